"""Every public function that can refuse a call leaves everything as it was when it does.

The model has what a failed call could touch: a spectral_norm in training mode, which takes a step
whenever its weight is read, tied tensors, a module at two paths, layers with running statistics,
hooks, and adapters in every state. Messages are tested word by word beside each verb.
"""

import copy
import functools
import inspect
import math
import re
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
    starting,
)
from tests.support.helpers import enter, nothing_drawn, snapshot

# What a message must contain, and the call.
Row = tuple[str, Callable[[Any, Path], object]]
IDS = torch.zeros(3, 2, dtype=torch.int64)
GENERATOR = torch.Generator()
CHECK_FIRST = "the model, an nn.Module, comes first"
UNKNOWN = "no adapter 'c' here; attached are: 'scaled', 'a', 'b'"
TIED = "shares its adapter with a tensor outside of this module: emb.weight, head.weight are tied"
SPECTRAL = "cannot merge at 'normalised.weight': _SpectralNorm below the adapter cannot store"
TAKEN = "an adapter 'a' is attached already"
OFF = "adapter 'b' is switched off"
MISFIT = "'doubled.weight' has shape [4, 3] in the file and [4, 4] in this model"
NO_RANK = "rank must be a whole number of at least 1, got 0"
ACTIVATE = """activate must be "only", "also" or "no", got 'on'"""
NO_LINEAR = "cannot start 'emb.weight' from inputs: it is not the weight of an nn.Linear"
NOT_ONE = "there are several adapters: 'scaled', 'a', 'b'; say which one, by name="

