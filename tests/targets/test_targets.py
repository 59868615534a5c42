"""Targets: types of layers, tensors without elements, and errors word by word."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import paramlora as pl
from paramlora import LoRA
from tests.support.helpers import Row, refuses
from tests.support.mixed import train
from tests.support.models import attached, plain


@dataclass
class Nothing:
    """A filter that matches nothing, and has no hash."""

    def __call__(self, path: str, module: nn.Module) -> bool:
        return False


def test_type_matches_subclasses() -> None:
    """A type as target matches adapted modules and subclasses; `out_proj` is then trained."""
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0)
    assert type(layer.self_attn.out_proj) is not nn.Linear
    pl.attach(layer, pl.LoRA(rank=2), nn.Linear, name="one")
    summary = pl.attach(layer, pl.LoRA(rank=1), nn.Linear, name="two")
    sites = {row.site for row in summary.sites if row.adapter == "two"}
    assert sites == {"linear1.weight", "linear2.weight", "self_attn.out_proj.weight"}
    before = layer(torch.ones(2, 3, 8))
    train(layer, torch.randn(2, 3, 8), steps=1)
    factors = pl.state_dict(layer, "two")
    assert factors["self_attn.out_proj.weight.B"].any()
    with pl.using(layer), torch.no_grad():
        off = layer(torch.ones(2, 3, 8))
    assert not torch.equal(layer(torch.ones(2, 3, 8)), before)
    assert_close(off, before)


@pytest.mark.parametrize("spec", [pl.LoRA(1), pl.Delta()])
def test_empty_tensor(spec: pl.kinds.Spec) -> None:
    """A tensor without elements raises TargetError with its path, and nothing is attached."""
    model = nn.Sequential(nn.Linear(0, 3), nn.Linear(3, 2))
    with pytest.raises(pl.TargetError, match=r"'0.weight' with .*: it has no elements"):
        pl.attach(model, spec, "*weight")
    assert list(model.state_dict()) == ["0.weight", "0.bias", "1.weight", "1.bias"]


def with_constants() -> nn.Module:
    """Return a Linear with a number and a tensor that are no parameters."""
    layer = nn.Linear(3, 2)
    layer.scale_v = nn.Parameter(torch.ones(2, 3))
    vars(layer).update(scale=2.0, table=torch.ones(2, 3))
    return layer


A_TARGET = (
    "a target is a module type, a name or a glob over paths, or a callable (path, module) -> bool, "
    "got"
)


TARGETS: dict[str, Row] = {
    "typo in a path": (
        plain,
        lambda m: pl.attach(m, LoRA(2), "fc9"),
        pl.TargetError,
        "no tensor matches 'fc9'; did you mean fc2, fc1?",
    ),
    "typo in a tensor": (
        plain,
        lambda m: pl.attach(m, LoRA(2), "fc1.wieght"),
        pl.TargetError,
        "no tensor matches 'fc1.wieght'; did you mean fc1.weight, fc2.weight, emb.weight?",
    ),
    "no similar path": (
        plain,
        lambda m: pl.attach(m, LoRA(2), "h.*.c_attn"),
        pl.TargetError,
        "no tensor matches 'h.*.c_attn'; there are emb, rnn, fc1, norm, fc2, gain, emb.weight, "
        "rnn.weight_ih_l0, …",
    ),
    "typo in a path of an adapted model": (
        attached,
        lambda m: pl.attach(m, LoRA(2), "fc9", name="two"),
        pl.TargetError,
        "no tensor matches 'fc9'; did you mean fc2, fc1?",
    ),
    "the second of a list": (
        plain,
        lambda m: pl.attach(m, LoRA(2), ["fc1", "fc3"]),
        pl.TargetError,
        "no tensor matches 'fc3'; did you mean fc2, fc1?",
    ),
    "the second of a mapping": (
        plain,
        lambda m: pl.attach(m, {"fc1": LoRA(2), "fc2.bais": pl.Delta()}),
        pl.TargetError,
        "no tensor matches 'fc2.bais'; did you mean fc2.bias, fc1.bias, fc2.weight?",
    ),
    "a type without a match": (
        plain,
        lambda m: pl.attach(m, LoRA(2), nn.Conv2d),
        pl.TargetError,
        "no tensor matches Conv2d; modules with a weight here are Embedding, LayerNorm, Linear",
    ),
    "a callable without a hash": (
        plain,
        lambda m: pl.attach(m, LoRA(2), Nothing()),
        pl.TargetError,
        "no tensor matches Nothing(); modules with a weight here are Embedding, LayerNorm, Linear",
    ),
    "the name of a type": (
        plain,
        lambda m: pl.attach(m, LoRA(2), "Linear"),
        pl.TargetError,
        "no tensor matches 'Linear'; give the class itself, Linear without quotation marks",
    ),
    "a type without a weight": (
        plain,
        lambda m: pl.attach(m, LoRA(2), nn.LSTM),
        pl.TargetError,
        "no tensor matches LSTM; there is no parameter 'weight' in rnn, only rnn.weight_ih_l0, "
        "rnn.weight_hh_l0, rnn.bias_ih_l0, rnn.bias_hh_l0: name those with a glob, 'rnn.*'",
    ),
    "the model itself without a weight": (
        lambda: nn.LSTM(3, 3, bias=False),
        lambda m: pl.attach(m, LoRA(2), nn.LSTM),
        pl.TargetError,
        "no tensor matches LSTM; there is no parameter 'weight' in the model itself, only "
        "weight_ih_l0, weight_hh_l0: name those with a glob, '*'",
    ),
    "a path without a weight": (
        plain,
        lambda m: pl.attach(m, LoRA(2), "act"),
        pl.TargetError,
        "no tensor matches 'act'; there is no parameter 'weight' in act",
    ),
    "a callable that matches nothing": (
        plain,
        lambda m: pl.attach(m, LoRA(2), lambda path, module: False),
        pl.TargetError,
        "no tensor matches <lambda>; modules with a weight here are Embedding, LayerNorm, Linear",
    ),
    "a model without parameters": (
        nn.ReLU,
        lambda m: pl.attach(m, LoRA(2), "fc1"),
        pl.TargetError,
        "no tensor matches 'fc1'; there are no parameters",
    ),
    "a model without weights": (
        nn.ReLU,
        lambda m: pl.attach(m, LoRA(2)),
        pl.TargetError,
        "no tensor matches 'all-linear'; modules with a weight here are none",
    ),
    "everything excluded": (
        plain,
        lambda m: pl.attach(m, LoRA(2), "fc?", exclude="fc*"),
        pl.TargetError,
        "every tensor that matches is excluded by exclude='fc*'",
    ),
    "typo in exclude": (
        plain,
        lambda m: pl.attach(m, LoRA(2), exclude=["fc2", "fc9"]),
        pl.TargetError,
        "exclude= matches nothing: no 'fc9'; did you mean fc2, fc1?",
    ),
    "an empty list": (
        plain,
        lambda m: pl.attach(m, LoRA(2), []),
        pl.TargetError,
        "no targets given; name at least one, such as nn.Linear or 'fc1'",
    ),
    "an empty mapping": (
        plain,
        lambda m: pl.attach(m, {}),
        pl.TargetError,
        "no targets given; name at least one, such as nn.Linear or 'fc1'",
    ),
    "mapping plus targets": (
        plain,
        lambda m: pl.attach(m, {"fc1": LoRA(2)}, "fc2"),
        TypeError,
        "with a mapping from target to spec, leave targets out",
    ),
    "a module as a target": (
        plain,
        lambda m: pl.attach(m, LoRA(2), m.fc1),
        TypeError,
        f"{A_TARGET} Linear(in_features=5, out_features=4, bias=True)",
    ),
    "a number as a target": (
        plain,
        lambda m: pl.attach(m, LoRA(2), 5),  # type: ignore[arg-type]
        TypeError,
        f"{A_TARGET} 5",
    ),
    "None in a list": (
        plain,
        lambda m: pl.attach(m, LoRA(2), ["fc1", None]),  # type: ignore[list-item]
        TypeError,
        f"{A_TARGET} None",
    ),
    "a constant, next to a parameter whose name would be that of a hook": (
        with_constants,
        lambda m: pl.attach(m, LoRA(2), "scale"),
        pl.TargetError,
        "no tensor matches 'scale'[...]",
    ),
    "a constant tensor that no hook computes": (
        with_constants,
        lambda m: pl.attach(m, LoRA(2), "table"),
        pl.TargetError,
        "no tensor matches 'table'[...]",
    ),
    "None as exclude": (
        plain,
        lambda m: pl.attach(m, LoRA(2), exclude=None),  # type: ignore[arg-type]
        TypeError,
        f"{A_TARGET} None",
    ),
    "a type that is not a module": (
        plain,
        lambda m: pl.attach(m, LoRA(2), int),  # type: ignore[arg-type]
        TypeError,
        "a target type is a module type such as nn.Linear, got <class 'int'>",
    ),
}


@pytest.mark.parametrize("row", TARGETS.values(), ids=TARGETS.keys())
def test_target_errors(row: Row) -> None:
    """A target that matches nothing, or is not a target, raises and changes nothing."""
    make, call, error, message = row
    refuses(make(), call, error, message)
