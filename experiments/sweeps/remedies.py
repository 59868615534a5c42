"""The report of a comparison of remedies, from its rows alone.

All adapters of one base share its errors, so a base is one observation. Each figure is the mean
over bases of the mean over adapter seeds. ± is the standard deviation over bases. An interval is
Student's 95 % interval of the mean over bases. Differences are taken between two trainings with the
same base, adapter seed and images, before any mean.
"""

from statistics import mean

from matplotlib.axes import Axes

from ..digits.data import small_note
from ..harness.rundir import Row, RunDirectory, replace_file
from ..harness.settings import listed
from ..report.figures import Figure, plt, png
from ..report.style import GROUP_COLOUR
from ..report.table import Sample, Table
from .families import EIGHT, MASKED, NO_REMEDY, USUAL
from .select import SELECTION, TEST, Points, choose, gains, rows_of

SIDES = {"all": "accuracy", "tuned": "tuned_accuracy", "other": "other_accuracy"}
OFFSET = {"all": 0.0, "tuned": 0.2, "other": -0.2}  # of a point in the figure, in lines


def by_base(points: Points) -> Sample:
    """Return the mean over adapter seeds for each base.

    >>> by_base({(0, 0): 1.0, (0, 1): 3.0, (1, 0): 5.0}).values
    (2.0, 5.0)
    """
    bases = sorted({base for base, _ in points})
    return Sample(tuple(mean(v for key, v in points.items() if key[0] == base) for base in bases))


def difference(one: Points, two: Points) -> Sample:
    """Return the paired differences one − two, the mean over adapter seeds for each base."""
    return by_base({key: one[key] - two[key] for key in one})


