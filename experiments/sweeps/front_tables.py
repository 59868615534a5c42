"""What each method learns and keeps, by rate and at equal learning: the tables of a front.

All adapters of one base share its errors, so a base is one observation: a value is the mean over
the adapter seeds of a base. Tables and figure have means over bases. ± is the sd over bases, and an
interval is Student's 95 % interval of the mean over bases. Differences between methods are taken on
each base, between trainings with the same adapter seeds and images, before any mean.

At equal learning, y is interpolated linearly between the rates of a method, up to the rate with
which it learns most on that base. The base itself is the point (0, 0) of every method, at rate 0.
Bases differ in what there is to learn: a better base has less. So equal learning means the same
share of the most that full fine-tuning learns on that base.
"""

from collections.abc import Callable
from math import exp, log
from statistics import mean

from ..analysis.front import at, difference
from ..harness.rundir import Row, RunDirectory
from ..report.table import Sample, Table
from .select import SELECTION, TEST

SHARES = (0.25, 0.5, 0.75, 0.9)  # of the most that full fine-tuning learns on a base
REFERENCE = "full"
Points = dict[float, tuple[float, float]]  # (learned, kept) by learning rate, points


class Front:
    """The gains of each method at each learning rate and base, in points.

    Args:
        run: a run of `front.run_front`.
    """

    def __init__(self, run: RunDirectory) -> None:
        self.run = run
        self.bases = sorted({row["base_seed"] for row in self._rows(TEST)})
        self.arms = list(dict.fromkeys(row["varied"]["arm"] for row in self._rows(TEST)))
        self.seeds = len({r["seed"] for r in self._rows(TEST) if r["stage"] == "on"})
        self.points = self._points(TEST)

    def _rows(self, part: str) -> list[Row]:
        return [row for row in self.run.rows if row["varied"]["part"] == part]

    def _points(self, part: str) -> dict[tuple[str, int], Points]:
        """Return the gains on tuned and on other digits by method and base, means over seeds."""
        rows, sides = self._rows(part), ("tuned_accuracy", "other_accuracy")
        base = {row["base_seed"]: row for row in rows if row["stage"] == "base"}
        found: dict[tuple[str, int], dict[float, list[tuple[float, ...]]]] = {}
        for row in (row for row in rows if row["stage"] == "on"):
            below = base[row["base_seed"]]
            gains = tuple(100 * (row[side] - below[side]) for side in sides)
            of_arm = found.setdefault((row["varied"]["arm"], row["base_seed"]), {})
            of_arm.setdefault(row["varied"]["lr"], []).append(gains)
        return {
            key: {rate: tuple(map(mean, zip(*g, strict=True))) for rate, g in sorted(rates.items())}
            for key, rates in found.items()
        }

    def sample(self, arm: str, rate: float, side: int) -> Sample:
        """Return the gains of each base at a rate; side 0: tuned digits, 1: other digits."""
        return Sample(tuple(self.points[arm, base][rate][side] for base in self.bases))

    def rates(self, arm: str) -> list[float]:
        """Return the learning rates of a method, ascending."""
        return list(self.points[arm, self.bases[0]])

    def kept(self, arm: str, base: int, share: float) -> float | None:
        """Return the gain on the other digits at a share of what full learns at most, or None."""
        return at(self._front(arm, base), share * self.most(REFERENCE, base))

    def _front(self, arm: str, base: int) -> list[tuple[float, float]]:
        return [(0.0, 0.0), *self.points[arm, base].values()]

    def apart(self, arm: str, base: int, share: float) -> float | None:
        """Return the gain on the other digits less that of full fine-tuning, at equal learning."""
        ours, theirs = (self.kept(one, base, share) for one in (arm, REFERENCE))
        return None if ours is None or theirs is None else ours - theirs

    def ratio(self, arm: str, base: int, share: float) -> float | None:
        """Return the logarithm of what the method forgets / what full forgets, or None."""
        ours, theirs = (self.kept(one, base, share) for one in (arm, REFERENCE))
        if ours is None or theirs is None or ours >= 0 or theirs >= 0:
            return None
        return log(ours / theirs)

    def kept_table(self) -> Table:
        """Return the most that each method learns, and the other digits at equal learning."""
        found = self._by_level(self.kept, mean_sd, self.swept)
        lines = []
        for arm, *cells in found.rows:
            most = Sample(tuple(self.most(arm, base) for base in self.bases))
            lines.append([arm, mean_sd(most), *cells])
        return Table([found.head[0], "learns at most", *found.head[1:]], lines)

    def most(self, arm: str, base: int) -> float:
        """Return the largest gain on the tuned digits, over the rates."""
        return max(learned for learned, _ in self.points[arm, base].values())

    def learned(self, arm: str, rate: float) -> Sample:
        """Return the gain on the tuned digits in % of the most that full learns on the base."""
        shares = (100 * self.points[arm, b][rate][0] / self.most(REFERENCE, b) for b in self.bases)
        return Sample(tuple(shares))

    def difference_table(self) -> Table:
        """Return LoRA − full on the other digits at equal learning; last: over all of it."""
        found = self._by_level(self.apart, with_interval, self.loras)
        lines = []
        for arm, *cells in found.rows:
            over_all = [
                difference(self._front(arm, base), self._front(REFERENCE, base))
                for base in self.bases
            ]
            there = Sample(tuple(d for d in over_all if d is not None))
            lines.append([arm, *cells, with_interval(there)])
        return Table([*found.head, "mean over all"], lines)

    def ratio_table(self) -> Table:
        """Return how many times as much LoRA forgets as full, geometric means over the bases."""
        return self._by_level(self.ratio, times, self.loras)

    @property
    def swept(self) -> list[str]:
        """The methods without the joint ones."""
        return [arm for arm in self.arms if not arm.startswith("joint")]

    @property
    def loras(self) -> list[str]:
        """The methods that are compared with full fine-tuning."""
        return [arm for arm in self.swept if arm != REFERENCE]

    def _by_level(
        self,
        value: Callable[[str, int, float], float | None],
        shown: Callable[[Sample], str],
        arms: list[str],
    ) -> Table:
        lines = []
        for arm in arms:
            cells = []
            for share in SHARES:
                found = [value(arm, base, share) for base in self.bases]
                there = [v for v in found if v is not None]
                few = "" if len(there) == len(found) else f", n {len(there)}"
                cells.append(f"{shown(Sample(tuple(there)))}{few}" if there else "-")
            lines.append([arm, *cells])
        return Table(["method", *(f"{share:.0%}".replace("%", " %") for share in SHARES)], lines)

    def rate_table(self) -> Table:
        """Return the gains of each method at each rate."""
        lines = []
        for arm in self.arms:
            for rate in self.rates(arm):
                tuned, other = (self.sample(arm, rate, side) for side in (0, 1))
                cells = [mean_sd(s) for s in (tuned, other)]
                lines.append([arm, f"{rate:g}", *cells])
        return Table(["method", "rate", "tuned", "other"], lines)

    def chosen(self) -> dict[str, float]:
        """Return the rate with which each method learns most, by the validation images."""
        points = self._points(SELECTION)
        bases = {base for _, base in points}
        return {
            arm: max(self.rates(arm), key=lambda r: mean(points[arm, base][r][0] for base in bases))
            for arm in (self.swept if bases else [])
        }

    def chosen_table(self) -> Table:
        """Return the gains at each method's chosen rate, and their differences from full."""
        rates, lines = self.chosen(), []
        for arm, rate in rates.items():
            sides = [self.sample(arm, rate, side) for side in (0, 1)]
            full = [self.sample(REFERENCE, rates[REFERENCE], side) for side in (0, 1)]
            cells = [mean_sd(s) for s in sides]
            for ours, theirs in zip(sides, full, strict=True):
                pairs = zip(ours.values, theirs.values, strict=True)
                apart = Sample(tuple(a - b for a, b in pairs))
                cells.append("" if arm == REFERENCE else with_interval(apart))
            lines.append([arm, f"{rate:g}", *cells])
        return Table(["method", "rate", "tuned", "other", "tuned − full", "other − full"], lines)


def mean_sd(sample: Sample) -> str:
    """Return "+mean ± sd" in points."""
    return f"{sample.mean:+.2f} ± {sample.sd or 0:.2f}"


def times(logs: Sample) -> str:
    """Return the geometric mean and its 95 % interval, of logarithms.

    >>> times(Sample((log(2), log(8))))
    '4.00 (0.00 to 26730.60)'
    """
    low, high = logs.bounds() if logs.sd is not None else (logs.mean, logs.mean)
    return f"{exp(logs.mean):.2f} ({exp(low):.2f} to {exp(high):.2f})"


def with_interval(sample: Sample) -> str:
    """Return "mean (95 % interval)" with signs, or the mean alone for a single value."""
    if sample.sd is None:
        return f"{sample.mean:+.2f}"
    low, high = sample.bounds()
    return f"{sample.mean:+.2f} ({low:+.2f} to {high:+.2f})"
