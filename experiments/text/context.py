"""What the stages of the text study share: tokens on the device, models, training, evaluation."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..analysis.evaluate import score
from ..harness.environment import commit
from ..harness.loggers import Curve, EarlyStopping, curve
from ..harness.parallel import Group, blocks_of, spread
from ..harness.rundir import Row, RunDirectory
from ..harness.train import Hook, every, learning_rate, train
from .data import Corpus, Tokens, by_length, tokenized
from .models import load_classifier, load_tokenizer, rate_of
from .settings import TextSettings

WARMUP = 0.06  # share of the steps over which the learning rate rises
EVALUATED = 4  # a batch of an evaluation is so many times one of training


@dataclass(frozen=True)
class TextContext:
    """The data to fine-tune with, and the run that takes down what comes of it.

    Attributes:
        tokens: the splits "train", "validation" and "test", on the device.
        dtype: of products inside autocast; None without it.
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
        # All take the same number of turns: a sharded model is gathered by all together.
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

    def fine_tune(
        self, model: nn.Module, trained: list[nn.Parameter], method: str, seed: int
    ) -> Row:
        """Train to the best accuracy on the validation rows; return what a row says of it.

        The model may be sharded by this; the parameters have the values of the best evaluation.
        """
        settings, batches = self.settings, TextBatches(self, seed)
        training = settings.finetuning
        spread_out = spread(model, settings.place.parallel, self.group, blocks_of(model))
        trained = [p for p in model.parameters() if p.requires_grad]
        on_gpu = self.device.type == "cuda"
        optimizer = torch.optim.AdamW(
            trained,
            lr=rate_of(settings, method),
            weight_decay=training.weight_decay,
            fused=on_gpu,
        )
        clock, watched = _Clock(self.device), Curve()

        def figure(_: nn.Module) -> float:
            with clock.stopped():
                value = self.accuracy(model, "validation")
            watched(len(watched.steps) + 1, {"validation": value})
            return value

        patience = training.patience or len(batches) + 1
        early = EarlyStopping(figure, trained, patience)
        hooks: list[Hook] = [every(max(1, batches.steps_of_epoch // training.evaluations), early)]
        if training.schedule == "linear":
            rates = linear(rate_of(settings, method), len(batches) // training.accumulate)
            hooks.insert(0, learning_rate(optimizer, rates))
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)
        clock.start()
        # Dropout draws from the global generators, and each process must drop something else.
        with torch.random.fork_rng([self.device] if on_gpu else []):
            torch.manual_seed(seed * self.group.size + self.group.rank)
            losses = train(
                spread_out,
                batches,
                cross_entropy,
                optimizer,
                label=f"{method} {seed}",
                hooks=hooks,
                accumulate=training.accumulate,
                autocast=self.dtype,
            )
        seconds = clock.stop()
        # Each process saw its share of a batch, so weighed that the mean is that of the batch.
        losses = self.group.total(losses.to(self.device)).cpu() / self.group.size
        if not early.best:  # fewer steps than an evaluation waits for
            early(len(losses), model)
        early.restore()
        peak = torch.cuda.max_memory_allocated(self.device) if on_gpu else None
        return {
            "trainable": sum(p.numel() for p in trained),
            "steps": len(losses),
            "best_step": early.best,
            "validation_accuracy": early.highest,
            "validation_curve": watched.values["validation"],
            "seconds": seconds,
            "peak_bytes": peak,
            **curve(losses),
        }

    def record(self, stage: str, method: str, seed: int, **more: Any) -> None:
        """Add a row; of several processes the first writes it."""
        if self.group.first:
            row = {"stage": stage, "method": method, "seed": seed, "commit": self.commit}
            self.run.record({**row, **more})

    def scored(self, model: nn.Module, split: str) -> Row:
        """Return what a row says of a split: accuracy, loss, confusion."""
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
    """Return the dtype of products, None where they have that of the weights."""
    auto = settings.finetuning.precision == "auto" and device.type == "cuda"
    return torch.bfloat16 if auto or settings.finetuning.precision == "bf16" else None


class TextBatches:
    """All batches of a fine-tuning, of this process: (ids, mask, labels, weight) each.

    A batch is given out in `accumulate` parts; one too small for so many is left out. `weight`
    multiplies a part's mean, so that the mean over processes of what `train` makes of the parts,
    which it weighs by their rows here, is the mean over the rows of the batch everywhere.
    """

    def __init__(self, context: TextContext, seed: int) -> None:
        settings = context.settings.finetuning
        self.context, self.parts = context, settings.accumulate
        generator = torch.Generator().manual_seed(seed)
        lengths = context.tokens["train"].lengths
        epochs = []
        for _ in range(settings.epochs):
            order = torch.randperm(len(lengths), generator=generator)
            if settings.by_length:
                batches = by_length(lengths, order, settings.batch, generator)
            else:
                batches = list(order.split(settings.batch))
            epochs.append([rows for rows in batches if len(rows) >= self.parts])
        self.steps_of_epoch = len(epochs[0])
        self.rows = [rows for batches in epochs for rows in batches]

    def __len__(self) -> int:
        return len(self.rows) * self.parts

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        tokens, group = self.context.tokens["train"], self.context.group
        for rows in self.rows:
            shares = [group.share(part) for part in rows.tensor_split(self.parts)]
            weight = group.size * sum(len(mine) for mine, _ in shares) / len(rows)
            for mine, counts in shares:
                batch = tokens.batch(mine)
                factor = weight if counts else 0.0
                yield (*batch, torch.full((), factor, device=batch[0].device))


def cross_entropy(
    model: nn.Module, ids: Tensor, mask: Tensor, labels: Tensor, weight: Tensor
) -> Tensor:
    """Return the weighed mean cross-entropy of a classifier's logits, in nats."""
    logits = model(input_ids=ids, attention_mask=mask).logits
    return F.cross_entropy(logits.float(), labels) * weight


def linear(peak: float, steps: int) -> Callable[[int], float]:
    """Return a schedule: up to `peak` in a line over the first steps, then down to zero in one.

    >>> [round(linear(1.0, 50)(step), 3) for step in (1, 3, 4, 27, 50)]
    [0.333, 1.0, 1.0, 0.511, 0.021]
    """
    warmup = max(1, round(WARMUP * steps))

    def of(step: int) -> float:
        if step <= warmup:
            return peak * step / warmup
        return peak * (steps - step + 1) / max(1, steps - warmup)

    return of


class _Clock:
    """Seconds of training, without the evaluations in between."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds, self.began = device, 0.0, 0.0

    def start(self) -> None:
        self._wait()
        self.began = time.perf_counter()

    def stop(self) -> float:
        self._wait()
        self.seconds += time.perf_counter() - self.began
        return self.seconds

    def stopped(self) -> "_Stopped":
        return _Stopped(self)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class _Stopped:
    def __init__(self, clock: _Clock) -> None:
        self.clock = clock

    def __enter__(self) -> None:
        self.clock.stop()

    def __exit__(self, *exception: object) -> None:
        self.clock.start()