class Compared:
    """The gains of each remedy on the test images, by arm and schedule.

    Args:
        run: a run of `select.run_remedies`.
    """

    def __init__(self, run: RunDirectory) -> None:
        self.run, self.old = run, dict[str, str]()
        self._rows: dict[tuple[str, str, str], list[Row]] = {}
        for row in run.rows:
            about = row["varied"]
            if about["part"] == TEST:
                place = about["remedy"], about["arm"], about["schedule"]
                self._rows.setdefault(place, []).append(row)
                self.old[about["remedy"]] = about["old"]
        columns = zip(*self._rows, strict=True)
        self.remedies, self.arms, self.schedules = (list(dict.fromkeys(c)) for c in columns)

    def has(self, remedy: str, arm: str) -> bool:
        """Return whether a remedy was applied to an arm."""
        return (remedy, arm, self.schedules[0]) in self._rows

    def gains(self, remedy: str, arm: str, schedule: str, side: str = "all") -> Points:
        """Return the gain in points on the images of a side, by base and adapter seed."""
        return gains(self._rows[remedy, arm, schedule], SIDES[side])

    def arm_table(self, arm: str, reference: str = NO_REMEDY) -> Table:
        """Return the gains of each remedy and their differences from another, all digits."""
        head = ["remedy", "old images"]
        head += [part for s in self.schedules for part in (s, f"{s}: − {reference}")]
        lines = []
        for remedy in self.remedies:
            if self.has(remedy, arm):
                lines.append([remedy, self.old[remedy]])
                for schedule in self.schedules:
                    mine = self.gains(remedy, arm, schedule)
                    other = self.gains(reference, arm, schedule)
                    lines[-1] += [signed(by_base(mine)), apart(mine, other)]
        return Table(head, lines)

    def cross_table(self) -> Table:
        """Return each remedy's differences between schedules and between arms, all digits."""
        short, longer = self.schedules
        pairs = {f"{arm}: {longer} − {short}": ((arm, longer), (arm, short)) for arm in self.arms}
        for one, two in zip(self.arms[1:], self.arms, strict=False):
            pairs |= {f"{s}: {one} − {two}": ((one, s), (two, s)) for s in self.schedules}
        lines = [
            [remedy, *(self._apart(remedy, *p) for p in pairs.values())] for remedy in self.remedies
        ]
        return Table(["remedy", *pairs], lines)

    def _apart(self, remedy: str, one: tuple[str, str], two: tuple[str, str]) -> str:
        there = all((remedy, *place) in self._rows for place in (one, two))
        return apart(self.gains(remedy, *one), self.gains(remedy, *two)) if there else "-"

    def side_table(self) -> Table:
        """Return the gains on tuned and on other digits, and what was chosen."""
        head = ["remedy", "trained", "schedule", "tuned", "other", "validation", "chosen"]
        lines = []
        for (remedy, arm, schedule), rows in self._rows.items():
            sides = [signed(by_base(gains(rows, SIDES[side]))) for side in ("tuned", "other")]
            about = rows[0]["varied"]
            number = choose(self.run, about["contender"])
            tried = rows_of(self.run, SELECTION, about["contender"])
            its = [row for row in tried if row["varied"]["number"] == number]
            chosen = ", ".join(f"{k} {listed(v)}" for k, v in about["settings"].items())
            validation = f"{by_base(gains(its, 'accuracy')).mean:+.2f}"
            lines.append([remedy, arm, schedule, *sides, validation, chosen])
        return Table(head, lines)

    def rate_table(self) -> Table:
        """Return the mean gains on the validation images at each learning rate.

        Only remedies without an option of their own are trained at all of these rates.
        """
        found: dict[tuple[str, str, str], dict[int, list[Row]]] = {}
        for row in self.run.rows:
            about = row["varied"]
            if about["part"] == SELECTION and list(about["settings"]) == ["lr"]:
                place = about["remedy"], about["arm"], about["schedule"]
                found.setdefault(place, {}).setdefault(about["number"], []).append(row)
        lines = [
            [*place, *(f"{by_base(gains(rows, 'accuracy')).mean:+.2f}" for rows in by.values())]
            for place, by in found.items()
        ]
        return Table(["remedy", "trained", "schedule", *(f"× {times:g}" for times in EIGHT)], lines)

    def figure(self) -> Figure:
        """Draw the gains on all, tuned and other digits, with 95 % intervals over bases."""
        shape = len(self.arms), len(self.schedules)
        lines = [sum(self.has(remedy, arm) for remedy in self.remedies) for arm in self.arms]
        made, grid = plt.subplots(
            *shape,
            figsize=(3.7 * shape[1] + 2.5, 0.28 * sum(lines) + 0.7 * shape[0] + 0.5),
            sharex=True,
            sharey="row",
            squeeze=False,
            height_ratios=lines,
            layout="constrained",
        )
        for line, arm in zip(grid, self.arms, strict=True):
            for axes, schedule in zip(line, self.schedules, strict=True):
                self._draw(axes, arm, schedule)
                axes.set_title(f"{arm}, {schedule}", fontsize=9)
        for axes in grid[-1]:
            axes.set_xlabel("points above the base, test images")
        handles, labels = grid[0][0].get_legend_handles_labels()
        title = f"mean, 95 % interval, n = {len(_bases(self.run))} bases"
        made.legend(
            handles, labels, frameon=False, ncols=3, loc="outside upper center", title=title
        )
        return made

    def _draw(self, axes: Axes, arm: str, schedule: str) -> None:
        lines = [remedy for remedy in reversed(self.remedies) if self.has(remedy, arm)]
        for side, up in OFFSET.items():
            samples = [by_base(self.gains(remedy, arm, schedule, side)) for remedy in lines]
            axes.errorbar(
                [sample.mean for sample in samples],
                [y + up for y in range(len(lines))],
                xerr=[half_width(sample) for sample in samples],
                fmt="o",
                ms=3.5,
                lw=1,
                color=GROUP_COLOUR[side],
                label=f"{side} digits",
            )
        axes.axvline(0, color="#333333", lw=0.8)
        axes.set_yticks(range(len(lines)), lines, fontsize=8)
        axes.grid(axis="x", color="#eeeeee")
        axes.spines[["top", "right"]].set_visible(False)


