"""Random sequences of verbs on random models, compared with plain dense models.

Each verb is called on a model and on its reference (`reference_model.py`). After every step the two
must agree in outputs, weights, flags, base, factors and summary, and so must a second model that
was copied or loaded from the first.

`PARAMLORA_EXAMPLES=2000` runs 2000 sequences, with a new seed each time.
"""

import copy
import functools
import json
import os
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis.stateful import (
    precondition,
    rule,
    run_state_machine_as_test,
)
from safetensors import safe_open

import paramlora as pl
from tests.support.reference_model import (
    AdapterState,
    CheckedModel,
    ReferenceModel,
    assert_near,
    assert_same,
    frozen_outputs,
    stored,
)
from tests.support.state_machine import (
    ALREADY_MERGED,
    CANNOT_BE_ONLY,
    IS_MERGED,
    IS_OFF,
    IS_TAKEN,
    NAMES,
    NO_BACKWARD,
    NOTHING,
    BaseMachine,
    ExpectedError,
    File,
    a_free_name,
    a_name,
    a_scope,
    a_seed,
    a_spec,
    a_strength,
    an_activate,
    any_name,
    mostly,
    some_names,
)

EXAMPLES = int(os.environ.get("PARAMLORA_EXAMPLES", "0"))
SETTINGS = settings(
    max_examples=EXAMPLES or 25,
    derandomize=not EXAMPLES,
    stateful_step_count=50,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


class Machine(BaseMachine):
    """Calls verbs on a model, and applies them to its reference."""

    @precondition(lambda self: len(self.reference.names()) < len(NAMES))
    @rule(
        name=mostly(a_free_name, any_name),
        to=st.lists(st.tuples(st.integers(0, 40), a_spec), min_size=2, max_size=6),
        activate=an_activate,
        freeze=st.sampled_from([True, True, False]),
        filled=st.booleans(),
        seed=a_seed,
    )
    def attach(
        self,
        name: str,
        to: list[tuple[int, pl.kinds.Spec]],
        activate: Any,
        freeze: bool,
        filled: bool,
        seed: int,
    ) -> None:
        firsts = self.reference.firsts()
        specs: dict[Any, pl.kinds.Spec] = {}
        for index, spec in to:
            path = list(firsts)[index % len(firsts)]
            specs[path] = spec if self.reference.base(firsts[path]).dim() > 1 else pl.Delta()
        before = frozen_outputs(self.model, self.ids)
        generator = torch.Generator().manual_seed(seed)
        if self.attempt(
            lambda: pl.attach(
                self.model, specs, name=name, activate=activate, freeze=freeze, generator=generator
            ),
            IS_TAKEN if name in self.reference.names() else None,
            CANNOT_BE_ONLY if activate == "only" and self.reference.merged() else None,
        ):
            # With other active adapters, sums may be rounded in another order.
            others_active = any(adapter.active for _, _, adapter in self.reference.all_adapters())
            if activate != "only" or not others_active:
                (assert_near if others_active else assert_same)(
                    frozen_outputs(self.model, self.ids), before
                )
            self.record(name, specs, activate, freeze)
            if filled:
                self.fill(name, seed)

    def record(
        self, name: str, specs: dict[Any, pl.kinds.Spec], activate: Any, freeze: bool
    ) -> None:
        """Add an attached adapter to the reference, after a check of its factors."""
        factors = self.factors(name)
        for path, spec in specs.items():
            first = self.reference.firsts()[path]
            # If both paths of a tied tensor are targets, the first one wins.
            if name not in self.reference.adapters[first]:
                site_factors, base = factors.pop(first), self.reference.base(first)
                if isinstance(spec, pl.LoRA):
                    assert site_factors["A"].shape == (spec.rank, base[0].numel())
                    assert_same(
                        site_factors["B"], torch.zeros(len(base), spec.rank, dtype=torch.float64)
                    )
                else:
                    assert_same(site_factors["D"], torch.zeros_like(base).double())
                self.reference.adapters[first][name] = AdapterState(spec, site_factors)
        assert not factors
        self.reference.add(name, activate, freeze)

    @precondition(lambda self: self.reference.names() and not self.reference.merged())
    @rule(
        name=a_name,
        alpha=st.sampled_from([2.0, None]),
        activate=an_activate,
        freeze=st.booleans(),
        seed=a_seed,
    )
    def attach_again(
        self, name: str, alpha: float | None, activate: Any, freeze: bool, seed: int
    ) -> None:
        """Detach an adapter and attach it to the same tensors again, with another alpha."""
        by_path = {
            path: adapters[name]
            for path, adapters in self.reference.adapters.items()
            if name in adapters
        }
        if by_path:
            specs: dict[Any, pl.kinds.Spec] = {
                path: adapter.spec for path, adapter in by_path.items()
            }
            for path, spec in specs.items():
                if isinstance(spec, pl.LoRA):
                    specs[path] = replace(spec, alpha=alpha)
            pl.detach(self.model, name)
            self.reference.detach([name])
            pl.attach(self.model, specs, name=name, activate=activate, freeze=freeze)
            self.record(name, specs, activate, freeze)
            self.fill(name, seed)

    @precondition(lambda self: self.reference.names())
    @rule(names=some_names)
    def detach(self, names: list[str]) -> None:
        if self.attempt(
            lambda: pl.detach(self.model, *names),
            self.bad_name(names),
            IS_MERGED if self.reference.merged("", names) else None,
        ):
            self.reference.detach(names or self.reference.names())

    @precondition(lambda self: self.reference.names())
    @rule(
        verb=st.sampled_from(["enable", "disable", "scale"]),
        names=some_names,
        scope=a_scope,
        strength=a_strength,
    )
    def toggle(self, verb: str, names: list[str], scope: str, strength: float) -> None:
        options = [strength] if verb == "scale" else []
        if self.attempt(
            lambda: getattr(pl, verb)(self.submodule(scope), *options, *names),
            self.bad_name(names, scope),
            IS_MERGED if self.reference.merged(scope, names) else None,
        ):
            self.reference.toggle(verb, scope, names, strength)

    @precondition(lambda self: self.reference.names())
    @rule(verb=st.sampled_from(["freeze", "unfreeze"]), names=some_names, scope=a_scope)
    def freeze_or_unfreeze(self, verb: str, names: list[str], scope: str) -> None:
        if self.attempt(
            lambda: getattr(pl, verb)(self.submodule(scope), *names), self.bad_name(names, scope)
        ):
            self.reference.set_trainable(scope, names, verb == "unfreeze")

    def enter(
        self,
        block: AbstractContextManager[None],
        changes: list[tuple[AdapterState, dict[str, Any]]],
        *errors: ExpectedError | None,
    ) -> None:
        """Enter a block, which makes these changes for as long as it is open."""
        if self.attempt(block.__enter__, *errors):
            for adapter, change in changes:
                adapter.blocks.append(change)

            def end() -> None:
                for adapter, change in changes:
                    adapter.blocks = [other for other in adapter.blocks if other is not change]

            self.checked.blocks.append((block, end))

    @precondition(lambda self: self.reference.names() and len(self.checked.blocks) < 4)
    @rule(verb=st.sampled_from(["enabled", "disabled"]), names=some_names, scope=a_scope)
    def enter_toggled(self, verb: str, names: list[str], scope: str) -> None:
        chosen = self.reference.select(scope, names)
        self.enter(
            getattr(pl, verb)(self.submodule(scope), *names),
            [(adapter, {"active": verb == "enabled"}) for _, adapter in chosen],
            self.bad_name(names, scope),
            IS_MERGED if self.reference.merged(scope, names) else None,
        )

    @precondition(lambda self: self.reference.names())
    @rule(names=some_names, scales=st.dictionaries(a_name, a_strength, max_size=2), scope=a_scope)
    def activate(self, names: list[str], scales: dict[str, float], scope: str) -> None:
        if self.attempt(
            lambda: pl.activate(self.submodule(scope), *names, scales),
            self.bad_name([*names, *scales], scope),
            IS_MERGED if self.reference.merged(scope) else None,
        ):
            self.reference.activate(scope, names, scales)

    @precondition(lambda self: self.reference.names() and len(self.checked.blocks) < 4)
    @rule(names=some_names, scales=st.dictionaries(a_name, a_strength, max_size=2), scope=a_scope)
    def enter_using(self, names: list[str], scales: dict[str, float], scope: str) -> None:
        changes = [
            (
                adapter,
                {"active": name in names or name in scales}
                | ({"strength": scales[name]} if name in scales else {}),
            )
            for name, adapter in self.reference.select(scope, ())
        ]
        self.enter(
            pl.using(self.submodule(scope), *names, **scales),
            changes,
            self.bad_name([*names, *scales], scope),
            IS_MERGED if self.reference.merged(scope) else None,
        )

    @precondition(lambda self: self.reference.names() and len(self.checked.blocks) < 4)
    @rule(names=some_names, scope=a_scope)
    def enter_merged(self, names: list[str], scope: str) -> None:
        block = pl.merged(self.submodule(scope), *names)
        already = ALREADY_MERGED if self.reference.merged(scope) else None
        if self.attempt(block.__enter__, already, *self.cannot_merge(names, scope)):
            self.reference.merge(scope, names)
            self.checked.blocks.append((block, functools.partial(self.reference.unmerge, scope)))

    @precondition(lambda self: self.checked.blocks)
    @rule(fails=st.booleans(), merges=st.booleans(), index=st.sampled_from([-1, -1, 0]))
    def exit_block(self, fails: bool, merges: bool, index: int) -> None:
        """Exit a block, mostly the innermost one, after a merge or not; merged ones stay merged."""
        if merges:
            self.merge([], "")
        self.checked.exit_block(ZeroDivisionError() if fails else None, index)

    def cannot_merge(self, names: list[str], scope: str) -> list[ExpectedError | None]:
        chosen = [adapter for _, adapter in self.reference.select(scope, names)]
        live = [adapter for adapter in chosen if adapter.active and not adapter.merged]
        return [
            self.bad_name(names, scope),
            # Sites are checked in order, so either error can come first.
            (pl.StateError, f"{IS_MERGED[1]}|{IS_OFF[1]}")
            if names and len(live) < len(chosen)
            else None,
            None if live else NOTHING,
        ]

    @precondition(lambda self: self.reference.names())
    @rule(names=some_names, scope=a_scope)
    def merge(self, names: list[str], scope: str) -> None:
        if self.attempt(
            lambda: pl.merge(self.submodule(scope), *names), *self.cannot_merge(names, scope)
        ):
            self.reference.merge(scope, names)

    @precondition(lambda self: self.reference.merged())
    @rule(scope=a_scope)
    def unmerge(self, scope: str) -> None:
        part = self.submodule(scope)
        if self.attempt(lambda: pl.unmerge(part), self.bad_name((), scope)):
            self.reference.unmerge(scope)

    @precondition(lambda self: self.reference.names())
    @rule(switch=st.sampled_from([False, False, False, True]))
    def bake(self, switch: bool) -> None:
        """Bake a copy, and mostly continue with the original."""
        baked = self.checked.copied()
        reference = baked.reference
        before = {
            path: reference.dense(path) for path in reference.adapters if reference.adapters[path]
        }
        off = any(not adapter.active for _, _, adapter in reference.all_adapters())
        if self.attempt(lambda: pl.bake(baked.model), IS_OFF if off else None):
            reference.detach(reference.names())
            for path, expected in before.items():
                assert_near(stored(baked.model, path).detach(), expected)
            reference.set_base({path: stored(baked.model, path).detach() for path in before})
        self.set_aside(baked, switch)

    @precondition(lambda self: self.reference.names())
    @rule(training=st.booleans())
    def mode(self, training: bool) -> None:
        self.model.train(training)
        self.reference.training = training

    @precondition(
        lambda self: any(
            adapter.active and adapter.trainable and not adapter.merged
            for _, _, adapter in self.checked.reference.all_adapters()
        )
    )
    @rule()
    def train_step(self) -> None:
        """Take a step of SGD on the factors; compare gradients of a trained base too."""
        optimizer = torch.optim.SGD(pl.parameters(self.model), lr=0.5)
        optimizer.zero_grad()
        loss = self.model(self.ids).tanh().mean()
        untrained = any(
            adapter.merged and adapter.trainable for _, _, adapter in self.reference.all_adapters()
        )
        try:
            loss.backward()
        except pl.StateError as error:
            # Not if an attention reads the weight of its `out_proj`, which has no forward of ours.
            if not untrained or not re.search(NO_BACKWARD[1], str(error)):
                raise
            self.model.zero_grad()
            return
        optimizer.step()
        leaves = {
            adapter: {key: value.clone().requires_grad_() for key, value in adapter.factors.items()}
            for _, _, adapter in self.reference.all_adapters()
            if adapter.active and adapter.trainable and not adapter.merged
        }
        weights = {path: self.reference.dense(path, leaves) for path in self.reference.adapters}
        for weight in weights.values():
            weight.requires_grad_() if weight.is_leaf else weight.retain_grad()
        self.reference.outputs(self.ids, weights).tanh().mean().backward()
        for path, weight in weights.items():
            actual = stored(self.model, path).grad
            assert (actual is None) != self.reference.flag(path)
            if actual is not None:
                assert weight.grad is not None
                assert_near(actual, weight.grad)
        for adapter, factors in leaves.items():
            for key, leaf in factors.items():
                assert leaf.grad is not None
                adapter.factors[key] = leaf.detach() - 0.5 * leaf.grad
        self.model.zero_grad()

    @precondition(lambda self: self.reference.names())
    @rule(switch=st.booleans())
    def deepcopy(self, switch: bool) -> None:
        """Copy, and continue with the copy or the original."""
        self.set_aside(self.checked.copied(), switch)

    @precondition(lambda self: self.second is not None)
    @rule()
    def swap(self) -> None:
        assert self.second is not None
        self.checked, self.second = self.second, self.checked

    @precondition(lambda self: self.reference.names() and len(self.files) < 5)
    @rule(name=a_name)
    def save(self, name: str) -> None:
        path = Path(self.folder.name) / f"{len(self.files)}.safetensors"
        if not self.attempt(lambda: pl.save(self.model, path, name), self.bad_name([name])):
            assert not path.exists()
            return
        by_path = {
            site: adapters[name]
            for site, adapters in self.reference.adapters.items()
            if name in adapters
        }
        with safe_open(path, framework="pt") as file:
            content = json.loads(file.metadata()["paramlora"])
            assert content["name"] == name
            assert content["sites"].keys() == by_path.keys()
            keys = {f"{site}.{key}" for site, adapter in by_path.items() for key in adapter.factors}
            assert set(file.keys()) == keys
            for site, adapter in by_path.items():
                assert content["sites"][site]["strength"] == adapter.own_strength
                assert content["sites"][site]["kind"] == type(adapter.spec).__name__
                for key, factor in adapter.factors.items():
                    assert_same(file.get_tensor(f"{site}.{key}").double(), factor)
        self.files.append(File(path, name, copy.deepcopy(by_path)))

    @precondition(lambda self: self.files)
    @rule(
        index=st.integers(0, 9),
        name=mostly(st.none(), any_name),
        activate=st.none() | an_activate,
        strength=a_strength,
    )
    def load(self, index: int, name: str | None, activate: Any, strength: float) -> None:
        """Load a file as a new adapter, or into the one of that name."""
        file = self.files[index % len(self.files)]
        target_name = name or file.name
        self.toggle("scale", [target_name], "", strength)
        attached = {
            site: by_name[target_name]
            for site, by_name in self.reference.adapters.items()
            if target_name in by_name
        }
        others_merged = any(
            adapter.merged
            for _, other, adapter in self.reference.all_adapters()
            if other != target_name
        )
        fits = attached.keys() == file.adapters.keys() and all(
            (type(adapter.spec), adapter.spec.rank)
            == (type(attached[site].spec), attached[site].spec.rank)
            for site, adapter in file.adapters.items()
        )
        if self.attempt(
            lambda: pl.load(self.model, file.path, name=name, activate=activate),
            CANNOT_BE_ONLY if activate == "only" and others_merged else None,
            IS_MERGED if self.reference.merged("", [target_name]) and attached else None,
            IS_TAKEN if attached and not fits else None,
        ):
            self.load_into_reference(self.reference, file, target_name, activate)

    def load_into_reference(
        self, reference: ReferenceModel, file: File, name: str, activate: Any = None
    ) -> None:
        new, before = name not in reference.names(), reference.names()
        for site, adapter in file.adapters.items():
            state = reference.adapters[site].setdefault(name, AdapterState(adapter.spec, {}))
            state.spec, state.factors = adapter.spec, dict(adapter.factors)
            state.strength = adapter.own_strength
        if new or activate:
            reference.add(name, activate or ("no" if before else "only"), freeze=new)

    @precondition(lambda self: self.files)
    @rule(index=st.integers(0, 9), switch=st.booleans())
    def load_fresh(self, index: int, switch: bool) -> None:
        """Load a file into a new model."""
        file = self.files[index % len(self.files)]
        fresh = CheckedModel(
            copy.deepcopy(self.reference.plain),
            ReferenceModel.of(copy.deepcopy(self.reference.plain)),
        )
        pl.load(fresh.model, file.path)
        self.load_into_reference(fresh.reference, file, file.name)
        self.set_aside(fresh, switch)

    @precondition(lambda self: self.reference.names())
    @rule(name=a_name, seed=a_seed)
    def load_values(self, name: str, seed: int) -> None:
        self.attempt(
            lambda: self.fill(name, seed),
            self.bad_name([name]),
            IS_MERGED if self.reference.merged("", [name]) else None,
        )

    @precondition(lambda self: self.reference.names())
    @rule(seed=a_seed)
    def load_base(self, seed: int) -> None:
        """Load another base under the adapters."""
        torch.manual_seed(seed)
        state = {
            key: value + torch.randn_like(value) / 8
            for key, value in pl.base_state_dict(self.model).items()
        }
        for first, paths in self.reference.paths.items():
            state |= dict.fromkeys(paths, state[first])
        if self.attempt(
            lambda: pl.load_base_state_dict(self.model, state),
            IS_MERGED if self.reference.merged() else None,
        ):
            self.reference.plain.load_state_dict(state)
            self.reference.set_base({})


@pytest.fixture
def _one_thread() -> Iterator[None]:
    """Use one thread: at these sizes more threads are slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.usefixtures("_one_thread")
def test_random_sequences_of_verbs() -> None:
    """After any sequence of verbs, a model agrees with its dense reference."""
    run_state_machine_as_test(Machine, settings=SETTINGS)
