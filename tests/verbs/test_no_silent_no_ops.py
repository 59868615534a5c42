"""A verb that cannot do anything says so: no adapters, nothing to train, swapped arguments."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import paramlora as pl
from paramlora import LoRA
from tests.support.helpers import enter, refuses, unchanged
from tests.support.models import attached, plain

NONE_HERE = (
    "no adapter is attached here; attach or load one first, or call this on the model that has "
    "adapters"
)
Call = Callable[[Any], Any]

WITHOUT: dict[str, Call] = {
    "activate": pl.activate,
    "bake": pl.bake,
    "detach": pl.detach,
    "disable": pl.disable,
    "disabled": lambda m: enter(pl.disabled(m)),
    "enable": pl.enable,
    "enabled": lambda m: enter(pl.enabled(m)),
    "eva": lambda m: pl.eva(m, [torch.ones(2, 4)]),
    "freeze": pl.freeze,
    "merge": pl.merge,
    "merged": lambda m: enter(pl.merged(m)),
    "parameter_groups": lambda m: pl.parameter_groups(m, lr=1.0),
    "parameters": pl.parameters,
    "routed": lambda m: enter(pl.routed(m, [0, 1])),
    "scale": lambda m: pl.scale(m, 0.5),
    "unfreeze": pl.unfreeze,
    "unmerge": pl.unmerge,
    "using": lambda m: enter(pl.using(m)),
}


@pytest.mark.parametrize("call", WITHOUT.values(), ids=WITHOUT.keys())
@pytest.mark.parametrize("make", [plain, lambda: attached().act], ids=["model", "part"])
def test_verb_on_a_model_without_adapters(call: Call, make: Callable[[], nn.Module]) -> None:
    """A verb on a model, or on a part of one, without adapters raises and changes nothing."""
    refuses(make(), call, pl.StateError, NONE_HERE)


NAMING: dict[str, Call] = {
    "load_state_dict": lambda m: pl.load_state_dict(m, {}, "digits"),
    "save": lambda m: pl.save(m, "file.safetensors", "digits"),
    "save_peft": lambda m: pl.save_peft(m, "folder", "digits"),
    "state_dict": lambda m: pl.state_dict(m, "digits"),
    "combine": lambda m: pl.combine(m, {"digits": 1.0}, name="both"),
}


@pytest.mark.parametrize("call", NAMING.values(), ids=NAMING.keys())
def test_named_adapter_of_a_model_without_adapters(call: Call) -> None:
    """A verb that takes one adapter names the one that is not there."""
    message = "no adapter 'digits' here; attached are: none"
    refuses(plain(), call, pl.AdapterNameError, message)


def test_blocks_that_end_without_adapters() -> None:
    """A block of `merged` or `using` ends as usual if the adapters were detached inside."""
    model = attached()
    with pl.using(model, "digits"):
        pl.detach(model)
    model = attached()
    pl.enable(model)
    with pl.merged(model):
        pl.bake(model)


def test_unmerge_if_nothing_is_merged() -> None:
    """`unmerge` of adapters that are not merged changes nothing."""
    model = attached()
    with unchanged(model):
        pl.unmerge(model)


class Fixed(LoRA):
    """A kind whose factors are all constants, so that nothing of it can be trained."""

    @property
    def constants(self) -> tuple[str, ...]:
        return "A", "B"


@pytest.mark.parametrize(
    "call", [pl.parameters, lambda m: pl.parameter_groups(m, lr=1.0)], ids=["list", "groups"]
)
def test_parameters_that_would_be_empty(call: Call) -> None:
    """An optimizer is not handed an empty list."""
    model = plain()
    pl.attach(model, Fixed(rank=2), "fc1")
    message = (
        "there are no factors to train: the adapters here have only constants; name other adapters"
    )
    refuses(model, call, pl.StateError, message)


def first(found: str) -> str:
    return (
        "the model, an nn.Module, comes first, as in attach(model, spec, targets), "
        f"save(model, path, name) and enable(model, name); got {found} in its place"
    )


SWAPPED: dict[str, tuple[Call, str]] = {
    "attach": (lambda m: pl.attach(LoRA(2), m), first("a LoRA")),  # type: ignore[arg-type]
    "targets before the spec": (
        lambda m: pl.attach(m, "*.fc1", LoRA(2)),  # type: ignore[arg-type]
        f"the spec comes before the targets: attach(model, {LoRA(2)!r}, '*.fc1')",
    ),
    "enable": (lambda m: pl.enable("digits", m), first("'digits'")),  # type: ignore[arg-type]
    "disabled": (lambda m: enter(pl.disabled("a")), first("'a'")),  # type: ignore[arg-type]
    "scale": (lambda m: pl.scale(0.5, m), first("a float")),  # type: ignore[arg-type]
    "merge": (lambda m: pl.merge("digits", m), first("'digits'")),  # type: ignore[arg-type]
    "routed": (lambda m: enter(pl.routed([0], m)), first("a list")),  # type: ignore[arg-type]
    "save": (lambda m: pl.save("a.file", m), first("'a.file'")),  # type: ignore[arg-type]
    "load": (lambda m: pl.load(Path("a.file"), m), first("'a.file'")),  # type: ignore[arg-type]
    "save_peft": (lambda m: pl.save_peft("a", m), first("'a'")),  # type: ignore[arg-type]
    "load_peft": (lambda m: pl.load_peft("a", m), first("'a'")),  # type: ignore[arg-type]
    "state_dict": (lambda m: pl.state_dict("a", m), first("'a'")),  # type: ignore[arg-type]
    "load_state_dict": (
        lambda m: pl.load_state_dict({}, m),  # type: ignore[arg-type]
        first("a dict"),
    ),
    "load_base_state_dict": (
        lambda m: pl.load_base_state_dict({}, m),  # type: ignore[arg-type]
        first("a dict"),
    ),
    "fingerprint": (lambda m: pl.fingerprint(m.state_dict()), first("a OrderedDict")),
    "summary": (lambda m: pl.summary(None), first("a NoneType")),  # type: ignore[arg-type]
    "a class": (lambda m: pl.attach(nn.Linear, LoRA(2)), first("a type")),  # type: ignore[arg-type]
}


@pytest.mark.parametrize(("call", "message"), SWAPPED.values(), ids=SWAPPED.keys())
def test_swapped_arguments(call: Call, message: str) -> None:
    """Arguments in the wrong order raise a TypeError that says the right order."""
    refuses(attached(), call, TypeError, message)


def test_detach_of_the_rest_after_its_parts() -> None:
    """`detach` without adapters restores what detaching the parts left frozen, and then raises."""
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    expected = [p.requires_grad for p in copy.deepcopy(model).parameters()]
    pl.attach(model, LoRA(2), "0")
    pl.detach(model[0])
    pl.detach(model)
    assert [p.requires_grad for p in model.parameters()] == expected
    refuses(model, pl.detach, pl.StateError, NONE_HERE)
