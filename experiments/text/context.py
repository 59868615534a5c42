"""What the stages of the text study share: tokens on the device, models, training, evaluation."""

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

EVALUATED = 4  # the size of an evaluation batch, in training batches


@dataclass(frozen=True)
class TextContext:
    """What the stages of the study share: the data on the device, and the run that gets the rows.

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
        """Return a new classifier, its head drawn from the seed."""
        pad = self.tokenizer.pad_token_id
        labels = len(self.corpus.labels)
        return load_classifier(self.settings.model, labels, pad, seed).to(self.device)

    def logits(self, model: nn.Module, split: str) -> Tensor:
        """Return the logits of a split, float32 (n, labels), in evaluation mode.

        Shared out over the processes, batches of like length; the same rows make a batch every
        time, so that equal weights give equal bits.
        """
        tokens, group, training = self.tokens[split], self.group, model.training
        order = tokens.lengths.argsort(stable=True)
        batches = order.split(EVALUATED * self.settings.finetuning.batch)
        # All processes take the same number of turns, because they gather a sharded model together.
        turns = -(-len(batches) // group.size)
        found = torch.zeros(len(tokens), len(self.corpus.labels), device=self.device)
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
        answers = self.logits(model, split).argmax(1)
        return float((answers == self.tokens[split].labels).float().mean())

    def autocast(self) -> torch.autocast:
        on = self.dtype is not None
        return torch.autocast(self.device.type, dtype=self.dtype or torch.bfloat16, enabled=on)

    def record(self, stage: str, method: str, seed: int, **more: Any) -> None:
        """Record a row; with several processes, only the first writes it."""
        if self.group.first:
            row = {"stage": stage, "method": method, "seed": seed, "commit": self.commit}
            self.run.record({**row, **more})

    def scored(self, model: nn.Module, split: str) -> Row:
        """Return accuracy, loss and confusion on a split, as a row has them."""
        return score(self.logits(model, split), self.tokens[split].labels)


def prepare_context(
    settings: TextSettings,
    run: RunDirectory,
    corpus: Corpus,
    device: torch.device,
    group: Group,
) -> TextContext:
    """Tokenize the splits, or read them where a run did so before, and put them on the device."""
    tokenizer = load_tokenizer(settings.model)

    def kept(digest: str) -> Path:
        return Path(settings.place.tokens) / f"{digest}.safetensors"

    tokens = {
        split: tokenized(corpus, split, tokenizer, settings.dataset.max_length, kept).to(device)
        for split in corpus.splits
    }
    dtype = autocast_dtype(settings, device)
    return TextContext(settings, run, corpus, tokenizer, tokens, device, dtype, group)


def autocast_dtype(settings: TextSettings, device: torch.device) -> torch.dtype | None:
    """Return the dtype of autocast; None if products have the dtype of the weights."""
    auto = settings.finetuning.precision == "auto" and device.type == "cuda"
    return torch.bfloat16 if auto or settings.finetuning.precision == "bf16" else None
