"""Clocks, interleaved rounds, and memory of a step."""

import random
import time
from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

import torch

Name = TypeVar("Name", bound=Hashable)
Result = TypeVar("Result")


def now(device: str = "cpu", clock: str = "wall") -> float:
    """Return a time in seconds.

    Args:
        device: type of the device that computes. On "cuda" the wall clock is read after all queued
            work has finished.
        clock: "wall", or "processor" for the CPU time of this process. The latter depends less on
            other processes, adds up all threads, and does not include the time of a GPU.
    """
    if clock == "processor":
        return time.process_time()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def timed_call(act: Callable[[], Result], device: str = "cpu") -> tuple[Result, float]:
    """Call `act`; return its result and the seconds it took by the wall clock."""
    start = now(device)
    result = act()
    return result, now(device) - start


def interleaved(
    runs: Mapping[Name, Callable[[], object]],
    rounds: int,
    *,
    repeats: int = 1,
    warm_up: int = 0,
    device: str = "cpu",
    clock: str = "wall",
    shuffle: bool = True,
) -> dict[Name, list[float]]:
    """Return the seconds per call of each run, one value per round.

    A round measures all runs one after the other, so that a disturbance affects all of them. Each
    round draws a new order from a fixed seed. In a fixed order, a run that always follows one that
    leaves the caches cold takes up to 1.05 of its time.

    Args:
        runs: the functions to call, by name.
        rounds: measured rounds.
        repeats: calls of a run in each round.
        warm_up: rounds before those, whose times are dropped.
        device, clock: as for `now`.
        shuffle: draw a new order in each round. Without it the order is that of `runs`.
    """
    seconds: dict[Name, list[float]] = {name: [] for name in runs}
    order, generator = list(runs), random.Random(0)
    for _ in range(warm_up + rounds):
        if shuffle:
            generator.shuffle(order)
        for name in order:
            run = runs[name]
            start = now(device, clock)
            for _ in range(repeats):
                run()
            seconds[name].append((now(device, clock) - start) / repeats)
    return {name: values[warm_up:] for name, values in seconds.items()}


def peak_bytes(step: Callable[[], object], device: str) -> int | None:
    """Return the bytes that a call of `step` adds at its peak; None except on "cuda"."""
    if device != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
