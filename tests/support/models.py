"""Models that several test files share."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import paramlora as pl


class Net(nn.Module):
    """A model of several kinds of tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(7, 5)
        self.rnn = nn.LSTM(5, 5)
        self.fc1 = nn.Linear(5, 4)
        self.act = nn.ReLU()
        self.norm = nn.LayerNorm(4)
        self.fc2 = nn.Linear(4, 3)
        self.gain = nn.Parameter(torch.tensor(2.0))


class Tied(nn.Module):
    """An embedding and a head that share a weight, or have equal ones."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.emb = nn.Embedding(7, 5)
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.emb.weight if tied else nn.Parameter(self.emb.weight.detach())

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.emb(ids))


def tied_on_one_side() -> nn.Module:
    """Return a tied model with an adapter attached to one side through a part."""
    model = Tied()
    pl.attach(model.head, pl.LoRA(rank=2), "weight")
    return model


def plain() -> nn.Module:
    """Return a `Net` without adapters, always with the same weights."""
    torch.manual_seed(0)
    return Net()


def attached() -> nn.Module:
    """Return a `Net` with "digits" on both Linears and "letters" on the second, "letters" off."""
    model = plain()
    pl.attach(model, pl.LoRA(rank=2), name="digits")
    pl.attach(model, pl.LoRA(rank=1, alpha=3), "fc2", name="letters", activate="no")
    with torch.no_grad():
        for parameter in pl.parameters(model):
            parameter.normal_()
    return model


def half_merged() -> nn.Module:
    """Return the model of `attached` with "digits" merged."""
    model = attached()
    pl.merge(model, "digits")
    return model


# The adapter of each row of a batch, as an index into NAMES; −1 for none.
IDS = [2, 0, -1, 0, 1, 2, -1]
NAMES = ("first", "second", "third")


def with_three_adapters(
    model: nn.Module, make_spec: Callable[[], pl.kinds.Spec], target: str
) -> nn.Module:
    """Return the model in float64 with three adapters that all change its outputs."""
    model.double()
    for i, name in enumerate(NAMES):
        spec = make_spec()
        if spec == pl.LoRA(rank=2, alpha=3):
            spec = pl.LoRA(rank=i + 1, alpha=3)
        pl.attach(model, spec, target, name=name, activate="no")
    pl.enable(model)
    with torch.no_grad():
        for parameter in pl.parameters(model):
            parameter.normal_(std=0.5)
    pl.scale(model, 0.7, "second")
    return model


def one_by_one(model: nn.Module, inputs: list[Tensor]) -> Tensor:
    """Return the outputs of the rows, each computed in its own batch with the adapter in IDS."""
    rows = []
    for i, index in enumerate(IDS):
        row = [tensor[i : i + 1] for tensor in inputs]
        with pl.using(model, *([NAMES[index]] if index >= 0 else [])):
            rows.append(model(*row))
    return torch.cat(rows)


# The blocks of queries, keys and values in a `Fused` layer.
QKV = ["*.qkv.weight[:4]", "*.qkv.weight[4:8]", "*.qkv.weight[8:]"]


class Fused(nn.Module):
    """A fused projection to queries, keys and values, and a stack of three experts."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(4, 12)
        self.experts = nn.Parameter(torch.randn(3, 4, 4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        x = (q @ k.mT).softmax(-1) @ v
        return torch.einsum("eoi,bni->bno", self.experts, x)


def fused() -> Any:
    """Return a `Fused` layer, always with the same weights."""
    torch.default_generator.manual_seed(0)
    return Fused()


class CountingLoRA(pl.LoRA):
    """A LoRA that counts how often W' is built."""

    built = 0

    def apply(self, weight: Tensor, factors: Any, strength: Any = 1.0) -> Tensor:
        CountingLoRA.built += 1
        return super().apply(weight, factors, strength)


class Wrapped(nn.Module):
    """A layer under the path "layer", by which other libraries can target it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)
