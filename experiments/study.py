"""The digit study: a base, three ways to fine-tune it, and the proofs, as a list of stages.

A stage makes rows and an adapter's file; what it made before an interruption is not made again.
Every fine-tuning starts from the same base, and for one adapter seed all methods see the same
images in the same order, so that they can be compared in pairs.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import paramlora as pl

from .bench import Bench, curve, prepare
from .data import load_data
from .environment import DECIDING, describe, resolve_device
from .methods import BlogScrambled, attached_ranks, wrap, wrapped_ranks
from .rundir import RunDirectory
from .settings import DigitSettings, deciding
from .stages import Stage, run_stages

ADAPTER = "digits"
ATTACHED = ("off", "on", "merged", "unmerged")


def stages(settings: DigitSettings) -> Iterator[Stage[Bench]]:
    """Yield what a run consists of, in order."""
    lora = lora_of(settings)
    scrambled = BlogScrambled(settings.rank, settings.alpha)
    yield Stage(_key("base", None), ("base",), count_base)
    for seed in range(settings.seeds):
        yield Stage(_key("lora", seed), ATTACHED, partial(tune_attached, "lora", lora, seed))
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
    environment = describe(device, data)
    run = RunDirectory.start(Path(settings.folder), deciding(settings), environment, DECIDING)
    say(f"run      {run.folder}, on {device}")
    say(f"data     {data.name}: {data.why}")

    def prepared() -> Bench:
        bench = prepare(settings, run, device, data, say)
        show_parameters(bench, lora_of(settings), say)
        return bench

    run_stages(run, stages(settings), prepared, say)
    return run


def count_base(bench: Bench) -> None:
    """Record the base itself. Row: "base"."""
    learned = {"parameters": pl.summary(bench.model()).total, **curve(bench.base.losses)}
    bench.record("base", "base", None, bench.base_logits, **learned)


def tune_attached(method: str, spec: pl.Spec, seed: int, bench: Bench) -> None:
    """Fine-tune an adapter, save it, and prove what can be done with it. Rows: ATTACHED."""
    model, generator = bench.model(), torch.Generator().manual_seed(seed)
    batches = bench.batches(generator)
    attached = pl.attach(model, spec, nn.Linear, name=ADAPTER, generator=generator)
    parameters = pl.parameters(model, ADAPTER)
    losses = bench.fine_tune(model, batches, parameters, f"{method} {seed}")
    pl.save(model, bench.run.folder / "adapters" / f"{method}-{seed}.safetensors", ADAPTER)

    on, off = bench.evaluate(model), evaluate_off(bench, model)
    bench.record("off", method, seed, off, **bench.beside_base(model, off))
    learned = {"trainable": attached.trainable, "ranks": attached_ranks(model, ADAPTER)}
    bench.record("on", method, seed, on, **learned, **curve(losses))
    merge_and_unmerge(bench, model, method, seed, on)


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


def show_parameters(bench: Bench, spec: pl.Spec, say: Callable[[str], None]) -> None:
    """Say what attaching does to the number of parameters that are trained."""
    model = bench.model()
    before = pl.summary(model).trainable
    # A generator of its own, as for the fine-tunings: torch's global stream is left as it was.
    attached = pl.attach(model, spec, nn.Linear, name=ADAPTER, generator=torch.Generator())
    share = attached.trainable / attached.total
    say(str(attached))
    say(f"trained  {before:,} parameters before, {attached.trainable:,} now: {share:.2%}")


def lora_of(settings: DigitSettings) -> pl.LoRA:
    """Return the adapter that the settings ask for."""
    return pl.LoRA(settings.rank, settings.alpha, init=settings.init)
