"""The report of the study, from its rows alone: tables, the figure, and the rule of exclusion."""

from pathlib import Path

import numpy as np

from ..harness.rundir import RunDirectory, replace_file
from ..report.figures import Axes, Figure, plt, png
from ..report.style import COLOUR, shades
from ..report.table import Sample, Table, key_value_table
from .analysis import (
    HIGHEST,
    LEARNED,
    PARTS,
    REFERENCE,
    Found,
    by_kl,
    by_kl_fashion,
    by_rate,
    by_sizes,
    kl_terms,
    least_squares,
)

MARKS = {"sft-1": "o", "sft-2": "s", "oracle": "^", "grpo": "x"}
SHOWN = 3  # bases whose checkpoints are drawn; the figure says nothing more with all of them
RULE = (
    "A training diverged if one of its values is not finite or its last checkpoint answers parity "
    f"worse than its base. Its checkpoints, and those with KL above {HIGHEST:g} nats, do not count."
)


def cell(sample: Sample, digits: int = 1, sign: str = "+") -> str:
    """Return "mean (95 % interval over bases)", or "-" for fewer than two bases."""
    if len(sample.values) < 2:
        return "-"
    return f"{sample.mean:{sign}.{digits}f} ({sample.interval(digits)})"


def fit_table(run: RunDirectory) -> Table:
    """Return R² of the fit of each arm: by the rule, without the largest rate, and at any KL."""
    found, any_kl = Found(run), Found(run, np.inf)
    head = ["arm", "R²", "without the largest rate", "any KL"]
    lines = []
    for arm in found.arms:
        fits = found.fits(arm), found.fits(arm, all_rates=False), any_kl.fits(arm)
        counts = (counted(run, arm)[name] for name in ("total", "diverged", "beyond"))
        lines.append([arm, *(one.mean_sd(2) for one in fits), *map(str, counts)])
    return Table([*head, "checkpoints", "diverged", f"KL > {HIGHEST:g}"], lines)


def counted(run: RunDirectory, arm: str) -> dict[str, int]:
    """Return the number of checkpoints of an arm, of its diverged trainings, and beyond HIGHEST."""
    rows = [row for row in run.rows if row["stage"] == "base" or row["cell"] == arm]
    found = Found(RunDirectory(run.folder, run.settings, run.environment, rows))
    return {"total": found.total, "diverged": found.diverged, "beyond": found.beyond}


def excess_table(found: Found, method: str | None = None) -> Table:
    """Return the excess of each arm in each part of KL, over all methods or for one alone."""
    head = ["arm", *(f"KL {low:g} to {high:g}" for low, high in PARTS)]
    arms = [arm for arm in found.arms if arm != REFERENCE]
    lines = [[arm, *(cell(found.excess(arm, part, method)) for part in PARTS)] for arm in arms]
    return Table(head, lines)


def method_table(found: Found) -> Table:
    """Return the excess of each rank for each method alone, where both arms have checkpoints."""
    head = ["method", "arm", *(f"KL {low:g} to {high:g}" for low, high in PARTS)]
    lines = [
        [method, arm, *(cell(found.excess(arm, part, method)) for part in PARTS)]
        for method in found.methods
        for arm in found.adapters
    ]
    return Table(head, lines, (0, 1))


def least_table(found: Found) -> Table:
    """Return the least forgetting of each arm at LEARNED parity, and LoRA less full, paired."""
    arms = [REFERENCE, *found.adapters]
    head = ["method", *arms, *(f"{arm} − {REFERENCE}" for arm in found.adapters)]
    lines = []
    for method in found.methods:
        least = {arm: found.least_forgotten(arm, method) for arm in arms}
        cells = [Sample(tuple(least[arm].values())) for arm in arms]
        line = [
            method,
            *(f"{one.mean_sd(1)} (n {len(one.values)})" if one.values else "-" for one in cells),
        ]
        for arm in found.adapters:
            both = least[arm].keys() & least[REFERENCE].keys()
            line.append(
                cell(Sample(tuple(least[arm][b] - least[REFERENCE][b] for b in sorted(both))))
            )
        lines.append(line)
    return Table(head, lines)


def explained_table(found: Found) -> Table:
    """Return what several quantities explain of forgetting, and LoRA's offset beside them."""
    models = {
        "KL": [by_kl],
        "‖ΔW‖/‖W‖ of each layer": [by_sizes],
        "KL and ‖ΔW‖/‖W‖": [by_kl, by_sizes],
        "KL and the logarithm of the rate": [by_kl, by_rate],
        "KL on Fashion-MNIST": [by_kl_fashion],
        "KL on both": [by_kl, by_kl_fashion],
    }
    lines = []
    for name, terms in models.items():
        cells = []
        for method in (None, "oracle"):
            if method is None or method in found.methods:
                share, offset = found.explained(terms, method)
                cells += [share.mean_sd(2), cell(offset)]
        lines.append([name, *cells])
    head = ["R²", "LoRA's offset", "oracle alone: R²", "LoRA's offset"]
    return Table(["terms, each with its square", *head[: len(lines[0]) - 1]], lines)


def figure(found: Found) -> Figure:
    """Draw forgetting against KL, and the excess of LoRA in the parts of KL."""
    made, (left, right) = plt.subplots(1, 2, figsize=(9, 3.9), layout="constrained")
    scatter(left, found)
    bars(right, found)
    return made