# The calls of each public function that it refuses; the model is that of `make`.
CALLS: dict[str, list[Row]] = {
    "attach": [
        ("no tensor matches 'a_typo'", lambda m, _: pl.attach(m, pl.LoRA(2), "a_typo")),
        (
            "cannot adapt 'norm.weight' with LoRA: a low-rank update needs two dimensions",
            lambda m, _: pl.attach(m, pl.LoRA(2), ["shared", "norm.weight"], name="new"),
        ),
        (
            "the init failed",
            lambda m, _: pl.attach(m, pl.LoRA(2, init=FailingInit()), LINEARS, name="new"),
        ),
        (
            "init did not fill a factor of shape (2, 4) with finite numbers",
            lambda m, _: pl.attach(
                m, pl.LoRA(2, init=not_finite), LINEARS, name="new", generator=GENERATOR
            ),
        ),
        (
            "cannot adapt 'emb.weight' with LoRA: init='pissa' needs a rank of at most 4",
            lambda m, _: pl.attach(m, pl.LoRA(9, init="pissa"), ["emb", "normalised"], name="new"),
        ),
        (
            "no tensor matches Conv2d",
            lambda m, _: pl.attach(m, pl.LoRA(2), nn.Conv2d, name="new"),
        ),
        (
            "cannot adapt 'normalised.bias' with LoRA",
            lambda m, _: pl.attach(m, pl.LoRA(2), ["normalised", "normalised.bias"], name="new"),
        ),
        (
            "block_size=3 does not divide its 4 inputs",
            lambda m, _: pl.attach(m, pl.OFT(3), "normalised", name="new"),
        ),
        (TAKEN, lambda m, _: pl.attach(m, pl.LoRA(2), "shared", name="a")),
        (
            ACTIVATE,
            lambda m, _: pl.attach(m, pl.LoRA(2), "shared", name="new", activate="on"),  # type: ignore[arg-type]
        ),
        (
            "exclude= matches nothing: no 'nothing.there'",
            lambda m, _: pl.attach(
                m, pl.LoRA(2), "shared[:2]", name="new", exclude="nothing.there"
            ),
        ),
        (
            "'shared.weight[:3]' and 'shared.weight[2:]' overlap",
            lambda m, _: pl.attach(m, pl.LoRA(2), ["shared[:3]", "again[2:]"], name="new"),
        ),
        (
            "attach() has no argument 'target_modules': write targets=",
            lambda m, _: pl.attach(m, pl.LoRA(2), target_modules=["shared"]),  # type: ignore[arg-type]
        ),
        (
            "'x.y' cannot be an adapter's name",
            lambda m, _: pl.attach(m, pl.LoRA(2), "shared", name="x.y", hold_statistics=True),
        ),
    ],
    "activate": [
        (UNKNOWN, lambda m, _: pl.activate(m, "a", "c")),
        ("a strength must be a finite number, got nan", lambda m, _: pl.activate(m, a=math.nan)),
    ],
    "audit": [
        ("index out of range in self", lambda m, _: pl.audit(m, IDS + 9)),
        ("'int' object is not callable", lambda m, _: pl.audit(m, IDS, 3)),  # type: ignore[arg-type]
    ],
    "bake": [(OFF, lambda m, _: pl.bake(m)), (TIED, lambda m, _: pl.bake(m.head))],
    "base_state_dict": [(CHECK_FIRST, lambda m, _: pl.base_state_dict("a model"))],  # type: ignore[arg-type]
    "combine": [
        (
            "cannot combine at 'shared.weight': the adapters there are of kind LoRA, IA3",
            lambda m, _: pl.combine(m, {"a": 1, "scaled": 1}, name="new"),
        ),
        (
            "an adapter 'b' is attached already",
            lambda m, _: pl.combine(m, {"a": 1}, name="b"),
        ),
        (
            "method='dare' needs density=, the share of elements to keep",
            lambda m, _: pl.combine(m, {"a": 1, "b": 1}, name="new", method="dare", density=2.0),
        ),
        (NO_RANK, lambda m, _: pl.combine(m, {"a": 1}, name="new", method="svd", rank=0)),
        (
            "no adapter 'none' here",
            lambda m, _: pl.combine(m, {"a": 1, "none": 1}, name="new", method="linear"),
        ),
        (
            ACTIVATE,
            lambda m, _: pl.combine(m, {"a": 1}, name="new", activate="on"),  # type: ignore[arg-type]
        ),
    ],
    "corda": [
        (
            "cannot start 'emb.weight': it needs a LoRA(init='corda')",
            lambda m, _: pl.corda(m, [IDS], "a", mode="knowledge"),
        )
    ],
    "detach": [
        (UNKNOWN, lambda m, _: pl.detach(m, "a", "c")),
        (TIED, lambda m, _: pl.detach(m.head)),
    ],
    "disable": [(UNKNOWN, lambda m, _: pl.disable(m, "c"))],
    "disabled": [(UNKNOWN, lambda m, _: enter(pl.disabled(m, "c")))],
    "enable": [(UNKNOWN, lambda m, _: pl.enable(m, "b", "c"))],
    "enabled": [(UNKNOWN, lambda m, _: enter(pl.enabled(m, "b", "c")))],
    "eva": [(NO_LINEAR, lambda m, _: pl.eva(m, [IDS], "a"))],
    "extract": [
        (
            "model is not a fine-tune of base",
            lambda m, _: pl.extract(plain(lambda: nn.Linear(3, 3)), m, 2, name="new"),
        ),
        (
            "the model to extract from has adapters",
            lambda m, _: pl.extract(m, m, 2, name="new"),
        ),
        (NO_RANK, lambda m, _: pl.extract(plain(), m, 0, name="new")),
        (TAKEN, lambda m, _: pl.extract(plain(), m, 2, name="a")),
    ],
    "fingerprint": [(CHECK_FIRST, lambda m, _: pl.fingerprint("a model"))],  # type: ignore[arg-type]
    "freeze": [(UNKNOWN, lambda m, _: pl.freeze(m, "a", "c"))],
    "hold_statistics": [(CHECK_FIRST, lambda m, _: enter(pl.hold_statistics("a model")))],  # type: ignore[arg-type]
    "load": [
        (MISFIT, lambda m, f: pl.load(m, file_of(f), name="new")),
        (MISFIT, lambda m, f: pl.load(m, file_of(f), name="a")),
        ("No such file or directory", lambda m, f: pl.load(m, f / "no file")),
        (
            "adapter 'a' is attached already, and its sites, kinds or ranks differ from those in",
            lambda m, f: pl.load(m, file_of(f, inputs=4), name="a"),
        ),
        (
            "into='a' is the adapter that takes the file's update; pass no name",
            lambda m, f: pl.load(m, file_of(f, inputs=4), name="new", into="a"),
        ),
        (UNKNOWN, lambda m, f: pl.load(m, file_of(f, inputs=4), into="c")),
        (
            "adapts doubled.weight, and the slot 'b' does not",
            lambda m, f: pl.load(m, file_of(f, inputs=4), into="b"),
        ),
        (
            "has rank 3 at 'doubled.weight', and the slot has rank 2",
            lambda m, f: pl.load(m, file_of(f, inputs=4, rank=3), into="a"),
        ),
        (
            "was saved with another base: shared.weight, shared.bias, doubled.weight",
            lambda m, f: pl.load(m, file_of(f, inputs=4), name="new", check_base=True),
        ),
        (
            "was saved with another base: shared.weight, shared.bias, doubled.weight",
            lambda m, f: pl.load(m, file_of(f, inputs=4), into="a", check_base=True),
        ),
        (
            ACTIVATE,
            lambda m, f: pl.load(m, file_of(f, inputs=4), name="new", activate="on"),  # type: ignore[arg-type]
        ),
        (
            ACTIVATE,
            lambda m, f: pl.load(m, file_of(f, inputs=4), into="a", activate="on"),  # type: ignore[arg-type]
        ),
    ],
    "load_base_state_dict": [
        (
            "the state for the base does not fit: missing emb.weight,",
            lambda m, _: pl.load_base_state_dict(m, {}),
        ),
        (
            "the state for the base does not fit: conv.bias: expected (2,), found (3,)",
            lambda m, _: pl.load_base_state_dict(
                m, {**pl.base_state_dict(m), "conv.bias": torch.zeros(3)}
            ),
        ),
    ],
    "load_peft": [
        (
            "doubled.lora_A.weight: expected (2, 4), found (2, 3)",
            lambda m, f: pl.load_peft(m, file_of(f, peft=True), name="new"),
        ),
        (
            "is not a folder; pass one that PEFT's save_pretrained wrote, or use load for a file",
            lambda m, f: pl.load_peft(m, f / "no folder", name="new"),
        ),
        (
            "adapts 'shared.weight', which is tied to again.weight; PEFT adapts only one of them",
            lambda m, f: pl.load_peft(m, file_of(f, peft=True, inputs=4), name="new"),
        ),
        (
            ACTIVATE,
            lambda m, f: pl.load_peft(
                m,
                file_of(f, peft=True, inputs=4, targets="doubled"),
                name="new",
                activate="on",  # type: ignore[arg-type]
            ),
        ),
    ],
    "load_state_dict": [
        (
            "the state for adapter 'a' does not fit: missing emb.weight.A,",
            lambda m, _: pl.load_state_dict(m, {}, "a"),
        ),
        (
            "does not fit: shared.weight.A: expected (2, 4), found (2, 1); shared.weight.B:",
            lambda m, _: pl.load_state_dict(
                m,
                {k: v[..., :1] if "shared" in k else v for k, v in pl.state_dict(m, "a").items()},
                "a",
            ),
        ),
    ],
    "lora_null": [
        (
            "cannot start 'emb.weight': it needs a LoRA(init='null')",
            lambda m, _: pl.lora_null(m, [IDS], "a"),
        )
    ],
    "merge": [
        (SPECTRAL, lambda m, _: pl.merge(m)),
        (OFF, lambda m, _: pl.merge(m, "b")),
        (UNKNOWN, lambda m, _: pl.merge(m, "scaled", "c")),
        (
            "cannot merge at 'weight': Doubled below the adapter cannot store",
            lambda m, _: pl.merge(m.doubled),
        ),
    ],
    "merged": [
        (SPECTRAL, lambda m, _: enter(pl.merged(m))),
        (OFF, lambda m, _: enter(pl.merged(m, "b"))),
    ],
    "merged_state_dict": [(SPECTRAL, lambda m, _: pl.merged_state_dict(m))],
    "parameter_groups": [
        ("lr must be a positive number, got -1.0", lambda m, _: pl.parameter_groups(m, lr=-1.0))
    ],
    "parameters": [(UNKNOWN, lambda m, _: pl.parameters(m, "c"))],
    "routed": [
        (
            "ids may be −1 (none), 0 = 'scaled', 1 = 'a', 2 = 'b'; got 7",
            lambda m, _: enter(pl.routed(m, [0, 1, 7])),
        ),
        (
            "ids name the adapter 'c', and rows are routed to 'scaled', 'a', 'b'",
            lambda m, _: enter(pl.routed(m, ["a", None, "c"])),
        ),
        (
            "cannot route 'norm.weight': BatchNorm1d reads it in its own forward",
            lambda m, _: enter(pl.routed(m, [0, 0, 0], "b")),
        ),
    ],
    "save": [
        (NOT_ONE, lambda m, f: pl.save(m, f / "new.safetensors")),
        ("no does not exist", lambda m, f: pl.save(m, f / "no" / "folder", "a")),
    ],
    "save_peft": [
        (UNKNOWN, lambda m, f: pl.save_peft(m, f / "new", "c")),
        ("no does not exist", lambda m, f: pl.save_peft(m, f / "no" / "folder", "a")),
        (
            "cannot store the adapter at 'shared.weight': it is tied to again.weight",
            lambda m, f: pl.save_peft(m, f / "new", "scaled"),
        ),
    ],
    "scale": [
        (UNKNOWN, lambda m, _: pl.scale(m, 0.5, "c")),
        ("a strength must be a finite number, got inf", lambda m, _: pl.scale(m, math.inf)),
    ],
    "state_dict": [
        (NOT_ONE, lambda m, _: pl.state_dict(m)),
        (UNKNOWN, lambda m, _: pl.state_dict(m, "c")),
    ],
    "summary": [(CHECK_FIRST, lambda m, _: pl.summary("a model"))],  # type: ignore[arg-type]
    "names": [(CHECK_FIRST, lambda m, _: pl.names("a model"))],  # type: ignore[arg-type]
    "unfreeze": [(UNKNOWN, lambda m, _: pl.unfreeze(m, "b", "c"))],
    "unmerge": [("no adapter is attached here", lambda m, _: pl.unmerge(m.dropout))],
    "using": [
        (UNKNOWN, lambda m, _: enter(pl.using(m, "a", c=0.5))),
        (
            "adapter names are separate arguments, each a string, got ['a']",
            lambda m, _: enter(pl.using(m, ["a"])),  # type: ignore[arg-type]
        ),
    ],
}
ONLY = """cannot make 'new' the only active adapter while 'b' is merged"""
ORDER = "cannot switch on 'scaled' while 'b', which was attached after it, is merged"


