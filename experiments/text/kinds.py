"""The kinds of adapters on texts, with a learning rate chosen for each on the validation texts.

    part         seeds                          trainings
    selection    those after the test's seeds   each kind × rate
    test         the settings' seeds            each kind at its choice

The choice has the highest accuracy on the validation texts; the test texts are not used for it. A
kind's test follows as soon as its selection is complete, so that a run that ends early has whole
kinds. All kinds train the new head with the adapter's rate, as `lora+head` does, on the same
texts, steps and seeds. `full` fine-tunes all weights.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from ..harness.rundir import Row, RunDirectory
from ..harness.settings import StudyError
from .front import Cell, train_cells
from .front_report import best_of
from .settings import FULL_RATES, KINDS, TextSettings

FULL = "full"
ARMS: Mapping[str, Sequence[float]] = {**KINDS, FULL: FULL_RATES}
SELECTION, TEST = "selection", "test"
SELECTION_SEEDS = 1


def parse_kinds(given: str) -> dict[str, tuple[float, ...]]:
    """Return the rates to try for each kind.

    Raises:
        StudyError: a kind is unknown, or a rate is not a number above 0.

    >>> parse_kinds("lora=1e-3/3e-3,ia3")
    {'lora': (0.001, 0.003), 'ia3': (0.001, 0.003, 0.01, 0.03)}
    """
    found = {}
    for part in filter(None, given.split(",")):
        kind, _, rates = part.partition("=")
        if kind not in ARMS:
            raise StudyError(f"--kinds {kind}: unknown; choose among {', '.join(ARMS)}")
        try:
            found[kind] = tuple(map(float, rates.split("/"))) if rates else tuple(ARMS[kind])
        except ValueError:
            raise StudyError(f"--kinds {part}: write rates as {kind}=1e-4/1e-3") from None
    return found


def selection_cells(settings: TextSettings, kinds: Mapping[str, Sequence[float]]) -> Iterator[Cell]:
    """Yield the trainings that choose the rates, a kind after the other."""
    first = settings.seed_from + settings.seeds
    for kind, rates in kinds.items():
        for seed in range(first, first + SELECTION_SEEDS):
            for rate in rates:
                yield _cell(SELECTION, kind, rate, seed)


def measured_cells(settings: TextSettings, kind: str, rate: float) -> Iterator[Cell]:
    """Yield the trainings of a kind at its choice."""
    for seed in range(settings.seed_from, settings.seed_from + settings.seeds):
        yield _cell(TEST, kind, rate, seed)


def _cell(part: str, kind: str, rate: float, seed: int) -> Cell:
    full = kind == FULL
    method = FULL if full else "lora+head"
    return Cell(kind, method, rate, seed, None, "lora" if full else kind, {"part": part})


def rows_of(rows: Sequence[Row], part: str, kind: str) -> list[Row]:
    """Return the rows of a kind in a part."""
    return [row for row in rows if row["part"] == part and row["method"] == kind]


def best_rate(rows: Sequence[Row], kind: str) -> float:
    """Return the rate with the highest mean accuracy on the validation texts in the selection."""
    return float(best_of(rows_of(rows, SELECTION, kind))[0]["rate"])


def run_kinds(
    settings: TextSettings,
    kinds: Mapping[str, Sequence[float]],
    folder: Path,
    jobs: int = 1,
    minutes: float = float("inf"),
    say: Callable[[str], None] = print,
) -> RunDirectory:
    """Choose a rate for each kind, measure it, and return the run with the rows of both parts.

    A run can be extended: its rows are kept, and further kinds and rates are added to them.

    Args:
        settings: the preset, with the seeds of the measurement.
        kinds: the rates to try for each kind.
        folder: the folder of the run.
        jobs: parallel processes.
        minutes: begin no training after so many minutes.
        say: called with each line of progress.

    Raises:
        StudyError: the settings name no second data set, or the run has other settings.
    """

    def following(rows: Sequence[Row], cell: Cell) -> Iterator[Cell]:
        tried = {(row["rate"], row["seed"]) for row in rows_of(rows, SELECTION, cell.arm)}
        asked = selection_cells(settings, {cell.arm: kinds[cell.arm]})
        if cell.row["part"] == SELECTION and tried >= {(one.rate, one.seed) for one in asked}:
            yield from measured_cells(settings, cell.arm, best_rate(rows, cell.arm))

    asked, marks = {"selection_seeds": SELECTION_SEEDS}, {"kinds": True}
    todo = list(selection_cells(settings, kinds))
    return train_cells(settings, todo, asked, marks, folder, jobs, minutes, say, following)
