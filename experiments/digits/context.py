"""What the stages of the digit study share: the data and the base on the device, and their use."""

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import paramlora as pl

from ..analysis.confusion import wrong_counts
from ..analysis.evaluate import logits_of, score
from ..harness.environment import commit, resolve_device
from ..harness.loggers import Curve, Log, TensorBoardLog, logging
from ..harness.rundir import Row, RunDirectory
from ..harness.train import (
    Batches,
    Hook,
    Objective,
    cpu_threads,
    cross_entropy,
    every,
    seeded_order,
    train,
)
from .bases import Base, base_path, find, keep, order_after_base, pretrain, restore
from .data import Data, hold_out, load_data
from .settings import DigitSettings, chosen_digits
from .strengths import Strengths

ADAPTER = "digits"


@dataclass(frozen=True)
class StudyContext:
    """A base to fine-tune, the data to do it with, and the run that takes down what comes of it.

    `inputs` and `test_inputs` are float32 (n, 784), the labels int64 (n,), all on one device.
    """

    settings: DigitSettings
    run: RunDirectory
    base: Base
    inputs: Tensor
    labels: Tensor
    test_inputs: Tensor
    test_labels: Tensor
    base_logits: Tensor
    base_fingerprint: str
    tuned: list[int]
    commit: str | None
    # Images that neither fine-tuning nor, in a selection, pre-training sees; none by default.
    held_inputs: Tensor | None = None
    held_labels: Tensor | None = None

    @property
    def tuned_rows(self) -> Tensor:
        """The rows of the training images of the tuned digits, int64 (n,)."""
        digits = torch.tensor(self.tuned, device=self.labels.device)
        return torch.isin(self.labels, digits).nonzero().squeeze(1)

    def model(self) -> nn.Module:
        """Return a new copy of the base."""
        return restore(self.settings, self.base, self.inputs.device)

    def batches(self, generator: torch.Generator) -> Batches:
        """Return the batches of a fine-tuning. To be drawn first, so that methods share them."""
        settings, rows = self.settings, self.tuned_rows
        size = settings.remedies.tune_batch or settings.pretraining.batch
        count = settings.finetuning.steps * size
        if settings.finetuning.order == "blog":
            order = order_after_base(settings, len(self.labels), len(rows), count)
        else:
            order = seeded_order(len(rows), count, generator)
        return Batches((self.inputs, self.labels), rows[order.to(rows.device)], size)

    def fine_tune(
        self,
        model: nn.Module,
        batches: Batches,
        parameters: list[nn.Parameter],
        label: str,
        hooks: Sequence[Hook] = (),
    ) -> Tensor:
        """Train the parameters plainly by a new Adam, and return the loss of each step."""
        optimizer = torch.optim.Adam(parameters, self.settings.finetuning.lr, fused=True)
        return self.train(model, batches, cross_entropy, optimizer, label, hooks)

    def train(
        self,
        model: nn.Module,
        batches: Iterable[tuple[Tensor, ...]],
        objective: Objective,
        optimizer: torch.optim.Optimizer,
        label: str,
        hooks: Sequence[Hook] = (),
    ) -> Tensor:
        """Train on as many threads as the settings say, and return the loss of each step."""
        with cpu_threads(self.settings.place.threads):
            return train(model, batches, objective, optimizer, label=label, hooks=hooks)

    @contextmanager
    def watched(self, name: str) -> Iterator[tuple[list[Hook], Row]]:
        """Yield hooks that keep and log the accuracies of a training, and the row they fill.

        Without `look` and `tensorboard` there are no hooks, and the row stays empty.
        """
        settings, hooks, row = self.settings, list[Hook](), Row()
        curve = Curve()
        logs: list[Log] = [curve]

        def look(step: int, model: nn.Module, loss: Tensor) -> None:
            seen = self._halves(model)
            for log in logs:
                log(step, seen)

        with ExitStack() as files:
            if settings.extras.tensorboard:
                board = TensorBoardLog(self.run.folder / "tensorboard" / name)
                logs.append(files.enter_context(board))
                hooks.append(logging(board))
            if settings.extras.look:
                hooks.append(every(settings.extras.look, look))
            yield hooks, row
        if settings.extras.look:
            row["way"] = {"steps": curve.steps, **curve.values}

    def _halves(self, model: nn.Module) -> dict[str, float]:
        """Return the accuracy on tuned and on other digits' test images."""
        its = score(self.evaluate(model), self.test_labels, self.tuned)
        return {"tuned": its["tuned_accuracy"], "other": its["other_accuracy"]}

    def validated(self, model: nn.Module) -> float:
        """Return the model's accuracy on the validation images, a fraction."""
        assert self.held_inputs is not None
        assert self.held_labels is not None
        right = logits_of(model, self.held_inputs).argmax(1) == self.held_labels
        return float(right.float().mean())

    def evaluate(self, model: nn.Module) -> Tensor:
        """Return the model's logits of the test images, (n, 10)."""
        return logits_of(model, self.test_inputs)

    def beside_base(self, model: nn.Module, logits: Tensor) -> Row:
        """Return whether the model's base, and these logits, are bitwise those of the base."""
        return {
            "same_fingerprint": pl.fingerprint(model) == self.base_fingerprint,
            "same_logits": torch.equal(logits, self.base_logits),
        }

    def record(
        self, stage: str, method: str, seed: int | None, logits: Tensor, **more: Any
    ) -> None:
        """Add a row for the evaluation that gave these logits."""
        row = {
            "stage": stage,
            "method": method,
            "base_seed": self.settings.seed,
            "seed": seed,
            "tuned": self.tuned,
            "commit": self.commit,
        }
        self.run.record({**row, **score(logits, self.test_labels, self.tuned), **more})


