"""Learning against forgetting: LoRA of several ranks, full fine-tuning and joint training.

Each method is trained at seven learning rates, on the same bases, images and seeds:

    learned   accuracy on the tuned digits, in points above the base
    kept      accuracy on the other digits, in points above the base; negative if it forgot

A method is a curve of these two over its rates. No rate is chosen. Two methods are compared at
equal learning: for each base, `kept` is interpolated between the rates. Joint training sees the
images of all digits for as many steps. It shows what can be learned without forgetting.

All adapters of a base share its errors, so a base is one observation: n is the number of bases.
Source of the comparison: Biderman et al., "LoRA Learns Less and Forgets Less", arXiv 2405.09673.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from statistics import mean

from ..analysis.front import difference, rising
from ..digits.data import small_note
from ..digits.settings import DigitSettings
from ..harness.rundir import Row, RunDirectory, replace_file
from ..harness.settings import replace
from ..report.figures import Figure, plt, png
from ..report.style import COLOUR, MARKS, SHADES
from ..report.table import Sample, Table
from .cells import Cell
from .families import FULL, USUAL
from .remedies import half_width, signed

TIMES = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)  # learning rates / the usual one of the method
# The parts of the learning that two methods both reach, at which they are compared.
PARTS = {"lower half": (0.0, 0.5), "50 to 90 %": (0.5, 0.9), "last tenth": (0.9, 1.0)}
Point = tuple[float, float]  # learned and kept, in points


@dataclass(frozen=True)
class Method:
    """LoRA of a rank, or full fine-tuning if `rank` is None; on all digits if `joint`."""

    rank: int | None
    joint: bool = False

    @property
    def name(self) -> str:
        return ("joint, " if self.joint else "") + (f"LoRA r {self.rank}" if self.rank else FULL)


METHODS = (
    *(Method(rank) for rank in (1, 2, 4, 8, 32)),
    *(Method(None), Method(2, joint=True), Method(None, joint=True)),
)
REFERENCE = Method(None).name


def front_cells(settings: DigitSettings, base_seeds: int) -> Iterator[Cell]:
    """Yield a cell for each base, method and learning rate."""
    return rate_cells(settings, base_seeds, METHODS)


def rate_cells(
    settings: DigitSettings, base_seeds: int, methods: Iterable[Method], spectra: bool = False
) -> Iterator[Cell]:
    """Yield a cell for each base, method and learning rate.

    The scale of LoRA's update is alpha at all ranks (`scale_rule="alpha"`), and its initial A is
    PEFT's.
    """
    for base in range(settings.seed, settings.seed + base_seeds):
        for method in methods:
            usual = USUAL["LoRA" if method.rank else FULL]
            for rate in (float(f"{times * usual:g}") for times in TIMES):
                changes: Row = {"seed": base, "lr": rate}
                if method.rank:
                    changes |= {"rank": method.rank, "init": "kaiming", "scale_rule": "alpha"}
                varied = {"method": method.name, "lr": rate}
                yield Cell(
                    f"{method.name}, rate {rate:g}",
                    replace(settings, **changes),
                    (settings.remedies.strength,),
                    varied=varied,
                    full=method.rank is None,
                    joint=method.joint,
                    spectra=spectra,
                )


class Front:
    """What each method learned and kept at each rate and base, from a run's rows."""

    def __init__(self, run: RunDirectory) -> None:
        base = {row["base_seed"]: row for row in run.rows if row["stage"] == "base"}
        found: dict[tuple[str, float, int], list[Point]] = {}
        for row in run.rows:
            if row["stage"] == "on":
                key = row["varied"]["method"], row["varied"]["lr"], row["base_seed"]
                found.setdefault(key, []).append(_gains(row, base[row["base_seed"]]))
        self.points = {
            key: (mean(one for one, _ in points), mean(two for _, two in points))
            for key, points in found.items()
        }
        self.methods = list(dict.fromkeys(method for method, _, _ in self.points))
        self.bases = sorted(base)
        self.run = run

    def rates(self, method: str) -> list[float]:
        """Return the learning rates of a method, ascending."""
        return sorted({rate for name, rate, _ in self.points if name == method})

    def at(self, method: str, rate: float) -> tuple[Sample, Sample]:
        """Return what was learned and kept at a rate, a value per base."""
        pairs = [self.points[method, rate, base] for base in self.bases]
        learned, kept = zip(*pairs, strict=True)
        return Sample(learned), Sample(kept)

    def curve(self, method: str, base: int) -> list[Point]:
        """Return the points of a method on a base: the base itself, then its rates, ascending."""
        return [(0.0, 0.0), *(self.points[method, r, base] for r in self.rates(method))]

    def means(self, method: str) -> list[tuple[Sample, Sample]]:
        """Return what a method learned and kept, up to the rate with the highest mean learning."""
        points = [self.at(method, rate) for rate in self.rates(method)]
        return points[: len(rising([(learned.mean, kept.mean) for learned, kept in points]))]

    def front_table(self) -> Table:
        """Return what each method learns and keeps at each rate, mean ± sd over bases."""
        lines = []
        for method in self.methods:
            for rate in self.rates(method):
                learned, kept = self.at(method, rate)
                both = [signed(learned), learned.interval(2), signed(kept), kept.interval(2)]
                lines.append([method, f"{rate:g}", *both, str(len(self.bases))])
        head = ["method", "rate", "learned", "95 % interval", "kept", "95 % interval", "n"]
        return Table(head, lines)

    def matched_table(self) -> Table:
        """Return LoRA's `kept` less that of full fine-tuning at equal learning, paired by base."""
        lines = []
        for method in self.methods:
            if method != REFERENCE and not method.startswith("joint"):
                parts = [self.apart(method, part) for part in PARTS.values()]
                cells = [f"{signed(one)} ({one.interval(2)})" for one in parts]
                lines.append([method, *cells, str(len(parts[0].values))])
        return Table(["method", *PARTS, "n"], lines)

    def apart(self, method: str, part: tuple[float, float], reference: str = REFERENCE) -> Sample:
        """Return `kept` less that of another method in a part of the learning, by base."""
        found = (
            difference(self.curve(method, base), self.curve(reference, base), part)
            for base in self.bases
        )
        return Sample(tuple(value for value in found if value is not None))

    def figure(self) -> Figure:
        """Draw what is kept against what is learned: a curve a method, a point a rate."""
        made, axes = plt.subplots(figsize=(6, 4.6), layout="constrained")
        styles = iter(zip(SHADES, MARKS, strict=True))
        for method in self.methods:
            if method.startswith("joint"):
                continue
            colour, mark = (COLOUR["full"], "X") if method == REFERENCE else next(styles)
            points = self.means(method)
            learned, kept = zip(*points, strict=True)
            axes.errorbar(
                [sample.mean for sample in learned],
                [sample.mean for sample in kept],
                yerr=[half_width(sample) for sample in kept],
                fmt=f"{mark}-",
                color=colour,
                label=method,
                ms=4.5,
                lw=1.3,
                elinewidth=0.8,
            )
        axes.plot(0, 0, "P", color=COLOUR["base"], ms=7, label="base")
        axes.set(xlabel="learned: tuned digits, points above the base")
        axes.set_ylabel("kept: other digits, points above the base")
        axes.grid(color="#eeeeee")
        title = f"mean, 95 % interval, n = {len(self.bases)} bases"
        axes.legend(frameon=False, title=title, alignment="left")
        return made


