"""What becomes of figures while a network trains: kept, written to CSV, shown by TensorBoard.

Each is made for one training and called with the step and the figures' values by name.
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

CURVE = 200  # points kept of a loss curve, each the mean of as many steps as that takes
Log = Callable[[int, Mapping[str, float]], None]


class Curve:
    """Keeps figures in memory: `steps`, and `values` by name, for a row or a figure.

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


class CsvLog:
    """Writes a line a step to a new CSV file: `step`, then the figures that the first call has."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.names: tuple[str, ...] = ()

    def __call__(self, step: int, values: Mapping[str, float]) -> None:
        if not self.names:
            self.names = tuple(values)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(_line(["step", *self.names]))
        with open(self.path, "a") as file:
            file.write(_line([step, *(values[name] for name in self.names)]))


class TensorBoardLog(AbstractContextManager):
    """Writes to a folder for `tensorboard --logdir`, each figure a curve over the steps.

    Used in a `with`, at whose end everything is in the files.

    Raises:
        StudyError: tensorboard is not installed.
    """

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise StudyError(
                f"TensorBoard's files cannot be written ({error}): pip install tensorboard"
            ) from None
        self.writer = SummaryWriter(str(folder))

    def __call__(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def __exit__(self, *exception: object) -> None:
        self.writer.close()


def logging(log: Log, evaluate: Callable[[nn.Module], Mapping[str, float]] | None = None) -> Hook:
    """Return a hook of `train` that logs the step's loss, and what `evaluate(model)` gives."""

    def hook(step: int, model: nn.Module, loss: Tensor) -> None:
        log(step, {"loss": float(loss), **(evaluate(model) if evaluate is not None else {})})

    return hook


class EarlyStopping:
    """A hook that ends the training when a figure has not risen for a while, and goes back.

    Source: Prechelt 1998, "Early Stopping - But When?".

    Args:
        figure: the model to a number, the higher the better, on a validation split.
        parameters: those that are trained; they are kept when the figure is at its best.
        patience: calls without a new best after which the training ends.

    Call `restore` after the training: the parameters are then those of the best call, and `best`
    says at which step that was. Put into `every(n, …)`, it looks every n steps.
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
        """Give the parameters the values that they had at the best call."""
        for parameter, kept in zip(self.parameters, self.kept, strict=True):
            parameter.copy_(kept)


def curve(losses: Tensor) -> Row:
    """Return the mean training loss and its curve, thinned to CURVE points or fewer, in nats."""
    every = -(-len(losses) // CURVE)
    means = [round(float(part.mean()), 6) for part in losses.split(every)]
    return {"train_loss": float(losses.mean()), "train_curve": means, "train_curve_every": every}


def rows_to_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows as CSV: their plain values, a column a name, lists and mappings left out."""
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
