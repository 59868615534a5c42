"""What adapters did to a model: answers that changed, layers that mattered, directions that moved.

For any model with adapters, any loader of (inputs, labels) and any list of classes; nothing here
knows of digits. `Answers` are gathered with everything off and on, and the rest is counted from
them. All leave the model as it was.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor, nn

import paramlora as pl

from ..harness.settings import StudyError
from .task_metrics import area, front

Value = TypeVar("Value")
Loader = Iterable[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Answers:
    """A model's logits of a data set, (n, classes), and the labels, int64 (n,), on the CPU."""

    logits: Tensor
    labels: Tensor

    @cached_property
    def given(self) -> Tensor:
        """The answers, int64 (n,)."""
        return self.logits.argmax(1)

    @property
    def right(self) -> Tensor:
        """Which answers are right, bool (n,)."""
        return self.given == self.labels

    @property
    def confusion(self) -> list[list[int]]:
        """How many examples of each class (row) got each answer (column)."""
        classes = self.logits.shape[1]
        pairs = torch.bincount(self.labels * classes + self.given, minlength=classes**2)
        return pairs.view(classes, classes).tolist()


@torch.no_grad()
def answers_of(model: nn.Module, loader: Loader) -> Answers:
    """Return the model's answers, in evaluation mode, its mode given back.

    Args:
        model: as it is: with whatever adapters are on.
        loader: batches of inputs and labels, moved to the device of the model's first parameter.
    """
    device, modes = next(model.parameters()).device, [m.training for m in model.modules()]
    model.eval()
    try:
        parts = [(model(x.to(device)).float().cpu(), y.cpu()) for x, y in loader]
    finally:
        for module, mode in zip(model.modules(), modes, strict=True):
            module.training = mode
    return Answers(torch.cat([z for z, _ in parts]), torch.cat([y for _, y in parts]))


def off_and_on(model: nn.Module, loader: Loader, *names: str) -> tuple[Answers, Answers]:
    """Return the answers with all adapters off, and with the named ones on (none: as they are).

    Raises:
        StudyError: nothing is attached, so that off is on.
    """
    if not pl.summary(model).sites:
        raise StudyError("the model has no adapter: attach one, or load it, first")
    with pl.disabled(model):
        off = answers_of(model, loader)
    if not names:
        return off, answers_of(model, loader)
    with pl.using(model, *names):
        return off, answers_of(model, loader)


@dataclass(frozen=True)
class Ledger:
    """Which examples changed sides: rows of the data set, by class of their label.

    `won`: wrong before and right after; `lost`: right before and wrong after.
    """

    won: dict[int, list[int]]
    lost: dict[int, list[int]]

    def counts(self) -> list[tuple[int, int, int]]:
        """Return (class, won, lost) for each class."""
        return [(label, len(self.won[label]), len(self.lost[label])) for label in self.won]


def ledger(before: Answers, after: Answers) -> Ledger:
    """Return which examples went from wrong to right and from right to wrong.

    >>> one = Answers(torch.eye(2)[[0, 0, 1]], torch.tensor([0, 1, 1]))
    >>> two = Answers(torch.eye(2)[[1, 1, 1]], torch.tensor([0, 1, 1]))
    >>> ledger(one, two)
    Ledger(won={0: [], 1: [1]}, lost={0: [0], 1: []})
    """
    classes = range(before.logits.shape[1])

    def of(changed: Tensor) -> dict[int, list[int]]:
        return {
            label: (changed & (before.labels == label)).nonzero().flatten().tolist()
            for label in classes
        }

    return Ledger(of(~before.right & after.right), of(before.right & ~after.right))


def confusion_change(before: Answers, after: Answers) -> list[list[int]]:
    """Return the confusion matrix after less the one before."""
    pairs = zip(before.confusion, after.confusion, strict=True)
    return [[a - b for b, a in zip(one, two, strict=True)] for one, two in pairs]


def strength_curve(
    model: nn.Module, loader: Loader, strengths: Sequence[float], *names: str
) -> list[tuple[float, Answers]]:
    """Return the answers at each strength λ of the adapters, all where none is named."""
    batches, names = list(loader), names or names_of(model)
    found = []
    for strength in strengths:
        with pl.using(model, **dict.fromkeys(names, float(strength))):
            found.append((float(strength), answers_of(model, batches)))
    return found


