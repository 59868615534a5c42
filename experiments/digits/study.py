"""The digit study: a base, its fine-tuning by several methods, and their checks, as stages.

A stage records rows and saves an adapter. Complete stages are not run again when a run is resumed.
Every fine-tuning starts from the same base. For each adapter seed, all methods get the same images
in the same order, so that they can be compared in pairs.
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
from ..harness.adapters import adapter_path, load_adapter
from ..harness.batches import Batches
from ..harness.environment import RESULT_KEYS, resolve_device
from ..harness.loggers import curve
from ..harness.rundir import RunDirectory, read_json, replace_file
from ..harness.settings import StudyError, result_settings
from ..harness.stages import Stage, run_stages
from ..harness.train import Hook
from .context import StudyContext
from .data import Data, announce, describe, load_data
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

EXPLORED = "explore.json"
PICTURED = 3  # adapters whose images the page has; with those of more, it would be large
ATTACHED = ("off", "on", "merged", "unmerged")
FULL_RATE = 0.1  # learning rate of full fine-tuning / that of the adapter


def stages(settings: DigitSettings) -> Iterator[Stage[StudyContext]]:
    """Yield the stages of a run, in order."""
    lora = lora_of(settings.adapter)
    scrambled = BlogScrambled(settings.adapter.rank, settings.adapter.numerator)
    yield Stage(_key("base", None), ("base",), count_base)
    for seed in settings.adapter_seeds:
        make = partial(tune_attached, "lora", lora, seed)
        yield Stage(_key("lora", seed), ATTACHED, make, f"lora-{seed}")
        if settings.remedied:
            continue  # remedies apply to `lora` only, so the other methods are not comparable
        yield Stage(_key("wrapped", seed), ("wrapped",), partial(tune_wrapped, lora, seed))
        if settings.extras.compat == "blog":
            make = partial(tune_attached, "scrambled", scrambled, seed)
            yield Stage(_key("scrambled", seed), ATTACHED, make, f"scrambled-{seed}")
    if settings.remedied:
        return
    # Nothing depends on the adapter seed if the images do not: there is no random A.
    same = settings.finetuning.order == "blog"
    distinct: Sequence[int | None] = [None] if same else settings.adapter_seeds
    for either in distinct:
        for method in ("full", "joint"):
            yield Stage(_key(method, either), (method,), partial(tune_full, method, either))


def _key(method: str, seed: int | None) -> dict[str, Any]:
    return {"method": method, "seed": seed}


def run_digits(
    settings: DigitSettings, say: Callable[[str], None] = print, data: Data | None = None
) -> RunDirectory:
    """Run the study, or the incomplete stages of a run, and return the run's directory.

    Args:
        settings: the settings of the run, with its folder.
        say: called with each line of progress.
        data: the data set; by default, the one that the settings name is loaded.

    Raises:
        StudyError: the data, the device or the folder cannot be used. The message says why.
    """
    device = resolve_device(settings.place.device)
    data = data or load_data(settings.dataset.data, settings.dataset.data_dir)
    environment = {"study": settings.STUDY, **describe(device, data)}
    folder, asked = Path(settings.folder), result_settings(settings)
    with RunDirectory.start(folder, asked, environment, RESULT_KEYS) as run:
        say(f"run      {run.folder}, on {device}")
        announce(data, say)

        @lru_cache(maxsize=1)
        def prepared() -> StudyContext:
            context = prepare(settings, run, device, data, say)
            show_parameters(context, lora_of(settings.adapter), say)
            return context

        run_stages(run, stages(settings), prepared, say)
        if not explored(run.folder, len(settings.adapter_seeds)):
            explore_adapters(prepared(), data.test.images, run.folder)
    return run


def explored(folder: Path, count: int) -> bool:
    """Return whether explore.json exists, is whole and has this number of adapters."""
    try:
        return len(read_json(folder / EXPLORED, "").get("adapters", ())) == count
    except (FileNotFoundError, StudyError):
        return False


def explore_adapters(context: StudyContext, images: Tensor, folder: Path) -> None:
    """Write explore.json, the data of the interactive page: all adapters at all strengths."""
    model, names = context.model(), list[str]()
    at = Strengths(context.model(), context.test_inputs, context.base_logits)

    def logits(name: str, sites: Sequence[str], strengths: Sequence[float]) -> Tensor:
        scaling = lora_of(context.settings.adapter).scaling
        update = chosen(updates(factors_of(model, name), scaling), sites)
        return at.logits(update, strengths).cpu()

    for seed in context.settings.adapter_seeds:
        names.append(f"seed {seed}")
        load_adapter(model, folder, f"lora-{seed}", names[-1])
    found = explore(
        model,
        [(context.test_inputs, context.test_labels)],
        list("0123456789"),
        tuned=context.tuned,
        images=images if len(images) == len(context.test_labels) else None,
        all_subsets=names,
        pictured=names[:PICTURED],
        mean=True,
        logits=logits,
    )
    replace_file(folder / EXPLORED, json.dumps(found).encode())


def count_base(context: StudyContext) -> None:
    """Record the base. Row: "base"."""
    learned = {"parameters": pl.summary(context.model()).total, **curve(context.base.losses)}
    context.record("base", "base", None, context.base_logits, **learned)


def tune_attached(method: str, spec: pl.kinds.Spec, seed: int, context: StudyContext) -> None:
    """Fine-tune an adapter, save it, and check off, merge and unmerge. Rows: ATTACHED."""
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
    pl.save(model, adapter_path(context.run.folder, f"{method}-{seed}"), ADAPTER)

    on, off = context.evaluate(model), evaluate_off(context, model)
    context.record("off", method, seed, off, **context.compare_to_base(model, off))
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
    """Fine-tune with the remedies in the settings and set the strength; return the losses."""
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
    """Record the distance of merged from on, and whether unmerging restores every bit.

    Rows: "merged", and "unmerged" with the adapter off. `on` are the logits with the adapter on.
    """
    pl.merge(model, ADAPTER)
    merged = context.evaluate(model)
    distance = float((merged - on).abs().max() / on.abs().max())
    context.record("merged", method, seed, merged, distance_from_on=distance)

    pl.unmerge(model)
    same_on = torch.equal(context.evaluate(model), on)
    off = evaluate_off(context, model)
    checks = {**context.compare_to_base(model, off), "same_on_logits": same_on}
    context.record("unmerged", method, seed, off, **checks)


def tune_wrapped(spec: pl.LoRA, seed: int, context: StudyContext) -> None:
    """Fine-tune the base with wrapped layers, including biases. Row: "wrapped"."""
    model, generator = context.model(), torch.Generator().manual_seed(seed)
    batches = context.batches(generator)
    wrap(model, spec, generator)
    trained = [p for p in model.parameters() if p.requires_grad]
    losses = context.fine_tune(model, batches, trained, f"wrapped {seed}")
    learned = {"trainable": sum(p.numel() for p in trained), "ranks": wrapped_ranks(model)}
    context.record("wrapped", "wrapped", seed, context.evaluate(model), **learned, **curve(losses))


def tune_full(method: str, seed: int | None, context: StudyContext) -> None:
    """Fine-tune all weights and biases, on all digits if `method` is "joint". Row: `method`."""
    model, generator = context.model(), torch.Generator().manual_seed(seed or 0)
    batches = context.batches(generator, joint=method == "joint")
    trained = list(model.requires_grad_(True).parameters())
    lr = FULL_RATE * context.settings.finetuning.lr
    losses = context.fine_tune(model, batches, trained, f"{method} {seed or 0}", lr=lr)
    learned = {"trainable": sum(p.numel() for p in trained), "lr": lr, **curve(losses)}
    context.record(method, method, seed, context.evaluate(model), **learned)


def evaluate_off(context: StudyContext, model: nn.Module) -> Tensor:
    """Return the logits of the test images with the adapter off, (n, 10)."""
    with pl.disabled(model, ADAPTER):
        return context.evaluate(model)


def show_parameters(context: StudyContext, spec: pl.kinds.Spec, say: Callable[[str], None]) -> None:
    """Report the number of trainable parameters before and after attaching an adapter."""
    model = context.model()
    before = pl.summary(model).trainable
    # A separate generator, so that the state of torch's global generator does not change.
    attached = pl.attach(model, spec, nn.Linear, name=ADAPTER, generator=torch.Generator())
    share = attached.trainable / attached.total
    say(str(attached))
    say(f"trained  {before:,} parameters before, {attached.trainable:,} now: {share:.2%}")
