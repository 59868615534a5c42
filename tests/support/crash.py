"""Saves adapters in child processes that are killed; a test runs it as a program.

`python tests/support/crash.py FILE HOW ROUNDS`. HOW is "paramlora", or "directly" for a plain write
into the file, for comparison. Each save is a generation: all factors have its number. The program
prints the number of damaged files, of interrupted saves, and of generations. It goes on after
ROUNDS, to at most ten times as many, until three saves were interrupted.
"""

import functools
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

import paramlora as pl

PATH, HOW, ROUNDS = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
MODEL = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 256))


def write(generation: int) -> None:
    with torch.no_grad():
        for parameter in pl.parameters(MODEL):
            parameter.fill_(generation)
    if HOW == "directly":
        PATH.write_bytes(save(pl.state_dict(MODEL)))
    else:
        pl.save(MODEL, PATH)


def read() -> int:
    """Return the generation of a file that is whole."""
    with safe_open(PATH, framework="pt") as file:
        values = {float(x) for key in file.keys() for x in file.get_tensor(key).unique()}  # noqa: SIM118
    if HOW != "directly":
        pl.load(MODEL, PATH)
    (value,) = values
    return int(value)


def save_on(generation: int) -> None:
    while True:
        generation += 1
        write(generation)


def run_and_kill(child: Callable[[], None], seconds: float | None) -> None:
    """Run a function in a child process that is killed after some time, or kills itself."""
    process = os.fork()
    if process == 0:
        child()
        os._exit(1)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(process, signal.SIGKILL)
    _, status = os.waitpid(process, 0)
    assert os.WIFSIGNALED(status), "the child was not killed"


def leftovers() -> list[Path]:
    return [path for path in PATH.parent.iterdir() if path != PATH]


def at_step(step: str, generation: int) -> None:
    """Save, and be killed when this function of `os` is called."""
    setattr(os, step, lambda *args: os.kill(os.getpid(), signal.SIGKILL))
    write(generation)


def after_a_kill(last: int, seconds: float) -> tuple[int, bool]:
    """Kill a saving process; return the file's generation, and whether a save was interrupted."""
    run_and_kill(lambda: save_on(last), random.uniform(0, 6 * seconds))
    left = leftovers()
    for path in left:
        path.unlink()
    return read(), bool(left)


def main() -> None:
    torch.set_num_threads(1)
    random.seed(0)
    pl.attach(MODEL, pl.LoRA(rank=16))
    start = time.perf_counter()
    for _ in range(5):
        write(1)
    seconds = (time.perf_counter() - start) / 5
    for step in ("fsync", "replace") if HOW != "directly" else ():
        run_and_kill(functools.partial(at_step, step, 99), None)
        assert read() == 1, step
        assert len(leftovers()) == 1, step
        write(1)
        assert leftovers() == [], "the next save removes what the killed one has left"
    damaged = interrupted = 0
    last = 1
    for number in range(10 * ROUNDS):
        if number >= ROUNDS and interrupted >= 3:
            break
        try:
            found, was_interrupted = after_a_kill(last, seconds)
        except (SafetensorError, ValueError):
            damaged += 1
            write(last)
            continue
        assert found >= last, "an older file came back"
        last, interrupted = found, interrupted + was_interrupted
    print(damaged, interrupted, last)


if __name__ == "__main__":
    main()
