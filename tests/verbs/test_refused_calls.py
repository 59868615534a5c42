"""Every public function that can refuse a call leaves everything as it was when it does.

The model has what a failed call could touch: a spectral_norm in training mode, which takes a step
whenever its weight is read, tied tensors, a module at two paths, layers with running statistics,
hooks, and adapters in every state. Messages are tested word by word beside each verb.
"""

import copy
import functools
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import paramlora as pl
from tests.support.everything import (
    LINEARS,
    FailingInit,
    failing,
    fails_late,
    file_of,
    make,
    merged,
    not_finite,
    plain,
)
from tests.support.helpers import enter, nothing_drawn, snapshot

Call = Callable[[Any, Path], object]
IDS = torch.zeros(3, 2, dtype=torch.int64)

# The calls of each public function that it refuses; the model is that of `make`, or of `merged`.
CALLS: dict[str, list[Call]] = {
    "attach": [
        lambda m, _: pl.attach(m, pl.LoRA(2), "a_typo"),
        lambda m, _: pl.attach(m, pl.LoRA(2), ["shared", "norm.weight"], name="new"),
        lambda m, _: pl.attach(m, pl.LoRA(2, init=FailingInit()), LINEARS, name="new"),
        lambda m, _: pl.attach(m, pl.LoRA(2, init=not_finite), LINEARS, name="new"),
        lambda m, _: pl.attach(m, pl.LoRA(9, init="pissa"), ["emb", "normalised"], name="new"),
        lambda m, _: pl.attach(m, pl.LoRA(2), nn.Conv2d, name="new"),
        lambda m, _: pl.attach(m, pl.LoRA(2), ["normalised", "normalised.bias"], name="new"),
        lambda m, _: pl.attach(m, pl.OFT(3), "normalised", name="new"),
        lambda m, _: pl.attach(m, pl.LoRA(2), "shared", name="a"),
        lambda m, _: pl.attach(m, pl.LoRA(2), "shared", name="new", activate="on"),  # type: ignore[arg-type]
        lambda m, _: pl.attach(m, pl.LoRA(2), "shared[:2]", name="new", exclude="nothing.there"),
        lambda m, _: pl.attach(m, pl.LoRA(2), ["shared[:3]", "again[2:]"], name="new"),
        lambda m, _: pl.attach(m, pl.LoRA(2), target_modules=["shared"]),  # type: ignore[arg-type]
        lambda m, _: pl.attach(m, pl.LoRA(2), "shared", name="x.y", hold_statistics=True),
    ],
    "activate": [
        lambda m, _: pl.activate(m, "a", "c"),
        lambda m, _: pl.activate(m, a=float("nan")),
    ],
    "audit": [lambda m, _: pl.audit(m, IDS + 9), lambda m, _: pl.audit(m, IDS, 3)],  # type: ignore[arg-type]
    "bake": [lambda m, _: pl.bake(m), lambda m, _: pl.bake(m.head)],
    "base_state_dict": [lambda m, _: pl.base_state_dict("a model")],  # type: ignore[arg-type]
    "combine": [
        lambda m, _: pl.combine(m, {"a": 1, "scaled": 1}, name="new"),
        lambda m, _: pl.combine(m, {"a": 1}, name="b"),
        lambda m, _: pl.combine(m, {"a": 1, "b": 1}, name="new", method="dare", density=2.0),
        lambda m, _: pl.combine(m, {"a": 1}, name="new", method="svd", rank=0),
        lambda m, _: pl.combine(m, {"a": 1, "none": 1}, name="new", method="linear"),
    ],
    "corda": [lambda m, _: pl.corda(m, [IDS], "a", mode="knowledge")],
    "detach": [lambda m, _: pl.detach(m, "a", "c"), lambda m, _: pl.detach(m.head)],
    "disable": [lambda m, _: pl.disable(m, "c")],
    "disabled": [lambda m, _: enter(pl.disabled(m, "c"))],
    "enable": [lambda m, _: pl.enable(m, "b", "c")],
    "enabled": [lambda m, _: enter(pl.enabled(m, "b", "c"))],
    "eva": [lambda m, _: pl.eva(m, [IDS], "a"), lambda m, _: pl.eva(m, fails_late(), "a")],
    "extract": [
        lambda m, _: pl.extract(plain(lambda: nn.Linear(3, 3)), m, 2, name="new"),
        lambda m, _: pl.extract(m, m, 2, name="new"),
        lambda m, _: pl.extract(plain(), m, 0, name="new"),
        lambda m, _: pl.extract(plain(), m, 2, name="a"),
    ],
    "fingerprint": [lambda m, _: pl.fingerprint("a model")],  # type: ignore[arg-type]
    "freeze": [lambda m, _: pl.freeze(m, "a", "c")],
    "hold_statistics": [lambda m, _: enter(pl.hold_statistics("a model"))],  # type: ignore[arg-type]
    "load": [
        lambda m, f: pl.load(m, file_of(f), name="new"),
        lambda m, f: pl.load(m, file_of(f), name="a"),
        lambda m, f: pl.load(m, f / "no file"),
    ],
    "load_base_state_dict": [
        lambda m, _: pl.load_base_state_dict(m, {}),
        lambda m, _: pl.load_base_state_dict(
            m, {**pl.base_state_dict(m), "conv.bias": torch.zeros(3)}
        ),
    ],
    "load_peft": [
        lambda m, f: pl.load_peft(m, file_of(f, peft=True), name="new"),
        lambda m, f: pl.load_peft(m, f / "no folder", name="new"),
    ],
    "load_state_dict": [
        lambda m, _: pl.load_state_dict(m, {}, "a"),
        lambda m, _: pl.load_state_dict(
            m,
            {k: v[..., :1] if "shared" in k else v for k, v in pl.state_dict(m, "a").items()},
            "a",
        ),
    ],
    "lora_null": [lambda m, _: pl.lora_null(m, [IDS], "a")],
    "merge": [
        lambda m, _: pl.merge(m),  # spectral_norm cannot store the merged weight
        lambda m, _: pl.merge(m, "b"),
        lambda m, _: pl.merge(m, "scaled", "c"),
    ],
    "merged": [lambda m, _: enter(pl.merged(m)), lambda m, _: enter(pl.merged(m, "b"))],
    "merged_state_dict": [lambda m, _: pl.merged_state_dict(m)],
    "parameter_groups": [lambda m, _: pl.parameter_groups(m, lr=-1.0)],
    "parameters": [lambda m, _: pl.parameters(m, "c")],
    "routed": [
        lambda m, _: enter(pl.routed(m, [0, 1, 7])),
        lambda m, _: enter(pl.routed(m, ["a", None, "c"])),
        lambda m, _: enter(pl.routed(m, [0, 0, 0], "b")),
    ],
    "save": [
        lambda m, f: pl.save(m, f / "new.safetensors"),
        lambda m, f: pl.save(m, f / "no" / "folder", "a"),
    ],
    "save_peft": [
        lambda m, f: pl.save_peft(m, f / "new", "c"),
        lambda m, f: pl.save_peft(m, f / "no" / "folder", "a"),
        lambda m, f: pl.save_peft(m, f / "new", "scaled"),
    ],
    "scale": [lambda m, _: pl.scale(m, 0.5, "c"), lambda m, _: pl.scale(m, float("inf"))],
    "state_dict": [lambda m, _: pl.state_dict(m), lambda m, _: pl.state_dict(m, "c")],
    "summary": [lambda m, _: pl.summary("a model")],  # type: ignore[arg-type]
    "names": [lambda m, _: pl.names("a model")],  # type: ignore[arg-type]
    "unfreeze": [lambda m, _: pl.unfreeze(m, "b", "c")],
    "unmerge": [lambda m, _: pl.unmerge(m.dropout)],
    "using": [
        lambda m, _: enter(pl.using(m, "a", c=0.5)),
        lambda m, _: enter(pl.using(m, ["a"])),  # type: ignore[arg-type]
    ],
}
# Refused because an adapter is merged.
WHILE_MERGED: dict[str, list[Call]] = {
    "attach": [lambda m, _: pl.attach(m, pl.LoRA(2), "shared", name="new")],
    "activate": [lambda m, _: pl.activate(m, "a")],
    "bake": [lambda m, _: pl.bake(m)],
    "detach": [lambda m, _: pl.detach(m)],
    "disable": [lambda m, _: pl.disable(m)],
    "disabled": [lambda m, _: enter(pl.disabled(m))],
    # "scaled" acts before "b", which is in the stored weight.
    "enable": [lambda m, _: pl.enable(m, "scaled")],
    "enabled": [lambda m, _: enter(pl.enabled(m, "scaled"))],
    "load_base_state_dict": [lambda m, _: pl.load_base_state_dict(m, pl.base_state_dict(m))],
    "load_state_dict": [lambda m, _: pl.load_state_dict(m, pl.state_dict(m, "b"), "b")],
    "merge": [lambda m, _: pl.merge(m, "b"), lambda m, _: pl.merge(m)],
    "merged": [lambda m, _: enter(pl.merged(m, "a"))],
    "routed": [lambda m, _: enter(pl.routed(m, ["a"] * 3, "a"))],
    "scale": [lambda m, _: pl.scale(m, 2.0)],
    "using": [lambda m, _: enter(pl.using(m, "a"))],
    "combine": [lambda m, _: pl.combine(m, {"b": 1}, name="new", activate="only")],
    "extract": [lambda m, _: pl.extract(plain(), m, 2, name="new")],
}
# Refused because a parametrization below the adapter fails.
WHILE_FAILING: dict[str, list[Call]] = {
    "attach": [
        lambda m, _: pl.attach(m, pl.LoRA(2), LINEARS, name="new", hold_statistics=True),
        lambda m, _: pl.attach(m, pl.LoRA(2, init="pissa"), ["shared", "doubled"], name="new"),
    ],
    "audit": [lambda m, _: pl.audit(m, IDS)],
    "bake": [lambda m, _: pl.bake(m)],
    "eva": [lambda m, _: pl.eva(m, [IDS], "a")],
    "extract": [lambda m, _: pl.extract(plain(), m, 2, name="new")],
    "load": [lambda m, f: pl.load(m, file_of(f), name="new")],
    "merge": [lambda m, _: pl.merge(m), lambda m, _: pl.merge(m, "a")],
    "merged": [lambda m, _: enter(pl.merged(m, "a", "scaled"))],
    "merged_state_dict": [lambda m, _: pl.merged_state_dict(m)],
}
# Refused inside of `routed`, where each row has an adapter of its own.
WHILE_ROUTED: list[Call] = [
    lambda m, _: pl.attach(m, pl.LoRA(2), "shared", name="new"),
    lambda m, _: pl.combine(m, {"a": 1}, name="new"),
    lambda m, _: pl.extract(plain(), m, 2, name="new"),
    lambda m, f: pl.load(m, file_of(f), name="new"),
    lambda m, _: enter(pl.enabled(m, "b")),
    lambda m, _: pl.merge(m, "a"),
    lambda m, _: pl.bake(m),
    lambda m, _: pl.merged_state_dict(m),
    lambda m, _: m(IDS[:2]),
    lambda m, _: m.shared.weight + 1,
]
ERRORS = (pl.ParamloraError, ValueError, TypeError, OSError, ArithmeticError, IndexError)
# Functions that refuse nothing.
NEVER = {"keep_blocks"}


