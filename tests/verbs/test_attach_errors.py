"""Errors of `attach` for tensors, names, specs and inits, word by word.

A message says what was given, what was found and what to do. `[...]` stands for words that do not
come from paramlora. Errors of targets are in `test_targets.py`, those of settings in
`tests/kinds/test_specs.py`.
"""

import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import paramlora as pl
from paramlora import LoRA
from tests.support.helpers import A_NAME, LEAVE_OUT, Row, refuses, unchanged
from tests.support.models import attached, plain, tied_on_one_side


class Holder(nn.Module):
    """A Linear, and a tensor of any dtype or layout."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self.fc1 = nn.Linear(5, 4)
        self.table = nn.Parameter(tensor, requires_grad=False)


class Failing(nn.Module):
    """An init that fails at its second call."""

    calls = 0

    def __call__(self, tensor: Tensor) -> None:
        self.calls += 1
        if self.calls == 2:
            raise FloatingPointError("the init failed")
        nn.init.zeros_(tensor)


def hooked() -> nn.Module:
    with warnings.catch_warnings():  # the old weight_norm is deprecated
        warnings.simplefilter("ignore")
        return nn.Sequential(nn.utils.weight_norm(nn.Linear(5, 4)), nn.Linear(4, 3))


def lazy() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 4), nn.LazyLinear(3))


def packed() -> nn.Module:
    return nn.Sequential(torch.ao.nn.quantized.dynamic.Linear(5, 4), nn.ReLU())


DTYPE = "only floating tensors of 16 to 64 bits can be adapted, not integer, complex or packed ones"


def other_dtype(dtype: torch.dtype) -> Row:
    """Return the row of a tensor of a dtype that cannot be adapted."""

    def make() -> nn.Module:
        zeros = torch.zeros(4, 5)
        if dtype is not torch.qint8:
            return Holder(zeros.to(dtype))
        with warnings.catch_warnings():  # torch will remove this dtype
            warnings.simplefilter("ignore")
            return Holder(torch.quantize_per_tensor(zeros, 0.1, 0, dtype))

    return (
        make,
        lambda m: pl.attach(m, pl.Delta(), ["fc1", "table"]),
        pl.TargetError,
        f"cannot adapt 'table' with Delta: its dtype is {dtype}; {DTYPE} {LEAVE_OUT}",
    )


ATTACHING: dict[str, Row] = {
    "a weight that a hook computes": (
        hooked,
        lambda m: pl.attach(m, LoRA(2)),
        pl.TargetError,
        "cannot adapt '0.weight': a hook computes it, as the old weight_norm and spectral_norm and "
        "pruning do; use those of torch.nn.utils.parametrizations, or leave it out with narrower "
        "targets or with exclude=",
    ),
    "a tie with an adapter on one side": (
        tied_on_one_side,
        lambda m: pl.attach(m, LoRA(2), "emb", name="two"),
        pl.StateError,
        "'emb.weight' and 'head.weight' are tied, and adapters were attached to one side alone, "
        "through a part of the model; detach those, and attach to the whole",
    ),
    "an init that fills nothing": (
        plain,
        lambda m: pl.attach(m, LoRA(2, init=torch.zeros_like)),
        ValueError,
        "init did not fill a factor of shape (2, 5) with finite numbers; it has to do so in place, "
        "as torch.nn.init.normal_ does",
    ),
    "a spec's class": (
        plain,
        lambda m: pl.attach(m, LoRA),  # type: ignore[arg-type]
        TypeError,
        "a spec is an instance such as LoRA(rank=8), got <class 'paramlora.kinds.lora.LoRA'>",
    ),
    "a spec's class in a mapping": (
        plain,
        lambda m: pl.attach(m, {"fc1": LoRA(2), "fc2": LoRA}),  # type: ignore[dict-item]
        TypeError,
        "a spec is an instance such as LoRA(rank=8), got <class 'paramlora.kinds.lora.LoRA'>",
    ),
    "LoRA on a bias": (
        plain,
        lambda m: pl.attach(m, LoRA(2), ["fc1", "fc1.bias"]),
        pl.TargetError,
        "cannot adapt 'fc1.bias' with LoRA: a low-rank update needs two dimensions, it has 1; use "
        f"Delta() {LEAVE_OUT}",
    ),
    "LoRA on a number": (
        plain,
        lambda m: pl.attach(m, LoRA(2), "gain"),
        pl.TargetError,
        "cannot adapt 'gain' with LoRA: a low-rank update needs two dimensions, it has 0; use "
        f"Delta() {LEAVE_OUT}",
    ),
    "integer": other_dtype(torch.int8),
    "boolean": other_dtype(torch.bool),
    "complex": other_dtype(torch.complex64),
    "eight bits": other_dtype(torch.float8_e4m3fn),
    "quantized": other_dtype(torch.qint8),
    "sparse": (
        lambda: Holder(torch.eye(4).to_sparse()),
        lambda m: pl.attach(m, LoRA(2), ["fc1", "table"]),
        pl.TargetError,
        "cannot adapt 'table' with LoRA: its layout is torch.sparse_coo; adapters need a strided "
        f"(dense) tensor {LEAVE_OUT}",
    ),
    "packed, by type": (
        packed,
        lambda m: pl.attach(m, LoRA(2)),
        pl.TargetError,
        "no tensor matches 'all-linear'; packed (quantized) weights cannot be adapted, as those "
        "of 0",
    ),
    "packed, by path": (
        packed,
        lambda m: pl.attach(m, LoRA(2), "0"),
        pl.TargetError,
        "no tensor matches '0'; packed (quantized) weights cannot be adapted, as those of 0",
    ),
    "lazy": (
        lazy,
        lambda m: pl.attach(m, LoRA(2), "1"),
        pl.TargetError,
        "'1.weight' is lazy and has no shape yet; run one batch through the model first, and "
        "attach then",
    ),
    "lazy elsewhere": (
        lazy,
        lambda m: pl.attach(m, LoRA(2), "0"),
        pl.TargetError,
        "'1.weight' is lazy and has no shape yet; run one batch through the model first, and "
        "attach then",
    ),
    "a name that is taken": (
        attached,
        lambda m: pl.attach(m, LoRA(2), "emb", name="letters"),
        pl.AdapterNameError,
        "an adapter 'letters' is attached already (there are 'digits', 'letters'); choose another "
        "name=, or detach it first",
    ),
    "an empty name": (
        plain,
        lambda m: pl.attach(m, LoRA(2), name=""),
        pl.AdapterNameError,
        f"'' {A_NAME}",
    ),
    "a name with a dot": (
        plain,
        lambda m: pl.attach(m, LoRA(2), name="v1.2"),
        pl.AdapterNameError,
        f"'v1.2' {A_NAME}",
    ),
    "a number for a name": (
        plain,
        lambda m: pl.attach(m, LoRA(2), name=3),  # type: ignore[arg-type]
        pl.AdapterNameError,
        f"3 {A_NAME}",
    ),
    "a name that ModuleDict has": (
        plain,
        lambda m: pl.attach(m, LoRA(2), name="keys"),
        pl.AdapterNameError,
        f"'keys' {A_NAME}",
    ),
    "an init that fails at the second tensor": (
        plain,
        lambda m: pl.attach(m, LoRA(2, init=Failing())),
        FloatingPointError,
        "the init failed",
    ),
}


@pytest.mark.parametrize("row", ATTACHING.values(), ids=ATTACHING.keys())
def test_attach_errors(row: Row) -> None:
    """An attach that is impossible raises, says what to do, and changes nothing."""
    make, call, error, message = row
    refuses(make(), call, error, message)


def test_a_sharded_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module that FSDP manages is refused by name."""
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
    monkeypatch.setattr("paramlora.stack.storage.is_fsdp_managed", lambda m: m is model[1])
    message = "cannot adapt '1.weight' with LoRA: it is sharded over processes; attach first[...]"
    refuses(model, lambda m: pl.attach(m, LoRA(2)), pl.TargetError, message)


