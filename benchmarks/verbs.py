"""A forward, switching, scaling and merging on 224 layers, beside PEFT.

The model has the layers of a transformer of 8 B parameters, with the width that `--width` gives.
Both libraries are timed in interleaved rounds. Each verb and library gives a row in results.jsonl.
"""

import argparse
from collections.abc import Callable

import torch
from torch import nn
from tqdm import tqdm

import paramlora as pl

from .harness import options as shared
from .harness.contestants import linears
from .harness.results import Row, Table, append, machine, summarized
from .harness.timing import interleaved

BLOCKS, PER_BLOCK = 32, 7
RANK = 16
Verbs = dict[str, Callable[[], object]]
EXAMPLES = """\
examples:
  python -m benchmarks verbs --clock processor
  python -m benchmarks verbs --dtype bfloat16 --adapters 2
  python -m benchmarks verbs --width 64 --adapters 2 --rounds 3
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this subcommand."""
    what = parser.add_argument_group("what to measure").add_argument
    what("--width", type=int, default=512, help="width of each layer")
    what("--adapters", type=int, nargs="+", default=[2, 16], help="numbers of adapters, from 2 on")
    what("--dtype", default="float32", choices=["float32", "bfloat16"], help="dtype of the model")
    how = parser.add_argument_group("how to measure").add_argument
    shared.add_rounds(how, 15, "interleaved rounds, after one to warm up")
    shared.add_clock(how)
    shared.add_folder(parser.add_argument_group("results").add_argument)


def run(options: argparse.Namespace) -> None:
    """Measure all verbs, write their rows and print a table."""
    dtype = getattr(torch, options.dtype)
    lines = []
    for adapters in tqdm(options.adapters, desc="adapters", disable=None):
        rows = measure(adapters, options.width, dtype, options.rounds, options.clock)
        append(options.out / "results.jsonl", rows)
        taken = {(row["contestant"], row["verb"]): row["median_s"] * 1e3 for row in rows}
        for verb in dict.fromkeys(row["verb"] for row in rows):
            own, peer = taken["paramlora", verb], taken["PEFT", verb]
            cells = [f"{adapters}", f"{own:.3f}", f"{peer:.3f}", f"{own / peer:.3f}"]
            lines.append([verb, *cells])
    head = ["verb", "adapters", "paramlora ms", "PEFT ms", "paramlora / PEFT"]
    print(Table(head, lines).text())


def measure(adapters: int, width: int, dtype: torch.dtype, rounds: int, clock: str) -> list[Row]:
    """Return a row for each library and verb."""
    verbs = {
        "paramlora": paramlora_verbs(width, dtype, adapters),
        "PEFT": peft_verbs(width, dtype, adapters),
    }
    runs = {(name, verb): act for name, acts in verbs.items() for verb, act in acts.items()}
    seconds = interleaved(
        runs, rounds, warm_up=1, clock=clock, shuffle=False
    )  # merge, then unmerge
    return [
        {
            "suite": "verbs",
            "layers": BLOCKS * PER_BLOCK,
            "adapters": adapters,
            "width": width,
            "dtype": str(dtype).removeprefix("torch."),
            "verb": verb,
            "contestant": name,
            **summarized(values),
            "clock": clock,
            "torch": torch.__version__,
            "machine": machine("cpu"),
        }
        for (name, verb), values in seconds.items()
    ]


def layers(width: int, dtype: torch.dtype) -> nn.Module:
    """Return 32 blocks of seven linear layers."""
    blocks = [
        nn.Sequential(*[nn.Linear(width, width) for _ in range(PER_BLOCK)]) for _ in range(BLOCKS)
    ]
    return nn.Sequential(*blocks).to(dtype).requires_grad_(False)


def paramlora_verbs(width: int, dtype: torch.dtype, adapters: int) -> Verbs:
    """Return paramlora's verbs on a new model whose adapter a0 is enabled."""
    adapted = layers(width, dtype)
    for i in range(adapters):
        pl.attach(adapted, pl.LoRA(RANK), name=f"a{i}")
    pl.activate(adapted, "a0")
    x = torch.randn(1, width, dtype=dtype)

    def switch() -> None:
        # To a1 and back, so that every call does the same.
        pl.activate(adapted, "a1")
        pl.activate(adapted, "a0")

    def using() -> None:
        with pl.using(adapted, "a1"):
            pass

    def disabled() -> None:
        with pl.disabled(adapted):
            pass

    return {
        "forward": torch.no_grad()(lambda: adapted(x)),
        "switch": switch,
        "using": using,
        "disabled": disabled,
        "scale": lambda: pl.scale(adapted, 0.5, "a0"),
        "merge": lambda: pl.merge(adapted),
        "unmerge": lambda: pl.unmerge(adapted),
    }


def peft_verbs(width: int, dtype: torch.dtype, adapters: int) -> Verbs:
    """Return PEFT's counterparts of the verbs on a new model."""
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import LoraLayer

    base = layers(width, dtype)
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(linears(base)))
    wrapped = get_peft_model(base, config, adapter_name="a0")
    for i in range(1, adapters):
        wrapped.add_adapter(f"a{i}", config)
    x = torch.randn(1, width, dtype=dtype)

    def switch() -> None:
        wrapped.set_adapter("a1")
        wrapped.set_adapter("a0")

    def disabled() -> None:
        with wrapped.disable_adapter():
            pass

    def scale() -> None:
        # PEFT has no function for a whole model; its users write this loop.
        for module in wrapped.modules():
            if isinstance(module, LoraLayer):
                module.set_scale("a0", 0.5)

    return {
        "forward": torch.no_grad()(lambda: wrapped(x)),
        "switch": switch,
        # PEFT has no context manager for another adapter; the closest is to switch there and back.
        "using": switch,
        "disabled": disabled,
        "scale": scale,
        "merge": lambda: wrapped.merge_adapter(["a0"]),
        "unmerge": lambda: wrapped.unmerge_adapter(),
    }
