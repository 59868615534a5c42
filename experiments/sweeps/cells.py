"""The cells of a sweep, and the jobs that they make up.

A cell is one base and one choice of everything that training depends on. Cells that differ in their
adapters alone train together, and are one job.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..digits.methods import lora_of
from ..digits.settings import AdapterSettings, DigitSettings
from ..harness.grid import Grid, check_grid
from ..harness.settings import listed, replace

# Images of a step of all adapters that train together: with more, a step is arithmetic, which
# gains nothing, and its memory grows.
TOGETHER = 1000


@dataclass(frozen=True)
class Cell:
    """Settings, `seeds` of which train, evaluated at each of the strengths.

    `name` says in which of its settings it differs from the others, and `varied` has these, as far
    as they are of a grid.
    """

    name: str
    settings: DigitSettings
    strengths: tuple[float, ...]
    together: bool = True
    varied: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def cells(
    settings: DigitSettings, grid: Grid, base_seeds: int = 1, together: bool = True
) -> Iterator[Cell]:
    """Yield the cells of a sweep, in order.

    Args:
        settings: what the grid changes.
        grid: values by the name of a setting; every combination is a cell. Strengths are none: a
            cell has all of them.
        base_seeds: bases to take, counted from the settings' seed.
        together: whether the seeds of a cell may train at once.

    Raises:
        StudyError: a name that is no setting, or a value that is not allowed.
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
    """Return the cells in jobs: those that can train together, as far as that pays, are one."""
    found: list[list[Cell]] = []
    like: dict[Any, list[Cell]] = {}
    for cell in todo:
        # An update of scale 0 is not a multiple of another one.
        scaled = lora_of(cell.settings.adapter).scaling != 0
        others = dataclasses.replace(cell.settings, adapter=AdapterSettings())
        key = cell.together, scaled, others
        job = like.get(key, [])
        if not job or not is_stacked(cell) or _images_a_step([*job, cell]) > TOGETHER:
            job = like[key] = []
            found.append(job)
        job.append(cell)
    return found


def _images_a_step(job: Sequence[Cell]) -> int:
    settings = job[0].settings
    batch = settings.remedies.tune_batch or settings.pretraining.batch
    return batch * sum(cell.settings.seeds for cell in job)


def is_stacked(cell: Cell) -> bool:
    """Return whether the seeds of a cell train at once."""
    return cell.together and trains_together(cell.settings)


def trains_together(settings: DigitSettings) -> bool:
    """Return whether seeds can train at once: only batches and factors differ between them."""
    own = settings.remedies.ewc > 0 or settings.remedies.null_space_of == "old"
    return not settings.holdout.patience and not (settings.remedies.replay and own)
