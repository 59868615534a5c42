"""The digit study: a base, three ways to fine-tune it, and the proofs, as a list of stages.

A stage makes rows and an adapter's file; what it made before an interruption is not made again.
Every fine-tuning starts from the same base, and for one adapter seed all methods see the same
images in the same order, so that they can be compared in pairs.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import paramlora as pl

from ..analysis.explore import explore
from ..harness.batches import Batches
from ..harness.environment import RESULT_KEYS, resolve_device
from ..harness.loggers import curve
from ..harness.rundir import RunDirectory, replace_file
from ..harness.settings import result_settings
from ..harness.stages import Stage, run_stages
from ..harness.train import Hook
from .context import StudyContext
from .data import describe, load_data
from .methods import (
    ADAPTER,
    BlogScrambled,
    attached_ranks,
    factors_of,
    lora_of,
    wrap,
    wrapped_ranks,
)
from .remedies.recipe import answers, recipe
from .settings import DigitSettings
from .shared import prepare
from .strengths import Strengths, chosen, updates

EXPLORED, EXPLORED_SEEDS = "explore.json", 3
ATTACHED = ("off", "on", "merged", "unmerged")


def stages(settings: DigitSettings) -> Iterator[Stage[StudyContext]]:
    """Yield what a run consists of, in order."""
    lora = lora_of(settings.adapter)
    scrambled = BlogScrambled(settings.adapter.rank, settings.adapter.numerator)
    yield Stage(_key("base", None), ("base",), count_base)
    for seed in range(settings.seeds):
        yield Stage(_key("lora", seed), ATTACHED, partial(tune_attached, "lora", lora, seed))
        if settings.remedied:
            continue  # the methods beside it are plain: they would be compared with something else
        yield Stage(_key("wrapped", seed), ("wrapped",), partial(tune_wrapped, lora, seed))
        if settings.extras.compat == "blog":
            make = partial(tune_attached, "scrambled", scrambled, seed)
            yield Stage(_key("scrambled", seed), ATTACHED, make)


def _key(method: str, seed: int | None) -> dict[str, Any]:
    return {"method": method, "seed": seed}


def run_digits(settings: DigitSettings, say: Callable[[str], None] = print) -> RunDirectory:
    """Run the study, or what is left of it, and return its directory.

    Args:
        settings: what to run, and where.
        say: gets each line of what happens.

    Raises:
        StudyError: data, device or folder cannot be used; the message says why.
    """
    device = resolve_device(settings.place.device)
    data = load_data(settings.dataset.data, settings.dataset.data_dir)
    environment = {"study": settings.STUDY, **describe(device, data)}
    run = RunDirectory.start(
        Path(settings.folder), result_settings(settings), environment, RESULT_KEYS
    )
    say(f"run      {run.folder}, on {device}")
    say(f"data     {data.name}: {data.why}")

    @lru_cache(maxsize=1)
    def prepared() -> StudyContext:
        context = prepare(settings, run, device, data, say)
        show_parameters(context, lora_of(settings.adapter), say)
        return context

    run_stages(run, stages(settings), prepared, say)
    if not (run.folder / EXPLORED).exists():
        explore_adapters(prepared(), data.test.images, run.folder)
    return run


def explore_adapters(context: StudyContext, images: Tensor, folder: Path) -> None:
    """Write what the report's page lets its reader try: the first adapters, at every strength."""
    model, names = context.model(), list[str]()
    at = Strengths(context.model(), context.test_inputs, context.base_logits)

    def logits(name: str, sites: Sequence[str], strengths: Sequence[float]) -> Tensor:
        its = updates(factors_of(model, name), lora_of(context.settings.adapter).scaling)
        return at.logits(chosen(its, sites), strengths).cpu()

    for seed in range(min(context.settings.seeds, EXPLORED_SEEDS)):
        names.append(f"seed {seed}")
        pl.load(model, folder / "adapters" / f"lora-{seed}.safetensors", name=names[-1])
    found = explore(
        model,
        [(context.test_inputs, context.test_labels)],
        list("0123456789"),
        tuned=context.tuned,
        images=images if len(images) == len(context.test_labels) else None,
        all_subsets=names[:1],
        logits=logits,
    )
    replace_file(folder / EXPLORED, json.dumps(found).encode())