def while_merged(verb: str) -> str:
    """Return the message of a verb that is called on "b" while it is merged."""
    return f"cannot {verb} adapter 'b' while it is merged; unmerge first"


# Refused because an adapter is merged.
WHILE_MERGED: dict[str, list[Row]] = {
    "attach": [(ONLY, lambda m, _: pl.attach(m, pl.LoRA(2), "shared", name="new"))],
    "activate": [(while_merged("toggle"), lambda m, _: pl.activate(m, "a"))],
    "detach": [(while_merged("detach"), lambda m, _: pl.detach(m))],
    "disable": [(while_merged("disable"), lambda m, _: pl.disable(m))],
    "disabled": [(while_merged("disable"), lambda m, _: enter(pl.disabled(m)))],
    # "scaled" acts before "b", which is in the stored weight.
    "enable": [(ORDER, lambda m, _: pl.enable(m, "scaled"))],
    "enabled": [(ORDER, lambda m, _: enter(pl.enabled(m, "scaled")))],
    "eva": [(while_merged("start"), lambda m, _: pl.eva(m, [IDS], "b"))],
    "load": [
        (ONLY, lambda m, f: pl.load(m, file_of(f, inputs=4), name="new", activate="only")),
        (while_merged("load"), lambda m, f: pl.load(m, file_of(f, inputs=4), into="b")),
        (ORDER, lambda m, f: pl.load(m, saved(m, f, "scaled"), activate="also")),
        (while_merged("load"), lambda m, f: pl.load(m, saved(m, f, "b"))),
    ],
    "load_base_state_dict": [
        (
            "cannot load a base under adapter 'b' while it is merged",
            lambda m, _: pl.load_base_state_dict(m, pl.base_state_dict(m)),
        )
    ],
    "load_state_dict": [
        (while_merged("load"), lambda m, _: pl.load_state_dict(m, pl.state_dict(m, "b"), "b"))
    ],
    "merge": [(while_merged("merge"), lambda m, _: pl.merge(m, "b"))],
    "merged": [(while_merged("merge"), lambda m, _: enter(pl.merged(m, "a")))],
    "routed": [
        (
            "cannot route to adapter 'b' while it is merged",
            lambda m, _: enter(pl.routed(m, ["a"] * 3, "a")),
        )
    ],
    "scale": [(while_merged("scale"), lambda m, _: pl.scale(m, 2.0))],
    "using": [(while_merged("toggle"), lambda m, _: enter(pl.using(m, "a")))],
    "combine": [(ONLY, lambda m, _: pl.combine(m, {"b": 1}, name="new", activate="only"))],
    "extract": [(ONLY, lambda m, _: pl.extract(plain(), m, 2, name="new"))],
}
FAILS = "the parametrization failed"
# Refused because a parametrization below the adapter fails, after other tensors were read.
WHILE_FAILING: dict[str, list[Row]] = {
    "attach": [
        (
            FAILS,
            lambda m, _: pl.attach(m, pl.LoRA(2), LINEARS, name="new", hold_statistics=True),
        ),
        (
            FAILS,
            lambda m, _: pl.attach(
                m, pl.LoRA(2, init="pissa"), ["shared", "doubled"], name="new", generator=GENERATOR
            ),
        ),
    ],
    "audit": [(FAILS, lambda m, _: pl.audit(m, IDS))],
    "bake": [(FAILS, lambda m, _: pl.bake(m))],
    "corda": [(FAILS, lambda m, _: pl.corda(m, [IDS], "corda", mode="instruction"))],
    "eva": [(FAILS, lambda m, _: pl.eva(m, [IDS], "eva"))],
    "extract": [(FAILS, lambda m, _: pl.extract(plain(), m, 2, name="new"))],
    "load": [(FAILS, lambda m, f: pl.load(m, file_of(f, inputs=4), name="new"))],
    "lora_null": [(FAILS, lambda m, _: pl.lora_null(m, [IDS], "null"))],
    "merge": [(FAILS, lambda m, _: pl.merge(m)), (FAILS, lambda m, _: pl.merge(m, "a"))],
    "merged": [(FAILS, lambda m, _: enter(pl.merged(m, "a", "scaled")))],
    "merged_state_dict": [(FAILS, lambda m, _: pl.merged_state_dict(m))],
}
# Refused because of the batches that an adapter is to start from.
STARTING: dict[str, list[Row]] = {
    "corda": [
        (
            "mode must be 'knowledge' or 'instruction', got 'both'",
            lambda m, _: pl.corda(m, [IDS], "corda", mode="both"),  # type: ignore[arg-type]
        ),
        ("no more batches", lambda m, _: pl.corda(m, fails_late(), "corda", mode="knowledge")),
        (
            "cannot start 'normalised.weight': its module received no inputs",
            lambda m, _: pl.corda(m, [], "corda", mode="knowledge"),
        ),
    ],
    "eva": [
        ("no more batches", lambda m, _: pl.eva(m, fails_late(), "eva")),
        (
            "cannot start 'normalised.weight' at rank 2 from 0 rows of inputs",
            lambda m, _: pl.eva(m, [], "eva"),
        ),
        (
            "oversampling must be a whole number of at least 0, got -1",
            lambda m, _: pl.eva(m, [IDS], "eva", oversampling=-1),
        ),
    ],
    "lora_null": [
        ("no more batches", lambda m, _: pl.lora_null(m, fails_late(), "null")),
        (
            "cannot start 'normalised.weight': its module received no inputs",
            lambda m, _: pl.lora_null(m, [], "null"),
        ),
    ],
}


