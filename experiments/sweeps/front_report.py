"""The report of a learning-forgetting front, from its rows alone: its tables and the figure."""

from typing import Any

from ..digits.data import small_note
from ..harness.rundir import RunDirectory, replace_file
from ..report.figures import Figure, plt, png
from ..report.style import COLOUR
from ..report.table import Sample
from .front_tables import REFERENCE, Front

LOWEST = -15.0  # of the figure, points
# Shades of the colour of an adapter, from low to high rank, each with a mark of its own.
SHADES = ("#F7B267", "#EE8A3C", "#D55E00", "#A34700", "#6B2F00")
MARKS = ("v", "^", "s", "D", "P")


def figure(front: Front) -> Figure:
    """Draw the gain on other digits against that on tuned ones: a line for each method."""
    made, axes = plt.subplots(figsize=(5, 5.6), layout="constrained")
    shades = iter(zip(SHADES, MARKS, strict=True))
    for arm in front.arms:
        mark: dict[str, Any] = {"fmt": "o-", "color": COLOUR["full"], "lw": 2.2, "zorder": 3}
        if arm.startswith("joint"):
            mark = {"fmt": "*", "ms": 9, "color": mark["color"] if "full" in arm else SHADES[2]}
        elif "N(0, 1)" in arm:
            mark = {"fmt": "x--", "color": COLOUR["scrambled"], "lw": 1.2}
        elif arm != REFERENCE:
            shade, form = next(shades)
            mark = {"fmt": f"{form}-", "color": shade, "lw": 1.2}
        _draw(axes, front, arm, {"ms": 4.5, "elinewidth": 0.8, "capsize": 2, **mark})
    axes.axhline(0, color=COLOUR["base"], lw=0.8, ls=":")
    axes.set(xlabel="learned, % of the most that full learns")
    axes.set(xlim=(-4, 112), ylim=(LOWEST, 2))
    axes.set_ylabel("other digits, points above the base")
    made.legend(frameon=False, ncols=2, loc="outside lower center", fontsize=9)
    return made


def _draw(axes: Any, front: Front, arm: str, mark: dict[str, Any]) -> None:
    rates = front.rates(arm)
    x = [front.learned(arm, rate) for rate in rates]
    y = [front.sample(arm, rate, 1) for rate in rates]
    axes.errorbar(
        [s.mean for s in x],
        [s.mean for s in y],
        xerr=[half_width(s) for s in x],
        yerr=[half_width(s) for s in y],
        label=arm,
        **mark,
    )


def half_width(sample: Sample) -> float:
    """Return half of the 95 % interval of the mean; 0 for a single value."""
    return sample.bounds()[1] - sample.mean if sample.sd is not None else 0.0


def markdown(front: Front) -> str:
    """Return the report."""
    run, n = front.run, len(front.bases)
    settings, held = run.settings, front.chosen_table()
    chosen = "No rate was chosen: the run has no bases for it."
    if held.rows:
        chosen = (
            f"Each rate was chosen by the gain on the tuned digits of the validation images, on "
            f"{settings['chosen_on']} other bases, pre-trained without these images."
        )
    parts = [
        f"# Learning and forgetting, preset {settings['preset']}",
        f"{run.environment['data']}; tuned digits {settings['digits']}, {settings['steps']} steps "
        f"of {settings['batch']} images, alpha {settings['alpha']:g}. Gains on the test images in "
        f"points above the base. n = {n} bases; each value is the mean over {front.seeds} adapter "
        f"seeds. ± is the sd over bases.{small_note(run.environment['data'])}",
        "![Kept against learned](front.png)",
        f"Means over {n} bases × {front.seeds} adapter seeds, a point per learning rate. Learned: "
        "the gain on the tuned digits in % of the most that full fine-tuning learns on a base. "
        f"Bars: 95 % intervals over the bases. Points below {LOWEST:g} are not shown.",
        "## Other digits at equal learning",
        front.kept_table().markdown(),
        "Columns: a share of the most that full fine-tuning learns on the tuned digits of a base. "
        "`n`: bases on which the method learns that much, if not all.",
        "## LoRA − full fine-tuning at equal learning, other digits",
        front.difference_table().markdown(),
        "Paired by base, with 95 % intervals clustered by base, not corrected for the number of "
        "comparisons. Negative: LoRA forgets more. `mean over all`: over all that both learn.",
        "The same as a ratio: how many times as much LoRA forgets, geometric mean over the bases.",
        front.ratio_table().markdown(),
        "## At the rate with which a method learns most",
        held.markdown() if held.rows else "",
        chosen,
        "## All rates",
        front.rate_table().markdown(),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def write_front_report(run: RunDirectory) -> None:
    """Write front.md and front.png beside the rows."""
    front = Front(run)
    replace_file(run.folder / "front.png", png(figure(front)))
    replace_file(run.folder / "front.md", markdown(front).encode())
