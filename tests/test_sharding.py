"""Adapters under FSDP2: attached before sharding, they train as in one process."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from reference import shake
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing import assert_close

import paramlora as pl

ROWS = 8


def model() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    pl.attach(layers, pl.LoRA(rank=2), name="low")
    pl.attach(layers, pl.Delta(), "*.bias", name="full")
    shake(layers)
    return layers


def train(layers: nn.Module, batches: Tensor) -> None:
    trained = [parameter for parameter in layers.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=0.05)
    for x in batches:
        optimizer.zero_grad()
        layers(x).square().mean().backward()
        optimizer.step()


def process(rank: int, meeting: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    batches = torch.randn(5, ROWS, 6, generator=torch.Generator().manual_seed(1))
    sharded, mesh = model(), init_device_mesh("cpu", (2,))
    for layer in (sharded[0], sharded[2]):
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    half = ROWS // 2
    train(sharded, batches[:, rank * half : (rank + 1) * half])
    found = {key: value.full_tensor() for key, value in sharded.state_dict().items()}
    alone = model()
    train(alone, batches)
    assert_close(found, dict(alone.state_dict()))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"), reason="this torch shards on GPUs only"
)
def test_pitfall_13_sharding_trains_as_one_process(tmp_path: Path) -> None:
    """Under `fully_shard` in two processes, five steps of Adam give what one process gives."""
    torch.multiprocessing.spawn(process, (str(tmp_path / "meeting"),), 2)
