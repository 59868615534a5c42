"""The report of the kinds of adapters, from its rows alone.

All adapters of a base share its errors, so a base is one observation: n is the number of bases.
"""

from math import ceil

from scipy.stats import ttest_1samp

from ..digits.data import small_note
from ..harness.rundir import RunDirectory, replace_file
from ..report.figures import Figure, plt, png
from ..report.style import COLOUR
from ..report.table import Sample, Table, holm
from .front import PARTS, Front
from .kinds import RATES, REFERENCE, best_rate, rows_at
from .remedies import SIDES, apart, by_base, difference, half_width, signed
from .select import SELECTION, TEST, Points, gains

COLUMNS = 4  # panels side by side
LOWEST = -12  # the figure's axis ends here


class Kinds:
    """The gains of each kind on the test images, at its choice and over its rates.

    A run that is not finished is reported on the bases that are.

    Args:
        run: a run of `kinds.run_kinds`.
    """

    def __init__(self, run: RunDirectory) -> None:
        test = [row for row in run.rows if row["varied"]["part"] == TEST]
        count = {row["base_seed"]: 0 for row in test}
        for row in test:
            count[row["base_seed"]] += 1
        whole = [base for base in count if count[base] == max(count.values())]
        self.run, self.rows = run, [row for row in test if row["base_seed"] in whole]
        self.front = Front(RunDirectory(run.folder, run.settings, run.environment, self.rows))
        self.kinds, self.bases = self.front.methods, self.front.bases
        self.chosen = {kind: best_rate(run, kind) for kind in self.kinds}

    def gains(self, kind: str, side: str) -> Points:
        """Return the gain in points at the chosen rate on the images of a side."""
        return gains(rows_at(self.rows, TEST, kind, self.chosen[kind]), SIDES[side])

    def trained(self, kind: str) -> int:
        """Return the number of trained numbers of a kind."""
        rows = rows_at(self.rows, TEST, kind, self.chosen[kind])
        return next(row["trained"] for row in rows if row["stage"] == "on")

    def p_values(self) -> dict[str, float]:
        """Return Holm's p of each kind's difference from LoRA, all digits, by the paired t-test."""
        others = [kind for kind in self.kinds if kind != REFERENCE]
        mine = self.gains(REFERENCE, "all")
        samples = [difference(self.gains(kind, "all"), mine).values for kind in others]
        return dict(zip(others, holm([ttest_1samp(s, 0).pvalue for s in samples]), strict=True))

    def chosen_table(self) -> Table:
        """Return each kind's gains at its chosen rate, and its difference from LoRA."""
        p, lines = self.p_values(), []
        for kind in self.kinds:
            all_of = self.gains(kind, "all")
            lines.append([kind, f"{self.trained(kind):,}", f"{self.chosen[kind]:g}"])
            lines[-1] += [signed(by_base(self.gains(kind, side))) for side in ("tuned", "other")]
            lines[-1] += [signed(by_base(all_of)), apart(all_of, self.gains(REFERENCE, "all"))]
            lines[-1] += [f"{p[kind]:.2f}" if kind in p else "", str(len(self.bases))]
        head = ["kind", "trained", "rate", "learned", "kept", "all digits", f"− {REFERENCE}"]
        return Table([*head, "p (Holm)", "n"], lines)

    def matched_table(self) -> Table:
        """Return `kept` of each kind less that of LoRA at equal learning, paired by base.

        A star marks differences with a p below 0.05, corrected by Holm's method in each column.
        """
        others = [kind for kind in self.kinds if kind != REFERENCE]
        columns = []
        for part in PARTS.values():
            samples = [self.front.apart(kind, part, REFERENCE) for kind in others]
            p = holm([ttest_1samp(sample.values, 0).pvalue for sample in samples])
            columns.append(
                [
                    f"{signed(sample)} ({sample.interval(2)})" + ("*" if value < 0.05 else "")
                    for sample, value in zip(samples, p, strict=True)
                ]
            )
        counts = [str(len(self.front.apart(kind, (0, 1), REFERENCE).values)) for kind in others]
        most = [self.most(kind) for kind in others]
        rows = zip(others, *columns, most, counts, strict=True)
        return Table(["kind", *PARTS, "learned at most", "n"], list(map(list, rows)))

    def most(self, kind: str) -> str:
        """Return the most that a kind learned, over its rates."""
        return signed(self.front.means(kind)[-1][0])

    def rate_table(self) -> Table:
        """Return the mean gains over all digits on the validation images at each rate."""
        lines = []
        for kind in self.kinds:
            tried = [rows_at(self.run.rows, SELECTION, kind, rate) for rate in RATES]
            lines.append([kind, *(f"{by_base(gains(r, 'accuracy')).mean:+.2f}" for r in tried)])
        return Table(["kind", *(f"{rate:g}" for rate in RATES)], lines)

    def figure(self) -> Figure:
        """Draw what each kind keeps against what it learns, beside LoRA: a panel a kind."""
        others = [kind for kind in self.kinds if kind != REFERENCE]
        lines = ceil(len(others) / COLUMNS)
        made, grid = plt.subplots(
            lines,
            COLUMNS,
            figsize=(9.5, 2.5 * lines + 0.4),
            sharex=True,
            sharey=True,
            squeeze=False,
            layout="constrained",
        )
        for kind, axes in zip(others, grid.flat, strict=False):
            for name, colour in ((REFERENCE, COLOUR["on"]), (kind, COLOUR["off"])):
                learned, kept = zip(*self.front.means(name), strict=True)
                colour = COLOUR["full"] if name == "full" else colour
                axes.errorbar(
                    [sample.mean for sample in learned],
                    [sample.mean for sample in kept],
                    yerr=[half_width(sample) for sample in kept],
                    fmt="o-",
                    color=colour,
                    ms=3.5,
                    lw=1.2,
                    elinewidth=0.7,
                )
            axes.set_title(kind, fontsize=9)
            axes.set_ylim(LOWEST, 1)
            axes.grid(color="#eeeeee")
        for axes in grid.flat[len(others) :]:
            axes.set_axis_off()
        for axes in grid.flat[max(0, len(others) - COLUMNS) : len(others)]:
            axes.tick_params(labelbottom=True)  # the lowest panel of each column
        made.supxlabel("learned: tuned digits, points above the base", fontsize=9)
        made.supylabel(
            f"kept: other digits, points above the base; cut off below −{-LOWEST}", fontsize=9
        )
        key = {REFERENCE: COLOUR["on"], "the kind in the title": COLOUR["off"]}
        if "full" in others:
            key["all weights and biases (full)"] = COLOUR["full"]
        handles = [plt.Line2D([], [], color=one, marker="o", ms=3.5) for one in key.values()]
        title = f"mean, 95 % interval, n = {len(self.bases)} bases"
        made.legend(
            handles, list(key), frameon=False, ncols=3, loc="outside upper center", title=title
        )
        return made