def colours(found: Found) -> dict[str, str]:
    """Return the colour of full fine-tuning and of each rank."""
    return {
        REFERENCE: COLOUR["full"],
        **dict(zip(found.adapters, shades(len(found.adapters)), strict=True)),
    }


def scatter(axes: Axes, found: Found) -> None:
    """Draw the checkpoints from the first SHOWN bases, and the curve of full fine-tuning."""
    shown = [row for row in found.rows if row.base in found.bases[:SHOWN]]
    for arm, colour in reversed(colours(found).items()):
        for method, mark in MARKS.items():
            rows = [row for row in shown if (row.arm, row.method) == (arm, method)]
            axes.scatter(
                [row.kl for row in rows],
                [row.forgotten for row in rows],
                s=7,
                alpha=0.5,
                color=colour,
                marker=mark,
                linewidths=0.6,
            )
    rows = [row for row in found.rows if row.arm == REFERENCE]
    c = least_squares(map(kl_terms, rows), [row.forgotten for row in rows])
    x = np.geomspace(3e-3, found.highest, 100)
    axes.plot(x, c[0] + c[1] * x + c[2] * x**2, color=COLOUR["published"], lw=2)
    for arm, colour in colours(found).items():
        axes.scatter([], [], color=colour, label=arm, s=22)
    for method, mark in MARKS.items():
        axes.scatter([], [], color=COLOUR["base"], marker=mark, label=method, s=22)
    axes.plot([], [], color=COLOUR["published"], lw=2, label="fit of full")
    axes.set_xscale("log")
    axes.set(xlim=(1e-3, 1.1 * found.highest))
    axes.set(xlabel="KL(base ‖ tuned) on MNIST, nats", ylabel="forgotten: Fashion-MNIST, points")
    axes.legend(frameon=False, fontsize=8)


def bars(axes: Axes, found: Found) -> None:
    """Draw the excess of an adapter in each part of KL, over all methods and for each alone."""
    arm = found.adapters[len(found.adapters) // 2]
    series: list[tuple[str | None, str, str]] = [(None, "D", COLOUR["base"])]
    series += [(method, MARKS[method], COLOUR["on"]) for method in found.methods]
    for number, (method, mark, colour) in enumerate(series):
        samples = [found.excess(arm, part, method) for part in PARTS]
        places = [i for i, sample in enumerate(samples) if len(sample.values) > 2]
        axes.errorbar(
            [i + 0.16 * (number - 2) for i in places],
            [samples[i].mean for i in places],
            [samples[i].bounds()[1] - samples[i].mean for i in places],
            fmt=mark,
            color=colour,
            ms=4.5,
            elinewidth=0.9,
            label=method or "all methods",
        )
    axes.axhline(0, color=COLOUR["full"], lw=1)
    axes.set_xticks(range(len(PARTS)), [f"{low:g} to\n{high:g}" for low, high in PARTS])
    axes.set(xlabel="KL, nats", ylabel=f"excess of {arm} over full, points")
    axes.grid(axis="y", color="#eeeeee")
    title = f"mean, 95 % interval, n ≤ {len(found.bases)} bases"
    axes.legend(frameon=False, fontsize=8, title=title, title_fontsize=8, alignment="left")


def markdown(run: RunDirectory) -> str:
    """Return the report."""
    found = Found(run)
    count, settings = len(found.bases), run.settings
    accuracies = {
        name: Sample(tuple(100 * row[name] for row in found.base_rows.values())).mean_sd(1)
        for name in ("parity", "fashion")
    }
    parts = [
        "# RL's Razor on ParityMNIST",
        f"{run.environment['data']}. n = {count} bases, which answer {accuracies['parity']} % of "
        f"parity and {accuracies['fashion']} % of Fashion-MNIST. {settings['epochs']} epochs, "
        f"{settings['checkpoints']} checkpoints in each. Intervals are Student's 95 % intervals "
        "over bases, not corrected for the number of comparisons.",
        f"**Rule of exclusion.** {RULE}",
        "![Forgetting against KL, and the excess of LoRA over full fine-tuning](razor.png)",
        f"Left: the checkpoints from the first {SHOWN} bases. Right: means over all bases.",
        "## R² of the quadratic fit",
        fit_table(run).markdown(),
        "A fit of forgetting to KL for each arm and base; R² is mean ± sd over bases.",
        "## Excess over full fine-tuning at equal KL",
        excess_table(found).markdown(),
        "Mean residual from the curve of full fine-tuning, less that of full itself, in points.",
        "The same for each method alone, with a curve of its own:",
        method_table(found).markdown(),
        f"## Least forgotten at {100 * LEARNED:g} % parity or more",
        least_table(found).markdown(),
        "The best of all rates and steps by the test images, for every arm alike.",
        "## What else explains forgetting",
        explained_table(found).markdown(),
        "Regressions over full fine-tuning and LoRA, one for each base. The offset is the mean "
        "difference of LoRA from full fine-tuning that the terms leave, in points.",
        "## Settings",
        key_value_table(settings).markdown(),
    ]
    return "\n\n".join(parts) + "\n"


def write_razor_report(folder: Path) -> str:
    """Write razor.md and razor.png of the run in `folder` from its rows; return the report."""
    run = RunDirectory.read(folder)
    replace_file(folder / "razor.png", png(figure(Found(run)), colours=128))
    text = markdown(run)
    replace_file(folder / "razor.md", text.encode())
    return text
