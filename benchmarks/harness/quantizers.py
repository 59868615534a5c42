"""Ways to quantize the linear layers of a model, for the subcommand `quantized`."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GROUP = 16  # elements of a row that share a scale, in `Int4Linear`


class Int4Linear(nn.Linear):
    """A linear layer whose weight is two four-bit codes a byte, with a scale for each group."""

    def __init__(self, layer: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        groups = layer.weight.detach().float().view(layer.out_features, -1, GROUP)
        scale = groups.abs().amax(-1, keepdim=True) / 7
        codes = (groups / scale).round().add(8).to(torch.uint8).view(-1, 2)
        packed = codes[:, :1] | codes[:, 1:] << 4  # (out · in / 2, 1)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.register_buffer("scale", scale.to(layer.weight.dtype))
        self.bias = layer.bias

    def dequantize(self) -> Tensor:
        """Return the weight, (out, in)."""
        codes = torch.cat([self.weight & 15, self.weight >> 4], dim=1)
        scale: Any = self.scale
        values = (codes.to(scale.dtype) - 8).view(self.out_features, -1, GROUP) * scale
        return values.view(self.out_features, self.in_features)

    def forward(self, input: Tensor) -> Tensor:
        return _Product.apply(input, self)


class _Product(torch.autograd.Function):
    """x Wᵀ + b, which dequantizes W once more in the backward instead of keeping it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Int4Linear) -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.dequantize(), layer.bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] @ ctx.layer.dequantize(), None


def _replace(model: nn.Module, convert: Callable[[nn.Linear], nn.Module]) -> None:
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, convert(child))


def int4(model: nn.Module) -> None:
    """Quantize by `Int4Linear`."""
    _replace(model, Int4Linear)


def int8_torchao(model: nn.Module) -> None:
    """Quantize to int8 by torchao."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig())


def nf4_torchao(model: nn.Module) -> None:
    """Quantize to NF4 by torchao."""
    from torchao.prototype._nf4tensor_api import NF4WeightOnlyConfig
    from torchao.quantization import quantize_

    blocks = [m.weight.numel() // 64 for m in model.modules() if isinstance(m, nn.Linear)]
    config: Any = NF4WeightOnlyConfig()
    config.block_size, config.scaler_block_size = 64, math.gcd(256, *blocks)
    quantize_(model, config)


def nf4_bitsandbytes(model: nn.Module) -> None:
    """Quantize to NF4 by bitsandbytes, computing in bfloat16."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    def convert(layer: nn.Linear) -> nn.Module:
        device = layer.weight.device
        made = Linear4bit(
            layer.in_features,
            layer.out_features,
            bias=False,
            compute_dtype=layer.weight.dtype,
            quant_type="nf4",
            device="meta",
        )
        made.weight = Params4bit(layer.weight.data.cpu(), requires_grad=False, quant_type="nf4")
        return made.to(device)

    _replace(model, convert)


# Each form of the base with its package, and the function that quantizes.
BASES: dict[str, tuple[str, Callable[[nn.Module], None]]] = {
    "bfloat16": ("torch", lambda model: None),
    "int4": ("torch", int4),
    "int8, torchao": ("torchao", int8_torchao),
    "NF4, torchao": ("torchao", nf4_torchao),
    "NF4, bitsandbytes": ("bitsandbytes", nf4_bitsandbytes),
}
