"""What each bad call says, word for word, and that it leaves the model bit-identical.

A message names what was given, what was found and what to do. `[...]` in one of them stands for
words that are not paramlora's.
"""

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import paramlora as pl
from paramlora import LoRA
from tests.support.helpers import A_NAME, LEAVE_OUT, attached, half_merged, plain, refuses

# A model, what is called on it, and the error and the message that this gives.
Row = tuple[Callable[[], nn.Module], Callable[[Any], Any], type[Exception], str]


class Tied(nn.Module):
    """An embedding whose weight is also the head's."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(7, 5)
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.emb.weight


class Holder(nn.Module):
    """A tensor of any kind, beside a Linear."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self.fc1 = nn.Linear(5, 4)
        self.table = nn.Parameter(tensor, requires_grad=False)


class Failing(nn.Module):
    """Counts the calls of an init, and fails at the second."""

    calls = 0

    def __call__(self, tensor: Tensor) -> None:
        self.calls += 1
        if self.calls == 2:
            raise FloatingPointError("the init failed")
        nn.init.zeros_(tensor)


def tied() -> nn.Module:
    model = Tied()
    pl.attach(model, LoRA(rank=2), "emb")
    return model


def one_sided() -> nn.Module:
    """A tied model to one side of which an adapter was attached through a part."""
    model = Tied()
    pl.attach(model.head, LoRA(rank=2), "weight")
    return model


def untied() -> nn.Module:
    """A tied model whose tie was cut under the adapter, as `to_empty` does on another device."""
    model = tied()
    held: Any = model.get_submodule("head.parametrizations.weight")
    held.original = nn.Parameter(held.original.detach().clone(), requires_grad=False)
    return model


def overwritten() -> nn.Module:
    """The model of `half_merged` with a merged weight that was written to."""
    model = half_merged()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key == "fc1.parametrizations.weight.original":
                parameter.add_(1)
    return model


def hooked() -> nn.Module:
    with warnings.catch_warnings():  # the old weight_norm, which torch advises against
        warnings.simplefilter("ignore")
        return nn.Sequential(nn.utils.weight_norm(nn.Linear(5, 4)), nn.Linear(4, 3))


def lazy() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 4), nn.LazyLinear(3))


def packed() -> nn.Module:
    return nn.Sequential(torch.ao.nn.quantized.dynamic.Linear(5, 4), nn.ReLU())


def spectral() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(parametrizations.spectral_norm(nn.Linear(5, 4)), nn.Linear(4, 3))
    pl.attach(model, LoRA(rank=2, init="gaussian"))
    with torch.no_grad():
        for parameter in pl.parameters(model):
            parameter.normal_()
    return model


def entered(context: Any) -> None:
    with context:
        raise AssertionError("the context was entered")


DTYPE = "only floating tensors of 16 to 64 bits can be adapted, not integer, complex or packed ones"
A_TARGET = "a target is a module type, a glob over paths, or a callable (path, module) -> bool, got"


def other_dtype(dtype: torch.dtype) -> Row:
    """Return the row of a tensor whose dtype cannot be adapted."""

    def make() -> nn.Module:
        zeros = torch.zeros(4, 5)
        if dtype is not torch.qint8:
            return Holder(zeros.to(dtype))
        with warnings.catch_warnings():  # torch is about to drop this dtype
            warnings.simplefilter("ignore")
            return Holder(torch.quantize_per_tensor(zeros, 0.1, 0, dtype))

    return (
        make,
        lambda m: pl.attach(m, pl.Delta(), ["fc1", "table"]),
        pl.TargetError,
        f"cannot adapt 'table' with Delta: its dtype is {dtype}; {DTYPE} {LEAVE_OUT}",
    )


