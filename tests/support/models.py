"""Models with adapters that several test files share."""

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


def plain() -> nn.Module:
    torch.manual_seed(0)
    return Net()


def attached() -> nn.Module:
    """A model with "digits" on both Linears and "letters" on the second, which is off."""
    model = plain()
    pl.attach(model, pl.LoRA(rank=2), name="digits")
    pl.attach(model, pl.LoRA(rank=1, alpha=3), "fc2", name="letters")
    with torch.no_grad():
        for parameter in pl.parameters(model):
            parameter.normal_()
    pl.disable(model, "letters")
    return model


def half_merged() -> nn.Module:
    """The model of `attached` with "digits" merged."""
    model = attached()
    pl.merge(model, "digits")
    return model


IDS = [2, 0, -1, 0, 1, 2, -1]


NAMES = ("first", "second", "third")


def adapted(model: nn.Module, spec: Callable[[], pl.kinds.Spec], target: str) -> nn.Module:
    """Return the model in float64 with three adapters that all change its outputs."""
    model.double()
    for i, name in enumerate(NAMES):
        made = spec()
        if made == pl.LoRA(rank=2, alpha=3):
            made = pl.LoRA(rank=i + 1, alpha=3)
        pl.attach(model, made, target, name=name)
    with torch.no_grad():
        for parameter in pl.parameters(model):
            parameter.normal_(std=0.5)
    pl.scale(model, 0.7, "second")
    return model


def one_by_one(model: nn.Module, inputs: list[Tensor]) -> Tensor:
    """Return each row's output from a batch of its own, with the adapter that it names."""
    rows = []
    for i, index in enumerate(IDS):
        row = [tensor[i : i + 1] for tensor in inputs]
        with pl.using(model, *([NAMES[index]] if index >= 0 else [])):
            rows.append(model(*row))
    return torch.cat(rows)


QKV = ["*.qkv.weight[:4]", "*.qkv.weight[4:8]", "*.qkv.weight[8:]"]


class Layer(nn.Module):
    """A layer with a fused projection of three blocks, and a stack of three experts."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(4, 12)
        self.experts = nn.Parameter(torch.randn(3, 4, 4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        x = (q @ k.mT).softmax(-1) @ v
        return torch.einsum("eoi,bni->bno", self.experts, x)


def layer() -> Any:
    torch.default_generator.manual_seed(0)
    return Layer()