def _gains(row: Mapping[str, object], base: Mapping[str, object]) -> Point:
    learned, kept = (
        100 * (row[side] - base[side])  # type: ignore[operator]
        for side in ("tuned_accuracy", "other_accuracy")
    )
    return learned, kept


def markdown(front: Front) -> str:
    """Return the report."""
    run, count = front.run, len(front.bases)
    parts = [
        f"# Learning and forgetting, preset {run.settings['preset']}",
        f"{run.environment['data']}.{small_note(run.environment['data'])} n = {count} bases; each "
        f"value is the mean over {run.settings['seeds']} adapter seeds. ± is the sd over bases, "
        "intervals are Student's 95 % intervals of the mean over bases, not corrected for the "
        "number of comparisons. "
        f"{run.settings['steps']} steps, batches of 10 images.",
        "`learned`: accuracy on the tuned digits, points above the base. `kept`: the same on the "
        "other digits.",
        "![Kept against learned](front.png)",
        "Points: learning rates, up to the one that learns most. Bars: 95 % intervals of `kept` "
        "over bases.",
        "## At equal learning",
        front.matched_table().markdown(),
        "`kept` of LoRA less that of full fine-tuning, in points, mean ± sd and 95 % interval, "
        "paired by base; positive if LoRA forgets less. Columns: parts of the learning, from none "
        "to the most that both reach on a base. `kept` is interpolated between the rates.",
        "## All rates",
        front.front_table().markdown(),
    ]
    return "\n\n".join(parts) + "\n"


def write_front_report(run: RunDirectory) -> None:
    """Write front.md and front.png beside the rows."""
    front = Front(run)
    replace_file(run.folder / "front.png", png(front.figure()))
    replace_file(run.folder / "front.md", markdown(front).encode())