def in_routed(verb: str) -> str:
    """Return the message of a verb that acts on all rows."""
    return f"cannot {verb} inside of routed(): every row would get it"


# Refused inside of `routed`, where each row has an adapter of its own.
WHILE_ROUTED: list[Row] = [
    (in_routed("attach an adapter"), lambda m, _: pl.attach(m, pl.LoRA(2), "shared", name="new")),
    (in_routed("attach an adapter"), lambda m, _: pl.combine(m, {"a": 1}, name="new")),
    (in_routed("attach an adapter"), lambda m, _: pl.extract(plain(), m, 2, name="new")),
    (
        in_routed("attach an adapter"),
        lambda m, f: pl.load(m, file_of(f, inputs=4), name="new"),
    ),
    (in_routed("switch adapters on"), lambda m, _: enter(pl.enabled(m, "b"))),
    (in_routed("merge"), lambda m, _: pl.merge(m, "a")),
    (in_routed("merge"), lambda m, _: pl.bake(m.conv)),
    (
        "'emb.weight' has another adapter for each row inside of routed()",
        lambda m, _: pl.merged_state_dict(m),
    ),
    (
        "ids route 3 rows, and the input of 'head.weight' has 2 in its batch dimension",
        lambda m, _: m(IDS[:2]),
    ),
    ("'shared.weight' was read inside of routed()", lambda m, _: m.shared.weight + 1),
]
ERRORS = (pl.ParamloraError, ValueError, TypeError, OSError, ArithmeticError, IndexError)
# Functions that refuse nothing.
NEVER = {"keep_blocks"}


