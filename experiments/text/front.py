"""The learning-forgetting front of the text study: LoRA at several ranks, and full fine-tuning.

    FOLDER/cells/NAME/    a run of the text study for each arm, learning rate and seed
    FOLDER/results.jsonl  one row per training
    FOLDER/front.md       tables, and front.png

Every training is an ordinary run, so an interrupted command continues. The cells of the first seed
begin before those of the second one. After `minutes`, no further training begins.

Full fine-tuning trains the new head, too. `lora` leaves it at its random start, so that the
embeddings have to move towards it. `lora+head` trains it and is the fairer comparison.
"""

import dataclasses
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path

from ..harness.progress import progress
from ..harness.rundir import Row, RunDirectory
from ..harness.settings import StudyError, replace, result_settings
from .report import tuned_rows
from .settings import FrontGrid, TextSettings


@dataclass(frozen=True)
class Cell:
    """One training: the arm's name, the settings that it changes, and further keys of its row.

    A rank of None leaves the rank and the scale of the settings.
    """

    arm: str
    method: str
    rate: float
    seed: int
    rank: int | None = 8
    kind: str = "lora"
    row: Row = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.arm.replace(' ', '-')}-{self.rate:g}-{self.seed}"

    def settings(self, base: TextSettings, folder: Path) -> TextSettings:
        """Return the settings of the training. The scale alpha/r of LoRA is 2 at every rank."""
        size = {} if self.rank is None else {"rank": self.rank, "alpha": 2.0 * self.rank}
        return replace(
            base,
            **size,
            methods=self.method,
            kind=self.kind,
            lr=self.rate,
            full_lr=self.rate,
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
    # Processes finish in another order, and the report has the arms in this one.
    todo = [
        dataclasses.replace(cell, row={"number": number})
        for number, cell in enumerate(cells(settings, grid))
    ]
    asked = {"grid": {name: list(values) for name, values in vars(grid).items()}}
    return train_cells(settings, todo, asked, {"front": True}, folder, jobs, minutes, say)


def train_cells(
    settings: TextSettings,
    cells: Sequence[Cell],
    asked: Row,
    marks: Row,
    folder: Path,
    jobs: int = 1,
    minutes: float = float("inf"),
    say: Callable[[str], None] = print,
    following: Callable[[Sequence[Row], Cell], Iterable[Cell]] = lambda rows, cell: (),
) -> RunDirectory:
    """Train cells, each in a run of its own, and record a row as soon as one is finished.

    Args:
        settings: the settings that the cells change.
        cells: the trainings to begin with, in this order.
        asked: further settings of the run with the rows.
        marks: further keys of its environment.
        folder: the folder of the run with the rows; the cells have theirs in it.
        jobs: parallel processes.
        minutes: begin no training after so many minutes.
        say: called with each line of progress.
        following: called with all rows and a finished cell; returns cells to train next.

    Raises:
        StudyError: the settings name no second data set, or the run has other settings.
    """
    if not settings.retention:
        raise StudyError("--retention must name a second data set, such as spam")
    say(f"front    {folder}: {len(cells)} trainings to begin with, {jobs} at a time")
    todo, run = deque(cells), None
    finished = _run_all(todo, settings, folder, time.time() + 60 * minutes, jobs)
    with ExitStack() as opened:
        for cell, one in progress(finished, None, "front", "training"):
            if one is None:
                continue
            if run is None:
                wanted, environment = result_settings(settings) | asked, one.environment | marks
                run = opened.enter_context(RunDirectory.start(folder, wanted, environment, ()))
            row = row_of(cell, one)
            run.record(row)
            say(f"cell     {cell.name:<24} {100 * row['accuracy']:.2f} % on the test texts")
            todo.extendleft(reversed(list(following(run.rows, cell))))
    if run is None:
        raise StudyError(f"no training of {folder} ended within {minutes:g} minutes")
    return run


def row_of(cell: Cell, run: RunDirectory) -> Row:
    """Return the row of a finished cell."""
    (row,) = tuned_rows(run)
    own = {"stage": "front", "method": cell.arm, "rate": cell.rate, "seed": cell.seed, **cell.row}
    return {**row, **own, "rank": cell.rank if "lora" in cell.method else None}


def _run_all(
    todo: deque[Cell], settings: TextSettings, folder: Path, end: float, jobs: int
) -> Iterator[tuple[Cell, RunDirectory | None]]:
    """Yield each cell as it is finished, with the result of `_run`, from `jobs` processes.

    Cells that are added to `todo` meanwhile are trained as well.
    """
    if jobs == 1:
        while todo:
            cell = todo.popleft()
            yield cell, _run(cell.settings(settings, folder), end)
        return
    # Not joblib: its processes restart when their memory grows, and reading the data takes seconds.
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        running: dict[Future[RunDirectory | None], Cell] = {}
        while todo or running:
            while todo and len(running) < jobs:
                cell = todo.popleft()
                running[pool.submit(_run, cell.settings(settings, folder), end)] = cell
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(future), future.result()


def _run(settings: TextSettings, end: float) -> RunDirectory | None:
    """Run one training and return its run, or None if it would begin after the time `end`."""
    from .study import run_text

    return None if time.time() > end else run_text(settings, lambda line: None)
