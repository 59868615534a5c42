"""Loggers of figures during training, in memory or for TensorBoard, and rows as CSV.

A logger belongs to one training. Call it with the step and the figures' values by name.
"""

import csv
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .rundir import Row
from .settings import StudyError
from .train import Hook

CURVE = 200  # the most points of a stored loss curve; each is the mean over equally many steps
Log = Callable[[int, Mapping[str, float]], None]


class Curve:
    """A logger that keeps figures in memory, as `steps` and as `values` by name.

    >>> curve = Curve()
    >>> curve(10, {"old": 0.9, "new": 0.5})
    >>> curve.steps, curve.values
    ([10], {'old': [0.9], 'new': [0.5]})
    """

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.values: dict[str, list[float]] = {}

    def __call__(self, step: int, values: Mapping[str, float]) -> None:
        self.steps.append(step)
        for name, value in values.items():
            self.values.setdefault(name, []).append(float(value))


class TensorBoardLog(AbstractContextManager):
    """A logger that writes files for `tensorboard --logdir`, with one curve per figure.

    Use it in a `with` statement, which flushes and closes the files at its end.

    Raises:
        StudyError: tensorboard is not installed.
    """

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise StudyError(
                f"cannot write TensorBoard files ({error}): pip install tensorboard"
            ) from None
        self.writer = SummaryWriter(str(folder))

    def __call__(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def __exit__(self, *exception: object) -> None:
        self.writer.close()


def logging(log: Log, evaluate: Callable[[nn.Module], Mapping[str, float]] | None = None) -> Hook:
    """Return a hook of `train` that logs the step's loss and the figures of `evaluate(model)`."""

    def hook(step: int, model: nn.Module, loss: Tensor) -> None:
        log(step, {"loss": float(loss), **(evaluate(model) if evaluate is not None else {})})

    return hook


class EarlyStopping:
    """A hook that ends the training when a validation figure has stopped improving.

    The hook copies the parameters at each new best figure. Call `restore` after the training to get
    the best parameters back; `best` is the step at which the figure was highest. Wrap the hook in
    `every(n, …)` to evaluate the figure every n steps.

    Source: Prechelt 1998, "Early Stopping - But When?".

    Args:
        figure: maps the model to a number, such as the accuracy on validation images. Higher is
            better.
        parameters: the trained parameters, which are copied and restored.
        patience: the training ends after this many calls in a row without a new best figure.
    """

    def __init__(
        self,
        figure: Callable[[nn.Module], float],
        parameters: Iterable[Tensor],
        patience: int,
    ) -> None:
        self.figure, self.parameters, self.patience = figure, list(parameters), patience
        self.best, self.highest, self.waited = 0, -float("inf"), 0
        self.kept = [parameter.detach().clone() for parameter in self.parameters]

    def __call__(self, step: int, model: nn.Module, loss: Tensor | None = None) -> bool:
        value = self.figure(model)
        if value > self.highest:
            self.highest, self.best, self.waited = value, step, 0
            self.kept = [parameter.detach().clone() for parameter in self.parameters]
        else:
            self.waited += 1
        return self.waited >= self.patience

    @torch.no_grad()
    def restore(self) -> None:
        """Set the parameters to their values at the best call."""
        for parameter, kept in zip(self.parameters, self.kept, strict=True):
            parameter.copy_(kept)


def curve(losses: Tensor) -> Row:
    """Return the mean training loss and the loss curve, in nats, for a row.

    The curve has at most CURVE points. Each point is the mean over `train_curve_every` steps.

    Args:
        losses: the loss of each step, float32 (steps,).
    """
    every = -(-len(losses) // CURVE)
    means = [round(float(part.mean()), 6) for part in losses.split(every)]
    return {"train_loss": float(losses.mean()), "train_curve": means, "train_curve_every": every}


def rows_to_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows as CSV text with one column per key, without lists and mappings."""
    plain = [
        {k: v for k, v in row.items() if not isinstance(v, list | tuple | dict)} for row in rows
    ]
    names = list(dict.fromkeys(name for row in plain for name in row))
    lines = [_line(names), *(_line([row.get(name, "") for name in names]) for row in plain)]
    return "".join(lines)


def _line(cells: Iterable[Any]) -> str:
    text = StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue()
