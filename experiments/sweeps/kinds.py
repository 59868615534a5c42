"""The kinds of adapters on the digits, with a learning rate chosen for each on validation images.

    part        bases pre-trained on             evaluated on         cells
    selection   training images − validation     validation images    every kind × rate × base
    test        all training images              test images          every kind × some rates × base

All kinds have the same nine rates to choose from, and the same images, steps and seeds. The choice
has the highest mean gain over all digits in the selection. The test part has each kind at its
choice, and at rates from about a tenth of it up to the one that learned most in the selection, so
that kinds can also be compared where they have learned equally much. Ranks and block sizes give
about as many trained numbers as a LoRA of rank 2, if the kind allows it.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import mean

import paramlora as pl
from paramlora.kinds import Spec

from ..digits.settings import DigitSettings
from ..harness.rundir import Row, RunDirectory
from ..harness.settings import replace, result_settings
from .cells import Cell
from .families import FULL
from .select import SELECTION, TEST, gains, validation_images
from .sweep import run_sweep

REFERENCE = "LoRA, r 2"
KINDS: Mapping[str, Spec] = {
    REFERENCE: pl.LoRA(2),
    "LoRA, r 2, PiSSA": pl.LoRA(2, init="pissa"),
    "DoRA, r 2": pl.DoRA(2),
    "LoHa, r 1": pl.LoHa(1),
    "LoKr, r 2": pl.LoKr(2),
    "HiRA, r 2": pl.HiRA(2),
    "MiSS, r 4": pl.MiSS(4),
    "OFT, blocks of 8": pl.OFT(8),
    "LoRA-XS, r 10": pl.LoRAXS(10),
    "IA3": pl.IA3(),
    FULL: pl.Delta(),
}
RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
SELECTION_BASES, SELECTION_SEEDS = 2, 3


def selection_cells(settings: DigitSettings, base_seeds: int) -> Iterator[Cell]:
    """Yield the cells of the selection, on bases and with seeds that follow those of the test."""
    held = {"validation": validation_images(settings), "selection": True}
    held |= {"seeds": SELECTION_SEEDS, "seed_from": settings.seed_from + settings.seeds}
    first = settings.seed + base_seeds
    for base in range(first, first + SELECTION_BASES):  # outermost, as a process caches few bases
        for kind in KINDS:
            for rate in RATES:
                yield _cell(settings, SELECTION, kind, rate, {**held, "seed": base})


def measured_cells(settings: DigitSettings, run: RunDirectory, base_seeds: int) -> Iterator[Cell]:
    """Yield the cells of the measurement: each kind at its choice and at the rates around it."""
    rates = {kind: rates_of(run, kind) for kind in KINDS}
    for base in range(settings.seed, settings.seed + base_seeds):
        for kind in KINDS:
            for rate in rates[kind]:
                yield _cell(settings, TEST, kind, rate, {"seed": base})


def rates_of(run: RunDirectory, kind: str) -> list[float]:
    """Return the rates to measure a kind at.

    The curve of what is kept bends beyond the choice. Rates between those of the selection keep
    the error of its linear interpolation small there.
    """
    chosen, most = best_rate(run, kind), best_rate(run, kind, "tuned_accuracy")
    between = [float(f"{math.sqrt(a * b):.2g}") for a, b in pairwise(RATES) if b > chosen]
    found = [rate for rate in RATES if rate > chosen / 12]
    return sorted(rate for rate in [*found, *between] if rate <= max(chosen, most))


def _cell(settings: DigitSettings, part: str, kind: str, rate: float, changes: Row) -> Cell:
    return Cell(
        f"{kind}, rate {rate:g}, {part}",
        replace(settings, **{**changes, "lr": rate}),
        (settings.remedies.strength,),
        varied={"part": part, "method": kind, "lr": rate},
        spec=KINDS[kind],
    )


def best_rate(run: RunDirectory, kind: str, side: str = "accuracy") -> float:
    """Return the rate with the highest mean gain on the validation images of a side."""
    return max(
        RATES, key=lambda rate: mean(gains(rows_at(run.rows, SELECTION, kind, rate), side).values())
    )


def rows_at(rows: Sequence[Row], part: str, kind: str, rate: float) -> list[Row]:
    """Return the rows of a kind at a rate, with those of the bases."""
    varied = {"part": part, "method": kind, "lr": rate}
    return [row for row in rows if row["varied"] == varied]


def run_kinds(
    settings: DigitSettings,
    folder: Path,
    base_seeds: int = 5,
    jobs: int = 1,
    say: Callable[[str], None] = print,
) -> RunDirectory:
    """Choose a rate for each kind, measure it, and return the run with the rows of both parts.

    Args:
        settings: the preset, with the number of adapter seeds of the measurement.
        folder: the folder of the run; existing rows are kept.
        base_seeds: number of bases of the measurement, counted from the settings' seed.
        jobs: parallel processes.
        say: called with each line of progress.
    """
    asked = result_settings(settings) | {"kinds": True, "base_seeds": base_seeds}
    run = run_sweep(list(selection_cells(settings, base_seeds)), folder, asked, jobs, say)
    return run_sweep(list(measured_cells(settings, run, base_seeds)), folder, asked, jobs, say)