def half_width(sample: Sample) -> float:
    """Return half of the 95 % interval of the mean; 0 for a single value."""
    return sample.bounds()[1] - sample.mean if sample.sd is not None else 0.0


def signed(sample: Sample) -> str:
    """Return "+mean ± sd" in points."""
    return f"{sample.mean:+.2f} ± {sample.sd or 0:.2f}"


def apart(one: Points, two: Points) -> str:
    """Return the mean of the paired differences one − two and its 95 % interval."""
    sample = difference(one, two)
    if set(sample.values) == {0.0}:
        return "0"
    half = half_width(sample)
    return f"{sample.mean:+.2f} ({sample.mean - half:+.2f} to {sample.mean + half:+.2f})"


def markdown(compared: Compared) -> str:
    """Return the report."""
    run = compared.run
    bases = {row["base_seed"]: 100 * row["accuracy"] for row in _bases(run)}
    base = Sample(tuple(bases.values()))
    seeds = run.settings["seeds"]
    about = {row["varied"]["schedule"]: row["varied"] for row in run.rows}
    schedules = (f"{s}: {a['steps']} steps of {a['batch']} images" for s, a in about.items())
    held = next(row["n"] for row in run.rows if row["varied"]["part"] == SELECTION) // 10
    parts = [
        f"# Remedies, preset {run.settings['preset']}",
        f"{run.environment['data']}; accuracy of the bases: {base.mean_sd(2)} % (n = {len(bases)}, "
        f"lowest to highest {base.min_max(2)}).{small_note(run.environment['data'])}",
        f"Gains on the test images over each adapter's base, in points of accuracy over all "
        f"digits. n = {len(bases)} bases; each value is the mean over {seeds} adapter seeds. ± is "
        "the sd over bases. `− no remedy` is the paired difference (same schedule, base, adapter "
        "seed and images) with its 95 % interval, clustered by base. Intervals are not corrected "
        "for the number of comparisons.",
        f"Schedules: {'; '.join(schedules)}; constant learning rate. Rank "
        f"{run.settings['rank']}, alpha {run.settings['alpha']:g}; the initial A is Kaiming "
        "unless the row says otherwise.",
    ]
    for arm in compared.arms:
        parts += [f"## {arm}", compared.arm_table(arm).markdown()]
        if compared.has(MASKED, arm):
            parts += ["The same with differences from masking:"]
            parts += [compared.arm_table(arm, MASKED).markdown()]
    parts += [
        "![Points above the base, by remedy](remedies.png)",
        f"Points: means over {len(bases)} bases × {seeds} adapter seeds; bars: 95 % intervals over "
        "bases.",
        "## Paired differences between schedules and between LoRA and full fine-tuning",
        compared.cross_table().markdown(),
        "## Tuned and other digits, and the chosen settings",
        compared.side_table().markdown(),
        f"Each row was chosen among the same number of candidates by the mean gain on {held} "
        f"validation images per digit, on {run.settings['selection_bases']} other bases, "
        f"pre-trained without these images, × {run.settings['selection_seeds']} other adapter "
        "seeds. `validation`: the gain of the choice there.",
        "## The learning rate",
        compared.rate_table().markdown(),
        "Mean gains over all digits on these validation images, for the remedies that have no "
        "option but the rate. × 1 is "
        + " and ".join(f"{USUAL[arm]:g} ({arm})" for arm in compared.arms)
        + ". With so few bases there is no interval.",
    ]
    return "\n\n".join(parts) + "\n"


def _bases(run: RunDirectory) -> list[Row]:
    tests = [row for row in run.rows if row["varied"]["part"] == TEST and row["stage"] == "base"]
    return list({row["base_seed"]: row for row in tests}.values())


def write_remedies_report(run: RunDirectory) -> None:
    """Write remedies.md and remedies.png beside the rows."""
    compared = Compared(run)
    replace_file(run.folder / "remedies.png", png(compared.figure()))
    replace_file(run.folder / "remedies.md", markdown(compared).encode())
