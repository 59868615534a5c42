"""A model of mixed layers with two adapters, and functions to train and compare it."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.testing import assert_close

import paramlora as pl
from tests.support.reference import loss, shake

MATRICES = [
    "embed",
    "conv",
    "rnn.weight_*",
    "attention.in_proj_weight",
    "*.out_proj",
    "head",
    "table",
]


class Mixed(nn.Module):
    """Layers of many types, a bare parameter and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8, padding_idx=0)
        self.conv = nn.Conv1d(8, 8, 3, padding=1, groups=2)
        self.rnn = nn.GRU(8, 8, batch_first=True)
        self.attention = nn.MultiheadAttention(8, 2)
        self.norm = nn.BatchNorm1d(8)
        self.table = nn.Parameter(torch.randn(8, 8) / 3)
        self.head = nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        # Contiguous everywhere: for a strided input, torch rounds the product with a weight
        # differently if the weight requires a gradient, with adapters or without.
        x = self.conv(self.embed(ids).mT).mT.contiguous()
        x = self.rnn(x)[0].transpose(0, 1).contiguous()
        x = self.attention(x, x, x)[0].contiguous() @ self.table
        return self.head(self.norm(x.mT).mT.tanh().contiguous())


def mixed(dtype: torch.dtype = torch.float32) -> tuple[Mixed, Tensor]:
    """Return a `Mixed` model, always with the same weights, and ids for it."""
    torch.default_generator.manual_seed(0)
    return Mixed().to(dtype), torch.randint(11, (4, 5))


def small() -> Any:
    """Return two Linears with one adapter, its factors random."""
    torch.default_generator.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    pl.attach(model, pl.LoRA(rank=2, alpha=3))
    shake(model)
    return model


def attach_two(model: nn.Module, **options: Any) -> None:
    """Attach "low", low-rank, to all matrices, and "full", a Delta, to some tensors; train both."""
    options |= {"activate": "no"}  # so that the second one does not freeze the first
    pl.attach(model, pl.LoRA(rank=2, alpha=3), MATRICES, name="low", **options)
    pl.attach(model, pl.Delta(), ["*.bias", "head", "norm"], name="full", **options)
    pl.enable(model)


def train(model: nn.Module, x: Tensor, *names: str, steps: int = 2) -> None:
    """Train adapters with Adam."""
    optimizer = torch.optim.Adam(pl.parameters(model, *names), lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        loss([model(x)]).backward()
        optimizer.step()


def fields(model: nn.Module) -> list[tuple[bool, bool, float]]:
    """Return whether each adapter is active and merged, and its scale, by site."""
    return [(row.active, row.merged, row.scale) for row in pl.summary(model).sites]


def flags(model: nn.Module) -> list[bool]:
    """Return requires_grad of all parameters."""
    return [parameter.requires_grad for parameter in model.parameters()]


def values(model: nn.Module, name: str) -> dict[str, Tensor]:
    """Return copies of the factors of an adapter."""
    return {key: tensor.clone() for key, tensor in pl.state_dict(model, name).items()}


def assert_bits(actual: object, expected: object) -> None:
    """Assert that tensors are equal bit for bit."""
    assert_close(actual, expected, rtol=0, atol=0)
