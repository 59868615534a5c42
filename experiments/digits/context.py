"""What the stages of the digit study share: the data and the base on the device, and their use."""

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
