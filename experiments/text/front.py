"""The learning-forgetting front of the text study: LoRA at several ranks, and full fine-tuning.

    FOLDER/cells/NAME/    a run of the text study for each arm, learning rate and seed
    FOLDER/results.jsonl  one row per training
    FOLDER/front.md       tables, and front.png

Every training is an ordinary run, so an interrupted command continues. The first seed is finished
for all cells before the second one begins. After `minutes`, no further training begins.
"""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from ..analysis.front import difference
from ..harness.rundir import Row, RunDirectory, replace_file
from ..harness.settings import StudyError, replace, result_settings
from ..report.table import Sample, Table, key_value_table
from .report import tuned_rows
from .settings import TextSettings

# By name in the rows: the name in tables, its factor, and the digits shown.
KEPT = {
    "kept_probe": ("probe, %", 100, 1),
    "kept_refit": ("probe fitted again, %", 100, 1),
    "kept_retrieval": ("retrieval, %", 100, 1),
    "kept_agreement": ("agreement", 1, 3),
}
REFERENCE = "full"


@dataclass(frozen=True)
class FrontGrid:
    """The learning rates of the arms, in ascending order, and the ranks of LoRA."""

    ranks: tuple[int, ...] = (1, 8, 64)
    rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 2e-3, 4e-3)
    full_rates: tuple[float, ...] = (1e-5, 3e-5, 1e-4, 2e-4, 4e-4)
    joint_rates: tuple[float, ...] = (1e-3, 2e-3)
    joint_full_rates: tuple[float, ...] = (1e-4, 2e-4)


@dataclass(frozen=True)
class Cell:
    """One training: the arm's name, and the settings that it changes."""

    arm: str
    method: str
    rate: float
    seed: int
    rank: int = 8

    @property
    def name(self) -> str:
        return f"{self.arm.replace(' ', '-')}-{self.rate:g}-{self.seed}"

    def settings(self, base: TextSettings, folder: Path) -> TextSettings:
        """Return the settings of the training. The scale alpha/r of LoRA is 2 at every rank."""
        return replace(
            base,
            methods=self.method,
            lr=self.rate,
            full_lr=self.rate,
            rank=self.rank,
            alpha=2.0 * self.rank,
            seeds=1,
            seed_from=self.seed,
            out=str(folder / "cells" / self.name),
        )


