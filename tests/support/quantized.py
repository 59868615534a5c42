"""Two quantized layers in each form that a library stores, and the dense model that they stand for.

The libraries are optional. `Codes` and `Bytes` have the forms of GPTQ's and of bitsandbytes' layers
and need none of them.
"""

import copy
import importlib
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import paramlora as pl

SIZE = 64
STEP = 1 / 64


class Codes(nn.Module):
    """A layer without a weight: a matrix of integers and one step, as GPTQ, AWQ and HQQ have."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        codes = (layer.weight.detach() / STEP).round().to(torch.int32)
        self.register_buffer("qweight", codes.t().contiguous())  # (in, out)
        self.register_buffer("step", torch.tensor(STEP))
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        weight: Any = self.qweight
        return F.linear(x, weight.t().to(x.dtype) * self.step, self.bias)


class Bytes(nn.Linear):
    """A layer whose weight is a column of bytes, as bitsandbytes has."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features)
        codes = (layer.weight.detach() / STEP).round().add(128).to(torch.uint8)
        self.weight = nn.Parameter(codes.view(-1, 1), requires_grad=False)
        self.bias = layer.bias

    def forward(self, input: Tensor) -> Tensor:
        codes = self.weight.view(self.out_features, self.in_features).to(input.dtype)
        return F.linear(input, (codes - 128) * STEP, self.bias)


def imported(name: str) -> Any:
    """Return a module of an optional library; skip if it is missing or not for this torch."""
    try:
        return importlib.import_module(name)
    except (ImportError, AttributeError) as error:
        return pytest.skip(f"{name.partition('.')[0]} is not installed for this torch: {error}")


def layers() -> nn.Sequential:
    """Return two float layers."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(SIZE, SIZE), nn.Tanh(), nn.Linear(SIZE, SIZE))


def _each(convert: Callable[[nn.Linear], nn.Module]) -> nn.Sequential:
    model = layers()
    return nn.Sequential(*[convert(m) if isinstance(m, nn.Linear) else m for m in model])


def _torchao(config: Callable[[Any], Any]) -> nn.Sequential:
    quantization = imported("torchao.quantization")
    model = layers()
    try:
        made = config(quantization)
    except AttributeError as error:
        pytest.skip(f"this torchao lacks it: {error}")
    quantization.quantize_(model, made)
    return model


def nf4(_: Any) -> Any:
    """Return torchao's setting of NF4, in blocks that fit the layers."""
    api = imported("torchao.prototype._nf4tensor_api")
    config = api.NF4WeightOnlyConfig()
    config.block_size, config.scaler_block_size = 64, 32
    return config


def _bitsandbytes(make: Callable[[Any], nn.Module]) -> nn.Sequential:
    nn_ = imported("bitsandbytes").nn

    def convert(layer: nn.Linear) -> nn.Module:
        made = make(nn_)
        made.load_state_dict(layer.state_dict())
        return made

    return _each(convert).to("cpu")  # quantizes


def _hqq() -> nn.Sequential:
    hqq = imported("hqq.core.quantize")
    config = hqq.BaseQuantizeConfig(nbits=4, group_size=64)
    options = {"compute_dtype": torch.float32, "device": "cpu"}
    return _each(lambda layer: hqq.HQQLinear(copy.deepcopy(layer), config, **options))


def _quanto(bits: str) -> nn.Sequential:
    quanto = imported("optimum.quanto")
    model = layers()
    quanto.quantize(model, weights=bits)
    quanto.freeze(model)
    return model


FORMS: dict[str, Callable[[], nn.Sequential]] = {
    "codes": lambda: _each(Codes),
    "bytes": lambda: _each(Bytes),
    "torchao int8": lambda: _torchao(lambda q: q.Int8WeightOnlyConfig()),
    "torchao int4": lambda: _torchao(
        lambda q: q.IntxWeightOnlyConfig(
            weight_dtype=torch.int4,  # type: ignore[attr-defined]
            granularity=q.PerGroup(32),
        )
    ),
    "torchao float8": lambda: _torchao(lambda q: q.Float8WeightOnlyConfig()),
    "torchao nf4": lambda: _torchao(nf4),
    "bitsandbytes 4": lambda: _bitsandbytes(lambda m: m.Linear4bit(SIZE, SIZE, quant_type="nf4")),
    "bitsandbytes 8": lambda: _bitsandbytes(
        lambda m: m.Linear8bitLt(SIZE, SIZE, has_fp16_weights=False)
    ),
    "hqq": _hqq,
    "quanto int8": lambda: _quanto("qint8"),
    "quanto int4": lambda: _quanto("qint4"),
}


def quantized(form: str) -> nn.Sequential:
    """Return two quantized layers, with the same values in every call."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the libraries, about each other
        return FORMS[form]()


def inputs(rows: int = 5) -> Tensor:
    return torch.randn(rows, SIZE, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def randomize(model: nn.Module, *names: str, seed: int = 2) -> None:
    """Fill the factors of adapters, so that they compute something."""
    generator = torch.Generator().manual_seed(seed)
    for factor in pl.parameters(model, *names):
        factor.copy_(torch.randn(factor.shape, generator=generator) / 4)


@torch.no_grad()
def dense(model: nn.Sequential) -> nn.Sequential:
    """Return the float64 model of two quantized layers, read off their outputs."""
    plain = layers().double()
    for ours, layer in zip(model, plain, strict=True):
        if isinstance(layer, nn.Linear):
            bias = ours(torch.zeros(1, SIZE)).double()
            layer.weight.copy_((ours(torch.eye(SIZE)).double() - bias).t())
            layer.bias.copy_(bias[0])
    return plain
