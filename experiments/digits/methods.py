"""The methods that the digit study compares: three ways to fine-tune a base at low rank, and two
of all weights.

    lora       W' = W + (alpha/r) · B A                A: (r, in),  B: (out, r)   paramlora's own
    scrambled  W' = W + (alpha/r) · view(B A, W)       A: (r, out), B: (in, r)    the blog's bug
    wrapped    y = x Wᵀ + b + (alpha/r) · x Aᵀ Bᵀ      like lora, with b trained  for comparison
    full       W' = W + ΔW, b' = b + Δb                all parameters, no adapter
    joint      as full, on the images of all digits    for comparison

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

ADAPTER = "digits"  # the name of the adapter in the model


@dataclass(frozen=True)
class BlogScrambled(pl.kinds.Spec):
    """The incorrect update of a blog post of 2024-04-17, kept to measure its effect.

    B A has shape (in, out), and `view` reads its elements row by row into the weight's shape
    (out, in). This is not a transpose: each row of the update mixes parts of several rows of B A.
    The rank of the update therefore exceeds r, although the number of parameters is the same.
    Initially A ~ N(0, 1) and B = 0.
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
    """A wrapper module that adds a low-rank update to the output of a linear layer.

    The layer's weight is frozen. A, B and the layer's bias are trained. The change of the bias
    cannot be switched off, and code that looks for `nn.Linear` no longer finds the layer in place.

    Args:
        linear: the layer to wrap.
        factors: "A", (r, in), and "B", (out, r).
        scale: the factor s of the update s · B A.
    """

    def __init__(self, linear: nn.Linear, factors: dict[str, Tensor], scale: float) -> None:
        super().__init__()
        self.linear, self.scale = linear, scale
        self.A, self.B = nn.Parameter(factors["A"]), nn.Parameter(factors["B"])
        linear.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        update = F.linear(F.linear(x, self.A), self.B)  # (n, in) -> (n, r) -> (n, out)
        return torch.add(self.linear(x), update, alpha=self.scale)


def wrap(model: nn.Module, spec: pl.LoRA, generator: torch.Generator) -> None:
    """Wrap every linear layer that is a child of `model`, in place.

    The initial factors are those that `pl.attach` draws with the same spec and generator.
    """
    for name, layer in list(model.named_children()):
        if isinstance(layer, nn.Linear):
            factors = spec.create(layer.weight.detach(), generator)
            setattr(model, name, WrappedLinear(layer, factors, spec.scaling))


def attached_ranks(model: nn.Module, name: str) -> dict[str, int]:
    """Return the numerical rank of an adapter's update at each site, by the site's path.

    The update is W' - W in float64, so that this works for every kind of adapter.
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
    """Return the numerical rank of each wrapped layer's update, by the path LAYER.weight."""
    return {
        f"{name}.weight": _rank(layer.B.detach().double() @ layer.A.detach().double())
        for name, layer in model.named_children()
        if isinstance(layer, WrappedLinear)
    }


def _read(model: nn.Module, path: str) -> Tensor:
    module, _, tensor = path.rpartition(".")
    return getattr(model.get_submodule(module), tensor).clone()


def _rank(update: Tensor) -> int:
    # With several threads on shared cores, even a small matrix takes seconds.
    with cpu_threads(1):
        return int(torch.linalg.matrix_rank(update.cpu()))


def factors_of(model: nn.Module, name: str = ADAPTER) -> dict[str, nn.Parameter]:
    """Return an adapter's factors by their names in `model.named_parameters()`."""
    ids = {id(parameter) for parameter in pl.parameters(model, name)}
    return {key: p for key, p in model.named_parameters() if id(p) in ids}


def lora_of(settings: AdapterSettings) -> pl.LoRA:
    """Return the spec of the adapter in the settings."""
    return pl.LoRA(settings.rank, settings.numerator, init=settings.init)
