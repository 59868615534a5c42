"""The models and sizes that `layers` measures, in suites of cells."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Self-attention of four linear layers; grouped queries if `key_width` is below `width`."""

    def __init__(self, width: int, heads: int, key_width: int, bias: bool) -> None:
        super().__init__()
        self.q = nn.Linear(width, width, bias=bias)
        self.k = nn.Linear(width, key_width, bias=bias)
        self.v = nn.Linear(width, key_width, bias=bias)
        self.o = nn.Linear(width, width, bias=bias)
        self.size = width // heads

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (-1, self.size)).transpose(-3, -2)
            for layer in (self.q, self.k, self.v)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, enable_gqa=k.shape != q.shape)
        return self.o(mixed.transpose(-3, -2).flatten(-2))


class Encoder(nn.Module):
    """One layer of a transformer encoder."""

    def __init__(self, width: int, hidden: int, heads: int) -> None:
        super().__init__()
        self.attention = Attention(width, heads, width, bias=True)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Llama(nn.Module):
    """One block of a Llama: seven linear layers without bias, grouped queries.

    By default it has Llama-8B's shape. `head` is the width of a head.
    """

    def __init__(self, width: int = 4096, head: int = 128) -> None:
        super().__init__()
        hidden = width * 7 // 2
        self.attention = Attention(width, width // head, width // 4, bias=False)
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


def mlp() -> nn.Module:
    """Return the network of the digit study, 784 → 256 → 128 → 10."""
    layers = [nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10)]
    return nn.Sequential(*layers)


def feed_forward(width: int, hidden: int, times: int) -> nn.Module:
    """Return `times` blocks width → hidden → width, each with a GELU inside."""
    blocks = [
        layer
        for _ in range(times)
        for layer in (nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
    ]
    return nn.Sequential(*blocks)


def encoders(*sizes: int) -> Callable[[], nn.Module]:
    """Return a function that builds two encoder layers in a row."""
    return lambda: nn.Sequential(Encoder(*sizes), Encoder(*sizes))


@dataclass(frozen=True)
class Cell:
    """A model, the shape of its input, and the rank of its adapters: one row of a table.

    Args:
        suite: the suite that it belongs to.
        model: builds the model.
        shape: shape of the input.
        rank: rank of the adapters.
        dtype: dtype of the model and its input.
        autocast: dtype of the products under `torch.autocast`; None for no autocast.
    """

    suite: str
    model: Callable[[], nn.Module]
    shape: tuple[int, ...]
    rank: int
    dtype: torch.dtype = torch.float32
    autocast: torch.dtype | None = None

    @property
    def products(self) -> torch.dtype:
        """The dtype that layers compute in."""
        return self.autocast or self.dtype


def cells(suite: str, quick: bool) -> Iterator[Cell]:
    """Yield the cells of a suite; only the first of them if `quick`."""
    half = torch.bfloat16
    by_suite = {
        "cpu-mlp": [Cell(suite, mlp, (n, 784), r) for r in (2, 4, 16) for n in (10, 100, 1000)],
        "cpu-ffn": [
            Cell(suite, lambda: feed_forward(1024, 4096, 1), (n, 1024), 16) for n in (32, 512, 2048)
        ],
        "cpu-encoder": [Cell(suite, encoders(256, 1024, 4), (8, 128, 256), 16)],
        "gpu-ffn": [
            Cell(suite, lambda: feed_forward(4096, 14336, 2), (n, 4096), 16, half)
            for n in (16, 512, 4096, 16384)
        ],
        "gpu-block": [Cell(suite, Llama, (1, n, 4096), 16, half) for n in (512, 4096)],
        "gpu-mlp": [Cell(suite, mlp, (100, 784), 4)],
        "gpu-autocast": [
            Cell(suite, encoders(768, 3072, 12), (b, 128, 768), 16, autocast=half) for b in (8, 128)
        ],
    }
    yield from by_suite[suite][:1] if quick else by_suite[suite]


SUITES = ("cpu-mlp", "cpu-ffn", "cpu-encoder", "gpu-mlp", "gpu-ffn", "gpu-block", "gpu-autocast")
