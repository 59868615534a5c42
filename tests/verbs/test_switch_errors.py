"""Errors of the verbs that name, toggle or scale adapters, word by word."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import paramlora as pl
from tests.support.helpers import Row, enter, refuses
from tests.support.models import attached, half_merged, plain

FORMS = (
    "the strength comes before the names, scale(model, 0.5, 'digits'), or is given by name, "
    "scale(model, digits=0.5)"
)
SWITCHING: dict[str, Row] = {
    "one of two names unknown": (
        attached,
        lambda m: pl.enable(m, "letters", "digit"),
        pl.AdapterNameError,
        "no adapter 'digit' here; attached are: 'digits', 'letters'; did you mean digits?",
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
        lambda m: enter(pl.using(m, digits=-math.inf)),
        ValueError,
        "a strength must be a finite number, got -inf",
    ),
    "a name in place of the strength": (
        attached,
        lambda m: pl.scale(m, "digits", 0.5),  # type: ignore[arg-type]
        TypeError,
        f"{FORMS}; got 'digits'",
    ),
    "a mapping in place of the strength": (
        plain,
        lambda m: pl.scale(m, {"digits": 0.5}),  # type: ignore[arg-type]
        TypeError,
        FORMS + "; got {'digits': 0.5}",
    ),
    "a strength in place of a name": (
        attached,
        lambda m: enter(pl.using(m, "digits", 0.5)),  # type: ignore[arg-type]
        TypeError,
        "adapter names are separate arguments, each a string, got 0.5; a strength is given by "
        "name, as in digits=0.5",
    ),
    "no strength": (attached, lambda m: pl.scale(m), TypeError, f"{FORMS}; got None"),
    "a strength for all and one by name": (
        attached,
        lambda m: pl.scale(m, 0.5, letters=2.0),
        TypeError,
        f"{FORMS}; got 0.5",
    ),
    "the second strength nan": (
        attached,
        lambda m: pl.scale(m, digits=2.0, letters=math.nan),
        ValueError,
        "a strength must be a finite number, got nan",
    ),
    "strength a boolean": (
        attached,
        lambda m: pl.scale(m, True, "digits"),
        ValueError,
        "a strength must be a finite number, got True",
    ),
    "strength a tensor of NaN": (
        attached,
        lambda m: pl.scale(m, torch.tensor(math.nan)),
        ValueError,
        "a strength must be a finite number, got tensor(nan)",
    ),
    "strength an infinite tensor": (
        attached,
        lambda m: pl.scale(m, torch.tensor(math.inf)),
        ValueError,
        "a strength must be a finite number, got tensor(inf)",
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
}


@pytest.mark.parametrize("row", SWITCHING.values(), ids=SWITCHING.keys())
def test_invalid_call(row: Row) -> None:
    """An invalid name or strength raises, says what to do, and changes nothing."""
    make, call, error, message = row
    refuses(make(), call, error, message)


VERBS: dict[str, Callable[[nn.Module, str], Any]] = {
    "enable": pl.enable,
    "disable": pl.disable,
    "scale": lambda m, name: pl.scale(m, 2.0, name),
    "scale by name": lambda m, name: pl.scale(m, **{name: 2.0}),
    "enabled": lambda m, name: enter(pl.enabled(m, name)),
    "disabled": lambda m, name: enter(pl.disabled(m, name)),
    "using": lambda m, name: enter(pl.using(m, name)),
    "using at a strength": lambda m, name: enter(pl.using(m, **{name: 0.5})),
    "merge": pl.merge,
    "merged": lambda m, name: enter(pl.merged(m, name)),
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
    """Every verb that takes an adapter's name answers a typo with the attached names."""
    refuses(
        attached(),
        lambda m: verb(m, "leters"),
        pl.AdapterNameError,
        "no adapter 'leters' here; attached are: 'digits', 'letters'; did you mean letters?",
    )


CHANGES_MERGED = {
    "enable": "enable",
    "disable": "disable",
    "scale": "scale",
    "scale by name": "scale",
    "enabled": "enable",
    "disabled": "disable",
    "using": "toggle",
    "using at a strength": "toggle",
    "merge": "merge",
    "detach": "detach",
    "load_state_dict": "load",
}


@pytest.mark.parametrize(("verb", "action"), CHANGES_MERGED.items())
def test_changing_a_merged_adapter(verb: str, action: str) -> None:
    """A merged adapter cannot be toggled, scaled, merged again, loaded or detached."""
    refuses(
        half_merged(),
        lambda m: VERBS[verb](m, "digits"),
        pl.StateError,
        f"cannot {action} adapter 'digits' while it is merged; unmerge first",
    )


@pytest.mark.parametrize("verb", ["enable", "disable", "detach"])
def test_changing_all_adapters_with_one_merged(verb: str) -> None:
    """A verb for all adapters raises and changes none of them if one is merged."""
    refuses(
        half_merged(),
        lambda m: getattr(pl, verb)(m),
        pl.StateError,
        f"cannot {verb} adapter 'digits' while it is merged; unmerge first",
    )


def test_base_classes_of_errors() -> None:
    """Each error is a ParamloraError and the matching standard error."""
    for error, standard in {
        pl.TargetError: ValueError,
        pl.AdapterNameError: KeyError,
        pl.StateError: RuntimeError,
        pl.CheckpointError: ValueError,
    }.items():
        assert issubclass(error, pl.ParamloraError)
        assert issubclass(error, standard)