def markdown(kinds: Kinds) -> str:
    """Return the report."""
    run, count = kinds.run, len(kinds.bases)
    held = next(row["n"] for row in run.rows if row["varied"]["part"] == SELECTION) // 10
    bases = Sample(tuple(100 * r["accuracy"] for r in _bases(kinds)))
    parts = [
        f"# Kinds of adapters, preset {run.settings['preset']}",
        f"{run.environment['data']}; accuracy of the bases: {bases.mean_sd(2)} %."
        f"{small_note(run.environment['data'])} n = {count} bases; each value is the mean over "
        f"{run.settings['seeds']} adapter seeds. ± is the sd over bases, intervals are Student's "
        f"95 % intervals of the mean over bases. {run.settings['steps']} steps, batches of 10 "
        "images, Adam at a constant rate. `full` trains all weights and biases.",
        "`learned`: accuracy on the tuned digits, points above the base. `kept`: the same on the "
        "other digits.",
        "## At the chosen rate",
        kinds.chosen_table().markdown(),
        f"Each kind's rate has the highest mean gain over all digits among {len(RATES)} rates, on "
        f"{held} validation images per digit and on other bases, which were pre-trained without "
        f"these images. `− {REFERENCE}`: the difference over all digits, paired by base, adapter "
        "seed and images. p: the paired t-test over bases, corrected for the number of kinds by "
        "Holm's method.",
        "## At equal learning",
        kinds.matched_table().markdown(),
        f"`kept` less that of {REFERENCE}, in points, paired by base; positive if the kind forgets "
        "less. Columns: parts of the learning, from none to the most that both reach on a base. "
        "`kept` is interpolated between the rates. Intervals are not corrected for the number of "
        "comparisons. A star: p < 0.05 by the paired t-test, corrected by Holm's method over the "
        "kinds of the column.",
        "![Kept against learned, a panel for each kind](kinds.png)",
        f"Orange: {REFERENCE}. Points: learning rates, up to the one that learns most. Bars: 95 % "
        "intervals of `kept` over bases.",
        "## The learning rate",
        kinds.rate_table().markdown(),
        "Mean gains over all digits on the validation images. With so few bases there is no "
        "interval.",
    ]
    return "\n\n".join(parts) + "\n"


def _bases(kinds: Kinds) -> list[dict[str, float]]:
    rows = [row for row in kinds.rows if row["stage"] == "base"]
    return list({row["base_seed"]: row for row in rows}.values())


def write_kinds_report(run: RunDirectory) -> None:
    """Write kinds.md and kinds.png beside the rows."""
    kinds = Kinds(run)
    replace_file(run.folder / "kinds.png", png(kinds.figure(), colours=64))
    replace_file(run.folder / "kinds.md", markdown(kinds).encode())
