"""The methods that the digit study compares: three ways to fine-tune a base at low rank.

    lora       W' = W + (alpha/r) · B A                A: (r, in),  B: (out, r)   paramlora's own
    scrambled  W' = W + (alpha/r) · view(B A, W)       A: (r, out), B: (in, r)    the blog's bug
    wrapped    y = x Wᵀ + b + (alpha/r) · x Aᵀ Bᵀ      as lora, and b is trained  for comparison

x: (n, in), W: (out, in), b: (out,).
"""

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import paramlora as pl

from ..harness.train import cpu_threads
from .settings import AdapterSettings

ADAPTER = "digits"  # its name in the model


@dataclass(frozen=True)
class BlogScrambled(pl.kinds.Spec):
    """The update of a blog post of 2024-04-17, as its code computes it: a bug, kept to measure.

    B A comes out as (in, out) and its elements are read row by row into the weight's (out, in).
    That is no transpose: the rows of the update mix parts of several rows of B A, so its rank is
    not at most r any more. The number of parameters is the same and does not show it.
    A ~ N(0, 1), B zero.
    """

    rank: int = 2
    alpha: float = 1.0

    def create(self, weight: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        out, inputs = weight.shape
        A = pl.kinds.draw((self.rank, out), weight, lambda A, g: A.normal_(generator=g), generator)
        return {"A": A, "B": A.new_zeros(inputs, self.rank)}

    def apply(
        self, weight: Tensor, factors: pl.kinds.Factors, strength: pl.kinds.Strength = 1.0
    ) -> Tensor:
        product = (factors["B"] @ factors["A"]).view(weight.shape)
        return pl.kinds.add_update(weight, strength * (self.alpha / self.rank) * product)


class WrappedLinear(nn.Module):
    """A linear layer inside another module that adds the low-rank update to its output.

    The layer's weight is frozen; A, B and the layer's own bias are trained. What the bias learns
    cannot be switched off, and the layer is no `nn.Linear` any more for whoever reads the model.

    Args:
        linear: the layer, kept inside as it is.
        factors: "A", (r, in), and "B", (out, r).
        scale: what multiplies B A.
    """

    def __init__(self, linear: nn.Linear, factors: dict[str, Tensor], scale: float) -> None:
        super().__init__()
        self.linear, self.scale = linear, scale
        self.A, self.B = nn.Parameter(factors["A"]), nn.Parameter(factors["B"])
        linear.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        update = F.linear(F.linear(x, self.A), self.B)
        return torch.add(self.linear(x), update, alpha=self.scale)


def wrap(model: nn.Module, spec: pl.LoRA, generator: torch.Generator) -> None:
    """Wrap every linear layer that is a child of `model`, in place.

    The factors start as `pl.attach` with the same spec and generator would have them.
    """
    for name, layer in list(model.named_children()):
        if isinstance(layer, nn.Linear):
            factors = spec.create(layer.weight.detach(), generator)
            setattr(model, name, WrappedLinear(layer, factors, spec.scaling))


def attached_ranks(model: nn.Module, name: str) -> dict[str, int]:
    """Return the numerical rank of an adapter's update at each site, by the site's path.

    The update is W' - W in float64, whatever the spec does to W.
    """
    double = copy.deepcopy(model).double()
    paths = [row.site for row in pl.summary(double).sites if row.adapter == name]
    with torch.no_grad():
        with pl.using(double, name):
            on = [_read(double, path) for path in paths]
        with pl.using(double):
            off = [_read(double, path) for path in paths]
    return {path: _rank(w_on - w) for path, w_on, w in zip(paths, on, off, strict=True)}


def wrapped_ranks(model: nn.Module) -> dict[str, int]:
    """Return the numerical rank of the update of each wrapped layer, by its weight's old path."""
    return {
        f"{name}.weight": _rank(layer.B.detach().double() @ layer.A.detach().double())
        for name, layer in model.named_children()
        if isinstance(layer, WrappedLinear)
    }


def _read(model: nn.Module, path: str) -> Tensor:
    module, _, tensor = path.rpartition(".")
    return getattr(model.get_submodule(module), tensor).clone()


def _rank(update: Tensor) -> int:
    # Small matrices: several threads that share their cores with others take seconds for one.
    with cpu_threads(1):
        return int(torch.linalg.matrix_rank(update.cpu()))


def factors_of(model: nn.Module, name: str = ADAPTER) -> dict[str, nn.Parameter]:
    """Return an adapter's factors by their names among the model's parameters."""
    its = {id(parameter) for parameter in pl.parameters(model, name)}
    return {key: p for key, p in model.named_parameters() if id(p) in its}


def lora_of(settings: AdapterSettings) -> pl.LoRA:
    """Return the adapter that the settings ask for."""
    return pl.LoRA(settings.rank, settings.numerator, init=settings.init)
