"""Sweeps: the digit study over a grid of settings, many seeds and bases, in parallel.

A cell is one base model and one value of every setting that training depends on. Its adapter seeds
train together if the result is the same, and every strength λ is evaluated without training again.
Cells that differ only in their adapter settings train together as one job. joblib runs the jobs in
`--jobs N` processes, or on the back end set by `joblib.parallel_config`, such as a Dask cluster.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import paramlora as pl
from paramlora.kinds import Spec

from ..analysis.evaluate import score, scores
from ..digits.context import StudyContext
from ..digits.data import SMALL_VERSION, describe
from ..digits.methods import ADAPTER, factors_of, lora_of
from ..digits.remedies.recipe import Recipe, answers, recipe
from ..digits.settings import DigitSettings
from ..digits.shared import (
    context_of,
    shared_context,
    shared_data,
    shared_settings,
    shared_strengths,
)
from ..digits.strengths import Strengths, updates
from ..harness.batches import Batches
from ..harness.environment import RESULT_KEYS, resolve_device
from ..harness.progress import progress
from ..harness.rows import key_of
from ..harness.rundir import Row, RunDirectory
from .cells import Cell, is_stacked, jobs_of
from .logits import full_logits, spec_logits
from .spectra import deltas, measured
from .together import StackedBatches, Together, objective_together

STUDY = "sweeps"  # the study's name in environment.json
Training = tuple[StudyContext, int]  # a context and an adapter seed


def run_job(cells: Sequence[Cell]) -> list[list[Row]]:
    """Train and evaluate the adapters of a job's cells; return the rows of each cell.

    These are the base's row and one per seed and strength.

    The cells contain everything that a job needs, so it can run in any process on any machine that
    has the code and the data.
    """
    contexts = [context_of(cell.settings) for cell in cells]
    todo = [(context, seed) for context in contexts for seed in context.settings.adapter_seeds]
    tune = tune_together if is_stacked(cells[0]) else tune_one_by_one
    trained = iter(tune(todo, cells[0].full, cells[0].joint, cells[0].spec))
    at = shared_strengths(shared_settings(cells[0].settings))
    rows = []
    for cell, context in zip(cells, contexts, strict=True):
        of_cell = [next(trained) for _ in range(context.settings.seeds)]
        rows.append(list(_rows(cell, context, at, of_cell)))
    return rows


def _rows(
    cell: Cell, context: StudyContext, at: Strengths, trained: Sequence[tuple[Row, float]]
) -> Iterator[Row]:
    settings, labels = cell.settings, context.test_labels
    common: Row = {"cell": cell.name, "varied": dict(cell.varied)}
    common |= {"base_seed": settings.seed, "tuned": context.tuned}
    base = score(context.base_logits, labels, context.tuned)
    yield {**common, "stage": "base", "seed": None, "strength": 0.0, **base}
    for seed, (factors, loss) in zip(settings.adapter_seeds, trained, strict=True):
        if cell.full:
            on = full_logits(context, factors, cell.strengths)
        elif cell.spec:
            on = spec_logits(context, cell.spec, factors, cell.strengths)
        else:
            on = at.logits(updates(factors, lora_of(settings.adapter).scaling), cell.strengths)
        if settings.remedies.route != "none":
            on = torch.stack([answers(context, one, seed) for one in on])
        more = measured(context, deltas(factors, cell)) if cell.spectra else {}
        if cell.spec:
            more["trained"] = sum(factor.numel() for factor in factors.values())
        for strength, row in zip(cell.strengths, scores(on, labels, context.tuned), strict=True):
            labelled = {"stage": "on", "seed": seed, "strength": strength, "train_loss": loss}
            yield {**common, **labelled, **row, **more}


def tune_one_by_one(
    todo: Sequence[Training], full: bool = False, joint: bool = False, spec: Spec | None = None
) -> list[tuple[Row, float]]:
    """Return each adapter's trained factors, by name, and its mean training loss."""
    return [_tuned(context, seed, full, joint, spec) for context, seed in todo]


def _tuned(
    context: StudyContext, seed: int, full: bool, joint: bool, spec: Spec | None
) -> tuple[Row, float]:
    model, plain = _attached(context, seed, full, joint, spec)
    made = recipe(context, model, factors_of(model), plain, seed)
    losses = _train(context, made, model, made.objective, made.batches)
    made.finish()
    factors = {name: factor.detach().clone() for name, factor in factors_of(model).items()}
    return factors, float(losses.mean())


