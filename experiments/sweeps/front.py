"""The learning-forgetting front of the digit study: LoRA at several ranks, and full fine-tuning.

Every method is trained at nine learning rates on the tuned digits, from the same bases, on the same
images in the same order. x is the gain on the tuned digits (learning) and y the gain on the other
digits (forgetting, if negative), both on test images in points above each adapter's own base.
No rate is chosen for the comparison at equal learning (analysis/front.py). The rate with which a
method learns most is chosen on validation images, on further bases and with further adapter seeds:

    part        bases pre-trained on             evaluated on         used for
    selection   training images − validation     validation images    the best rate of each method
    test        all training images              test images          every figure

The joint methods train on all digits. They show what the same steps reach without forgetting.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace as replaced
from pathlib import Path

from ..digits.settings import DigitSettings
from ..harness.rundir import Row, RunDirectory
from ..harness.settings import StudyError, replace, result_settings
from .cells import Cell, cell_of
from .select import SELECTION, TEST, validation_images
from .sweep import run_sweep

# Learning rates, as multiples of the usual one: 1e-3 for LoRA and 1e-4 for all weights.
TIMES = (0.03, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0, 3.0, 6.0)
JOINT_TIMES = (1.0, 3.0, 10.0)
USUAL = {"lora": 1e-3, "full": 1e-4, "joint-lora": 1e-3, "joint": 1e-4}
RANKS = (1, 2, 4, 8, 32)
# The settings of each method by name, in the order of the tables. A has PEFT's initialisation.
ARMS: dict[str, Row] = {
    **{f"LoRA r {rank}": {"methods": "lora", "rank": rank, "init": "kaiming"} for rank in RANKS},
    "LoRA r 2, A ~ N(0, 1)": {"methods": "lora", "rank": 2, "init": "gaussian"},
    "full": {"methods": "full"},
    "joint LoRA r 2": {"methods": "joint-lora", "rank": 2, "init": "kaiming"},
    "joint full": {"methods": "joint"},
}


def front_cells(
    settings: DigitSettings, bases: Sequence[int], part: str, times: Sequence[float] = TIMES
) -> Iterator[Cell]:
    """Yield a cell for each base, method and learning rate.

    Args:
        settings: the settings of all cells, apart from those of the method.
        bases: the base seeds.
        part: SELECTION or TEST, for the rows.
        times: the learning rates, as multiples of the usual one.
    """
    for base in bases:  # outermost, as a process caches few bases
        for arm, changes in ARMS.items():
            joint = changes["methods"].startswith("joint")
            for factor in JOINT_TIMES if joint else times:
                rate = float(f"{factor * USUAL[changes['methods']]:g}")
                one = replace(settings, **changes, lr=rate, full_lr=rate, seed=base)
                about: Row = {"arm": arm, "lr": rate, "part": part}
                cell = cell_of(f"{arm}, rate {rate:g}, {part}", one)
                if part == TEST or not joint:
                    yield replaced(cell, varied=about)


def run_front(
    settings: DigitSettings,
    folder: Path,
    *,
    base_seeds: int = 5,
    selection_bases: int = 2,
    times: Sequence[float] = TIMES,
    jobs: int = 1,
    say: Callable[[str], None] = print,
) -> RunDirectory:
    """Train all methods at all rates, or the rest of an interrupted run, and return the run.

    Args:
        settings: the preset, with the number of adapter seeds.
        folder: the run's folder; a stopped run continues from its rows.
        base_seeds: number of bases, counted from the settings' seed.
        selection_bases: number of further bases, for the choice of the rates.
        times: the learning rates, as multiples of the usual one.
        jobs: parallel processes.
        say: called with each line of progress.

    Raises:
        StudyError: the settings have a remedy or name methods.
    """
    if settings.remedied or settings.finetuning.methods != "all":
        raise StudyError("the front has its own methods and rates, and takes no remedy")
    held = {"validation": validation_images(settings), "selection": True}
    held |= {"seeds": min(3, settings.seeds), "seed_from": settings.seed_from + settings.seeds}
    first = settings.seed + base_seeds
    bases = range(settings.seed, first), range(first, first + selection_bases)
    todo = [
        *front_cells(settings, bases[0], TEST, times),
        *front_cells(replace(settings, **held), bases[1], SELECTION, times),
    ]
    asked = result_settings(settings) | {"base_seeds": base_seeds, "times": list(times)}
    return run_sweep(todo, folder, asked | {"chosen_on": selection_bases}, jobs, say)
