"""Training on several devices, with one process per device, started by `torchrun`.

    torchrun --nproc-per-node 2 -m experiments text …

DDP keeps the whole model in each process and averages the gradients. With adapters these are only
the gradients of the factors. FSDP2 (`fully_shard`) keeps a shard of every tensor in each process
and gathers the weights of a layer while it runs. In both cases each process gets its share of each
batch, weighted so that the mean over processes is the mean over the batch. Rank 0 writes all files.
"""

import gc
import importlib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .settings import StudyError


@dataclass(frozen=True)
class Group:
    """The number of processes that train together, and the rank of this process."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def share(self, rows: Tensor) -> tuple[Tensor, bool]:
        """Return this process's rows of a batch, and whether they count.

        If a batch has fewer rows than there are processes, a process without rows gets one row that
        does not count, because every process must take part in the collective operations.
        """
        mine = rows[self.rank :: self.size]
        return (mine, True) if len(mine) else (rows[:1], False)

    def wait(self) -> None:
        """Wait for all processes."""
        if self.size > 1:
            dist.barrier()

    def total(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over the processes in place, and return it."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor


@contextmanager
def group(device: torch.device) -> Iterator[tuple[Group, torch.device]]:
    """Join the process group if torchrun started this process; yield the group and the device.

    Args:
        device: the requested device. With "cuda", each process uses the GPU of its local rank.
    """
    if "RANK" not in os.environ or int(os.environ["WORLD_SIZE"]) == 1:
        yield Group(), device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    # If the caller has initialised a process group, use it and do not destroy it.
    created = not dist.is_initialized()
    if created:
        # Its functions have the group as a default value: imported later, as DDP does, they would
        # hold the group until Python exits. See `leave`.
        importlib.import_module("torch.distributed.nn.functional")
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Group(dist.get_rank(), dist.get_world_size()), device
    finally:
        if created:
            leave()


def leave() -> None:
    """Destroy the process group and end the threads of its backend.

    The threads end with the last reference to the group. A model that DDP has wrapped holds one,
    and may be part of a reference cycle, so cycles are collected first. Otherwise a thread of gloo
    may still release a result while Python finalizes. It asks for the GIL then, Python ends the
    thread, and the process aborts with "terminate called without an active exception". Caches of
    torch's DTensors keep the group of a sharded model, but its threads are idle by then.
    """
    gc.collect()
    dist.destroy_process_group()


def shared(batches: Iterable[tuple[Tensor, ...]], group: Group) -> Iterator[tuple[Tensor, ...]]:
    """Yield this process's rows of each batch, for an objective that is a mean over rows.

    Raises:
        StudyError: a batch cannot be divided evenly. The mean of the processes' means would then
            differ from the mean over the batch.
    """
    for batch in batches:
        if len(batch[0]) % group.size:
            raise StudyError(
                f"a batch of {len(batch[0])} cannot be divided evenly among {group.size} "
                "processes; choose another --batch, or another number of processes"
            )
        yield tuple(tensor[group.rank :: group.size] for tensor in batch)


def spread(model: nn.Module, how: str, group: Group, blocks: list[nn.Module]) -> nn.Module:
    """Return the model, prepared for training by all processes of the group.

    Args:
        model: the model with its adapters attached, on this process's device. It must be the same
            in all processes.
        how: "ddp" wraps the model. "fsdp" shards it in place, which cannot be undone.
        group: the processes. With a single process, the model is returned unchanged.
        blocks: modules whose weights "fsdp" gathers one module at a time.
    """
    if group.size == 1:
        return model
    if how == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(next(model.parameters()).device.type, (group.size,))
    for block in (*blocks, model):
        fully_shard(block, mesh=mesh)
    return model


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Return the repeated layers of a model: the modules in its `nn.ModuleList`s."""
    # Exclude subclasses such as ParametrizationList, whose modules are not layers.
    lists = [module for module in model.modules() if type(module) is nn.ModuleList]
    return [block for blocks in lists for block in blocks]
