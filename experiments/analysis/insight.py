"""The effect of adapters on a classifier's predictions, by example, by strength and by layer.

The functions take a model with adapters and a loader of (inputs, labels), for any classes.
`predict` runs the model. The other functions compare its `Predictions` with adapters off, on, at
some strength, or at some sites only. All of them leave the model unchanged.
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
from .evaluate import confusion_counts
from .task_metrics import hypervolume, pareto_front

Value = TypeVar("Value")
Loader = Iterable[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Predictions:
    """A model's logits on a data set, (n, classes), and the labels, int64 (n,), on the CPU."""

    logits: Tensor
    labels: Tensor

    @cached_property
    def predicted(self) -> Tensor:
        """The predicted classes, int64 (n,)."""
        return self.logits.argmax(1)

    @property
    def correct(self) -> Tensor:
        """Which predictions are correct, bool (n,)."""
        return self.predicted == self.labels

    @property
    def confusion(self) -> list[list[int]]:
        """The number of examples of each class (row) that got each prediction (column)."""
        classes = self.logits.shape[1]
        return confusion_counts(self.predicted[None], self.labels, classes)[0].tolist()

    def accuracies(self, tuned: Sequence[int]) -> dict[str, float]:
        """Return the accuracy on the `tuned` classes and on all "other" ones, as fractions."""
        correct, is_tuned = self.correct.float(), torch.isin(self.labels, torch.tensor(list(tuned)))
        halves = {"tuned": is_tuned, "other": ~is_tuned}
        return {name: float(correct[half].mean()) for name, half in halves.items()}


@torch.no_grad()
def predict(model: nn.Module, loader: Loader) -> Predictions:
    """Return the model's predictions in evaluation mode, with its adapters as they are.

    Afterwards each module is in the mode (training or evaluation) that it was in before.

    Args:
        model: with any adapters; the active ones stay active.
        loader: batches of inputs and labels. Inputs are moved to the device of the model's first
            parameter.
    """
    device, modes = next(model.parameters()).device, [m.training for m in model.modules()]
    model.eval()
    try:
        batches = [(model(x.to(device)).float().cpu(), y.cpu()) for x, y in loader]
    finally:
        for module, mode in zip(model.modules(), modes, strict=True):
            module.training = mode
    return Predictions(torch.cat([z for z, _ in batches]), torch.cat([y for _, y in batches]))


def predict_off_and_on(
    model: nn.Module, loader: Loader, *names: str
) -> tuple[Predictions, Predictions]:
    """Return the predictions with all adapters off, and those with the named adapters on.

    Without names, "on" is the model as it is.

    Raises:
        StudyError: the model has no adapter.
    """
    if not pl.summary(model).sites:
        raise StudyError("the model has no adapter: attach one, or load it, first")
    with pl.disabled(model):
        off = predict(model, loader)
    if not names:
        return off, predict(model, loader)
    with pl.using(model, *names):
        return off, predict(model, loader)


@dataclass(frozen=True)
class Flips:
    """The examples whose prediction became correct or wrong, as rows of the data set by class.

    `positive`: wrong before and correct after. `negative`: correct before and wrong after. The
    terms are those of Yan et al. 2021, "Positive-Congruent Training", arXiv 2011.09161.
    """

    positive: dict[int, list[int]]
    negative: dict[int, list[int]]

    def counts(self) -> list[tuple[int, int, int]]:
        """Return (class, positive flips, negative flips) for each class."""
        return [(c, len(self.positive[c]), len(self.negative[c])) for c in self.positive]


def flips(before: Predictions, after: Predictions) -> Flips:
    """Return the examples that went from wrong to correct and from correct to wrong.

    >>> one = Predictions(torch.eye(2)[[0, 0, 1]], torch.tensor([0, 1, 1]))
    >>> two = Predictions(torch.eye(2)[[1, 1, 1]], torch.tensor([0, 1, 1]))
    >>> flips(one, two)
    Flips(positive={0: [], 1: [1]}, negative={0: [0], 1: []})
    """
    classes = range(before.logits.shape[1])

    def rows_by_class(flipped: Tensor) -> dict[int, list[int]]:
        return {
            label: (flipped & (before.labels == label)).nonzero().flatten().tolist()
            for label in classes
        }

    return Flips(
        rows_by_class(~before.correct & after.correct),
        rows_by_class(before.correct & ~after.correct),
    )


def strength_curve(
    model: nn.Module, loader: Loader, strengths: Sequence[float], *names: str
) -> list[tuple[float, Predictions]]:
    """Return the predictions at each strength λ of the named adapters (default: all adapters)."""
    batches, names = list(loader), names or names_of(model)
    curve = []
    for strength in strengths:
        with pl.using(model, **dict.fromkeys(names, float(strength))):
            curve.append((float(strength), predict(model, batches)))
    return curve


@dataclass(frozen=True)
class TradeOff:
    """Learning against forgetting over the strengths.

    `points`: (tuned accuracy, other accuracy) at each of the `strengths`, as fractions. `front`:
    the points that no other point beats on both axes. `area`: the hypervolume of the front above
    (the base's tuned accuracy, 0). It is 0 if nothing was learned.
    """

    strengths: list[float]
    points: list[tuple[float, float]]
    front: list[tuple[float, float]]
    area: float


