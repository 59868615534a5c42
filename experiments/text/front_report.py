"""The report of a learning-forgetting front: a pure function of its rows."""

from pathlib import Path
from typing import TYPE_CHECKING

from scipy.stats import spearmanr

from ..analysis.front import difference
from ..analysis.intruders import predictors
from ..harness.rundir import Row, RunDirectory, replace_file
from ..report.style import COLOUR, MARKS, shades
from ..report.table import Sample, Table, key_value_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# By name in the rows: the name in tables, its factor, and the digits shown.
KEPT = {
    "kept_probe": ("probe, %", 100, 1),
    "kept_refit": ("probe fitted again, %", 100, 1),
    "kept_retrieval": ("retrieval, %", 100, 1),
    "kept_agreement": ("agreement", 1, 3),
}
REFERENCE = "full"
SHOWN = 10
# A darker orange and another mark for a higher rank.
SHADES = dict(zip((1, 8, 64), shades(3), strict=True))
MARKED = dict(zip(SHADES, MARKS[1:], strict=False))


def is_front(folder: Path) -> bool:
    """Return whether the run in a folder is one of several arms and rates."""
    return bool(RunDirectory.read(folder).environment.get("front"))


def arms_in(run: RunDirectory) -> dict[str, list[Row]]:
    """Return the rows of each arm, in the order in which their training began."""
    found: dict[str, list[Row]] = {}
    for row in sorted(run.rows, key=lambda row: row.get("number", 0)):
        found.setdefault(row["method"], []).append(row)
    return found


def by_rate(rows: list[Row]) -> dict[float, list[Row]]:
    """Return the rows of each learning rate, in ascending order of the rates."""
    rates = sorted({row["rate"] for row in rows})
    return {rate: [row for row in rows if row["rate"] == rate] for rate in rates}


def front_table(run: RunDirectory) -> Table:
    """Return a line per arm and rate: the accuracy on the task, and what is kept of other texts."""
    head = ["arm", "rate", "test, %", *(name for name, _, _ in KEPT.values()), "n"]
    first = run.rows[0]
    base = [f"{100 * first[key]:.1f}" for key in ("base_probe", "base_retrieval")]
    lines = [["checkpoint", "", "", base[0], base[0], base[1], "1.000", ""]]
    for arm, rows in arms_in(run).items():
        for rate, these in by_rate(rows).items():
            cells = [_cell(these, key, *shown[1:]) for key, shown in KEPT.items()]
            accuracy = _cell(these, "accuracy", 100, 1)
            lines.append([arm, f"{rate:g}", accuracy, *cells, str(len(these))])
    return Table(head, lines)


def _cell(rows: list[Row], key: str, factor: float, digits: int) -> str:
    return Sample(tuple(factor * row[key] for row in rows)).mean_sd(digits)


def difference_table(run: RunDirectory) -> Table:
    """Return what LoRA keeps less full fine-tuning, at equal accuracy on the task, with intervals.

    One difference per seed is the mean over all accuracies that both reach (analysis/front.py).
    """
    arms = arms_in(run)
    head = ["arm − full", "kept", "mean ± sd", "95 % interval", "n"]
    lines = []
    for arm in (name for name in arms if name.startswith("lora") and REFERENCE in arms):
        for key, (name, factor, digits) in KEPT.items():
            found = Sample(tuple(factor * d for d in _differences(arms[arm], arms[REFERENCE], key)))
            cells = [found.mean_sd(digits), found.interval(digits)] if found.values else ["-", "-"]
            lines.append([arm, name, *cells, str(len(found.values))])
    return Table(head, lines, (0, 1))


