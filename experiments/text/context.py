"""The context that all stages of the text study share: data, models, evaluation and rows."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..analysis.evaluate import score
from ..harness.environment import commit
from ..harness.parallel import Group
from ..harness.rundir import Row, RunDirectory
from .data import Corpus
from .models import load_classifier, load_tokenizer
from .settings import TextSettings
from .tokens import Tokens, tokenized

EVALUATION_FACTOR = 4  # an evaluation batch is this many times as large as a training batch


@dataclass(frozen=True)
class TextContext:
    """The data on the device, and the run that gets the rows. All stages of the study share it.

    Attributes:
        tokens: the splits "train", "validation" and "test", on the device.
        dtype: the dtype of autocast; None without autocast.
        group: the processes that train together.
    """

    settings: TextSettings
    run: RunDirectory
    corpus: Corpus
    tokenizer: Any
    tokens: dict[str, Tokens]
    device: torch.device
    dtype: torch.dtype | None
    group: Group
    commit: str | None = field(default_factory=commit)

    def model(self, seed: int) -> nn.Module:
        """Return a new classifier on the device. The seed determines its head."""
        pad = self.tokenizer.pad_token_id
        labels = len(self.corpus.labels)
        settings = self.settings
        model = load_classifier(settings.model, labels, pad, seed, settings.pooling)
        return model.to(self.device)

    def logits(self, model: nn.Module, split: str) -> Tensor:
        """Return the logits of a split, float32 (n, labels), in evaluation mode.

        Texts of similar length form a batch, and the processes share the batches. The batches are
        the same in every call, so equal weights give bit-for-bit equal logits.
        """
        tokens, group, training = self.tokens[split], self.group, model.training
        order = tokens.lengths.argsort(stable=True)
        batches = order.split(EVALUATION_FACTOR * self.settings.finetuning.batch)
        # Gathering a sharded model needs all processes, so each process runs the model `turns`
        # times. A process without a batch in the last turn repeats the last batch and drops it.
        turns = -(-len(batches) // group.size)
        found = torch.zeros(len(tokens), len(self.corpus.labels), device=self.device)  # (n, labels)
        model.eval()
        with torch.no_grad(), self.autocast():
            for turn in range(turns):
                number = turn * group.size + group.rank
                rows = batches[min(number, len(batches) - 1)]
                ids, mask, _ = tokens.batch(rows)
                logits = model(input_ids=ids, attention_mask=mask).logits.float()
                if number < len(batches):
                    found[rows.to(self.device)] = logits
        model.train(training)
        return group.total(found)

    def accuracy(self, model: nn.Module, split: str) -> float:
        """Return the accuracy on a split, from 0 to 1."""
        answers = self.logits(model, split).argmax(1)
        return float((answers == self.tokens[split].labels).float().mean())

    def autocast(self) -> torch.autocast:
        """Return autocast to the run's dtype; it is off if the dtype is None."""
        on = self.dtype is not None
        return torch.autocast(self.device.type, dtype=self.dtype or torch.bfloat16, enabled=on)

    def record(self, stage: str, method: str, seed: int, **more: Any) -> None:
        """Record a row. With several processes, only the first one writes it."""
        if self.group.first:
            row = {"stage": stage, "method": method, "seed": seed, "commit": self.commit}
            self.run.record({**row, **more})

    def scored(self, model: nn.Module, split: str) -> Row:
        """Return the accuracy, loss and confusion counts on a split, for a row."""
        return score(self.logits(model, split), self.tokens[split].labels)


def prepare_context(
    settings: TextSettings,
    run: RunDirectory,
    corpus: Corpus,
    device: torch.device,
    group: Group,
) -> TextContext:
    """Return the context of a run. Tokens of an earlier run are read from their files."""
    tokenizer = load_tokenizer(settings.model)

    def cache_path(digest: str) -> Path:
        return Path(settings.place.tokens) / f"{digest}.safetensors"

    tokens = {
        split: tokenized(corpus, split, tokenizer, settings.dataset.max_length, cache_path).to(
            device
        )
        for split in corpus.splits
    }
    dtype = autocast_dtype(settings, device)
    return TextContext(settings, run, corpus, tokenizer, tokens, device, dtype, group)


def autocast_dtype(settings: TextSettings, device: torch.device) -> torch.dtype | None:
    """Return the dtype of autocast, or None if products use the dtype of the weights."""
    auto = settings.finetuning.precision == "auto" and device.type == "cuda"
    return torch.bfloat16 if auto or settings.finetuning.precision == "bf16" else None
