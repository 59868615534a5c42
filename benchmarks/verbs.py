"""`python -m benchmarks.verbs`: switching, scaling and merging on 224 layers, beside PEFT's.

Each verb is timed in interleaved rounds, both libraries in each, on models of one shape. A row for
each goes to `results.jsonl`.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

import paramlora as pl

from .harness.measure import now
from .layers import processor

LAYERS = 224
Verbs = dict[str, Callable[[], object]]


def model(width: int, dtype: torch.dtype) -> nn.Module:
    """32 blocks of seven linear layers, as a transformer of 8 B parameters has."""
    blocks = [nn.Sequential(*[nn.Linear(width, width) for _ in range(7)]) for _ in range(32)]
    return nn.Sequential(*blocks).to(dtype).requires_grad_(False)


def ours(width: int, dtype: torch.dtype, adapters: int) -> Verbs:
    adapted = model(width, dtype)
    for i in range(adapters):
        pl.attach(adapted, pl.LoRA(rank=16), name=f"a{i}")
    pl.disable(adapted)
    pl.enable(adapted, "a0")

    def switch() -> None:
        # To the other one and back, so that every round does the same.
        for here, there in (("a0", "a1"), ("a1", "a0")):
            pl.disable(adapted, here)
            pl.enable(adapted, there)

    def using() -> None:
        with pl.using(adapted, "a1"):
            pass

    def context() -> None:
        with pl.disabled(adapted):
            pass

    return {
        "switch": switch,
        "using": using,
        "disabled": context,
        "scale": lambda: pl.scale(adapted, 0.5, "a0"),
        "merge": lambda: pl.merge(adapted),
        "unmerge": lambda: pl.unmerge(adapted),
    }


def peft(width: int, dtype: torch.dtype, adapters: int) -> Verbs:
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import LoraLayer

    base = model(width, dtype)
    paths = [path for path, module in base.named_modules() if isinstance(module, nn.Linear)]
    config = LoraConfig(r=16, lora_alpha=16, target_modules=paths)
    wrapped = get_peft_model(base, config, adapter_name="a0")
    for i in range(1, adapters):
        wrapped.add_adapter(f"a{i}", config)

    def switch() -> None:
        wrapped.set_adapter("a1")
        wrapped.set_adapter("a0")

    def context() -> None:
        with wrapped.disable_adapter():
            pass

    def scale() -> None:
        # As its users write it: there is no verb for a model.
        for module in wrapped.modules():
            if isinstance(module, LoraLayer):
                module.set_scale("a0", 0.5)

    return {
        "switch": switch,
        # It has no context for this: there and back is all there is.
        "using": switch,
        "disabled": context,
        "scale": scale,
        "merge": lambda: wrapped.merge_adapter(["a0"]),
        "unmerge": lambda: wrapped.unmerge_adapter(),
    }


def measure(
    adapters: int, width: int, dtype: torch.dtype, rounds: int, clock: str
) -> list[dict[str, Any]]:
    """Return a row for each library and verb."""
    contestants = {"paramlora": ours(width, dtype, adapters), "PEFT": peft(width, dtype, adapters)}
    seconds: dict[tuple[str, str], list[float]] = {}
    for _ in tqdm(range(rounds + 1), desc=f"{adapters} adapters", unit="round", disable=None):
        for name, verbs in contestants.items():
            for verb, run in verbs.items():
                start = now(clock)
                run()
                seconds.setdefault((name, verb), []).append(now(clock) - start)
    # The first round warms up.
    return [
        {
            "suite": "verbs",
            "layers": LAYERS,
            "adapters": adapters,
            "width": width,
            "dtype": str(dtype).removeprefix("torch."),
            "verb": verb,
            "contestant": name,
            "median_s": median(taken[1:]),
            "min_s": min(taken[1:]),
            "rounds": rounds,
            "clock": clock,
            "torch": torch.__version__,
            "machine": processor(),
        }
        for (name, verb), taken in seconds.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.verbs", description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--width", type=int, default=512, help="of each layer")
    parser.add_argument("--adapters", type=int, nargs="+", default=[2, 16])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument(
        "--clock",
        default="wall",
        choices=["wall", "processor"],
        help="processor: its time, on a machine that others use as well",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"), help="a folder")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    print(f"{'adapters':10}{'verb':12}{'paramlora ms':>14}{'PEFT ms':>12}{'share':>10}")
    for adapters in options.adapters:
        dtype = getattr(torch, options.dtype)
        rows = measure(adapters, options.width, dtype, options.rounds, options.clock)
        with open(options.out / "results.jsonl", "a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        taken = {(row["contestant"], row["verb"]): row["median_s"] * 1e3 for row in rows}
        for verb in dict.fromkeys(row["verb"] for row in rows):
            own, peer = taken["paramlora", verb], taken["PEFT", verb]
            print(f"{adapters:<10}{verb:12}{own:14.3f}{peer:12.3f}{own / peer:10.3f}")


if __name__ == "__main__":
    main()
