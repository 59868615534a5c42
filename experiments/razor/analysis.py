"""What the study asks of its rows: fits of forgetting to KL, and LoRA's excess over them.

    forgotten   the base's accuracy on garments less the tuned network's, in points
    curve       forgotten ≈ c₀ + c₁ KL + c₂ KL², by least squares over the checkpoints of one arm
                from one base, over all methods, rates and steps
    residual    forgotten less the curve of full fine-tuning from the same base
    excess      of an arm in a part of KL: its mean residual there, less full fine-tuning's own

A base is one observation: all checkpoints from it share its errors. Intervals are over bases.

Rule of exclusion, set before a look at the trainings that are reported: a training counts as
diverged if one of its values is not finite, or if its last checkpoint answers parity worse than its
base. None of its checkpoints counts. A checkpoint with KL above HIGHEST nats does not count either.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ..harness.rundir import Row, RunDirectory
from ..report.table import Sample
from .settings import Arm

HIGHEST = 10.0  # nats
REFERENCE = "full"
# The parts of KL, in nats, in which arms are compared.
PARTS = ((0.0, 0.05), (0.05, 0.15), (0.15, 0.4), (0.4, 1.0), (1.0, 3.0), (3.0, HIGHEST))
LEARNED = 0.94  # accuracy in parity at which forgetting is compared


@dataclass(frozen=True)
class Checkpoint:
    """The figures of one checkpoint. `forgotten` is in points, `sizes` are by layer."""

    arm: str
    method: str
    base: int
    rate: float
    step: int
    kl: float
    kl_fashion: float
    parity: float
    forgotten: float
    sizes: tuple[float, ...]


Rows = Sequence[Checkpoint]


class Found:
    """The checkpoints of a run that count, and the numbers of those that do not."""

    def __init__(self, run: RunDirectory, highest: float = HIGHEST) -> None:
        base = {row["base_seed"]: row for row in run.rows if row["stage"] == "base"}
        trainings = [row for row in run.rows if row["stage"] == "tuned"]
        self.base_rows, self.bases, self.highest = base, sorted(base), highest
        self.arms = list(dict.fromkeys(row["cell"] for row in trainings))
        self.methods = list(dict.fromkeys(row["method"] for row in trainings))
        self.rows, self.total, self.diverged, self.beyond = list[Checkpoint](), 0, 0, 0
        for row in trainings:
            own = base[row["base_seed"]]
            self.total += len(row["steps"])
            if diverged(row, own["parity"]):
                self.diverged += len(row["steps"])
                continue
            found = list(checkpoints(row, own["fashion"]))
            kept = [one for one in found if one.kl <= highest]
            self.beyond += len(found) - len(kept)
            self.rows += kept

    @property
    def adapters(self) -> list[str]:
        """The arms of adapters at all layers and without biases."""
        arms = [Arm.of(name) for name in self.arms]
        return [arm.name for arm in arms if arm.rank and not arm.biases and arm.layer is None]

    def of(self, arm: str, base: int, method: str | None = None) -> list[Checkpoint]:
        """Return the checkpoints of an arm from a base, by one method or by all."""
        return [row for row in self._groups.get((arm, base), []) if method in (None, row.method)]

    @cached_property
    def _groups(self) -> Mapping[tuple[str, int], list[Checkpoint]]:
        groups: dict[tuple[str, int], list[Checkpoint]] = {}
        for row in self.rows:
            groups.setdefault((row.arm, row.base), []).append(row)
        return groups

    def fits(self, arm: str, all_rates: bool = True) -> Sample:
        """Return R² of the arm's own curve, a value per base, with or without the largest rate."""
        top = max((row.rate for row in self.rows if row.arm == arm), default=0.0)
        groups = (self.of(arm, base) for base in self.bases)
        kept = ([row for row in rows if all_rates or row.rate < top] for rows in groups)
        return Sample(tuple(r_squared(kl_terms, rows) for rows in kept))

    def excess(self, arm: str, part: tuple[float, float], method: str | None = None) -> Sample:
        """Return the excess of an arm in a part of KL, a value per base that has both arms there.

        Args:
            arm: the arm.
            part: from and to, in nats.
            method: the only method whose checkpoints count, also for the curve (default: all).
        """
        found = (self._excess(arm, base, part, method) for base in self.bases)
        return Sample(tuple(value for value in found if value is not None))

    def _excess(
        self, arm: str, base: int, part: tuple[float, float], method: str | None
    ) -> float | None:
        theirs, ours = (self.of(name, base, method) for name in (REFERENCE, arm))
        curve, means = fitted(kl_terms, theirs), []
        for rows in (ours, theirs):
            inside = [row for row in rows if part[0] <= row.kl < part[1]]
            if not inside:
                return None
            means.append(float(np.mean([row.forgotten - curve(row) for row in inside])))
        return means[0] - means[1]

    def least_forgotten(self, arm: str, method: str) -> dict[int, float]:
        """Return the smallest forgetting at a parity accuracy of LEARNED or more, by base."""
        found = {}
        for base in self.bases:
            rows = [row.forgotten for row in self.of(arm, base, method) if row.parity >= LEARNED]
            if rows:
                found[base] = min(rows)
        return found

    def explained(
        self, terms: Sequence["Terms"], method: str | None = None
    ) -> tuple[Sample, Sample]:
        """Return R² and LoRA's offset of a regression over full and LoRA, a value per base.

        The offset is the coefficient of whether a checkpoint is of LoRA, in points, in a regression
        of forgetting on the terms and on it. R² is that of the terms alone.
        """
        shares, offsets = [], []
        for base in self.bases:
            arms = (REFERENCE, *self.adapters)
            rows = [row for arm in arms for row in self.of(arm, base, method)]

            def all_terms(row: Checkpoint) -> list[float]:
                return [1.0, *(value for term in terms for value in term(row))]

            shares.append(r_squared(all_terms, rows))
            more = [[*all_terms(row), float(row.arm != REFERENCE)] for row in rows]
            offsets.append(float(least_squares(more, [row.forgotten for row in rows])[-1]))
        return Sample(tuple(shares)), Sample(tuple(offsets))


