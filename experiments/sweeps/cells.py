"""The cells of a sweep, and their grouping into jobs.

A cell is one base model and one value of every setting that training depends on. Cells that differ
only in their adapter settings train together, as one job.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from paramlora.kinds import Spec

from ..digits.methods import lora_of
from ..digits.settings import AdapterSettings, DigitSettings
from ..harness.grid import Grid, check_grid
from ..harness.settings import listed, replace

# The most images per step, over all adapters that train together. A larger step is bound by
# arithmetic: stacking more adapters then saves no time and takes more memory.
TOGETHER = 1000


@dataclass(frozen=True)
class Cell:
    """One choice of settings, trained with each adapter seed and evaluated at each strength.

    Attributes:
        name: the settings in which it differs from the other cells, as text.
        settings: all settings; `settings.seeds` adapters are trained.
        strengths: the strengths λ to evaluate.
        together: whether the seeds may train at once.
        varied: the settings that the grid set, by name.
        full: whether all weights and biases are trained, instead of an adapter.
        joint: whether the images of all digits are trained on, instead of those of the tuned ones.
        spectra: whether rows have the intruder dimensions of the tuned weights.
        spec: the kind of adapter to train, in place of the LoRA of the settings.
    """

    name: str
    settings: DigitSettings
    strengths: tuple[float, ...]
    together: bool = True
    varied: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    full: bool = False
    joint: bool = False
    spectra: bool = False
    spec: Spec | None = None


def cells(
    settings: DigitSettings, grid: Grid, base_seeds: int = 1, together: bool = True
) -> Iterator[Cell]:
    """Yield the cells of a sweep, in order.

    Args:
        settings: the settings that the grid changes.
        grid: values by setting name; each combination is a cell. Strengths make no further cells,
            since every cell is evaluated at all strengths.
        base_seeds: number of bases, counted from the settings' seed.
        together: whether the seeds of a cell may train at once.

    Raises:
        StudyError: If a name is not a setting, or a value is not allowed.
    """
    check_grid(grid, settings)
    grid = dict(grid)
    strengths = tuple(float(λ) for λ in grid.pop("strength", [settings.remedies.strength]))
    for values in itertools.product(*grid.values()):
        changes = dict(zip(grid, values, strict=True))
        name = " ".join(f"{key}={listed(value)}" for key, value in changes.items()) or "plain"
        for number in range(base_seeds):
            seed = changes.get("seed", settings.seed) + number
            cell = replace(settings, **{**changes, "seed": seed})
            yield Cell(name, cell, strengths, together, changes)


def jobs_of(todo: Sequence[Cell]) -> list[list[Cell]]:
    """Group cells into jobs of cells that train together, up to `TOGETHER` images per step."""
    found: list[list[Cell]] = []
    open_jobs: dict[Any, list[Cell]] = {}
    for cell in todo:
        # `Together` scales B by the ratio of two scales, which does not exist if one of them is 0.
        has_scale = lora_of(cell.settings.adapter).scaling != 0
        shared = dataclasses.replace(cell.settings, adapter=AdapterSettings())
        key = cell.together, cell.full, cell.joint, cell.spec, has_scale, shared
        job = open_jobs.get(key, [])
        if not job or not is_stacked(cell) or _images_per_step([*job, cell]) > TOGETHER:
            job = open_jobs[key] = []
            found.append(job)
        job.append(cell)
    return found


def _images_per_step(job: Sequence[Cell]) -> int:
    settings = job[0].settings
    batch = settings.remedies.tune_batch or settings.pretraining.batch
    return batch * sum(cell.settings.seeds for cell in job)


def is_stacked(cell: Cell) -> bool:
    """Return whether the seeds of a cell train at once."""
    return cell.together and trains_together(cell.settings)


def trains_together(settings: DigitSettings) -> bool:
    """Return whether the seeds can train at once.

    They can if only batches and factors differ between them. Early stopping ends each training at
    another step. Fisher information and null spaces of replayed images differ from seed to seed.
    """
    per_seed = settings.remedies.ewc > 0 or settings.remedies.null_space_of == "old"
    return not settings.holdout.patience and not (settings.remedies.replay and per_seed)