@dataclass(frozen=True)
class Front:
    """What a strength buys: a point (learned, kept) a strength, fractions, their front and area.

    `area` is what the front dominates above (base's accuracy on new, 0): 0 for nothing learned.
    """

    points: list[tuple[float, float]]
    front: list[tuple[float, float]]
    area: float


def learning_and_forgetting(curve: Sequence[tuple[float, Answers]], tuned: Sequence[int]) -> Front:
    """Return accuracy on the tuned classes against that on the others, over the strengths.

    As "LoRA Learns Less and Forgets Less" plots them (Biderman et al. 2024, arXiv 2405.09673).
    """
    points: list[tuple[float, float]] = []
    for _, answers in curve:
        new, right = torch.isin(answers.labels, torch.tensor(list(tuned))), answers.right.float()
        points.append((float(right[new].mean()), float(right[~new].mean())))
    base = min(zip(curve, points, strict=True), key=lambda entry: abs(entry[0][0]))[1]
    return Front(points, front(points), area(points, (base[0], 0.0)))


def sites_of(model: nn.Module, *names: str) -> list[str]:
    """Return the paths of the adapted tensors, in order; of the named adapters, all if none."""
    chosen = names or names_of(model)
    rows = pl.summary(model).sites
    return list(dict.fromkeys(row.site for row in rows if row.adapter in chosen))


@contextmanager
def only_at(
    model: nn.Module, sites: Sequence[str], *names: str, strength: float | None = None
) -> Iterator[None]:
    """Inside, adapters are on at these sites alone; afterwards all is as it was.

    A site is switched by the module that has it: of one with several adapted tensors all are.

    Args:
        model: with adapters.
        sites: the paths of the tensors, `sites_of`.
        names: the adapters, all where none is named.
        strength: λ inside, by default what each has.
    """
    chosen = names or names_of(model)
    with ExitStack() as switched:
        switched.enter_context(pl.using(model))
        for path in dict.fromkeys(site.rpartition(".")[0] for site in sites):
            module = model.get_submodule(path)
            its = {row.adapter for row in pl.summary(module).sites}
            here = [name for name in chosen if name in its]
            if strength is None:
                switched.enter_context(pl.using(module, *here))
            else:
                switched.enter_context(pl.using(module, **dict.fromkeys(here, strength)))
        yield


def attribution(
    model: nn.Module, value: Callable[[nn.Module], Value], *names: str, most: int = 10
) -> dict[frozenset[str], Value]:
    """Return `value(model)` with the adapters on at each of the 2ⁿ sets of sites.

    Args:
        model: with adapters.
        value: such as accuracy on some classes, or several figures at once.
        names: the adapters, all where none is named.
        most: sites; beyond, there are too many combinations.

    Raises:
        StudyError: more sites than that.
    """
    sites = sites_of(model, *names)
    if len(sites) > most:
        raise StudyError(
            f"{len(sites)} sites have 2^{len(sites)} combinations; raise most= or adapt fewer"
        )
    found = {}
    for size in range(len(sites) + 1):
        for chosen in itertools.combinations(sites, size):
            with only_at(model, chosen, *names):
                found[frozenset(chosen)] = value(model)
    return found


def shapley(values: Mapping[frozenset[str], float]) -> dict[str, float]:
    """Return each site's Shapley value: its mean contribution over all orders of switching on.

        φ_i = Σ_S |S|! (n - |S| - 1)! / n! · (v(S ∪ i) - v(S)), over sets S without i

    They add up to v(all) - v(none). Source: Shapley 1953, "A value for n-person games".

    >>> both = frozenset({"a", "b"})
    >>> shapley({frozenset(): 0.0, frozenset({"a"}): 1.0, frozenset({"b"}): 0.0, both: 3.0})
    {'a': 2.0, 'b': 1.0}
    """
    players = sorted(frozenset().union(*values))
    n = len(players)
    found = {}
    for player in players:
        total = 0.0
        for others, value in values.items():
            if player not in others:
                weight = math.factorial(len(others)) * math.factorial(n - len(others) - 1)
                total += weight / math.factorial(n) * (values[others | {player}] - value)
        found[player] = total
    return found


def names_of(model: nn.Module) -> tuple[str, ...]:
    """Return the names of a model's adapters, in order."""
    return tuple(dict.fromkeys(row.adapter for row in pl.summary(model).sites))