def rows() -> Iterator[Any]:
    tables = ((make, CALLS), (merged, WHILE_MERGED), (failing, WHILE_FAILING))
    for world, calls in tables:
        for verb, each in calls.items():
            yield pytest.param(world, each, id=f"{verb}-{world.__name__}")


@functools.cache
def worlds(world: Callable[[], Any]) -> Any:
    """Return a model that all tests share, as no call changes it."""
    return world()


def refuses(model: nn.Module, calls: list[Call], folder: Path) -> None:
    """Assert that all calls are refused and change nothing of the model and the random state."""
    before = snapshot(model)
    for i, call in enumerate(calls):
        with nothing_drawn(), pytest.raises(ERRORS, match=r"."):
            call(model, folder)
        after = snapshot(model)
        changed = [part for part in before if after[part] != before[part]]
        assert not changed, f"call {i} has changed these parts of the model: {changed}"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("world", "calls"), list(rows()))
def test_refused_call(world: Callable[[], Any], calls: list[Call], tmp_path: Path) -> None:
    """A call that is refused changes nothing of the model, the random state or the disk."""
    refuses(worlds(world), calls, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} <= {"adapter.safetensors", "peft"}


def test_refused_calls_in_blocks(tmp_path: Path) -> None:
    """Inside of blocks, refused calls leave the blocks and the model as they were."""
    model = copy.deepcopy(worlds(make))
    with pl.hold_statistics(model), pl.using(model, "a", scaled=0.5):
        refuses(model, [call for calls in CALLS.values() for call in calls], tmp_path)
    with pl.routed(model, [0, 1, -1], "a", "scaled"):
        refuses(model, WHILE_ROUTED, tmp_path)


def test_every_public_function_has_a_refused_call() -> None:
    """The table has a refused call of each public function of the package."""
    functions = {name for name in pl.__all__ if inspect.isfunction(getattr(pl, name))}
    assert functions - NEVER == CALLS.keys()