ATTACHING: dict[str, Row] = {
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
    "nothing like it": (
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
    "a type that is not there": (
        plain,
        lambda m: pl.attach(m, LoRA(2), nn.Conv2d),
        pl.TargetError,
        "no tensor matches Conv2d; modules with a weight here are Embedding, LayerNorm, Linear",
    ),
    "a type without a weight": (
        plain,
        lambda m: pl.attach(m, LoRA(2), nn.LSTM),
        pl.TargetError,
        "no tensor matches LSTM; there is no parameter 'weight' in rnn, only rnn.weight_ih_l0, "
        "rnn.weight_hh_l0, rnn.bias_ih_l0, rnn.bias_hh_l0: name those with a glob",
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
    "no parameter at all": (
        nn.ReLU,
        lambda m: pl.attach(m, LoRA(2), "fc1"),
        pl.TargetError,
        "no tensor matches 'fc1'; there are no parameters",
    ),
    "no weight at all": (
        nn.ReLU,
        lambda m: pl.attach(m, LoRA(2)),
        pl.TargetError,
        "no tensor matches Linear; modules with a weight here are none",
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
    "a weight that a hook computes": (
        hooked,
        lambda m: pl.attach(m, LoRA(2)),
        pl.TargetError,
        "cannot adapt '0.weight': a hook computes it, as the old weight_norm and spectral_norm and "
        "pruning do; use those of torch.nn.utils.parametrizations, or leave it out with narrower "
        "targets or with exclude=",
    ),
    "a tie with an adapter on one side": (
        one_sided,
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
    "an empty list": (
        plain,
        lambda m: pl.attach(m, LoRA(2), []),
        pl.TargetError,
        "no targets given; name at least one, such as nn.Linear or '*.fc1'",
    ),
    "an empty mapping": (
        plain,
        lambda m: pl.attach(m, {}),
        pl.TargetError,
        "no targets given; name at least one, such as nn.Linear or '*.fc1'",
    ),
    "mapping plus targets": (
        plain,
        lambda m: pl.attach(m, {"fc1": LoRA(2)}, "fc2"),
        TypeError,
        "with a mapping from target to spec, leave targets out",
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
    "None as exclude": (
        plain,
        lambda m: pl.attach(m, LoRA(2), exclude=None),  # type: ignore[arg-type]
        TypeError,
        f"{A_TARGET} None",
    ),
    "a type that is no module": (
        plain,
        lambda m: pl.attach(m, LoRA(2), int),  # type: ignore[arg-type]
        TypeError,
        "a target type is a module type such as nn.Linear, got <class 'int'>",
    ),
    "LoRA on a bias": (
        plain,
        lambda m: pl.attach(m, LoRA(2), "fc*"),
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
        "no tensor matches Linear; packed (quantized) weights cannot be adapted, as those of 0",
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
    "rank 0": (
        plain,
        lambda m: pl.attach(m, LoRA(rank=0)),
        ValueError,
        "rank must be a whole number of at least 1, got 0",
    ),
    "a negative rank": (
        plain,
        lambda m: pl.attach(m, LoRA(rank=-4)),
        ValueError,
        "rank must be a whole number of at least 1, got -4",
    ),
    "a boolean rank": (
        plain,
        lambda m: pl.attach(m, LoRA(rank=True)),
        ValueError,
        "rank must be a whole number of at least 1, got True",
    ),
    "a broken rank": (
        plain,
        lambda m: pl.attach(m, LoRA(rank=2.5)),  # type: ignore[arg-type]
        ValueError,
        "rank must be a whole number of at least 1, got 2.5",
    ),
    "an infinite alpha": (
        plain,
        lambda m: pl.attach(m, LoRA(alpha=math.inf)),
        ValueError,
        "alpha must be a finite number or None, got inf",
    ),
    "an alpha that is no number": (
        plain,
        lambda m: pl.attach(m, LoRA(alpha=math.nan)),
        ValueError,
        "alpha must be a finite number or None, got nan",
    ),
    "a boolean alpha": (
        plain,
        lambda m: pl.attach(m, LoRA(alpha=True)),
        ValueError,
        "alpha must be a finite number or None, got True",
    ),
    "an alpha of letters": (
        plain,
        lambda m: pl.attach(m, LoRA(alpha="8")),  # type: ignore[arg-type]
        ValueError,
        "alpha must be a finite number or None, got '8'",
    ),
    "an unknown init": (
        plain,
        lambda m: pl.attach(m, LoRA(init="xavier")),
        ValueError,
        "init must be one of 'kaiming', 'gaussian', 'gaussian/sqrt_r', 'orthogonal'[...] or a "
        "callable, got 'xavier'",
    ),
}


def factors(model: nn.Module, **changed: Any) -> dict[str, Any]:
    """Return the state of "digits" with some entries changed, those that are None left out."""
    return edited(pl.state_dict(model, "digits"), changed)


def base(model: nn.Module, **changed: Any) -> dict[str, Any]:
    """Return the base's state with some entries changed, those that are None left out."""
    return edited(pl.base_state_dict(model), changed)


def edited(state: dict[str, Any], changed: dict[str, Any]) -> dict[str, Any]:
    state = {**state, **{key.replace("_", "."): value for key, value in changed.items()}}
    return {key: value for key, value in state.items() if value is not None}


USING: dict[str, Row] = {
    "one name good, one not": (
        attached,
        lambda m: pl.enable(m, "letters", "digit"),
        pl.AdapterNameError,
        "no adapter 'digit' here; attached are: 'digits', 'letters'; did you mean 'digits'?",
    ),
    "names in a list": (
        attached,
        lambda m: pl.enable(m, ["digits"]),  # type: ignore[arg-type]
        TypeError,
        "adapter names are separate arguments, each a string, got ['digits']",
    ),
    "an adapter of another part": (
        attached,
        lambda m: pl.enable(m.fc1, "letters"),
        pl.AdapterNameError,
        "no adapter 'letters' here; attached are: 'digits'",
    ),
    "none attached": (
        plain,
        lambda m: pl.disable(m, "digits"),
        pl.AdapterNameError,
        "no adapter 'digits' here; attached are: none",
    ),
    "strength nan": (
        attached,
        lambda m: pl.scale(m, math.nan),
        ValueError,
        "a strength must be a finite number, got nan",
    ),
    "strength infinite": (
        attached,
        lambda m: entered(pl.using(m, digits=-math.inf)),
        ValueError,
        "a strength must be a finite number, got -inf",
    ),
    "strength a name": (
        attached,
        lambda m: pl.scale(m, "digits"),  # type: ignore[arg-type]
        ValueError,
        "a strength must be a finite number, got 'digits'",
    ),
    "strength a boolean": (
        attached,
        lambda m: pl.scale(m, True, "digits"),
        ValueError,
        "a strength must be a finite number, got True",
    ),
    "strength a tensor that is no number": (
        attached,
        lambda m: pl.scale(m, torch.tensor(math.nan)),
        ValueError,
        "a strength must be a finite number, got tensor(nan)",
    ),
    "strength a vector": (
        attached,
        lambda m: pl.scale(m, torch.ones(2)),
        ValueError,
        "a strength given as a tensor must be floating and without dimensions, got torch.float32 "
        "of shape (2,)",
    ),
    "strength an integer tensor": (
        attached,
        lambda m: pl.scale(m, torch.tensor(1)),
        ValueError,
        "a strength given as a tensor must be floating and without dimensions, got torch.int64 of "
        "shape ()",
    ),
    "merging what is off": (
        attached,
        lambda m: pl.merge(m, "digits", "letters"),
        pl.StateError,
        "adapter 'letters' is switched off, so merging it would change what the model computes; "
        "enable it first",
    ),
    "merging nothing": (
        plain,
        lambda m: pl.merge(m),
        pl.StateError,
        "nothing to merge: no adapter is attached here",
    ),
    "merging all when all are off or merged": (
        half_merged,
        lambda m: pl.merge(m),
        pl.StateError,
        "nothing to merge: of the adapters here ('digits', 'letters') each is merged already or "
        "switched off; unmerge or enable first",
    ),
    "merging a tie with an adapter on one side": (
        one_sided,
        lambda m: pl.merge(m),
        pl.StateError,
        "'emb.weight' and 'head.weight' are tied, and adapters were attached to one side alone, "
        "through a part of the model; detach those, and attach to the whole",
    ),
    "merging a tie that was cut": (
        untied,
        lambda m: pl.merge(m),
        pl.StateError,
        "cannot merge: 'head.weight' and 'emb.weight' were tied when their adapter was attached, "
        "and are not any more (to_empty unties, for one); detach, tie them again and attach",
    ),
    "unmerging what was written to": (
        overwritten,
        lambda m: pl.unmerge(m),
        pl.StateError,
        "'fc1.weight' was written to since the merge, and unmerging would lose that; bake keeps it",
    ),
    "normalising what is merged": (
        half_merged,
        lambda m: parametrizations.weight_norm(m.fc1),
        pl.StateError,
        "_WeightNorm cannot take over a tensor into which adapter 'digits' is merged; unmerge "
        "first",
    ),
    "merging inside of merged": (
        half_merged,
        lambda m: entered(pl.merged(m, "letters")),
        pl.StateError,
        "adapter 'digits' is merged already; unmerge first",
    ),
    "merging over spectral_norm": (
        spectral,
        lambda m: pl.merge(m),
        pl.StateError,
        "cannot merge at '0.weight': _SpectralNorm below the adapter cannot store the merged "
        "weight; remove it first, or leave the adapter unmerged",
    ),
    "baking with something off": (
        attached,
        lambda m: pl.bake(m),
        pl.StateError,
        "adapter 'letters' is switched off and would be lost; enable it, or detach it",
    ),
    "baking one side of a tie": (
        tied,
        lambda m: pl.bake(m.head),
        pl.StateError,
        "'weight' shares its adapter with a tensor outside of this module: emb.weight, head.weight "
        "are tied; call it on a module that holds them all",
    ),
    "detaching one side of a tie": (
        tied,
        lambda m: pl.detach(m.emb),
        pl.StateError,
        "'weight' shares its adapter with a tensor outside of this module: emb.weight, head.weight "
        "are tied; call it on a module that holds them all",
    ),
    "a state with missing, unexpected and wrong entries": (
        attached,
        lambda m: pl.load_state_dict(
            m,
            factors(m, fc1_weight_A=None, fc3_weight_A=torch.ones(1), fc2_weight_B=torch.ones(9)),
            "digits",
        ),
        pl.CheckpointError,
        "the state for adapter 'digits' does not fit: missing fc1.weight.A; unexpected "
        "fc3.weight.A; fc2.weight.B: expected (3, 2), found (9,)",
    ),
    "a state without tensors": (
        attached,
        lambda m: pl.load_state_dict(m, factors(m, fc2_weight_B=[[1.0]]), "digits"),
        pl.CheckpointError,
        "the state for adapter 'digits' does not fit: fc2.weight.B: expected (3, 2), found "
        "list instead of a tensor",
    ),
    "a state without data": (
        attached,
        lambda m: pl.load_state_dict(
            m, factors(m, fc2_weight_B=torch.ones(3, 2, device="meta")), "digits"
        ),
        pl.CheckpointError,
        "the state for adapter 'digits' does not fit: fc2.weight.B: expected (3, 2), found a "
        "tensor on the meta device, which has no data",
    ),
    "the state of another adapter": (
        attached,
        lambda m: pl.load_state_dict(m, pl.state_dict(m, "letters"), "digits"),
        pl.CheckpointError,
        "the state for adapter 'digits' does not fit: missing fc1.weight.A, fc1.weight.B; "
        "fc2.weight.A: expected (2, 4), found (1, 4); fc2.weight.B: expected (3, 2), found (3, 1)",
    ),
    "a base with missing, unexpected and wrong entries": (
        attached,
        lambda m: pl.load_base_state_dict(
            m, base(m, fc1_bias=None, fc3_bias=torch.ones(1), fc2_weight=torch.ones(9, 4))
        ),
        pl.CheckpointError,
        "the state for the base does not fit: missing fc1.bias; unexpected fc3.bias; fc2.weight: "
        "expected (3, 4), found (9, 4)",
    ),
    "a base under other keys": (
        attached,
        lambda m: pl.load_base_state_dict(
            m, {key: value for key, value in m.state_dict().items() if "fc" not in key}
        ),
        pl.CheckpointError,
        "the state for the base does not fit: missing fc1.bias, fc1.weight, fc2.bias, fc2.weight",
    ),
}


@pytest.mark.parametrize("row", ATTACHING.values(), ids=ATTACHING.keys())
def test_attach_refuses(row: Row) -> None:
    """A bad attach says what was given, what there is and what to do, and changes nothing."""
    make, call, error, message = row
    refuses(make(), call, error, message)


@pytest.mark.parametrize("row", USING.values(), ids=USING.keys())
def test_verbs_refuse(row: Row) -> None:
    """A bad call on attached adapters says what is wrong and what to do, and changes nothing."""
    make, call, error, message = row
    refuses(make(), call, error, message)


VERBS: dict[str, Callable[[nn.Module, str], Any]] = {
    "enable": pl.enable,
    "disable": pl.disable,
    "scale": lambda m, name: pl.scale(m, 2.0, name),
    "enabled": lambda m, name: entered(pl.enabled(m, name)),
    "disabled": lambda m, name: entered(pl.disabled(m, name)),
    "using": lambda m, name: entered(pl.using(m, name)),
    "using at a strength": lambda m, name: entered(pl.using(m, **{name: 0.5})),
    "merge": pl.merge,
    "merged": lambda m, name: entered(pl.merged(m, name)),
    "detach": pl.detach,
    "load_state_dict": lambda m, name: pl.load_state_dict(m, pl.state_dict(m, "digits"), name),
    "freeze": pl.freeze,
    "unfreeze": pl.unfreeze,
    "parameters": pl.parameters,
    "state_dict": pl.state_dict,
    "save": lambda m, name: pl.save(m, "nowhere", name),
}


@pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS.keys())
def test_typo_in_a_name(verb: Callable[[nn.Module, str], Any]) -> None:
    """Every verb that takes an adapter's name answers a typo with the names that there are."""
    refuses(
        attached(),
        lambda m: verb(m, "leters"),
        pl.AdapterNameError,
        "no adapter 'leters' here; attached are: 'digits', 'letters'; did you mean 'letters'?",
    )


CHANGES_MERGED = {
    "enable": "enable",
    "disable": "disable",
    "scale": "scale",
    "enabled": "enable",
    "disabled": "disable",
    "using": "toggle",
    "using at a strength": "toggle",
    "merge": "merge",
    "detach": "detach",
    "load_state_dict": "load",
}


@pytest.mark.parametrize(("verb", "word"), CHANGES_MERGED.items())
def test_changing_what_is_merged(verb: str, word: str) -> None:
    """A merged adapter is not toggled, scaled, merged again, loaded or detached."""
    refuses(
        half_merged(),
        lambda m: VERBS[verb](m, "digits"),
        pl.StateError,
        f"cannot {word} adapter 'digits' while it is merged; unmerge first",
    )


@pytest.mark.parametrize("verb", ["enable", "disable", "detach"])
def test_changing_all_when_one_is_merged(verb: str) -> None:
    """A verb for all adapters changes none of them if one is merged."""
    refuses(
        half_merged(),
        lambda m: getattr(pl, verb)(m),
        pl.StateError,
        f"cannot {verb} adapter 'digits' while it is merged; unmerge first",
    )


def test_loading_a_base_under_what_is_merged() -> None:
    """A base is not loaded under a merged adapter, whose original bits are those of the old one."""
    refuses(
        half_merged(),
        lambda m: pl.load_base_state_dict(m, pl.base_state_dict(m)),
        pl.StateError,
        "cannot load a base under adapter 'digits' while it is merged; unmerge first",
    )


def test_errors_are_standard_ones() -> None:
    """Each error can be caught as paramlora's and as the standard error that it is."""
    for error, standard in {
        pl.TargetError: ValueError,
        pl.AdapterNameError: KeyError,
        pl.StateError: RuntimeError,
        pl.CheckpointError: ValueError,
    }.items():
        assert issubclass(error, pl.ParamloraError)
        assert issubclass(error, standard)


def test_a_rank_above_the_smaller_side_is_allowed_and_marked() -> None:
    """A rank above the smaller side of the matrix works as any other, and the summary marks it."""
    model = plain()
    rows = pl.attach(model, LoRA(rank=4), name="wide").sites
    assert [(row.site, row.note) for row in rows] == [
        ("fc1.weight", ""),
        ("fc2.weight", "rank above the smaller side"),
    ]
    assert "rank above the smaller side" in str(pl.summary(model)).splitlines()[2]
    assert [row.parameters for row in rows] == [4 * (5 + 4), 4 * (4 + 3)]
