"""The selection of remedies on validation images, and their measurement on the test images.

The best of several candidates is partly lucky, so the images that chose it overestimate its gain.
It is therefore measured on other images, other bases and other adapter seeds:

    part        bases pre-trained on             evaluated on         cells
    selection   training images − validation     validation images    every candidate × base
    test        all training images              test images          each contender's choice × base

For example, a contender with 8 candidates has 8 cells per base in the selection. `choose` returns
one of the 8. Only this one is trained in the test part, where no setting changes.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import mean

from ..digits.settings import DigitSettings
from ..digits.shared import shared_data
from ..harness.rundir import Row, RunDirectory
from ..harness.settings import replace, result_settings
from .cells import Cell
from .families import FULL, Contender, Family, contenders, families
from .sweep import run_sweep

VALIDATION = 500  # validation images per digit, at most a quarter of a digit's training images
SELECTION, TEST = "selection", "test"
Points = dict[tuple[int, int], float]  # a gain in points by base seed and adapter seed


def validation_images(settings: DigitSettings) -> int:
    """Return the number of validation images per digit; fewer than VALIDATION on small data."""
    labels = shared_data(settings.dataset.data, settings.dataset.data_dir).train.labels
    return min(VALIDATION, int(labels.bincount().min()) // 4)


def candidates(
    settings: DigitSettings, chosen: Sequence[Contender], bases: Sequence[int], seeds: int
) -> Iterator[Cell]:
    """Yield the cells of the selection: every candidate on every base, without the test images."""
    fresh = settings.seed_from + settings.seeds
    tried = {"validation": validation_images(settings), "selection": True}
    tried |= {"seeds": seeds, "seed_from": fresh}
    for base in bases:  # outermost, as a process caches few bases
        for one in chosen:
            for number, candidate in enumerate(one.family.candidates(one.arm)):
                yield _cell(settings, one, SELECTION, number, candidate, {**tried, "seed": base})


def measured(
    settings: DigitSettings, run: RunDirectory, chosen: Sequence[Contender], bases: Sequence[int]
) -> Iterator[Cell]:
    """Yield the cells of the measurement: each contender's choice on every base."""
    numbers = [choose(run, one.name) for one in chosen]
    for base in bases:
        for one, number in zip(chosen, numbers, strict=True):
            candidate = one.family.candidates(one.arm)[number]
            stops = "patience" in one.changes
            held = {"validation": validation_images(settings)} if stops else {}
            yield _cell(settings, one, TEST, number, candidate, {**held, "seed": base})


def _cell(
    settings: DigitSettings, one: Contender, part: str, number: int, candidate: Row, more: Row
) -> Cell:
    """Return the cell of a candidate, whose rows say what they belong to."""
    changed = replace(settings, **{**one.changes, **candidate, **more})
    about: Row = {"part": part, "contender": one.name, "number": number, "settings": candidate}
    about |= {"remedy": one.family.name, "arm": one.arm, "schedule": one.schedule}
    batch = changed.remedies.tune_batch or changed.pretraining.batch
    about |= {"old": one.family.old, "steps": changed.finetuning.steps, "batch": batch}
    name = f"{one.name} #{number}, {part}"
    return Cell(name, changed, (changed.remedies.strength,), varied=about, full=one.arm == FULL)


def choose(run: RunDirectory, contender: str) -> int:
    """Return the number of the candidate with the highest mean gain on the validation images."""
    rows = rows_of(run, SELECTION, contender)
    numbers = sorted({row["varied"]["number"] for row in rows})

    def merit(number: int) -> float:
        its = [row for row in rows if row["varied"]["number"] == number]
        return mean(gains(its, "accuracy").values())

    return max(numbers, key=merit)


def rows_of(run: RunDirectory, part: str, contender: str) -> list[Row]:
    """Return the rows of a contender in the selection or in the measurement."""
    wanted = (part, contender)
    return [r for r in run.rows if (r["varied"]["part"], r["varied"]["contender"]) == wanted]


def gains(rows: Sequence[Row], side: str) -> Points:
    """Return each adapter's gain over its own base in points.

    Args:
        rows: the rows of one candidate, with those of its bases.
        side: "accuracy", "tuned_accuracy" or "other_accuracy".
    """
    base = {row["base_seed"]: row[side] for row in rows if row["stage"] == "base"}
    on = [row for row in rows if row["stage"] == "on"]
    return {(r["base_seed"], r["seed"]): 100 * (r[side] - base[r["base_seed"]]) for r in on}


def run_remedies(
    settings: DigitSettings,
    folder: Path,
    *,
    chosen: Sequence[Family] | None = None,
    base_seeds: int = 5,
    selection_seeds: int = 3,
    selection_bases: int = 2,
    jobs: int = 1,
    say: Callable[[str], None] = print,
) -> RunDirectory:
    """Select and measure remedies, and return the run with the rows of both parts.

    Args:
        settings: the preset, with the number of adapter seeds of the measurement.
        folder: the folder of the run; existing rows are kept.
        chosen: the remedies to compare; all `families` by default.
        base_seeds: number of bases of the measurement, counted from the settings' seed.
        selection_seeds: number of adapter seeds per base in the selection. They follow those of
            the measurement.
        selection_bases: number of bases of the selection. They follow those of the measurement.
        jobs: parallel processes.
        say: called with each line of progress.
    """
    all_of = families(validation_images(settings)) if chosen is None else chosen
    compared = list(contenders(settings, all_of))
    bases = range(settings.seed, settings.seed + base_seeds)
    fresh = range(bases.stop, bases.stop + selection_bases)
    asked = result_settings(settings) | {
        "base_seeds": base_seeds,
        "selection_seeds": selection_seeds,
        "selection_bases": selection_bases,
    }
    todo = list(candidates(settings, compared, fresh, selection_seeds))
    run = run_sweep(todo, folder, asked, jobs, say)
    return run_sweep(list(measured(settings, run, compared, bases)), folder, asked, jobs, say)
