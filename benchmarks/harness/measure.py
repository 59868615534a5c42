"""Checking contestants against float64, then timing them in interleaved rounds.

    overhead = time / time of the floor − 1

The floor is the same model, frozen, no adapter, with the gradient of its input computed.
"""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .contestants import Contestant, Factors, give, linears
from .models import Cell

Values = dict[str, tuple[Tensor, Tensor]]

# Relative errors, as ‖found − reference‖ / ‖reference‖, that a dtype's rounding explains.
BOUNDS = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 2e-2}


@dataclass
class Entry:
    """A contestant that is ready to be timed in one cell."""

    contestant: Contestant
    model: nn.Module
    factors: Factors
    run: Callable[[Tensor], Tensor]


@dataclass
class Case:
    """A cell with its base model, its input, and the factors that all contestants get."""

    cell: Cell
    base: nn.Module
    x: Tensor
    values: Values
    alpha: float

    @classmethod
    def of(cls, cell: Cell, device: str) -> "Case":
        torch.manual_seed(0)
        base = cell.model().to(device, cell.dtype).requires_grad_(False)
        x = torch.randn(cell.shape, device=device, dtype=cell.dtype)
        values = {
            path: (
                torch.randn(cell.rank, layer.in_features, device=device) / cell.rank,
                torch.randn(layer.out_features, cell.rank, device=device) * 0.02,
            )
            for path, layer in linears(base).items()
        }
        return cls(cell, base, x, values, 2.0 * cell.rank)

    def enter(self, contestant: Contestant, mode: str) -> Entry:
        """Return a contestant on a copy of the base; mode: "eager", "compiled" or "graphs"."""
        model, factors = contestant.build(copy.deepcopy(self.base), self.cell.rank, self.alpha)
        give(factors, self.values)
        if contestant.then is not None:
            contestant.then(model)
        run: Callable[[Tensor], Tensor] = model
        if mode != "eager":
            plan = "reduce-overhead" if mode == "graphs" else "default"
            run = torch.compile(model, dynamic=False, mode=plan)
        if self.cell.autocast is not None:
            run = torch.autocast(self.x.device.type, self.cell.autocast)(run)
        return Entry(contestant, model, factors, run)


def train_step(entry: Entry, x: Tensor) -> Tensor:
    """Run forward and backward; the gradient of the input is wanted, as within a network."""
    x.grad = None
    for pair in entry.factors.values():
        for factor in pair:
            factor.grad = None
    y = entry.run(x)
    y.backward(torch.ones_like(y))
    return y


@torch.no_grad()
def infer(entry: Entry, x: Tensor) -> Tensor:
    return entry.run(x)


def check(case: Case, entry: Entry) -> float:
    """Return the largest relative error of outputs and gradients against float64 on dense weights.

    Raises:
        AssertionError: it is above what the dtype's rounding explains.
    """
    x = case.x.clone().requires_grad_()
    y = train_step(entry, x)
    reference = copy.deepcopy(case.base).double()
    s = case.alpha / case.cell.rank
    if entry.factors and not entry.contestant.off:
        for path, layer in linears(reference).items():
            A, B = (value.double() for value in case.values[path])
            layer.weight = nn.Parameter(layer.weight + s * B @ A)
    x64 = case.x.double().requires_grad_()
    y64 = reference(x64)
    y64.backward(torch.ones_like(y64))
    pairs: list[Any] = [(y, y64), (x.grad, x64.grad)]
    for path, (A, B) in entry.factors.items() if entry.contestant.learned else ():
        dW = reference.get_parameter(f"{path}.weight").grad
        assert dW is not None
        A64, B64 = (value.double() for value in case.values[path])
        pairs += [(A.grad, s * B64.T @ dW), (B.grad, s * dW @ A64.T)]
    worst = max(
        float((a.detach().double() - b.detach()).norm() / b.detach().norm()) for a, b in pairs
    )
    assert worst < BOUNDS[case.cell.products], (
        f"{entry.contestant.name} is off by {worst:.1e} in {case.cell}; not timed"
    )
    return worst


def timed(
    entries: list[Entry],
    x: Tensor,
    step: Callable[[Entry, Tensor], Tensor],
    rounds: int,
    clock: str = "wall",
) -> dict[str, list[float]]:
    """Return seconds a step for each contestant, one figure a round, all of them in each round.

    `clock`: "wall", or "processor", its time for this process, which others on the machine disturb
    less; it adds up all threads and is blind to a GPU.
    """
    device = x.device.type if clock == "wall" else clock
    for entry in entries:
        for _ in range(3):
            step(entry, x)
    start = now(device)
    step(entries[0], x)
    repeats = max(1, min(200, int(0.02 / max(now(device) - start, 1e-6))))
    seconds: dict[str, list[float]] = {entry.contestant.name: [] for entry in entries}
    for _ in range(rounds):
        for entry in entries:
            start = now(device)
            for _ in range(repeats):
                step(entry, x)
            seconds[entry.contestant.name].append((now(device) - start) / repeats)
    return seconds


def peak_memory(entry: Entry, x: Tensor) -> int | None:
    """Return the bytes that a training step adds to what is there, on a GPU."""
    if x.device.type != "cuda":
        return None
    train_step(entry, x)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    train_step(entry, x)
    return torch.cuda.max_memory_allocated() - before


def now(clock: str) -> float:
    """Return seconds: "processor" time, or the wall's clock, on "cuda" once all work is done."""
    if clock == "processor":
        return time.process_time()
    if clock == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