def count_base(context: StudyContext) -> None:
    """Record the base itself. Row: "base"."""
    learned = {"parameters": pl.summary(context.model()).total, **curve(context.base.losses)}
    context.record("base", "base", None, context.base_logits, **learned)


def tune_attached(method: str, spec: pl.kinds.Spec, seed: int, context: StudyContext) -> None:
    """Fine-tune an adapter, save it, and prove what can be done with it. Rows: ATTACHED."""
    model, generator = context.model(), torch.Generator().manual_seed(seed)
    batches = context.batches(generator)
    attached = pl.attach(model, spec, nn.Linear, name=ADAPTER, generator=generator)
    factors = factors_of(model)
    label = f"{method} {seed}"
    with context.watched(f"{method}-{seed}") as (hooks, seen):
        if method == "lora" and context.settings.remedied:
            losses = remedied(context, model, batches, seed, label, hooks)
        else:
            losses = context.fine_tune(model, batches, list(factors.values()), label, hooks)
    pl.save(model, context.run.folder / "adapters" / f"{method}-{seed}.safetensors", ADAPTER)

    on, off = context.evaluate(model), evaluate_off(context, model)
    context.record("off", method, seed, off, **context.beside_base(model, off))
    learned = {"trainable": attached.trainable, "ranks": attached_ranks(model, ADAPTER)}
    counted = answers(context, on, seed) if method == "lora" else on
    context.record("on", method, seed, counted, **learned, **curve(losses), **seen)
    merge_and_unmerge(context, model, method, seed, on)


def remedied(
    context: StudyContext,
    model: nn.Module,
    plain: Batches,
    seed: int,
    label: str,
    hooks: list[Hook],
) -> Tensor:
    """Fine-tune with the settings' remedies, set the strength; return the loss of each step."""
    made = recipe(context, model, factors_of(model), plain, seed)
    losses = context.train(
        model, made.batches, made.objective, made.optimizer, label, [*made.hooks, *hooks]
    )
    made.finish()
    pl.scale(model, context.settings.remedies.strength, ADAPTER)
    return losses


def merge_and_unmerge(
    context: StudyContext, model: nn.Module, method: str, seed: int, on: Tensor
) -> None:
    """Record how far merged is from on, and whether unmerging brings back every bit.

    Rows: "merged"; "unmerged", switched off again.
    """
    pl.merge(model, ADAPTER)
    merged = context.evaluate(model)
    distance = float((merged - on).abs().max() / on.abs().max())
    context.record("merged", method, seed, merged, distance_from_on=distance)

    pl.unmerge(model)
    same_on = torch.equal(context.evaluate(model), on)
    off = evaluate_off(context, model)
    checks = {**context.beside_base(model, off), "same_on_logits": same_on}
    context.record("unmerged", method, seed, off, **checks)


def tune_wrapped(spec: pl.LoRA, seed: int, context: StudyContext) -> None:
    """Fine-tune the base with its layers wrapped, biases trained too. Row: "wrapped"."""
    model, generator = context.model(), torch.Generator().manual_seed(seed)
    batches = context.batches(generator)
    wrap(model, spec, generator)
    trained = [p for p in model.parameters() if p.requires_grad]
    losses = context.fine_tune(model, batches, trained, f"wrapped {seed}")
    learned = {"trainable": sum(p.numel() for p in trained), "ranks": wrapped_ranks(model)}
    context.record("wrapped", "wrapped", seed, context.evaluate(model), **learned, **curve(losses))


def evaluate_off(context: StudyContext, model: nn.Module) -> Tensor:
    """Return the test images' logits with the adapter switched off."""
    with pl.disabled(model, ADAPTER):
        return context.evaluate(model)


def show_parameters(context: StudyContext, spec: pl.kinds.Spec, say: Callable[[str], None]) -> None:
    """Say what attaching does to the number of parameters that are trained."""
    model = context.model()
    before = pl.summary(model).trainable
    # A generator of its own, as for the fine-tunings: torch's global stream is left as it was.
    attached = pl.attach(model, spec, nn.Linear, name=ADAPTER, generator=torch.Generator())
    share = attached.trainable / attached.total
    say(str(attached))
    say(f"trained  {before:,} parameters before, {attached.trainable:,} now: {share:.2%}")
