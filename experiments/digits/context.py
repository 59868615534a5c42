"""The context that the stages of the digit study share: data, base, training and evaluation."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import paramlora as pl

from ..analysis.evaluate import logits_of, score
from ..harness.batches import Batches, seeded_order
from ..harness.loggers import Curve, Log, TensorBoardLog, logging
from ..harness.rundir import Row, RunDirectory
from ..harness.train import Hook, Objective, cpu_threads, cross_entropy, every, train
from .bases import Base, order_after_base, restore
from .settings import DigitSettings


@dataclass(frozen=True)
class StudyContext:
    """A base, the data to fine-tune and evaluate it with, and the run that records the results.

    `inputs` and `test_inputs` are float32 (n, 784). The labels are int64 (n,). `base_logits` are
    the base's logits of the test images, (n, 10). All are on the same device.
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
    # The validation images, None by default. Fine-tuning does not use them. With `selection`,
    # pre-training does not use them either.
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

    def batches(self, generator: torch.Generator, joint: bool = False) -> Batches:
        """Return the batches of a fine-tuning.

        Draw the batches before anything else from `generator`, so that all methods with the same
        adapter seed get the same images in the same order.

        Args:
            generator: the generator of the adapter seed.
            joint: draw from the images of all digits, instead of those of the tuned digits.
        """
        settings, rows = self.settings, self.tuned_rows
        if joint:
            rows = torch.arange(len(self.labels), device=self.labels.device)
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
        lr: float | None = None,
    ) -> Tensor:
        """Train with cross-entropy and Adam; return the loss of each step, float32 (steps,).

        The learning rate is that of the settings unless `lr` is given.
        """
        rate = self.settings.finetuning.lr if lr is None else lr
        optimizer = torch.optim.Adam(parameters, rate, fused=True)
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
        """Train with the number of threads in the settings; return the losses, float32 (steps,)."""
        with cpu_threads(self.settings.place.threads):
            return train(model, batches, objective, optimizer, label=label, hooks=hooks)

    @contextmanager
    def watched(self, name: str) -> Iterator[tuple[list[Hook], Row]]:
        """Yield hooks that record and log accuracies during training, and the row they fill.

        If neither `look` nor `tensorboard` is set, there are no hooks and the row stays empty. The
        row is filled at the end of the `with` block.
        """
        settings, hooks, row = self.settings, list[Hook](), Row()
        curve = Curve()
        logs: list[Log] = [curve]

        def look(step: int, model: nn.Module, loss: Tensor) -> None:
            accuracies = self._accuracies(model)
            for log in logs:
                log(step, accuracies)

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

    def _accuracies(self, model: nn.Module) -> dict[str, float]:
        """Return the accuracies on the test images of tuned and of other digits, fractions."""
        scored = score(self.evaluate(model), self.test_labels, self.tuned)
        return {"tuned": scored["tuned_accuracy"], "other": scored["other_accuracy"]}

    def validated(self, model: nn.Module) -> float:
        """Return the model's accuracy on the validation images, a fraction."""
        assert self.held_inputs is not None
        assert self.held_labels is not None
        right = logits_of(model, self.held_inputs).argmax(1) == self.held_labels
        return float(right.float().mean())

    def evaluate(self, model: nn.Module) -> Tensor:
        """Return the model's logits of the test images, (n, 10)."""
        return logits_of(model, self.test_inputs)

    def compare_to_base(self, model: nn.Module, logits: Tensor) -> Row:
        """Return whether the base weights and these logits are bit-for-bit those of the base."""
        return {
            "same_fingerprint": pl.fingerprint(model) == self.base_fingerprint,
            "same_logits": torch.equal(logits, self.base_logits),
        }

    def record(
        self, stage: str, method: str, seed: int | None, logits: Tensor, **more: Any
    ) -> None:
        """Record the row of an evaluation, with the scores of its logits, (n, 10)."""
        row = {
            "stage": stage,
            "method": method,
            "base_seed": self.settings.seed,
            "seed": seed,
            "tuned": self.tuned,
            "commit": self.commit,
        }
        self.run.record({**row, **score(logits, self.test_labels, self.tuned), **more})
