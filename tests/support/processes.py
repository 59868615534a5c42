"""Run functions in several processes that form one group of torch.distributed.

Starting a process takes seconds, most of them to import torch. So all scenarios of a test file run
one after the other in the same processes, and its tests check the results.
"""

import contextlib
import io
import multiprocessing
import os
import runpy
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from filelock import FileLock
from torch import Tensor

from experiments.harness.parallel import leave

if TYPE_CHECKING:  # Windows lacks it
    from multiprocessing.context import ForkServerContext

WORLD = 2
# A server process imports these once, and each process is forked from it.
PRELOADED = [
    "pytest",
    "torch.distributed.fsdp",
    "torch.distributed.run",
    "transformers.models.bert.modeling_bert",
    "paramlora",
    "experiments.text.report",
    "experiments.text.study",
]
Scenario = Callable[[Path], dict[str, Any]]
Results = dict[str, list[dict[str, Any]]]
needs_sharding = pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"), reason="this torch cannot shard on the CPU"
)


def draw(seed: int, *shape: int) -> Tensor:
    """Return normal numbers that are the same in every process."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def shared_folder(factory: pytest.TempPathFactory, name: str) -> Path:
    """Return a temporary folder that all workers of pytest-xdist share."""
    root = factory.getbasetemp()
    folder = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / name
    folder.mkdir(exist_ok=True)
    return folder


def forked() -> "ForkServerContext":
    """Return a context of multiprocessing whose processes need not import torch."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def start(function: Callable[..., None], arguments: tuple[Any, ...], nprocs: int = WORLD) -> None:
    """Run a function in several processes, with the rank as its first argument, and wait."""
    forked()
    torch.multiprocessing.start_processes(function, arguments, nprocs, start_method="forkserver")


def run_python(*arguments: str) -> None:
    """Run a command line of Python, without the program's name, in this process."""
    given = [argument for argument in arguments if argument != "-u"]
    as_module = given[0] == "-m"
    program, *sys.argv[1:] = given[as_module:]
    sys.argv[0] = program
    try:
        if as_module:
            runpy.run_module(program, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(program, run_name="__main__")
    except SystemExit as done:
        if done.code:
            raise


def output_of(*arguments: str) -> str:
    """Run a command line of Python in a forked process, and return what it printed."""
    with ProcessPoolExecutor(1, mp_context=forked()) as pool:
        return pool.submit(_output_of, *arguments).result()


def _output_of(*arguments: str) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        run_python(*arguments)
    return printed.getvalue()


def torchrun(arguments: Sequence[str]) -> None:
    """Run `torchrun` with these arguments in this process; its workers are forked from the server.

    Raises:
        ChildFailedError: a worker failed.
    """
    from torch.distributed import run as program

    def launch(config: Any, entrypoint: str) -> Callable[..., object]:
        assert entrypoint == sys.executable
        forked()
        config.start_method = "forkserver"
        return elastic_launch(config, run_python)

    elastic_launch = program.elastic_launch
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(1) as thread:
        patch.setattr(program, "elastic_launch", launch)
        # Only in the main thread, torchrun would replace the handlers of signals.
        thread.submit(program.main, list(arguments)).result()


def run(
    scenarios: Sequence[Scenario],
    folder: Path,
    prepare: Callable[[Path], None] = lambda folder: None,
) -> Results:
    """Run each scenario in every process; return the results by scenario, one for each process.

    pytest-xdist may give tests of one file to several workers. The first worker runs the
    scenarios, and the others wait for it and read its results.
    """
    with FileLock(folder / "lock"):
        if not (folder / "done").exists():
            prepare(folder)
            (folder / "rendezvous").unlink(missing_ok=True)
            start(_process, (scenarios, folder))
            (folder / "done").touch()
    return {
        scenario.__name__: [
            torch.load(folder / f"{scenario.__name__}-{rank}.pt", weights_only=True)
            for rank in range(WORLD)
        ]
        for scenario in scenarios
    }


def _process(rank: int, scenarios: Sequence[Scenario], folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD
    )
    for scenario in scenarios:
        torch.save(scenario(folder), folder / f"{scenario.__name__}-{rank}.pt")
        dist.barrier()
    leave()
