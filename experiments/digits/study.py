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
from ..harness.environment import DECIDING, resolve_device
from ..harness.loggers import curve
from ..harness.rundir import RunDirectory, replace_file
from ..harness.settings import deciding
from ..harness.stages import Stage, run_stages
from ..harness.train import Batches, Hook
from .bench import ADAPTER, Bench, prepare
from .data import describe, load_data
from .methods import BlogScrambled, attached_ranks, wrap, wrapped_ranks
from .recipe import answers, factors_of, lora_of, recipe
from .settings import DigitSettings
from .strengths import Strengths, chosen, updates

EXPLORED, EXPLORED_SEEDS = "explore.json", 3
ATTACHED = ("off", "on", "merged", "unmerged")


def stages(settings: DigitSettings) -> Iterator[Stage[Bench]]:
    """Yield what a run consists of, in order."""
    lora = lora_of(settings)
    scrambled = BlogScrambled(settings.rank, settings.numerator)
    yield Stage(_key("base", None), ("base",), count_base)
    for seed in range(settings.seeds):
        yield Stage(_key("lora", seed), ATTACHED, partial(tune_attached, "lora", lora, seed))
        if settings.remedied:
            continue  # the methods beside it are plain: they would be compared with something else
        yield Stage(_key("wrapped", seed), ("wrapped",), partial(tune_wrapped, lora, seed))
        if settings.compat == "blog":
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
    device = resolve_device(settings.device)
    data = load_data(settings.data, settings.data_dir)
    environment = {"study": settings.STUDY, **describe(device, data)}
    run = RunDirectory.start(Path(settings.folder), deciding(settings), environment, DECIDING)
    say(f"run      {run.folder}, on {device}")
    say(f"data     {data.name}: {data.why}")

    @lru_cache(maxsize=1)
    def prepared() -> Bench:
        bench = prepare(settings, run, device, data, say)
        show_parameters(bench, lora_of(settings), say)
        return bench

    run_stages(run, stages(settings), prepared, say)
    if not (run.folder / EXPLORED).exists():
        explore_adapters(prepared(), data.test.images, run.folder)
    return run


def explore_adapters(bench: Bench, images: Tensor, folder: Path) -> None:
    """Write what the report's page lets its reader try: the first adapters, at every strength."""
    model, names = bench.model(), list[str]()
    at = Strengths(bench.model(), bench.test_inputs, bench.base_logits)

    def logits(name: str, sites: Sequence[str], strengths: Sequence[float]) -> Tensor:
        its = updates(factors_of(model, name), lora_of(bench.settings).scaling)
        return at.logits(chosen(its, sites), strengths).cpu()

    for seed in range(min(bench.settings.seeds, EXPLORED_SEEDS)):
        names.append(f"seed {seed}")
        pl.load(model, folder / "adapters" / f"lora-{seed}.safetensors", name=names[-1])
    found = explore(
        model,
        [(bench.test_inputs, bench.test_labels)],
        list("0123456789"),
        tuned=bench.tuned,
        images=images if len(images) == len(bench.test_labels) else None,
        all_subsets=names[:1],
        logits=logits,
    )
    replace_file(folder / EXPLORED, json.dumps(found).encode())


def count_base(bench: Bench) -> None:
    """Record the base itself. Row: "base"."""
    learned = {"parameters": pl.summary(bench.model()).total, **curve(bench.base.losses)}
    bench.record("base", "base", None, bench.base_logits, **learned)


def tune_attached(method: str, spec: pl.kinds.Spec, seed: int, bench: Bench) -> None:
    """Fine-tune an adapter, save it, and prove what can be done with it. Rows: ATTACHED."""
    model, generator = bench.model(), torch.Generator().manual_seed(seed)
    batches = bench.batches(generator)
    attached = pl.attach(model, spec, nn.Linear, name=ADAPTER, generator=generator)
    factors = factors_of(model)
    label = f"{method} {seed}"
    with bench.watched(f"{method}-{seed}") as (hooks, seen):
        if method == "lora" and bench.settings.remedied:
            losses = remedied(bench, model, batches, seed, label, hooks)
        else:
            losses = bench.fine_tune(model, batches, list(factors.values()), label, hooks)
    pl.save(model, bench.run.folder / "adapters" / f"{method}-{seed}.safetensors", ADAPTER)

    on, off = bench.evaluate(model), evaluate_off(bench, model)
    bench.record("off", method, seed, off, **bench.beside_base(model, off))
    learned = {"trainable": attached.trainable, "ranks": attached_ranks(model, ADAPTER)}
    counted = answers(bench, on, seed) if method == "lora" else on
    bench.record("on", method, seed, counted, **learned, **curve(losses), **seen)
    merge_and_unmerge(bench, model, method, seed, on)


def remedied(
    bench: Bench, model: nn.Module, plain: Batches, seed: int, label: str, hooks: list[Hook]
) -> Tensor:
    """Fine-tune with the settings' remedies, set the strength; return the loss of each step."""
    made = recipe(bench, model, factors_of(model), plain, seed)
    losses = bench.train(
        model, made.batches, made.objective, made.optimizer, label, [*made.hooks, *hooks]
    )
    made.finish()
    pl.scale(model, bench.settings.strength, ADAPTER)
    return losses


def merge_and_unmerge(bench: Bench, model: nn.Module, method: str, seed: int, on: Tensor) -> None:
    """Record how far merged is from on, and whether unmerging brings back every bit.

    Rows: "merged"; "unmerged", switched off again.
    """
    pl.merge(model, ADAPTER)
    merged = bench.evaluate(model)
    distance = float((merged - on).abs().max() / on.abs().max())
    bench.record("merged", method, seed, merged, distance_from_on=distance)

    pl.unmerge(model)
    same_on = torch.equal(bench.evaluate(model), on)
    off = evaluate_off(bench, model)
    proofs = {**bench.beside_base(model, off), "same_on_logits": same_on}
    bench.record("unmerged", method, seed, off, **proofs)


def tune_wrapped(spec: pl.LoRA, seed: int, bench: Bench) -> None:
    """Fine-tune the base with its layers wrapped, biases trained too. Row: "wrapped"."""
    model, generator = bench.model(), torch.Generator().manual_seed(seed)
    batches = bench.batches(generator)
    wrap(model, spec, generator)
    trained = [p for p in model.parameters() if p.requires_grad]
    losses = bench.fine_tune(model, batches, trained, f"wrapped {seed}")
    learned = {"trainable": sum(p.numel() for p in trained), "ranks": wrapped_ranks(model)}
    bench.record("wrapped", "wrapped", seed, bench.evaluate(model), **learned, **curve(losses))


def evaluate_off(bench: Bench, model: nn.Module) -> Tensor:
    """Return the test images' logits with the adapter switched off."""
    with pl.disabled(model, ADAPTER):
        return bench.evaluate(model)


def show_parameters(bench: Bench, spec: pl.kinds.Spec, say: Callable[[str], None]) -> None:
    """Say what attaching does to the number of parameters that are trained."""
    model = bench.model()
    before = pl.summary(model).trainable
    # A generator of its own, as for the fine-tunings: torch's global stream is left as it was.
    attached = pl.attach(model, spec, nn.Linear, name=ADAPTER, generator=torch.Generator())
    share = attached.trainable / attached.total
    say(str(attached))
    say(f"trained  {before:,} parameters before, {attached.trainable:,} now: {share:.2%}")
