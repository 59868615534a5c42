"""The learning-forgetting front of the text study: LoRA at several ranks, and full fine-tuning.

    FOLDER/cells/NAME/    a run of the text study for each arm, learning rate and seed
    FOLDER/results.jsonl  one row per training
    FOLDER/front.md       tables, and front.png

Every training is an ordinary run, so an interrupted command continues. The first seed is finished
for all cells before the second one begins. After `minutes`, no further training begins.

Full fine-tuning trains the new head, too. `lora` leaves it at its random start, so that the
embeddings have to move towards it. `lora+head` trains it and is the fairer comparison.
"""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from ..harness.progress import progress
from ..harness.rundir import RunDirectory
from ..harness.settings import StudyError, replace, result_settings
from .report import tuned_rows
from .settings import FrontGrid, TextSettings


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
            for rate in grid.head_rates:
                yield Cell(f"lora+head r {rank}", "lora+head", rate, seed, rank)
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
    trainings = [cell.settings(settings, folder) for cell in todo]
    asked = {**result_settings(settings), "grid": {k: list(v) for k, v in vars(grid).items()}}
    run = None
    with ExitStack() as opened:
        pairs = zip(todo, _run_all(trainings, end, jobs), strict=True)
        for cell, one in progress(pairs, len(todo), "front", "training"):
            if one is None:
                continue
            if run is None:
                environment = {**one.environment, "front": True}
                run = opened.enter_context(RunDirectory.start(folder, asked, environment, ()))
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
