"""Intruder dimensions on the digits: do they, or the size of the update, predict forgetting?

LoRA of two ranks and full fine-tuning are trained at the rates of front.py. Each training gives

    kept     accuracy on the other digits, in points above the base; negative if it forgot
    left     number of intruders among the ten leading left vectors of each weight, summed
    right    the same of the right vectors
    size     mean of ‖ΔW‖ / ‖W‖ over the weights

and each base Spearman's rank correlation of `kept` with each of the others, over its trainings. All
trainings of a base share its errors, so a base is one observation, and intervals are over bases.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from operator import itemgetter
from statistics import mean

from scipy.stats import spearmanr

from ..analysis.intruders import SIZE, predictors
from ..digits.data import small_note
from ..digits.settings import DigitSettings
from ..harness.rundir import Row, RunDirectory, replace_file
from ..report.figures import Axes, Figure, plt, png
from ..report.style import COLOUR, SHADES
from ..report.table import Sample, Table
from .cells import Cell
from .families import FULL
from .front import Method, rate_cells
from .remedies import signed
from .spectra import EPSILON, STRENGTHS

METHODS = (Method(2), Method(8), Method(None))
LOOKS = {"LoRA r 2": (SHADES[0], "o"), "LoRA r 8": (SHADES[3], "s"), FULL: (COLOUR["full"], "X")}
EPSILONS = (0.3, 0.5, 0.7)


Value = Callable[[Row], float]
PREDICTORS: Mapping[str, Value] = predictors(EPSILONS)


def intruder_cells(settings: DigitSettings, base_seeds: int) -> Iterator[Cell]:
    """Yield a cell for each base, method and learning rate."""
    yield from rate_cells(settings, base_seeds, METHODS, spectra=True)


class Intruders:
    """The trainings of a run, with what each learned and kept."""

    def __init__(self, run: RunDirectory) -> None:
        base = {row["base_seed"]: row for row in run.rows if row["stage"] == "base"}
        self.run, self.bases = run, sorted(base)
        self.rows = [
            {**row, **_gains(row, base[row["base_seed"]])}
            for row in run.rows
            if row["stage"] == "on"
        ]
        self.methods = list(dict.fromkeys(row["varied"]["method"] for row in self.rows))
        self.groups = {"all": self.rows, **{name: self.of(method=name) for name in self.methods}}

    def of(self, **varied: object) -> list[Row]:
        """Return the trainings of a method, of a rate, or of both."""
        return [row for row in self.rows if varied.items() <= row["varied"].items()]

    def by_base(self, rows: Sequence[Row], value: Value) -> Sample:
        """Return the mean of a value over the trainings of each base."""
        groups = [[value(row) for row in rows if row["base_seed"] == base] for base in self.bases]
        return Sample(tuple(mean(group) for group in groups if group))

    def rate_table(self) -> Table:
        """Return sizes, counts and accuracies of each method and rate, means over bases."""
        lines = []
        for method in self.methods:
            for rate in sorted({row["varied"]["lr"] for row in self.of(method=method)}):
                rows = self.of(method=method, lr=rate)
                means = [self.by_base(rows, value).mean for value in PREDICTORS.values()]
                gains = [self.by_base(rows, itemgetter(side)) for side in ("learned", "kept")]
                cells = [f"{means[0]:.2f}", *(f"{count:.1f}" for count in means[1:])]
                lines.append([method, f"{rate:g}", *cells, *map(signed, gains)])
        return Table(["method", "rate", *PREDICTORS, "learned", "kept"], lines)

    def correlation(self, rows: Sequence[Row], name: str) -> dict[int, float]:
        """Return Spearman's correlation of a predictor with `kept` over each base's trainings.

        A base on which the predictor is the same for all trainings has none.
        """
        found = {}
        for base in self.bases:
            mine = [row for row in rows if row["base_seed"] == base]
            values = [PREDICTORS[name](row) for row in mine]
            if len(set(values)) > 1:
                kept = [row["kept"] for row in mine]
                found[base] = float(spearmanr(values, kept).statistic)
        return found

    def correlation_table(self) -> Table:
        """Return the correlations, and that of the size less others, paired by base."""
        lines = []
        for name in PREDICTORS:
            found = [self.correlation(rows, name) for rows in self.groups.values()]
            lines.append([name, *(_with_interval(list(one.values()), 2) for one in found)])
        for name in (f"left, ε = {EPSILON:g}", f"left, ε = {EPSILONS[-1]:g}"):
            cells = []
            for rows in self.groups.values():
                size, other = self.correlation(rows, SIZE), self.correlation(rows, name)
                pairs = [size[base] - other[base] for base in other]
                cells.append(_with_interval(pairs, 2))
            lines.append([f"{SIZE} less {name}", *cells])
        return Table(["predictor", *self.groups], lines)

    def scaling_table(self) -> Table:
        """Return the change of the accuracies by scaling the top intruder, and by its control."""
        lines = []
        for group, rows in self.groups.items():
            mine = [row for row in rows if row["scaled"]]
            for strength in STRENGTHS:
                cells = []
                for side in ("tuned", "other"):
                    top, control = (
                        self.by_base(mine, partial(_change, of=of, strength=strength, side=side))
                        for of in ("intruder", "neighbour")
                    )
                    apart = [a - b for a, b in zip(top.values, control.values, strict=True)]
                    samples = top.values, control.values, apart
                    cells += [_with_interval(list(values), 1) for values in samples]
                lines.append([group, f"{strength:g}", *cells, str(len(mine))])
        kinds = ("intruder", "neighbour", "difference")
        head = [f"{side}: {kind}" for side in ("tuned", "other") for kind in kinds]
        return Table(["trainings", "λ", *head, "n"], lines)

    def figure(self) -> Figure:
        """Draw `kept` against the number of intruders, and against the size of the update."""
        made, panels = plt.subplots(1, 2, figsize=(8, 3.4), layout="constrained", sharey=True)
        left, right = panels
        self._scatter(left, f"left, ε = {EPSILON:g}")
        left.set(
            xlabel=f"intruders (left vectors, ε = {EPSILON:g})", ylabel="kept: other digits, points"
        )
        self._scatter(right, SIZE)
        right.set(xlabel="‖ΔW‖/‖W‖, mean over the weights", xscale="log")
        left.legend(frameon=False, title="one point per training", alignment="left")
        return made

    def _scatter(self, axes: Axes, name: str) -> None:
        for method in self.methods:
            rows = self.of(method=method)
            x, y = [PREDICTORS[name](row) for row in rows], [row["kept"] for row in rows]
            colour, mark = LOOKS[method]
            axes.scatter(x, y, s=14, color=colour, marker=mark, label=method, linewidths=0)
        axes.grid(color="#eeeeee")


def _gains(row: Row, base: Row) -> Row:
    """Return what a training learned and kept, in points above its base."""
    sides = {"learned": "tuned_accuracy", "kept": "other_accuracy"}
    return {name: 100 * (row[side] - base[side]) for name, side in sides.items()}


def _change(row: Row, of: str, strength: float, side: str) -> float:
    """Return the change of an accuracy of a training by scaling, in points."""
    (found,) = [one for one in row["scaled"] if (one["of"], one["strength"]) == (of, strength)]
    return 100 * (found[side] - row[f"{side}_accuracy"])


def _with_interval(values: Sequence[float], digits: int) -> str:
    """Return "mean (95 % interval)", or "-" for fewer than three bases."""
    sample = Sample(tuple(values))
    if len(values) < 3:
        return "-"
    return f"{sample.mean:+.{digits}f} ({sample.interval(digits)})"


def markdown(found: Intruders) -> str:
    """Return the report."""
    run = found.run
    parts = [
        f"# Intruder dimensions, preset {run.settings['preset']}",
        f"{run.environment['data']}.{small_note(run.environment['data'])} n = {len(found.bases)} "
        f"bases with {run.settings['seeds']} seeds each.",
        "![Kept against the number of intruders and the size of the update](intruders.png)",
        "## By rate",
        found.rate_table().markdown(),
        "Numbers of intruders are summed over the weights, ten vectors of each. `learned` and "
        "`kept`: points above the base, mean ± sd over bases of the means over seeds.",
        "## Rank correlation with retention",
        found.correlation_table().markdown(),
        "Spearman's, over the trainings of a base; mean and Student's 95 % interval over bases. -: "
        "fewer than three bases on which the predictor varies.",
        f"## The top intruder of each weight at a strength λ (left vectors, ε = {EPSILON:g})",
        found.scaling_table().markdown(),
        "Change of the accuracy in points, over the trainings with an intruder, and 95 % interval "
        "over bases. The control scales the nearest vector that is no intruder by the same norm.",
    ]
    return "\n\n".join(parts) + "\n"


def write_intruder_report(run: RunDirectory) -> None:
    """Write intruders.md and intruders.png beside the rows."""
    found = Intruders(run)
    replace_file(run.folder / "intruders.png", png(found.figure()))
    replace_file(run.folder / "intruders.md", markdown(found).encode())
