"""The state machine of random sequences of verbs: strategies and the base class of its rules."""

import copy
import itertools
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant
from torch import Tensor, nn

import paramlora as pl
from tests.support.checked_model import CheckedModel
from tests.support.dense_net import LAYERS, Net, takes
from tests.support.reference_model import AdapterState, ReferenceModel

NAMES = "abc"
BAD_NAME = (pl.AdapterNameError, r"^no adapter '.' here; attached are: ")
IS_MERGED = (pl.StateError, r"^cannot .* adapter '.' while it is merged; unmerge first$")
IS_OFF = (pl.StateError, r"^adapter '.' is switched off")
NO_BACKWARD = (pl.StateError, r"^cannot train adapter '.'.* while it is merged: ")
NO_ADAPTER = (pl.StateError, r"^no adapter is attached here; ")
NOTHING = (pl.StateError, r"^nothing to merge")
IS_TAKEN = (pl.AdapterNameError, r"^(an )?adapter '.' is attached already")
OUT_OF_ORDER = (pl.StateError, r"so their order counts; ")
CANNOT_STORE = (pl.StateError, r"^cannot merge at '.*': .* below the adapter cannot store ")
IN_ROUTED = (pl.StateError, r"^cannot .* inside of routed\(\): every row would get ")
CANNOT_ROUTE = (pl.StateError, r"^cannot route '")
CANNOT_BE_ONLY = (pl.StateError, r"^cannot make '.' the only active adapter while '.' is merged")
ExpectedError = tuple[type[Exception] | tuple[type[Exception], ...], str]


def from_state(strategy: Callable[[Any], st.SearchStrategy[Any]]) -> st.SearchStrategy[Any]:
    """Return a strategy that depends on the current state of the machine."""
    return st.runner().flatmap(strategy)


