"""One study on several devices, each with a process of its own, as `torchrun` starts them.

    torchrun --nproc-per-node 2 -m experiments text …

DDP keeps a whole model in each process and averages the gradients: of adapters these are the
factors' alone. FSDP2 (`fully_shard`) keeps a part of every tensor in each, and gathers a layer's
weights when that layer is at work. Either way a process sees its share of each batch, weighed so
that the mean over the processes is the mean over the batch, and rank 0 writes what is written.
"""

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
    """The processes that work together: how many, and which of them this one is."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes files and talks."""
        return self.rank == 0

    def share(self, rows: Tensor) -> tuple[Tensor, bool]:
        """Return this process's rows of a batch, and whether they count.

        Of a batch smaller than the group some get a row that does not: all have to take part.
        """
        mine = rows[self.rank :: self.size]
        return (mine, True) if len(mine) else (rows[:1], False)

    def wait(self) -> None:
        """Wait until every process is here."""
        if self.size > 1:
            dist.barrier()

    def total(self, tensor: Tensor) -> Tensor:
        """Return the sum over the processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor


@contextmanager
def group(device: torch.device) -> Iterator[tuple[Group, torch.device]]:
    """Join the processes that torchrun started, if it did; yield the group and this one's device.

    Args:
        device: what was asked for; of "cuda" each process takes the one of its number.
    """
    if "RANK" not in os.environ or int(os.environ["WORLD_SIZE"]) == 1:
        yield Group(), device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    # The group of whoever called, if there is one, is left as it is.
    own = not dist.is_initialized()
    if own:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Group(dist.get_rank(), dist.get_world_size()), device
    finally:
        if own:
            dist.destroy_process_group()


def shared(batches: Iterable[tuple[Tensor, ...]], group: Group) -> Iterator[tuple[Tensor, ...]]:
    """Yield this process's rows of each batch, for objectives that are means over rows.

    Raises:
        StudyError: a batch cannot be shared out evenly, so that means of means would be wrong.
    """
    for batch in batches:
        if len(batch[0]) % group.size:
            raise StudyError(
                f"a batch of {len(batch[0])} cannot be shared out evenly to {group.size} "
                "processes; choose another --batch, or another number of processes"
            )
        yield tuple(tensor[group.rank :: group.size] for tensor in batch)


def spread(model: nn.Module, how: str, group: Group, blocks: list[nn.Module]) -> nn.Module:
    """Return the model for training by all processes of the group.

    Args:
        model: on this process's device, its adapters attached; the same in every process.
        how: "ddp" wraps it; "fsdp" shards it in place, and there is no way back.
        group: the processes; one alone trains the model as it is.
        blocks: "fsdp" gathers the weights of one of these modules at a time.
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
    """Return the layers of a model that are alike: the modules of its lists of modules."""
    # Not those that derive from it, as a tensor's list of parametrizations does.
    lists = [module for module in model.modules() if type(module) is nn.ModuleList]
    return [block for blocks in lists for block in blocks]
