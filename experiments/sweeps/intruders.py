"""Intruder dimensions on the digits: do they, or the size of the update, predict forgetting?

LoRA of two ranks and full fine-tuning are trained at the rates of front.py. Each training gives

    kept     accuracy on the other digits, in points above the base; negative if it forgot
    left     number of intruders among the ten leading left vectors of each weight, summed
    right    the same of the right vectors
    size     mean of ‖ΔW‖ / ‖W‖ over the weights

and Spearman's rank correlation of `kept` with each of the others, over all trainings. All trainings
of a base share its errors, so intervals are of a bootstrap that draws bases with replacement.
"""

from collections.abc import Iterator, Mapping, Sequence
from statistics import mean

import numpy as np
from scipy.stats import spearmanr

from ..digits.data import small_note
from ..digits.settings import DigitSettings
from ..harness.rundir import Row, RunDirectory, replace_file
from ..report.figures import Axes, Figure, plt, png
from ..report.style import COLOUR
from ..report.table import Sample, Table
from .cells import Cell
from .families import FULL
from .front import Method, rate_cells
from .remedies import signed
from .spectra import EPSILON, STRENGTHS

METHODS = (Method(2), Method(8), Method(None))
COLOURS = {"LoRA r 2": "#F5B78F", "LoRA r 8": COLOUR["on"], FULL: COLOUR["full"]}
EPSILONS = (0.3, 0.5, 0.7)
DRAWS = 2000
SIZE = "‖ΔW‖/‖W‖"
PREDICTORS = {
    **{f"left, ε = {e:g}": (lambda row, e=e: count(row, "left", e)) for e in EPSILONS},
    **{f"right, ε = {e:g}": (lambda row, e=e: count(row, "right", e)) for e in EPSILONS},
    SIZE: lambda row: mean(row["sizes"]),
}


def intruder_cells(settings: DigitSettings, base_seeds: int) -> Iterator[Cell]:
    """Yield a cell for each base, method and learning rate."""
    yield from rate_cells(settings, base_seeds, METHODS, spectra=True)


def count(row: Row, side: str, epsilon: float) -> int:
    """Return the number of intruders of a training among its "left" or "right" vectors."""
    return sum(value < epsilon for values in row[side] for value in values)