def prepare(
    settings: DigitSettings,
    run: RunDirectory,
    device: torch.device,
    data: Data,
    say: Callable[[str], None],
) -> StudyContext:
    """Put the data on the device, find or train the base, and say which digits are tuned."""
    whole, test_split = data.train.to(device), data.test.to(device)
    train_split, held = whole, None
    if settings.holdout.validation:
        stay, out = held_out(whole.labels, settings)
        train_split, held = whole.rows(stay), whole.rows(out)
    if settings.holdout.selection and held is not None:
        whole, test_split = train_split, held
    norm = settings.network.mean, settings.network.std
    inputs, test_inputs = train_split.inputs(*norm), test_split.inputs(*norm)
    whole_inputs = inputs if whole is train_split else whole.inputs(*norm)
    base, how = obtain(settings, whole_inputs, whole.labels, data.digest)
    model = restore(settings, base, device)
    logits = logits_of(model, test_inputs)
    counts = wrong_counts(score(logits, test_split.labels, [0])["confusion"])
    context = StudyContext(
        settings=settings,
        run=run,
        base=base,
        inputs=inputs,
        labels=train_split.labels,
        test_inputs=test_inputs,
        test_labels=test_split.labels,
        base_logits=logits,
        base_fingerprint=pl.fingerprint(model),
        tuned=chosen_digits(settings.finetuning.digits, counts),
        commit=commit(),
        held_inputs=None if held is None else held.inputs(*norm),
        held_labels=None if held is None else held.labels,
    )
    say(f"base     {pl.summary(model).total:,} parameters, {how}")
    say(f"         wrong answers by digit: {', '.join(map(str, counts))}")
    images = len(context.tuned_rows)
    say(f"tuned    digits {', '.join(map(str, context.tuned))}: {images:,} training images")
    return context


def held_out(labels: Tensor, settings: DigitSettings) -> tuple[Tensor, Tensor]:
    """Return the rows of the training images that stay, and of the validation images."""
    return hold_out(labels, settings.holdout.validation, torch.Generator().manual_seed(0))


def obtain(
    settings: DigitSettings, inputs: Tensor, labels: Tensor, data_digest: str
) -> tuple[Base, str]:
    """Return the base, and in words how it was come by: the one that is kept, or a new one."""
    path = base_path(settings, labels.device, data_digest)
    if (kept := find(path)) is not None:
        return kept, f"trained before, from {path}"
    began = time.perf_counter()
    with cpu_threads(settings.place.threads):
        base = pretrain(settings, inputs, labels)
    keep(base, path)
    seconds = time.perf_counter() - began
    return base, f"trained for {settings.pretraining.base_steps:,} steps in {seconds:.1f} s"


def context_of(settings: DigitSettings) -> StudyContext:
    """Return the context of these settings; what it shares with others is made once a process."""
    context = shared_context(shared_settings(settings))
    confusion = score(context.base_logits, context.test_labels)["confusion"]
    tuned = chosen_digits(settings.finetuning.digits, wrong_counts(confusion))
    return dataclasses.replace(context, settings=settings, tuned=tuned)


def shared_settings(settings: DigitSettings) -> DigitSettings:
    """Return the settings that decide on data and base, all others as in preset blog."""
    return DigitSettings(
        seed=settings.seed,
        network=settings.network,
        pretraining=settings.pretraining,
        holdout=dataclasses.replace(settings.holdout, patience=0),
        dataset=settings.dataset,
        place=dataclasses.replace(settings.place, out=""),
    )


@lru_cache(maxsize=4)
def shared_context(settings: DigitSettings) -> StudyContext:
    """Return the context of shared settings, made once a process."""
    device = resolve_device(settings.place.device)
    data = shared_data(settings.dataset.data, settings.dataset.data_dir)
    return prepare(settings, RunDirectory(Path(), {}, {}, []), device, data, lambda line: None)


@lru_cache(maxsize=4)
def shared_strengths(settings: DigitSettings) -> Strengths:
    """Return the answers at any strength on the base of shared settings, made once a process."""
    context = shared_context(settings)
    return Strengths(context.model(), context.test_inputs, context.base_logits)


@lru_cache(maxsize=2)
def shared_data(kind: str, data_dir: str) -> Data:
    """Return the data set that `load_data` returns, read once a process."""
    return load_data(kind, data_dir)


def counted_images(settings: DigitSettings) -> Tensor:
    """Return the images that answers are counted on, uint8 (n, 28, 28), as they are to be shown."""
    data = shared_data(settings.dataset.data, settings.dataset.data_dir)
    if not settings.holdout.selection:
        return data.test.images
    _, held = held_out(data.train.labels, settings)
    return data.train.images[held]