def mostly(good: st.SearchStrategy[Any], other: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Return a strategy that takes nine of ten values from the first one."""
    return st.integers(0, 9).flatmap(lambda i: other if i == 9 else good)


# `a_name` and `some_names` mostly give names of attached adapters, `a_free_name` another name.
# `a_scope` is the start of the paths of a submodule, mostly "", which is the whole model.
any_name = st.sampled_from(NAMES)
a_name = mostly(from_state(lambda m: st.sampled_from(m.reference.names() or NAMES)), any_name)
some_names = mostly(
    from_state(
        lambda m: st.lists(st.sampled_from(m.reference.names() or NAMES), max_size=2, unique=True)
    ),
    st.lists(any_name, max_size=2, unique=True),
)
a_free_name = from_state(
    lambda m: st.sampled_from(sorted({*NAMES} - {*m.reference.names()}) or NAMES)
)
# Two attached adapters, mostly in attaching order.
two_names = from_state(
    lambda m: mostly(
        st.sampled_from([[a, b] for a, b in itertools.combinations(m.reference.names(), 2)]),
        st.permutations(m.reference.names()),
    )
)
a_scope = mostly(st.just(""), from_state(lambda m: st.sampled_from(m.scopes)))
a_strength = st.sampled_from([0.0, 0.5, 1.0, -1.0, 2.0])
an_activate = st.sampled_from(["only", "also", "no"])
a_seed = st.integers(0, 2**16)
a_rank = st.integers(1, 3)
an_alpha = st.sampled_from([None, 1, 0.5, 3.0])
a_lora = st.builds(
    pl.LoRA,
    rank=st.integers(1, 5),
    alpha=an_alpha,
    init=st.sampled_from(["kaiming", "gaussian/sqrt_r", "orthogonal", nn.init.ones_]),
    rank_stabilized=st.booleans(),
)
a_spec = st.one_of(
    st.just(pl.Delta()),
    st.just(pl.IA3()),
    a_lora,
    st.one_of(
        st.builds(pl.DoRA, rank=a_rank, alpha=an_alpha),
        st.builds(pl.HiRA, rank=a_rank),
        st.just(pl.OFT(2)),
        st.just(pl.IA3(dim=1)),
    ),
    st.one_of(
        st.builds(pl.LoHa, rank=a_rank, alpha=an_alpha),
        st.builds(pl.LoKr, rank=a_rank, alpha=an_alpha),
        st.builds(pl.MiSS, rank=a_rank),
        st.builds(pl.LoRAXS, rank=a_rank, alpha=an_alpha),
        st.builds(pl.LoRA, rank=a_rank, init=st.sampled_from(["pissa", "olora"])),
    ),
)


# The tensors of an adapter, as numbers; mostly the first ones, so that adapters meet there.
some_tensors = st.lists(
    st.tuples(mostly(st.integers(0, 3), st.integers(0, 40)), a_spec), min_size=1, max_size=4
)


@dataclass
class File:
    """A saved adapter, with its expected state at each tensor."""

    path: Path
    name: str
    adapters: dict[str, AdapterState]


class BaseMachine(RuleBasedStateMachine):
    """A random model with its reference model, and methods for the rules.

    `second` is None, or another model with its reference: a copy, or a model loaded from a file.
    """

    count = 0  # of sequences
    checked: CheckedModel
    ids: Tensor
    scopes: list[str]
    compiles: int  # how often this sequence may still compile its model

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.files: list[File] = []
        self.second: CheckedModel | None = None

    def teardown(self) -> None:
        """Leave all blocks; check what is left of both models, and that all can be detached."""
        self.folder.cleanup()
        if hasattr(self, "checked") and sys.exc_info()[0] is None:
            self.end_second()
            while self.checked.blocks:
                self.checked.exit_block()
            if self.reference.names():
                pl.unmerge(self.model)
                pl.detach(self.model)
                self.reference.unmerge("")
                self.reference.detach(self.reference.names())
            self.checked.check(self.ids)
            self.checked.check_off(self.ids)

    @initialize(
        layers=st.lists(st.sampled_from(sorted(LAYERS)), min_size=1, max_size=2),
        tied=st.booleans(),
        again=st.booleans(),
        double=st.booleans(),
        untrained=st.sets(st.integers(0, 40), max_size=2),
        compiles=st.integers(0, 24),
        first=mostly(
            st.lists(some_tensors, min_size=2, max_size=2), st.lists(some_tensors, max_size=1)
        ),
        seed=a_seed,
    )
    def build(
        self,
        layers: list[str],
        tied: bool,
        again: bool,
        double: bool,
        untrained: set[int],
        compiles: int,
        first: list[list[tuple[int, pl.kinds.Spec]]],
        seed: int,
    ) -> None:
        type(self).count += 1
        torch.manual_seed(seed)
        plain = Net(layers, tied, again).to(torch.float64 if double else torch.float32)
        parameters = list(plain.parameters())
        for index in untrained:
            parameters[index % len(parameters)].requires_grad_(False)
        self.ids = torch.tensor([[0, 1], [4, 3], [2, 4]])
        self.compiles = 4 if compiles == 24 else 0
        self.checked = CheckedModel(copy.deepcopy(plain), ReferenceModel.of(plain))
        for i, adapters in enumerate(first):
            specs: Any = self.specs(adapters, False)
            pl.attach(self.model, specs, name=NAMES[i], activate="also")
            self.record(NAMES[i], specs)
            self.reference.add(NAMES[i], "also", freeze=True)
            self.fill(NAMES[i], seed + i)
        self.scopes = ["emb.", "head.", *(f"layers.{i}." for i in range(len(layers)))]

    def specs(self, to: list[tuple[int, pl.kinds.Spec]], halves: bool) -> dict[str, pl.kinds.Spec]:
        """Return a spec for each path; with `halves`, for the halves of the first tensor."""
        firsts = self.reference.firsts()
        specs: dict[str, pl.kinds.Spec] = {}
        for index, spec in to:
            path = list(firsts)[index % len(firsts)]
            base = self.reference.base(firsts[path])
            if halves and not specs:
                h = len(base) // 2
                for at, half in ((f"[:{h}]", base[:h]), (f"[{h}:]", base[h:])):
                    specs[path + at] = spec if takes(spec, half) else pl.Delta()
                taken = firsts[path]
            elif not (halves and firsts[path] == taken):
                specs[path] = spec if takes(spec, base) else pl.Delta()
        return specs

    @invariant()
    def check_models(self) -> None:
        self.checked.check(self.ids)
        self.checked.check_off(self.ids)

    @property
    def model(self) -> nn.Module:
        return self.checked.model

    @property
    def reference(self) -> ReferenceModel:
        return self.checked.reference

    def submodule(self, scope: str) -> nn.Module:
        """Return the part of the model whose paths start with `scope`."""
        return self.model.get_submodule(scope.rstrip("."))

    def bad_name(self, names: Any, scope: str = "") -> ExpectedError | None:
        attached = self.reference.names(scope)
        if not names and not attached:
            return NO_ADAPTER
        return BAD_NAME if set(names) - set(attached) else None

    def attempt(self, call: Callable[[], Any], *errors: ExpectedError | None) -> bool:
        """Call a function, and expect the first of `errors` that is not None, if there is one.

        Return whether the call was expected to succeed.
        """
        expected_error = next(filter(None, errors), None)
        if expected_error is None:
            call()
            return True
        error, message = expected_error
        with pytest.raises(error, match=message):
            call()
        return False

    def factors(self, name: str) -> dict[str, dict[str, Tensor]]:
        """Return the factors of an adapter of the model, by tensor, block and key."""
        found: dict[str, dict[str, Tensor]] = {}
        for key, tensor in pl.state_dict(self.model, name).items():
            site, _, factor = key.rpartition(".")
            path, _, index = site.partition("[")
            index = f"[{index}" if index else ""
            found.setdefault(path, {})[f"{index}.{factor}"] = tensor.double().clone()
        return found

    def record(self, name: str, specs: dict[str, pl.kinds.Spec]) -> None:
        """Add an attached adapter to the reference."""
        factors = self.factors(name)
        for site, spec in specs.items():
            path, _, index = site.partition("[")
            first, index = self.reference.firsts()[path], f"[{index}" if index else ""
            # If both paths of a tied tensor are targets, the first one wins.
            adapters = self.reference.adapters[first]
            if name not in adapters:
                adapters[name] = AdapterState({}, factors.pop(first))
            adapters[name].specs.setdefault(index, spec)
        assert not factors

    def fill(self, name: str, seed: int) -> None:
        """Set the factors of an adapter to random numbers, in the model and in the reference."""
        state = pl.state_dict(self.model, name)
        generator = torch.Generator().manual_seed(seed)
        values = {
            key: torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype) / 2
            for key, tensor in state.items()
        }
        pl.load_state_dict(self.model, values, name)
        for path, by_name in self.reference.adapters.items():
            for key in by_name[name].factors if name in by_name else ():
                by_name[name].factors[key] = values[f"{path}{key}"].double()

    def set_aside(self, other: CheckedModel, switch: bool) -> None:
        """Store `other` as the second model, or swap it with the current one if `switch`."""
        self.end_second()
        self.checked, self.second = (other, self.checked) if switch else (self.checked, other)

    def end_second(self) -> None:
        """Check the second model once more, and leave its blocks."""
        if self.second is not None:
            self.second.check(self.ids)
            while self.second.blocks:
                self.second.exit_block()
            self.second.check(self.ids)
            self.second = None
