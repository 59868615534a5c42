"""`python -m benchmarks.rows`: a batch whose rows have adapters of their own, beside PEFT's.

Time over the same model without adapters, inference, rank 16. Outputs of both are held against
each row by itself in float64 before anything is timed; rounds are interleaved.
"""

import argparse
import copy
import json
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import paramlora as pl

from .harness.measure import BOUNDS, now
from .harness.models import feed_forward
from .layers import processor

Run = Callable[[Tensor], Tensor]
RANK = 16


def entries(adapters: int, n: int, width: int, hidden: int, device: str) -> dict[str, Any]:
    """Return the contestants' runs, checked, and x."""
    torch.manual_seed(0)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    base = feed_forward(width, hidden, 2).to(device, dtype).requires_grad_(False)
    x = torch.randn(n, width, device=device, dtype=dtype)
    ids = torch.randint(-1, adapters, (n,))
    model, wrapped, values = _adapted(base, adapters, dtype)
    names = [f"a{i}" if i >= 0 else "__base__" for i in ids.tolist()]

    def routed(x: Tensor) -> Tensor:
        with pl.routed(model, ids):
            return model(x)

    runs: dict[str, Run] = {
        "floor": base,
        "paramlora": routed,
        "PEFT": lambda x: wrapped(x, adapter_names=names),
    }
    expected = _row_by_row(base, values, x, ids)
    for name in ("paramlora", "PEFT"):
        with torch.no_grad():
            error = float((runs[name](x).double() - expected).norm() / expected.norm())
        assert error < BOUNDS[dtype], f"{name} is off by {error:.1e}; not timed"
    return {"runs": runs, "x": x}


def _adapted(base: nn.Module, adapters: int, dtype: torch.dtype) -> tuple[Any, Any, Any]:

    from peft import LoraConfig, get_peft_model

    model, other = copy.deepcopy(base), copy.deepcopy(base)
    paths = [path for path, module in base.named_modules() if isinstance(module, nn.Linear)]
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=paths)
    wrapped = get_peft_model(other, config, adapter_name="a0", autocast_adapter_dtype=False)
    for i in range(1, adapters):
        wrapped.add_adapter(f"a{i}", config, autocast_adapter_dtype=False)
    values = {}
    for i in range(adapters):
        pl.attach(model, pl.LoRA(RANK), name=f"a{i}")
    # The dtype of PEFT's faster setting, so that both do the same arithmetic.
    model.to(dtype)
    with torch.no_grad():
        for i in range(adapters):
            state = pl.state_dict(model, f"a{i}")
            for path in paths:
                A, B = state[f"{path}.weight.A"], state[f"{path}.weight.B"]
                A.normal_(std=A.shape[1] ** -0.5)
                B.normal_(std=0.02)
                layer = wrapped.base_model.model.get_submodule(path)
                layer.lora_A[f"a{i}"].weight.copy_(A)
                layer.lora_B[f"a{i}"].weight.copy_(B)
                values[path, i] = (A.double(), B.double())
    return model.eval(), wrapped.eval(), values


def _row_by_row(base: nn.Module, values: Any, x: Tensor, ids: Tensor) -> Tensor:
    rows = x.double()
    for path, module in base.named_children():
        if isinstance(module, nn.Linear):
            W, b = module.weight.double(), module.bias.double()
            updated = []
            for row, i in zip(rows, ids.tolist(), strict=True):
                A, B = values[path, i] if i >= 0 else (None, None)
                updated.append(W @ row + b + (0 if A is None else B @ (A @ row)))
            rows = torch.stack(updated)
        else:
            rows = module(rows)
    return rows


@torch.no_grad()
def measure(adapters: int, n: int, rounds: int, device: str) -> list[dict[str, Any]]:
    """Return a row for each contestant."""
    width, hidden = (256, 1024) if device == "cpu" else (4096, 14336)
    made = entries(adapters, n, width, hidden, device)
    seconds: dict[str, list[float]] = {name: [] for name in made["runs"]}
    for _ in range(rounds + 2):
        for name, run in made["runs"].items():
            start = now(device)
            for _ in range(10):
                run(made["x"])
            seconds[name].append((now(device) - start) / 10)
    return [
        {
            "suite": f"{device}-rows",
            "adapters": adapters,
            "n": n,
            "contestant": name,
            "median_s": median(taken[2:]),
            "min_s": min(taken[2:]),
            "ratio": median(taken[2:]) / median(seconds["floor"][2:]),
            "rounds": rounds,
            "torch": torch.__version__,
            "machine": processor() if device == "cpu" else torch.cuda.get_device_name(),
        }
        for name, taken in seconds.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rows", description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--adapters", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 64, 512])
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"), help="a folder")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    cells = [(adapters, n) for adapters in options.adapters for n in options.batches]
    lines = [
        f"{'adapters':10}{'n':>6}{'floor ms':>10}{'paramlora':>11}{'PEFT':>8}{'ours / PEFT':>13}"
    ]
    with open(options.out / "results.jsonl", "a") as file:
        for adapters, n in tqdm(cells, unit="cell", disable=None):
            rows = measure(adapters, n, options.rounds, options.device)
            file.writelines(json.dumps(row) + "\n" for row in rows)
            by = {row["contestant"]: row for row in rows}
            own, peer = by["paramlora"]["ratio"], by["PEFT"]["ratio"]
            floor = by["floor"]["median_s"] * 1e3
            share = (own - 1) / (peer - 1)
            lines.append(f"{adapters:<10}{n:6}{floor:10.3f}{own:11.2f}{peer:8.2f}{share:13.2f}")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