def cells(settings: TextSettings, grid: FrontGrid) -> Iterator[Cell]:
    """Yield all trainings, those of the first seed first."""
    middle = grid.ranks[len(grid.ranks) // 2]
    for seed in range(settings.seed_from, settings.seed_from + settings.seeds):
        for rate in grid.full_rates:
            yield Cell("full", "full", rate, seed)
        for rank in grid.ranks:
            for rate in grid.rates:
                yield Cell(f"lora r {rank}", "lora", rate, seed, rank)
        for rate in grid.joint_full_rates:
            yield Cell("joint full", "joint", rate, seed)
        for rate in grid.joint_rates:
            yield Cell(f"joint lora r {middle}", "joint-lora", rate, seed, middle)


def run_front(
    settings: TextSettings,
    grid: FrontGrid,
    folder: Path,
    jobs: int = 1,
    minutes: float = float("inf"),
    say: Callable[[str], None] = print,
) -> RunDirectory:
    """Train all cells, or the rest of an interrupted run, and return the run with their rows.

    Raises:
        StudyError: the settings name no second data set, or the run has other settings.
    """
    if not settings.retention:
        raise StudyError("--retention must name a second data set, such as spam")
    todo, end = list(cells(settings, grid)), time.time() + 60 * minutes
    say(f"front    {folder}: {len(todo)} trainings, {jobs} at a time")
    run = None
    trainings = [cell.settings(settings, folder) for cell in todo]
    for cell, one in zip(todo, _run_all(trainings, end, jobs), strict=True):
        if one is None:
            continue
        if run is None:
            common = {
                **result_settings(settings),
                "grid": {k: list(v) for k, v in vars(grid).items()},
            }
            run = RunDirectory.start(folder, common, {**one.environment, "front": True}, ())
            run.key = ("method", "rate", "seed")
        (row,) = tuned_rows(one)
        own = {"stage": "front", "method": cell.arm, "rate": cell.rate, "seed": cell.seed}
        run.record({**row, **own, "rank": cell.rank if "lora" in cell.method else None})
        say(f"cell     {cell.name:<24} {100 * row['accuracy']:.2f} % on the test texts")
    if run is None:
        raise StudyError(f"no training of {folder} ended within {minutes:g} minutes")
    return run


def _run_all(trainings: list[TextSettings], end: float, jobs: int) -> Iterator[RunDirectory | None]:
    """Yield the result of `_run` for each training in order, from `jobs` processes."""
    if jobs == 1:
        yield from (_run(one, end) for one in trainings)
        return
    # Not joblib: its processes restart when their memory grows, and reading the data takes seconds.
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        yield from pool.map(_run, trainings, [end] * len(trainings))


def _run(settings: TextSettings, end: float) -> RunDirectory | None:
    """Run one training and return its run, or None if it would begin after the time `end`."""
    from .study import run_text

    return None if time.time() > end else run_text(settings, lambda line: None)


def is_front(folder: Path) -> bool:
    """Return whether the run in a folder is one of several arms and rates."""
    return bool(RunDirectory.read(folder).environment.get("front"))


def arms_in(run: RunDirectory) -> dict[str, list[Row]]:
    """Return the rows of each arm, in the order in which they were trained."""
    found: dict[str, list[Row]] = {}
    for row in run.rows:
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
    for arm in (name for name in arms if name.startswith("lora")):
        for key, (name, factor, digits) in KEPT.items():
            found = Sample(tuple(factor * d for d in _differences(arms[arm], arms[REFERENCE], key)))
            cells = [found.mean_sd(digits), found.interval(digits)] if found.values else ["-", "-"]
            lines.append([arm, name, *cells, str(len(found.values))])
    return Table(head, lines, (0, 1))


def _differences(ours: list[Row], theirs: list[Row], key: str) -> list[float]:
    """Return the difference of each seed that has all rates of both arms."""
    found = []
    for seed in sorted({row["seed"] for row in ours}):
        points = [
            [
                (row["accuracy"], row[key])
                for rate_rows in by_rate(rows).values()
                for row in rate_rows
                if row["seed"] == seed
            ]
            for rows in (ours, theirs)
        ]
        complete = [len(p) == len(by_rate(r)) for p, r in zip(points, (ours, theirs), strict=True)]
        one = difference(*points) if all(complete) else None
        found += [] if one is None else [one]
    return found


def chosen_table(run: RunDirectory) -> Table:
    """Return a line per arm at its best rate on the validation texts, paired with `full`."""
    arms = arms_in(run)
    best = {arm: _best(rows) for arm, rows in arms.items()}
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


def _best(rows: list[Row]) -> list[Row]:
    """Return the rows of the rate with the highest mean accuracy on the validation texts."""
    groups = by_rate(rows).values()
    return max(groups, key=lambda group: sum(r["validation_accuracy"] for r in group) / len(group))


def front_figure(run: RunDirectory, path: Path) -> None:
    """Draw what is kept against the accuracy on the task: a line per arm, a dot per rate."""
    from ..report.figures import plt, png

    shades = ["#F0A35E", "#D55E00", "#8A3D00"]
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axis, key in zip(axes, ("kept_probe", "kept_agreement"), strict=True):
        name, factor, _ = KEPT[key]
        colours = iter(shades)
        for arm, rows in arms_in(run).items():
            full = arm.endswith("full")
            colour = "#009E73" if full else next(colours, shades[1]) if arm[0] == "l" else shades[1]
            groups = by_rate(rows).values()
            x = [100 * sum(r["accuracy"] for r in g) / len(g) for g in groups]
            y = [factor * sum(r[key] for r in g) / len(g) for g in groups]
            style = (
                {"marker": "*", "linestyle": ":"} if arm.startswith("joint") else {"marker": "o"}
            )
            axis.plot(x, y, color=colour, label=arm, **style)
        if key == "kept_probe":
            axis.axhline(100 * run.rows[0]["base_probe"], color="#555555", linewidth=0.8)
        axis.set(xlabel="accuracy on the task, test texts, %", ylabel=f"kept: {name}")
    axes[0].legend(frameon=False, fontsize=8)
    replace_file(path, png(figure))


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
        "`experiments/text/retention.py` defines the measures.",
        "## Settings",
        key_value_table(run.settings).markdown(),
    ]
    replace_file(folder / "front.md", ("\n\n".join(parts) + "\n").encode())
    return run