@pytest.mark.parametrize("own", [True, False])
def test_random_state_after_a_refused_attach(own: bool) -> None:
    """A call that fails after drawing numbers gives the generators their states back."""
    generator = torch.Generator().manual_seed(3) if own else None
    source = generator or torch.default_generator
    model, before = plain(), source.get_state()
    specs: Any = {"fc1": LoRA(2), "fc2": LoRA(2, init=lambda A: A.fill_(math.inf))}
    with unchanged(model), pytest.raises(ValueError, match="did not fill a factor"):
        pl.attach(model, specs, generator=generator)
    assert torch.equal(source.get_state(), before)


def test_a_warning_that_is_an_error_leaves_nothing_attached() -> None:
    """With warnings as errors, an attach that would warn changes nothing."""
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    pl.attach(model, LoRA(2), "0", name="a")
    random_state = torch.get_rng_state()
    with unchanged(model), warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="'b' is now the only active adapter"):
            pl.attach(model, LoRA(2), "2", name="b", hold_statistics=True)
    assert pl.names(model) == ["a"]
    assert pl.summary(model).active == ("a",)
    assert torch.equal(torch.get_rng_state(), random_state)


def test_adapters_of_one_name_in_two_parts_are_detached_together() -> None:
    """After the whole model is detached, all of its parameters are trained again."""
    part = nn.ModuleDict({"fc": nn.Linear(3, 2)})
    model = nn.ModuleDict({"first": nn.Linear(4, 3), "part": part})
    pl.attach(model, LoRA(2), "first", name="a")
    pl.attach(part, LoRA(2), name="a")
    pl.detach(model)
    assert all(parameter.requires_grad for parameter in model.parameters())