def _differences(ours: list[Row], theirs: list[Row], key: str) -> list[float]:
    """Return the difference of each seed with all rates up to the one that learns most, in both."""
    found = []
    for seed in sorted({row["seed"] for row in ours}):
        points = []
        for rows in (ours, theirs):
            own = {row["rate"]: row for row in rows if row["seed"] == seed}
            needed = [
                rate for rate in by_rate(rows) if rate <= best_of(rows, "accuracy")[0]["rate"]
            ]
            complete = all(rate in own for rate in needed)
            by_rising_rate = [own[rate] for rate in sorted(own)] if complete else []
            points.append([(row["accuracy"], row[key]) for row in by_rising_rate])
        one = difference(points[0], points[1]) if all(points) else None
        found += [] if one is None else [one]
    return found


def chosen_table(run: RunDirectory) -> Table:
    """Return a line per arm at its best rate on the validation texts, paired with `full`."""
    arms = arms_in(run)
    best = {arm: best_of(rows) for arm, rows in arms.items()}
    theirs = {row["seed"]: row for row in best.get(REFERENCE, [])}
    head = ["arm", "rate", "test, %", "probe, %", "test − full", "probe − full", "n"]
    lines = []
    for arm, rows in best.items():
        pairs = [(row, theirs[row["seed"]]) for row in rows if row["seed"] in theirs]
        paired = [
            Sample(tuple(100 * (a[key] - b[key]) for a, b in pairs)).interval(1)
            if arm != REFERENCE
            else ""
            for key in ("accuracy", "kept_probe")
        ]
        shown = [_cell(rows, key, 100, 1) for key in ("accuracy", "kept_probe")]
        lines.append([arm, f"{rows[0]['rate']:g}", *shown, *paired, str(len(rows))])
    return Table(head, lines)


def spectra_table(run: RunDirectory, arms: tuple[str, ...] = ("full", "lora")) -> Table:
    """Return how well intruder dimensions and the size of the update predict what is kept.

    Spearman's rank correlation over all trainings of a seed whose arm begins with one of `arms`;
    mean and 95 % interval over seeds. The rows have `sizes` if the run was made with --spectra.
    """
    rows = [row for row in run.rows if "sizes" in row and row["method"].startswith(arms)]
    lines = []
    for name, value in predictors((0.5, 0.7)).items():
        cells = []
        for key in KEPT:
            found = []
            for seed in sorted({row["seed"] for row in rows}):
                mine = [row for row in rows if row["seed"] == seed]
                x, y = [value(row) for row in mine], [row[key] for row in mine]
                if min(len(set(x)), len(set(y))) > 1:
                    found.append(float(spearmanr(x, y).statistic))
            sample = Sample(tuple(found))
            cells.append(f"{sample.mean:+.2f} ({sample.interval(2)})" if found else "-")
        lines.append([name, *cells])
    return Table(["predictor", *(name for name, _, _ in KEPT.values())], lines)


def best_of(rows: list[Row], key: str = "validation_accuracy") -> list[Row]:
    """Return the rows of the rate with the highest mean accuracy, on the validation texts."""
    return max(by_rate(rows).values(), key=lambda group: sum(r[key] for r in group) / len(group))


def _accuracy(rows: list[Row]) -> float:
    return 100 * sum(row["accuracy"] for row in rows) / len(rows)


def front_figure(run: RunDirectory, path: Path) -> None:
    """Draw what is kept against the accuracy on the task: a line per arm, a dot per rate.

    LoRA with a trained head and with a random one have a row of panels each, beside full
    fine-tuning. Bars are sds over seeds. Rates whose accuracy is more than SHOWN points below the
    best are left out.
    """
    from ..report.figures import plt, png

    arms = arms_in(run)
    best = max(_accuracy(g) for rows in arms.values() for g in by_rate(rows).values())
    shown = {
        arm: [g for g in by_rate(rows).values() if _accuracy(g) > best - SHOWN]
        for arm, rows in arms.items()
    }
    panels = _panels(list(arms))
    figure, grid = plt.subplots(
        len(panels),
        2,
        figsize=(10, 3.6 * len(panels)),
        sharex=True,
        sharey="col",
        squeeze=False,
        layout="constrained",
    )
    for (title, names), line in zip(panels.items(), grid, strict=True):
        for axis, key in zip(line, ("kept_probe", "kept_agreement"), strict=True):
            for arm in names:
                if shown[arm]:
                    _draw(axis, arm, shown[arm], key)
            axis.set(ylabel=f"kept: {KEPT[key][0]}", title=title)
        base = 100 * run.rows[0]["base_probe"]
        line[0].axhline(base, color=COLOUR["base"], linewidth=0.8, label="checkpoint")
        line[0].legend(frameon=False, fontsize=8, title=_mean_of(shown), title_fontsize=8)
    for axis in grid[-1]:
        axis.set(xlabel="accuracy on the task, test texts, %")
    replace_file(path, png(figure))


