"""Models with three adapters, and a batch whose rows each name one."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

import paramlora as pl

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
