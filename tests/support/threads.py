"""A model for many threads, with the outputs that it must give in each kind of block."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

import paramlora as pl
from tests.support.reference import shake

THREADS = 8


def two_adapters() -> tuple[nn.Sequential, Tensor]:
    """Return a model with adapters "a" and "b", of which "b" is off, and an input."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).double()
    for name in "ab":
        pl.attach(model, pl.LoRA(rank=1), name=name)
    shake(model)
    pl.unfreeze(model)
    pl.activate(model, "a")
    return model, torch.randn(3, 3, dtype=torch.float64)


def dense(model: nn.Sequential, x: Tensor, **strengths: float) -> Tensor:
    """Return the output with these adapters, from the stored tensors alone."""
    state = {**pl.base_state_dict(model)}
    for name, strength in strengths.items():
        factors = pl.state_dict(model, name)
        for site in ("0.weight", "1.weight"):
            update = factors[f"{site}.B"] @ factors[f"{site}.A"]
            state[site] = state[site] + strength * update
    for i in (0, 1):
        x = x @ state[f"{i}.weight"].T + state[f"{i}.bias"]
    return x.detach()


Enter = Callable[[nn.Module], AbstractContextManager[None]]

# For each thread a block of another kind, and the adapters of each of the three rows inside it.
BLOCKS: list[tuple[Enter, list[dict[str, float]]]] = [
    (lambda m: pl.using(m, "b"), [{"b": 1}] * 3),
    (lambda m: pl.using(m, a=0.5, b=-1.5), [{"a": 0.5, "b": -1.5}] * 3),
    (lambda m: pl.using(m), [{}] * 3),
    (lambda m: pl.enabled(m), [{"a": 1, "b": 1}] * 3),
    (lambda m: pl.disabled(m, "a"), [{}] * 3),
    (lambda m: pl.routed(m, [1, 0, -1]), [{"b": 1}, {"a": 1}, {}]),
    (lambda m: pl.routed(m, [0, -1, 0], "b"), [{"b": 1}, {}, {"b": 1}]),
    (lambda m: pl.using(m, "a", b=2.0), [{"a": 1, "b": 2}] * 3),
]


def expected(model: nn.Sequential, x: Tensor, rows: list[dict[str, float]]) -> Tensor:
    parts = zip(x.split(1), rows, strict=True)
    return torch.cat([dense(model, row, **strengths) for row, strengths in parts])


def in_threads(function: Callable[[int], Any], count: int = THREADS) -> list[Any]:
    """Call a function with 0, 1, … in threads that start together; return or raise what it does."""
    start = threading.Barrier(count)

    def run(i: int) -> Any:
        start.wait()
        return function(i)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))
