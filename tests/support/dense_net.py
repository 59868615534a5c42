"""Small models of mixed layers, and their computation in float64 with given weights for each row.

Shares no code with paramlora: the formulas of the kinds are those of `reference.py`, and the layers
are torch's, called with dense tensors by `functional_call`.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrizations

import paramlora as pl
from tests.support.reference import (
    Formula,
    Strength,
    cayley,
    kronecker,
    moved,
    rotated,
    shared,
)


class Bare(nn.Module):
    """A module with a bare parameter of three dimensions, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(4, 2, 2) / 2)
        self.shift = nn.Buffer(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.table.flatten(1) + self.shift


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(4, 4),
    "conv": lambda: nn.Conv2d(1, 2, 3, padding=1),
    "lstm": lambda: nn.LSTM(4, 4, batch_first=True),
    "attention": lambda: nn.MultiheadAttention(4, 2, batch_first=True),
    "norm": lambda: nn.LayerNorm(4),
    "statistics": lambda: nn.BatchNorm1d(4),
    "spectral": lambda: parametrizations.spectral_norm(nn.Linear(4, 4)),
    "bare": Bare,
}
# The end of the key of the tensor that spectral_norm stores.
STORED = "parametrizations.weight.original"
# Layers that cannot compute each row with an adapter of its own.
UNROUTABLE = (Bare, nn.LayerNorm, nn.BatchNorm1d)


def _call(path: str, layer: nn.Module, *args: Tensor) -> Any:
    return layer(*args)


class Net(nn.Module):
    """An embedding, residual layers, the first of them once more if `again`, and a head."""

    def __init__(self, layers: list[str], tied: bool, again: bool = False) -> None:
        super().__init__()
        self.emb = nn.Embedding(5, 4, padding_idx=1)
        made = [LAYERS[layer]() for layer in layers]
        self.layers = nn.ModuleList(made + made[:1] if again else made)
        self.head = nn.Linear(4, 5, bias=False)
        if tied:
            self.head.weight = self.emb.weight

    def forward(self, ids: Tensor, call: Callable[..., Any] = _call) -> Tensor:
        """Return the outputs, (n, length, 5); `call` calls a layer, given its path."""
        x = call("emb", self.emb, ids)
        for i, layer in enumerate(self.layers):
            path = f"layers.{i}"
            if isinstance(layer, nn.LSTM):
                x = x + call(path, layer, x)[0]
            elif isinstance(layer, nn.MultiheadAttention):
                x = x + call(path, layer, x, x, x)[0]
            elif isinstance(layer, nn.Conv2d):
                x = x + call(path, layer, x.unsqueeze(1)).sum(1)
            elif isinstance(layer, nn.BatchNorm1d):
                x = x + call(path, layer, x.mT).mT
            else:
                x = x + call(path, layer, x)
        return call("head", self.head, x)


def scaling(spec: Any) -> float:
    """Return alpha/r of a spec, or alpha/√r, from its fields."""
    rank = getattr(spec, "rank", None)
    if rank is None or not hasattr(spec, "alpha"):
        return 1.0
    alpha = rank if spec.alpha is None else spec.alpha
    return alpha / (math.sqrt(rank) if spec.rank_stabilized else rank)


# Kinds whose update is independent of W, so that their order does not count.
ADDITIVE = (pl.LoRA, pl.LoHa, pl.LoKr, pl.MiSS, pl.LoRAXS, pl.Delta)


def formula_of(spec: Any) -> Formula:
    """Return W' as a function of W, the factors and the strength."""
    s = scaling(spec)

    def low_rank(W: Tensor, f: dict[str, Tensor], k: Strength) -> Tensor:
        product = moved(f) if "B0" in f else f["B"] @ f["A"]
        return W + k * s * product.reshape(W.shape)

    def hadamard(W: Tensor, f: dict[str, Tensor], k: Strength) -> Tensor:
        return W + k * s * ((f["B1"] @ f["A1"]) * (f["B2"] @ f["A2"])).reshape(W.shape)

    def ia3(W: Tensor, f: dict[str, Tensor], k: Strength) -> Tensor:
        shape = [-1 if i == spec.dim else 1 for i in range(W.dim())]
        return W * (1 + k * (f["l"] - 1)).view(shape)

    def dora(W: Tensor, f: dict[str, Tensor], k: Strength) -> Tensor:
        V = W + k * s * (f["B"] @ f["A"]).reshape(W.shape)
        rest = list(range(1, W.dim()))
        before, after = (torch.linalg.vector_norm(M, dim=rest, keepdim=True) for M in (W, V))
        before, after = before.detach(), after.detach()
        direction = V / torch.where(after > 0, after, 1)
        # A row of zeros has no direction.
        return torch.where(after > 0, (before + k * f["d"].view(before.shape)) * direction, V)

    formulas: dict[str, Formula] = {
        "LoRA": low_rank,
        "DoRA": dora,
        "LoHa": hadamard,
        "LoKr": kronecker(s),
        "IA3": ia3,
        "OFT": rotated(cayley),
        "HiRA": lambda W, f, k: W * (1 + k * (f["B"] @ f["A"]).reshape(W.shape)),
        "MiSS": shared,
        "LoRAXS": lambda W, f, k: W + k * s * (f["B"] @ f["R"] @ f["A"]).reshape(W.shape),
        "Delta": lambda W, f, k: W + k * f["D"],
    }
    return formulas[type(spec).__name__]


def takes(spec: Any, tensor: Tensor) -> bool:
    """Return whether a kind can adapt a tensor."""
    if isinstance(spec, pl.Delta | pl.IA3):
        return tensor.dim() > getattr(spec, "dim", -1)
    if tensor.dim() < 2:
        return False
    inputs = tensor[0].numel()
    if isinstance(spec, pl.OFT):
        return inputs % spec.block_size == 0
    if isinstance(spec, pl.MiSS):
        return spec.rank <= inputs
    at_most = isinstance(spec, pl.LoRAXS) or getattr(spec, "init", "") in ("pissa", "olora")
    return not at_most or spec.rank <= min(len(tensor), inputs)


def step(W: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return the vectors of spectral_norm after a step of the power iteration."""
    u = W @ v
    u = u / u.norm()
    v = W.T @ u
    return u, v / v.norm()


def normalised(W: Tensor, u: Tensor, v: Tensor) -> Tensor:
    return W / (u @ W @ v)


def call_rows(layer: nn.Module, states: list[dict[str, Tensor]], args: Any) -> Any:
    """Call a layer with its tensors; with several states, each row of the inputs with its own."""
    if len(states) == 1:
        return functional_call(layer, states[0], args)
    parts = [
        functional_call(layer, state, tuple(x[i : i + 1] for x in args))
        for i, state in enumerate(states)
    ]
    if isinstance(parts[0], tuple):
        return (torch.cat([part[0] for part in parts]), None)
    return torch.cat(parts)