def saved(model: nn.Module, folder: Path, name: str) -> Path:
    """Save one of the model's adapters, and return the file."""
    pl.save(model, folder / "adapter.safetensors", name)
    return folder / "adapter.safetensors"


def rows() -> Iterator[Any]:
    tables = (
        *((make, CALLS), (merged, WHILE_MERGED), (failing, WHILE_FAILING)),
        (starting, STARTING),
    )
    for world, calls in tables:
        for verb, each in calls.items():
            yield pytest.param(world, each, id=f"{verb}-{world.__name__}")


@functools.cache
def worlds(world: Callable[[], Any]) -> Any:
    """Return a model that all tests share, as no call changes it."""
    return world()


def refuses(model: nn.Module, calls: list[Row], folder: Path) -> None:
    """Assert that all calls are refused and change nothing of the model and the random state."""
    before = snapshot(model)
    for i, (message, call) in enumerate(calls):
        with nothing_drawn(GENERATOR), pytest.raises(ERRORS, match=re.escape(message)):
            call(model, folder)
        after = snapshot(model)
        changed = [part for part in before if after[part] != before[part]]
        assert not changed, f"call {i} has changed these parts of the model: {changed}"


@pytest.mark.parametrize(("world", "calls"), list(rows()))
def test_refused_call(world: Callable[[], Any], calls: list[Row], tmp_path: Path) -> None:
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