def trade_off(curve: Sequence[tuple[float, Predictions]], tuned: Sequence[int]) -> TradeOff:
    """Return accuracy on the tuned classes against accuracy on the others, over the strengths.

    The base is the point whose strength is nearest to 0. The plot is that of Biderman et al. 2024,
    "LoRA Learns Less and Forgets Less", arXiv 2405.09673.
    """
    strengths, points = [strength for strength, _ in curve], []
    for _, predictions in curve:
        accuracies = predictions.accuracies(tuned)
        points.append((accuracies["tuned"], accuracies["other"]))
    _, base = min(zip(map(abs, strengths), points, strict=True))
    return TradeOff(strengths, points, pareto_front(points), hypervolume(points, (base[0], 0.0)))


def names_of(model: nn.Module) -> tuple[str, ...]:
    """Return the names of a model's adapters, in order of attachment."""
    return tuple(dict.fromkeys(row.adapter for row in pl.summary(model).sites))


def sites_of(model: nn.Module, *names: str) -> list[str]:
    """Return the paths of the tensors that the named adapters (default: all) adapt, in order."""
    chosen = names or names_of(model)
    rows = pl.summary(model).sites
    return list(dict.fromkeys(row.site for row in rows if row.adapter in chosen))


@contextmanager
def only_at(
    model: nn.Module, sites: Sequence[str], *names: str, strength: float | None = None
) -> Iterator[None]:
    """Activate adapters at these sites only, inside the block.

    Sites are switched by the module that owns them. If a module has several adapted tensors, all
    of them are switched together.

    Args:
        model: with adapters.
        sites: paths of the tensors, as `sites_of` returns them.
        names: the adapters (default: all).
        strength: λ inside the block (default: each adapter's own strength).
    """
    chosen = names or names_of(model)
    with ExitStack() as blocks:
        # `using` acts on all adapted tensors of the module that it is given. The first block
        # switches the whole model off. One block per chosen module then switches that module on
        # again. Example: for sites ["fc2.weight"] the blocks are using(model), which leaves fc1
        # and fc2 off, and using(model.fc2, "a"). ExitStack leaves them in reverse order.
        blocks.enter_context(pl.using(model))
        for path in dict.fromkeys(site.rpartition(".")[0] for site in sites):
            module = model.get_submodule(path)
            here = names_of(module)
            attached = [name for name in chosen if name in here]  # others make `using` raise
            if strength is None:
                blocks.enter_context(pl.using(module, *attached))
            else:
                blocks.enter_context(pl.using(module, **dict.fromkeys(attached, strength)))
        yield


def attribution(
    model: nn.Module, value: Callable[[nn.Module], Value], *names: str, max_sites: int = 10
) -> dict[frozenset[str], Value]:
    """Return `value(model)` with the adapters active at each of the 2ⁿ subsets of the n sites.

    Args:
        model: with adapters.
        value: for example the accuracy on some classes, or several figures at once.
        names: the adapters (default: all).
        max_sites: largest n that is allowed.

    Raises:
        StudyError: there are more sites than `max_sites`.
    """
    sites = sites_of(model, *names)
    if len(sites) > max_sites:
        raise StudyError(
            f"{len(sites)} sites have 2^{len(sites)} subsets; raise max_sites= or adapt fewer"
        )
    values = {}
    for size in range(len(sites) + 1):
        for subset in itertools.combinations(sites, size):
            with only_at(model, subset, *names):
                values[frozenset(subset)] = value(model)
    return values


def shapley(values: Mapping[frozenset[str], float]) -> dict[str, float]:
    """Return each site's Shapley value: its mean contribution over all orders of switching on.

        φ_i = Σ_S |S|! (n - |S| - 1)! / n! · (v(S ∪ i) - v(S)), over subsets S without i

    The values add up to v(all sites) - v(no site). Source: Shapley 1953, "A value for n-person
    games".

    Args:
        values: v by subset, for all 2ⁿ subsets, as `attribution` returns them.

    Switching on "a" alone gains 1 in the example. Switched on after "b" it gains 3. Both orders
    count the same, so its value is 2.

    >>> both = frozenset({"a", "b"})
    >>> shapley({frozenset(): 0.0, frozenset({"a"}): 1.0, frozenset({"b"}): 0.0, both: 3.0})
    {'a': 2.0, 'b': 1.0}
    """
    sites = sorted(frozenset().union(*values))
    n = len(sites)
    result = {}
    for site in sites:
        total = 0.0
        for others, value in values.items():
            if site not in others:
                # Of the n! orders, |S|! (n - |S| - 1)! switch on exactly the sites S before this
                # one: any order of S, then the site, then any order of the rest.
                orders = math.factorial(len(others)) * math.factorial(n - len(others) - 1)
                total += orders / math.factorial(n) * (values[others | {site}] - value)
        result[site] = total
    return result
