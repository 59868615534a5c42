"""A batch whose rows use different adapters: `pl.routed` beside PEFT's `adapter_names`.

The figures are times over the same model without adapters, in inference with rank 16. Before they
are timed in interleaved rounds, the outputs of both are checked against each row by itself in
float64. On a GPU the model is in bfloat16, on a CPU smaller and in float32.

With --train, adapters that are trained at once are compared with as many separate trainings
(routed_training.py).
"""

import argparse
import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import paramlora as pl

from . import routed_training
from .harness import options as shared
from .harness.cases import BOUNDS, relative_error
from .harness.contestants import linears
from .harness.models import feed_forward
from .harness.results import Row, Table, append, machine, overhead_share, summarized
from .harness.timing import interleaved

Run = Callable[[Tensor], Tensor]
Values = dict[tuple[str, int], tuple[Tensor, Tensor]]
RANK = 16
REPEATS = 10  # forwards of a contestant in each round
EXAMPLES = """\
examples:
  python -m benchmarks routed
  python -m benchmarks routed --device cpu --adapters 8 --batches 8 --rounds 3
  python -m benchmarks routed --train --device cpu --clock processor --threads 1
  python -m benchmarks routed --train --models minilm --checkpoint DIR --data-dir DIR
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this subcommand."""
    what = parser.add_argument_group("what to measure").add_argument
    text = "numbers of adapters (default: 8 32; 16 64 with --train)"
    what("--adapters", type=int, nargs="+", help=text)
    text = "rows in a batch (default: 8 64 512); with --train, of each adapter"
    what("--batches", type=int, nargs="+", help=text)
    routed_training.add_options(parser.add_argument_group("training at once").add_argument)
    how = parser.add_argument_group("how to measure").add_argument
    shared.add_device(how)
    shared.add_rounds(how, 15, f"interleaved rounds per cell, of {REPEATS} forwards each")
    shared.add_clock(how)
    how("--threads", type=int, metavar="N", help="threads on the CPU (default: torch's)")
    shared.add_folder(parser.add_argument_group("results").add_argument)


def run(options: argparse.Namespace) -> None:
    """Measure all cells, write their rows and print a table."""
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.train:
        routed_training.run(options)
        return
    counts, batches = options.adapters or [8, 32], options.batches or [8, 64, 512]
    cells = [(adapters, n) for adapters in counts for n in batches]
    lines = []
    for adapters, n in tqdm(cells, unit="cell", disable=None):
        rows = measure(adapters, n, options.rounds, options.device, options.clock)
        append(options.out / "results.jsonl", rows)
        floor, own, peer = rows
        lines.append(
            [
                f"{adapters}",
                f"{n}",
                f"{floor['median_s'] * 1e3:.3f}",
                f"{own['ratio']:.2f}",
                f"{peer['ratio']:.2f}",
                overhead_share(own["ratio"], peer["ratio"]),
            ]
        )
    head = ["adapters", "rows", "floor ms", "paramlora", "PEFT", "share of\nPEFT's"]
    print(Table(head, lines).text())


@torch.no_grad()
def measure(adapters: int, n: int, rounds: int, device: str, clock: str = "wall") -> list[Row]:
    """Return the rows of the floor, paramlora and PEFT."""
    width, hidden = (256, 1024) if device == "cpu" else (4096, 14336)
    runs, x = prepare(adapters, n, width, hidden, device)
    seconds = interleaved(
        {name: partial(run, x) for name, run in runs.items()},
        rounds,
        repeats=REPEATS,
        warm_up=2,
        device=device,
        clock=clock,
    )
    floor = summarized(seconds["floor"])["median_s"]
    rows = []
    for name, values in seconds.items():
        own = summarized(values)
        about = {"suite": f"{device}-rows", "adapters": adapters, "n": n, "contestant": name}
        version = {"torch": torch.__version__, "machine": machine(device)}
        rows.append(about | own | {"ratio": own["median_s"] / floor} | version)
    return rows


def prepare(
    adapters: int, n: int, width: int, hidden: int, device: str
) -> tuple[dict[str, Run], Tensor]:
    """Return the forwards of the floor, paramlora and PEFT, and their input x, (n, width).

    Raises:
        AssertionError: if an output differs from the reference by more than rounding explains.
    """
    torch.manual_seed(0)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    base = feed_forward(width, hidden, 2).to(device, dtype).requires_grad_(False)
    x = torch.randn(n, width, device=device, dtype=dtype)
    ids = torch.randint(-1, adapters, (n,))  # -1: the row uses no adapter
    model, wrapped, values = _adapted(base, adapters, dtype)
    names = [f"a{i}" if i >= 0 else "__base__" for i in ids.tolist()]

    def routed(x: Tensor) -> Tensor:
        with pl.routed(model, ids):
            return model(x)

    def peft(x: Tensor) -> Tensor:
        return wrapped(x, adapter_names=names)

    expected = _row_by_row(base, values, x, ids)
    for name, forward in (("paramlora", routed), ("PEFT", peft)):
        with torch.no_grad():
            error = relative_error(forward(x), expected)
        assert error < BOUNDS[dtype], f"{name} is off by {error:.1e}; not timed"
    return {"floor": base, "paramlora": routed, "PEFT": peft}, x


def _adapted(base: nn.Module, adapters: int, dtype: torch.dtype) -> tuple[nn.Module, Any, Values]:
    """Return paramlora's and PEFT's model with the same adapters, and their factors in float64."""
    from peft import LoraConfig, get_peft_model

    model, other = copy.deepcopy(base), copy.deepcopy(base)
    paths = list(linears(base))
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=paths)
    wrapped = get_peft_model(other, config, adapter_name="a0", autocast_adapter_dtype=False)
    for i in range(1, adapters):
        wrapped.add_adapter(f"a{i}", config, autocast_adapter_dtype=False)
    for i in range(adapters):
        pl.attach(model, pl.LoRA(RANK), name=f"a{i}", activate="no")
    # One dtype, the faster setting of PEFT, so that both do the same arithmetic.
    model.to(dtype)
    values: Values = {}
    with torch.no_grad():
        for i in range(adapters):
            state = pl.state_dict(model, f"a{i}")
            for path in paths:
                A, B = state[f"{path}.weight.A"], state[f"{path}.weight.B"]  # (r, k), (m, r)
                A.normal_(std=A.shape[1] ** -0.5)
                B.normal_(std=0.02)
                layer = wrapped.base_model.model.get_submodule(path)
                layer.lora_A[f"a{i}"].weight.copy_(A)
                layer.lora_B[f"a{i}"].weight.copy_(B)
                values[path, i] = (A.double(), B.double())
    return model.eval(), wrapped.eval(), values


def _row_by_row(base: nn.Module, values: Values, x: Tensor, ids: Tensor) -> Tensor:
    """Return the outputs for x, (n, width), each row computed by itself in float64."""
    rows = x.double()
    for path, module in base.named_children():
        if isinstance(module, nn.Linear):
            W, b = module.weight.double(), module.bias.double()
            updated = []
            for row, i in zip(rows, ids.tolist(), strict=True):
                y = W @ row + b
                if i >= 0:
                    A, B = values[path, i]
                    y = y + B @ (A @ row)
                updated.append(y)
            rows = torch.stack(updated)
        else:
            rows = module(rows)
    return rows