class Intruders:
    """The trainings of a run, with what they kept."""

    def __init__(self, run: RunDirectory) -> None:
        base = {row["base_seed"]: row for row in run.rows if row["stage"] == "base"}
        self.run, self.bases = run, sorted(base)
        self.rows = [
            {**row, "gains": {side: 100 * (row[f"{side}_accuracy"] - base[row["base_seed"]][f"{side}_accuracy"]) for side in ("tuned", "other")}}
            for row in run.rows
            if row["stage"] == "on"
        ]
        self.methods = list(dict.fromkeys(row["varied"]["method"] for row in self.rows))

    def of(self, **varied: object) -> list[Row]:
        """Return the trainings of a method, of a rate, or of both."""
        return [row for row in self.rows if varied.items() <= row["varied"].items()]

    def by_base(self, rows: Sequence[Row], value) -> Sample:
        """Return the mean of a value over the trainings of each base."""
        groups = [[value(row) for row in rows if row["base_seed"] == base] for base in self.bases]
        return Sample(tuple(mean(group) for group in groups if group))

    def rate_table(self) -> Table:
        """Return counts, sizes and accuracies of each method and rate, mean over bases."""
        head = ["method", "rate", "‖ΔW‖/‖W‖", *(f"{s}, ε = {e:g}" for s in ("left", "right") for e in EPSILONS)]
        lines = []
        for method in self.methods:
            rows = self.of(method=method)
            for rate in sorted({row["varied"]["lr"] for row in rows}):
                found = self.of(method=method, lr=rate)
                cells = [f"{self.by_base(found, PREDICTORS[SIZE]).mean:.2f}"]
                cells += [f"{self.by_base(found, PREDICTORS[name]).mean:.1f}" for name in PREDICTORS if name != SIZE]
                gains = [signed(self.by_base(found, lambda row, s=side: row["gains"][s])) for side in ("tuned", "other")]
                lines.append([method, f"{rate:g}", *cells, *gains])
        return Table([*head, "learned", "kept"], lines)

    def correlation_table(self) -> Table:
        """Return Spearman's correlation of each predictor with `kept`, and intervals over bases."""
        groups = {"all": self.rows, **{method: self.of(method=method) for method in self.methods}}
        lines = []
        for name in PREDICTORS:
            cells = []
            for rows in groups.values():
                point, draws = self._correlations(rows, name)
                low, high = np.nanquantile(draws, [0.025, 0.975])
                undefined = np.isnan(point)
                cells.append("-" if undefined else f"{point:.2f} ({low:.2f} to {high:.2f})")
            lines.append([name, *cells])
        lines.append(["size − best count", *(self._best_difference(rows) for rows in groups.values())])
        return Table(["predictor", *groups], lines)

    def _correlations(self, rows: Sequence[Row], name: str) -> tuple[float, np.ndarray]:
        """Return a correlation over all rows, and over each draw of bases with replacement."""
        values = {
            base: np.array([[PREDICTORS[name](row), row["gains"]["other"]] for row in rows if row["base_seed"] == base])
            for base in self.bases
        }
        generator = np.random.default_rng(0)
        drawn = generator.choice(self.bases, (DRAWS, len(self.bases)))
        found = [_spearman(np.concatenate([values[base] for base in bases])) for bases in drawn]
        return _spearman(np.concatenate(list(values.values()))), np.array(found)

    def _best_difference(self, rows: Sequence[Row]) -> str:
        """Return by how much size's |correlation| exceeds that of the count with the largest one."""
        counts = {name: self._correlations(rows, name) for name in PREDICTORS if name != SIZE}
        best = max(counts.values(), key=lambda found: abs(np.nan_to_num(found[0])))
        size = self._correlations(rows, SIZE)
        low, high = np.nanquantile(abs(size[1]) - abs(best[1]), [0.025, 0.975])
        return f"{abs(size[0]) - abs(best[0]):+.2f} ({low:.2f} to {high:.2f})"

    def scaling_table(self) -> Table:
        """Return the change of the accuracies by scaling the top intruder, and by its control."""
        lines = []
        for method in ("all", *self.methods):
            rows = [row for row in self.rows if row["scaled"] and method in ("all", row["varied"]["method"])]
            for strength in STRENGTHS:
                cells = []
                for side in ("tuned", "other"):
                    for name in ("intruder", "neighbour"):
                        sample = self.by_base(rows, lambda row: _change(row, name, strength, side))  # noqa: B023
                        cells.append(_with_interval(sample))
                    sample = self.by_base(rows, lambda row: _change(row, "intruder", strength, side) - _change(row, "neighbour", strength, side))  # noqa: B023
                    cells.append(_with_interval(sample))
                lines.append([method, f"{strength:g}", *cells, str(len(rows))])
        head = [f"{side}: {name}" for side in ("tuned", "other") for name in ("intruder", "neighbour", "difference")]
        return Table(["trainings", "λ", *head, "n"], lines)

    def figure(self) -> Figure:
        """Draw `kept` against the number of intruders, and against the size of the update."""
        made, panels = plt.subplots(1, 2, figsize=(8, 3.4), layout="constrained", sharey=True)
        left, right = panels
        self._scatter(left, f"left, ε = {EPSILON:g}")
        left.set(xlabel=f"intruders (left vectors, ε = {EPSILON:g})", ylabel="kept: other digits, points")
        self._scatter(right, SIZE)
        right.set(xlabel="‖ΔW‖/‖W‖, mean over the weights", xscale="log")
        left.legend(frameon=False)
        return made

    def _scatter(self, axes: Axes, name: str) -> None:
        for method in self.methods:
            rows = self.of(method=method)
            x, y = zip(*((PREDICTORS[name](row), row["gains"]["other"]) for row in rows), strict=True)
            axes.scatter(x, y, s=12, alpha=0.6, color=COLOURS[method], label=method, linewidths=0)
        axes.grid(color="#eeeeee")


def _spearman(pairs: np.ndarray) -> float:
    """Return the rank correlation of two columns, or nan if one of them is constant."""
    if (pairs == pairs[0]).all(0).any():
        return float("nan")
    return float(spearmanr(pairs[:, 0], pairs[:, 1]).statistic)


def _change(row: Mapping, name: str, strength: float, side: str) -> float:
    """Return the change of an accuracy of a training by scaling, in points."""
    (found,) = [one for one in row["scaled"] if (one["of"], one["strength"]) == (name, strength)]
    return 100 * (found[side] - row[f"{side}_accuracy"])


def _with_interval(sample: Sample) -> str:
    if len(sample.values) < 2:
        return "-"
    return f"{sample.mean:+.1f} ({sample.interval(1)})"


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
        "Numbers of intruders are summed over the weights, ten vectors of each. `learned` and `kept`: "
        "points above the base, mean ± sd over bases of the means over seeds.",
        "## Rank correlation with what is kept",
        found.correlation_table().markdown(),
        "Spearman's, over all trainings; in brackets the central 95 % of "
        f"{DRAWS:,} bootstrap draws of bases.",
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