Terms = Callable[[Checkpoint], Sequence[float]]


def checkpoints(row: Row, base_fashion: float) -> Iterator[Checkpoint]:
    """Yield the checkpoints in the row of a training."""
    names = ("steps", "kl", "kl_fashion", "parity", "fashion", "sizes")
    for step, kl, kl_fashion, parity, fashion, sizes in zip(
        *(row[name] for name in names), strict=True
    ):
        common = row["cell"], row["method"], row["base_seed"], row["rate"], step
        forgotten = 100 * (base_fashion - fashion)
        yield Checkpoint(*common, kl, kl_fashion, parity, forgotten, tuple(sizes))


def diverged(row: Row, base_parity: float) -> bool:
    """Return whether a training diverged, by the rule in this file's docstring."""
    return None in (*row["kl"], *row["kl_fashion"]) or row["parity"][-1] < base_parity


def kl_terms(row: Checkpoint) -> list[float]:
    """Return the terms of the curve: 1, KL and KL²."""
    return [1.0, row.kl, row.kl**2]


def by_kl(row: Checkpoint) -> list[float]:
    """Return terms of a regression, without the constant: KL and its square."""
    return [row.kl, row.kl**2]


def by_kl_fashion(row: Checkpoint) -> list[float]:
    """Return the same of KL on Fashion-MNIST."""
    return [row.kl_fashion, row.kl_fashion**2]


def by_rate(row: Checkpoint) -> list[float]:
    """Return the same of the logarithm of the learning rate."""
    return [float(np.log10(row.rate)), float(np.log10(row.rate)) ** 2]


def by_sizes(row: Checkpoint) -> list[float]:
    """Return the same of the relative size of each layer's update."""
    return [term for size in row.sizes for term in (size, size**2)]


def least_squares(terms: Iterable[Sequence[float]], values: Sequence[float]) -> np.ndarray:
    """Return the coefficients of the terms."""
    return np.linalg.lstsq(np.array(list(terms)), np.array(values), rcond=None)[0]


def fitted(terms: Terms, rows: Rows) -> Callable[[Checkpoint], float]:
    """Return the regression of forgetting on terms, as a function of a checkpoint."""
    coefficients = least_squares(map(terms, rows), [row.forgotten for row in rows])
    return lambda row: float(np.dot(terms(row), coefficients))


def r_squared(terms: Terms, rows: Rows) -> float:
    """Return the share of the variance of forgetting that its regression on terms explains."""
    curve, values = fitted(terms, rows), np.array([row.forgotten for row in rows])
    rest = values - np.array([curve(row) for row in rows])
    return float(1 - (rest**2).sum() / ((values - values.mean()) ** 2).sum())
