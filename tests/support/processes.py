"""Runs a function in several processes that make up a group of torch.distributed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

WORLD, STEPS = 2, 4


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def process(rank: int, scenario: Callable[[Path], dict[str, Any]], folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD
    )
    torch.save(scenario(folder), folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def run(scenario: Callable[[Path], dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """Run a scenario in the processes; return what each of them found."""
    torch.multiprocessing.spawn(process, (scenario, folder), nprocs=WORLD)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]
