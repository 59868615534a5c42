"""A small model with all that a refused call might change, and arguments that verbs refuse."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import paramlora as pl
from tests.support.reference import shake


class Doubled(nn.Module):
    """A parametrization that cannot be inverted, and fails on request."""

    fails = False

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Dropout()

    def forward(self, weight: Tensor) -> Tensor:
        if self.fails:
            raise FloatingPointError("the parametrization failed")
        return 2 * weight


class Everything(nn.Module):
    """A small model with all that a refused call might change."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(5, 4)
        self.normalised = parametrizations.spectral_norm(nn.Linear(4, 4))
        self.doubled = nn.Linear(4, 4)
        doubled = Doubled()
        parametrize.register_parametrization(self.doubled, "weight", doubled)
        doubled.inner.eval()  # in another mode than the rest
        self.shared = nn.Linear(4, 4)
        self.again = self.shared
        self.conv = nn.Conv1d(2, 2, 3, padding=1)
        self.norm = nn.BatchNorm1d(4)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.emb.weight
        self.shared.register_forward_hook(lambda *_: None)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.again(self.shared(self.doubled(self.normalised(self.emb(ids)))))
        return self.head(self.norm(self.dropout(self.conv(x)).mT).mT)


LINEARS = ["normalised", "doubled", "shared", "emb"]
# Adapters that start from data, by the name of the method.
STARTS = {"eva": "kaiming", "corda": "corda", "null": "null"}


def make(layers: Sequence[str] = LINEARS) -> Any:
    """Return the model with "a" on, "b" off and "scaled", an IA3, on; "b" is not zero."""
    torch.manual_seed(0)
    model: Any = Everything()
    pl.attach(model, pl.IA3(), ["shared", "conv"], name="scaled", hold_statistics=True)
    pl.attach(model, pl.LoRA(2), layers, name="a", activate="also")
    pl.attach(model, pl.Delta(), ["shared.weight", "norm"], name="b", activate="no")
    shake(model)
    pl.unfreeze(model, "b")
    model(torch.zeros(3, 2, dtype=torch.int64))
    return model


def merged() -> Any:
    """Return the model with "b" merged and "scaled", which is below it and not additive, off."""
    model = make()
    pl.disable(model, "scaled")
    pl.enable(model, "b")
    pl.merge(model, "b")
    return model


def starting(layers: Sequence[str] = LINEARS) -> Any:
    """Return the model with adapters at Linears that can start from data, switched off."""
    model = make(layers)
    for name, init in STARTS.items():
        spec = pl.LoRA(2, init=init)
        at = [layer for layer in layers if layer in ("normalised", "doubled")]
        pl.attach(model, spec, at, name=name, activate="no")
    return model


def failing() -> Any:
    """Return the model with a weight that cannot be computed any more.

    All adapters are on. None is at the layer with spectral_norm, where `merge` would stop.
    """
    model = starting(["emb", "doubled", "shared"])
    pl.enable(model)
    model.doubled.parametrizations.weight[0].fails = True
    return model


class FailingInit(nn.Module):
    """An init that draws numbers, and fails at its second call."""

    calls = 0

    def forward(self, tensor: Tensor) -> None:
        self.calls += 1
        nn.init.normal_(tensor)
        if self.calls == 2:
            raise FloatingPointError("the init failed")


def not_finite(tensor: Tensor) -> None:
    """Draw numbers, and make them infinite."""
    tensor.normal_().div_(0)


def fails_late(*_: object) -> Iterator[Tensor]:
    """Yield batches and then fail."""
    yield torch.zeros(3, 2, dtype=torch.int64)
    raise FloatingPointError("no more batches")


def plain(make: Callable[[], nn.Module] = Everything) -> nn.Module:
    """Return a new model; drawing its weights leaves the random state as it was."""
    with torch.random.fork_rng(devices=[]):
        return make()


def file_of(
    folder: Path, peft: bool = False, inputs: int = 3, rank: int = 2, targets: Any = None
) -> Path:
    """Return a file, or a PEFT folder, of an adapter for "shared" and "doubled".

    It fits both if "doubled" has 4 inputs, and "shared" only if it has 3.
    """
    path = folder / ("peft" if peft else "adapter.safetensors")
    with torch.random.fork_rng(devices=[]):
        model = nn.ModuleDict({"shared": nn.Linear(4, 4), "doubled": nn.Linear(inputs, 4)})
        pl.attach(model, pl.LoRA(rank), targets)
    (pl.save_peft if peft else pl.save)(model, path)
    return path