def tune_together(
    todo: Sequence[Training], full: bool = False, joint: bool = False, spec: Spec | None = None
) -> list[tuple[Row, float]]:
    """Train all adapters at once; return the results of `tune_one_by_one`, up to rounding.

    The contexts may differ only in the settings of the adapter.
    """
    parts = [_attached(context, seed, full, joint, spec) for context, seed in todo]
    scalings = [
        1.0 if full or spec else lora_of(context.settings.adapter).scaling for context, _ in todo
    ]
    scales = [1.0 if s == scalings[0] else s / scalings[0] for s in scalings]
    model = Together(parts[0][0], [factors_of(model) for model, _ in parts], scales)
    made = [
        recipe(context, part, model.factors, plain, seed)
        for (context, seed), (part, plain) in zip(todo, parts, strict=True)
    ]
    batches = StackedBatches([one.batches for one in made])
    objective = objective_together([one.objective for one in made], batches.shared)
    _train(todo[0][0], made[0], model, objective, batches)
    made[0].finish()
    losses = torch.stack(model.losses).mean(0).tolist()
    return [(model.of(index), loss) for index, loss in enumerate(losses)]


def _train(
    context: StudyContext, made: Recipe, model: nn.Module, objective: Any, batches: Any
) -> Any:
    return context.train(model, batches, objective, made.optimizer, "fine-tuning", made.hooks)


def _attached(
    context: StudyContext, seed: int, full: bool, joint: bool, spec: Spec | None
) -> tuple[nn.Module, Batches]:
    """Return the base with a new adapter and its batches, drawn in the digit study's order.

    Full fine-tuning is an adapter, too: `pl.Delta` trains ΔW of the size of W, and Δb. So losses,
    penalties and routes that compare the model with its base work for both.
    """
    model, generator = context.model(), torch.Generator().manual_seed(seed)
    batches = context.batches(generator, joint)
    kind = pl.Delta() if full else spec or lora_of(context.settings.adapter)
    pl.attach(model, kind, nn.Linear, name=ADAPTER, generator=generator)
    return model, batches


def run_sweep(
    todo: Sequence[Cell],
    folder: Path,
    asked: Row,
    jobs: int = 1,
    say: Callable[[str], None] = print,
) -> RunDirectory:
    """Run the cells that have no rows yet, and return the run.

    All bases are trained first, so that no two jobs train the same base.

    Args:
        todo: the cells, all with the same data and device.
        folder: the run's folder; a stopped run continues from its rows.
        asked: the settings to store with the run.
        jobs: parallel processes, on the back end set by `joblib.parallel_config`.
        say: called with each line of progress.
    """
    first = todo[0].settings
    data = shared_data(first.dataset.data, first.dataset.data_dir)
    environment = {"study": STUDY, **describe(resolve_device(first.place.device), data)}
    with RunDirectory.start(folder, asked, environment, RESULT_KEYS) as run:
        recorded = {key_of(row) for row in run.rows}
        left = [cell for cell in todo if not recorded.issuperset(map(key_of, _keys(cell)))]
        say(f"run      {folder}: {len(todo)} cells, {len(todo) - len(left)} of them done")
        if data.is_small:
            say(f"small    {SMALL_VERSION}")
        for cell, rows in _made(todo, left, jobs, say):
            run.record_all({**row, "commit": environment["commit"]} for row in rows)
            say(f"cell     {cell.name}, base seed {cell.settings.seed}")
    return run


def _made(
    todo: Sequence[Cell], left: Sequence[Cell], jobs: int, say: Callable[[str], None]
) -> Iterator[tuple[Cell, list[Row]]]:
    """Train the cells in `left`, and yield each with its rows as soon as its job ends."""
    from joblib import delayed

    # Group all cells, the finished ones too. A job trains its cells in one stack, and its size can
    # change the last bits, so a resumed sweep must form the same jobs to get the same rows.
    todo_jobs = [job for job in jobs_of(todo) if any(cell in left for cell in job)]
    bases = list(dict.fromkeys(shared_settings(cell.settings) for cell in left))
    for path in _pool(jobs, len(bases))(delayed(_make_base)(base) for base in bases):
        say(f"base     {path}")
    made = _pool(jobs, len(todo_jobs))(delayed(run_job)(job) for job in todo_jobs)
    pairs = zip(todo_jobs, made, strict=True)
    for job, rows_by_cell in progress(pairs, len(todo_jobs), "cells", "job"):
        for cell, rows in zip(job, rows_by_cell, strict=True):
            if cell in left:
                yield cell, rows


def _pool(jobs: int, most: int) -> Any:
    """Return joblib's pool for `most` calls. One call needs no process, which starts slowly."""
    from joblib import Parallel

    return Parallel(n_jobs=min(jobs, max(most, 1)), return_as="generator")


def _make_base(settings: DigitSettings) -> str:
    """Train a base unless it exists; return its line of progress."""
    context = shared_context(settings)
    right = score(context.base_logits, context.test_labels)["accuracy"]
    return f"seed {settings.seed}, {100 * right:.2f} % of {len(context.test_labels):,} images right"


def _keys(cell: Cell) -> Iterator[Row]:
    """Yield the identity of each row of a cell: of its base, and of each seed and strength."""
    common: Row = {"cell": cell.name, "base_seed": cell.settings.seed}
    yield {**common, "stage": "base", "seed": None, "strength": 0.0}
    for seed in cell.settings.adapter_seeds:
        for strength in cell.strengths:
            yield {**common, "stage": "on", "seed": seed, "strength": strength}