def _mean_of(shown: dict[str, list[list[Row]]]) -> str:
    counts = {len(group) for groups in shown.values() for group in groups}
    return f"mean ± sd, n = {' to '.join(map(str, sorted({min(counts), max(counts)})))} seeds"


def _spectra_part(run: RunDirectory) -> list[str]:
    if not any("sizes" in row for row in run.rows):
        return []
    said = "Rank correlation with retention; mean and 95 % interval over seeds."
    return ["## Intruder dimensions", spectra_table(run).markdown(), said]


def _panels(arms: list[str]) -> dict[str, list[str]]:
    """Return the arms of each row of panels by its title; joint training is in the last one."""
    lora = [arm for arm in arms if "lora" in arm]
    found = {
        "LoRA: head trained": [arm for arm in lora if "+head" in arm],
        "LoRA: head at its random start": [arm for arm in lora if "+head" not in arm],
    }
    found = {title: names for title, names in found.items() if names} or {"": []}
    last = list(found)[-1]
    others = [arm for arm in arms if arm not in lora]
    return {
        title: [arm for arm in others if arm == REFERENCE or title == last] + names
        for title, names in found.items()
    }


def _draw(axes: "Axes", arm: str, groups: list[list[Row]], key: str) -> None:
    """Draw one arm: the mean ± sd over seeds of each rate."""
    samples = [
        [Sample(tuple(factor * row[name] for row in group)) for group in groups]
        for name, factor in (("accuracy", 100), (key, KEPT[key][1]))
    ]
    (x, y), (xerr, yerr) = (
        [[sample.mean for sample in line] for line in samples],
        [[sample.sd or 0.0 for sample in line] for line in samples],
    )
    joint = arm.startswith("joint")
    axes.errorbar(
        x,
        y,
        xerr=xerr,
        yerr=yerr,
        fmt="*:" if joint else f"{MARKED.get(groups[0][0]['rank'], 'o')}-",
        color=SHADES.get(groups[0][0]["rank"], COLOUR["full"]),
        label=arm,
        ms=8 if joint else 4,
        lw=1.3,
        elinewidth=0.8,
    )


def write_front(folder: Path) -> RunDirectory:
    """Write front.md and front.png of the run in `folder` from its rows; return the run."""
    run = RunDirectory.read(folder)
    front_figure(run, folder / "front.png")
    env, settings = run.environment, run.settings
    parts = [
        "# What is learned and what is kept",
        f"{settings['model']} on {env['data']}, {env['train_texts']:,} training and "
        f"{env['test_texts']:,} test texts of {settings['max_length']} tokens at most; kept: "
        f"{settings['retention']}. Head on: {settings['pooling']}. Mean ± sample sd over n seeds.",
        front_table(run).markdown(),
        "## At the best rate on the validation texts",
        chosen_table(run).markdown(),
        "The last columns have 95 % intervals of the differences, paired by seed.",
        "## At equal accuracy on the task",
        difference_table(run).markdown(),
        "![What is kept against what is learned](front.png)",
        "Bars: sd over seeds. "
        f"Rates that end more than {SHOWN} points below the best are not drawn.",
        "`experiments/text/retention.py` defines the measures.",
        *_spectra_part(run),
        "## Settings",
        key_value_table(run.settings).markdown(),
    ]
    replace_file(folder / "front.md", ("\n\n".join(parts) + "\n").encode())
    return run