CHANGES: dict[str, Callable[[Any], object]] = {
    "a parameter": lambda m: m.shared.bias.data.add_(1),
    "a factor": lambda m: pl.parameters(m, "b")[0].data.neg_(),
    "a buffer": lambda m: m.norm.running_mean.add_(1),
    "a step of spectral_norm": lambda m: m.normalised.weight,
    "requires_grad": lambda m: m.shared.bias.requires_grad_(),
    "a gradient": lambda m: setattr(m.shared.bias, "grad", torch.zeros(4)),
    "another parameter of the same value": lambda m: setattr(
        m.shared, "bias", nn.Parameter(m.shared.bias.data.clone())
    ),
    "training": lambda m: m.doubled.parametrizations.weight[0].inner.train(),
    "a setting": lambda m: setattr(m.dropout, "p", 0.25),
    "the class": lambda m: setattr(m.dropout, "__class__", nn.AlphaDropout),
    "a hook": lambda m: m.conv.register_forward_pre_hook(print),
    "a hook of a tensor": lambda m: pl.parameters(m, "b")[0].register_hook(print),
    "a strength": lambda m: pl.scale(m, 0.5, "a"),
    "an active adapter": lambda m: pl.disable(m, "a"),
    "random numbers": lambda _: torch.rand(()),
    "numbers of a generator": lambda _: torch.rand((), generator=GENERATOR),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changes_are_noticed(change: Callable[[Any], object], tmp_path: Path) -> None:
    """A refused call that changes anything, were it a flag or a random number, is noticed."""

    def call(model: nn.Module, _: Path) -> None:
        change(model)
        raise ValueError("refused")

    with torch.random.fork_rng(devices=[]), pytest.raises(AssertionError, match="changed"):
        refuses(copy.deepcopy(worlds(make)), [("refused", call)], tmp_path)


def test_every_public_function_has_a_refused_call() -> None:
    """The table has a refused call of each public function of the package."""
    functions = {name for name in pl.__all__ if inspect.isfunction(getattr(pl, name))}
    assert functions - NEVER == CALLS.keys()
