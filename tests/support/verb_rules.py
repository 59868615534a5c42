"""Rules of the state machine that attach, switch, merge and train adapters."""

import contextlib
import functools
import re
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any
from unittest import mock

import hypothesis.strategies as st
import pytest
import torch
from hypothesis.stateful import precondition, rule
from torch import nn

import paramlora as pl
from tests.support.checked_model import assert_near, assert_same, frozen_outputs, stored
from tests.support.dense_net import UNROUTABLE
from tests.support.reference_model import KEEP, AdapterState, Route
from tests.support.state_machine import (
    CANNOT_BE_ONLY,
    CANNOT_ROUTE,
    CANNOT_STORE,
    IN_ROUTED,
    IS_MERGED,
    IS_OFF,
    IS_TAKEN,
    NAMES,
    NO_BACKWARD,
    NOTHING,
    OUT_OF_ORDER,
    BaseMachine,
    ExpectedError,
    a_free_name,
    a_name,
    a_scope,
    a_seed,
    a_strength,
    an_activate,
    any_name,
    mostly,
    some_names,
    some_tensors,
)


class VerbRules(BaseMachine):
    """Calls verbs on a model, and applies them to its reference."""

    @precondition(lambda self: len(self.reference.names()) < len(NAMES))
    @rule(
        name=mostly(a_free_name, any_name),
        to=some_tensors,
        halves=st.booleans(),
        activate=an_activate,
        freeze=st.sampled_from([True, True, False]),
        hold=st.booleans(),
        filled=mostly(st.just(True), st.just(False)),
        seed=a_seed,
    )
    def attach(
        self,
        name: str,
        to: list[tuple[int, pl.kinds.Spec]],
        halves: bool,
        activate: Any,
        freeze: bool,
        hold: bool,
        filled: bool,
        seed: int,
    ) -> None:
        specs: Any = self.specs(to, halves)
        before = frozen_outputs(self.model, self.ids)
        generator = torch.Generator().manual_seed(seed)
        options: Any = {"activate": activate, "freeze": freeze, "generator": generator}
        if self.attempt(
            lambda: pl.attach(self.model, specs, name=name, hold_statistics=hold, **options),
            IN_ROUTED if self.reference.is_routed() else None,
            IS_TAKEN if name in self.reference.names() else None,
            CANNOT_BE_ONLY if activate == "only" and self.reference.merged() else None,
        ):
            # With other active adapters, sums may be rounded in another order.
            others_active = any(adapter.active for _, _, adapter in self.reference.all_adapters())
            if activate != "only" or not others_active:
                (assert_near if others_active else assert_same)(
                    frozen_outputs(self.model, self.ids), before
                )
            self.record(name, specs)
            self.reference.add(name, activate, freeze)
            self.reference.holders += [name] if hold else []
            if filled:
                self.fill(name, seed)

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
        specs: Any = {
            f"{path}{index}": replace(spec, alpha=alpha) if isinstance(spec, pl.LoRA) else spec
            for path, adapters in self.reference.adapters.items()
            if name in adapters
            for index, spec in adapters[name].specs.items()
        }
        if specs and not self.reference.is_routed():
            pl.detach(self.model, name)
            self.reference.detach([name])
            pl.attach(self.model, specs, name=name, activate=activate, freeze=freeze)
            self.record(name, specs)
            self.reference.add(name, activate, freeze)
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
        verb=st.sampled_from(["enable", "enable", "disable", "scale"]),
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
            self.cannot_enable(verb, names, scope),
        ):
            self.reference.toggle(verb, scope, names, strength)

    def cannot_enable(self, verb: str, names: list[str], scope: str) -> ExpectedError | None:
        wrong = self.reference.out_of_order(scope, names, merging=False)
        return OUT_OF_ORDER if wrong and verb.startswith("enable") else None

    @precondition(lambda self: self.reference.names())
    @rule(verb=st.sampled_from(["freeze", "unfreeze"]), names=some_names, scope=a_scope)
    def freeze_or_unfreeze(self, verb: str, names: list[str], scope: str) -> None:
        if self.attempt(
            lambda: getattr(pl, verb)(self.submodule(scope), *names), self.bad_name(names, scope)
        ):
            self.reference.set_trainable(scope, names, verb == "unfreeze")

    def enter(
        self,
        block: AbstractContextManager[Any],
        scope: str,
        changes: list[tuple[AdapterState, dict[str, Any]]],
        routes: dict[str, Route | None],
        *errors: ExpectedError | None,
    ) -> None:
        """Enter a block, which makes these changes for as long as it is open.

        Args:
            block: the block.
            scope: the part of the model that it is called on.
            changes: what it changes of each adapter.
            routes: its route at each tensor; by default it keeps the route there.
            errors: the errors that are expected.
        """
        if self.attempt(block.__enter__, *errors):
            marks = [(path, [routes.get(path, KEEP)]) for path in self.reference.inside(scope)]
            for adapter, change in changes:
                adapter.blocks.append(change)
            for path, mark in marks:
                self.reference.routes[path].append(mark)
            reference = self.reference

            def end() -> None:
                for adapter, change in changes:
                    adapter.blocks = [other for other in adapter.blocks if other is not change]
                for path, mark in marks:
                    kept = [other for other in reference.routes[path] if other is not mark]
                    reference.routes[path] = kept

            self.checked.blocks.append((block, end))

    @precondition(lambda self: self.reference.names() and len(self.checked.blocks) < 4)
    @rule(verb=st.sampled_from(["enabled", "disabled"]), names=some_names, scope=a_scope)
    def enter_toggled(self, verb: str, names: list[str], scope: str) -> None:
        chosen = self.reference.select(scope, names)
        routed = verb == "enabled" and self.reference.is_routed(scope)
        self.enter(
            getattr(pl, verb)(self.submodule(scope), *names),
            scope,
            [(adapter, {"active": verb == "enabled"}) for _, adapter in chosen],
            {},
            self.bad_name(names, scope),
            IS_MERGED if self.reference.merged(scope, names) else None,
            self.cannot_enable(verb, names, scope),
            IN_ROUTED if routed else None,
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
            scope,
            changes,
            dict.fromkeys(self.reference.inside(scope)),
            self.bad_name([*names, *scales], scope),
            IS_MERGED if self.reference.merged(scope) else None,
        )

    @precondition(lambda self: self.reference.names() and len(self.checked.blocks) < 4)
    @rule(
        names=some_names,
        ids=st.lists(st.integers(-1, 2), min_size=3, max_size=3),
        scope=a_scope,
    )
    def enter_routed(self, names: list[str], ids: list[int], scope: str) -> None:
        """Enter `routed`, and call the model on batches of other sizes inside of it."""
        if self.reference.normed:
            self.mode(False)  # a layer that runs once for each adapter takes a step each time
        order = names or self.reference.names(scope)
        ids = [-1 if i < 0 else i % len(order) for i in ids] if order else [-1] * 3
        route = [order[i] if i >= 0 else None for i in ids]
        chosen = {
            path: any(name in order for name in self.reference.adapters[path])
            for path in self.reference.inside(scope)
        }
        stays = any(
            isinstance(self.reference.plain.get_submodule(path.rpartition(".")[0]), UNROUTABLE)
            for path, is_chosen in chosen.items()
            if is_chosen
        )
        before = len(self.checked.blocks)
        self.enter(
            pl.routed(self.submodule(scope), ids, *names),
            scope,
            [(a, {"active": name in order}) for name, a in self.reference.select(scope, ())],
            {path: route if is_chosen else None for path, is_chosen in chosen.items()},
            self.bad_name(names, scope),
            IS_MERGED if self.reference.merged(scope) else None,
            CANNOT_ROUTE if stays else None,
        )
        if len(self.checked.blocks) > before:
            self.call_with_other_rows()

    @torch.no_grad()
    def call_with_other_rows(self) -> None:
        """Call a routed model on each row twice, side by side, and on a row too many."""
        if any(isinstance(m, nn.BatchNorm1d) for m in self.model.modules()):
            return  # which normalises by all rows
        self.model.eval()
        with self.without_dense_weights():
            once = self.model(self.ids)
        twice = self.model(self.ids.repeat_interleave(2, dim=0))
        assert_near(twice, once.repeat_interleave(2, dim=0))
        if any(self.reference.route(path) is not None for path in self.reference.paths):
            with pytest.raises(
                ValueError, match=r"^ids route 3 rows, and the input of '.*' has 4 "
            ):
                self.model(self.ids[[0, 0, 1, 2]])
        self.model.train(self.reference.training)

    def without_dense_weights(self) -> AbstractContextManager[Any]:
        """Assert that no W' is built inside, if all adapters are LoRAs where none is needed."""
        low_rank = all(
            path.endswith(".weight")
            and type(self.reference.plain.get_submodule(path[:-7])) in (nn.Linear, nn.Embedding)
            and all(type(spec) is pl.LoRA for spec in adapter.specs.values())
            for path, _, adapter in self.reference.all_adapters()
            if adapter.live
        )
        built = mock.patch.object(pl.LoRA, "apply", side_effect=AssertionError("W' is built"))
        return built if low_rank else contextlib.nullcontext()

    @precondition(lambda self: len(self.checked.blocks) < 4)
    @rule()
    def enter_hold(self) -> None:
        block, holder, reference = pl.hold_statistics(self.model), object(), self.reference
        block.__enter__()
        reference.holders.append(holder)
        self.checked.blocks.append((block, lambda: reference.holders.remove(holder)))

    @precondition(lambda self: self.reference.names() and len(self.checked.blocks) < 4)
    @rule(names=some_names, scope=a_scope)
    def enter_merged(self, names: list[str], scope: str) -> None:
        if self.stores_the_norm(scope):
            return
        block = pl.merged(self.submodule(scope), *names)
        already = IS_MERGED if self.reference.merged(scope) else None
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

    def stores_the_norm(self, scope: str = "") -> bool:
        """Whether a merge without effect would store a normalised W, which is not modelled."""
        for path in self.reference.inside(scope):
            live = [one for one in self.reference.adapters[path].values() if one.live]
            if live and self.reference.vectors(path) is not None:
                W = changed = self.reference.base(path).detach()
                for adapter in live:
                    changed = adapter.apply(changed)
                if torch.allclose(changed, W):
                    return True
        return False

    def cannot_merge(self, names: list[str], scope: str) -> list[ExpectedError | None]:
        inside = self.reference.inside(scope)
        chosen = [
            (path, adapter)
            for path in inside
            for name, adapter in self.reference.adapters[path].items()
            if not names or name in names
        ]
        live = [(path, adapter) for path, adapter in chosen if adapter.live]
        stored_by_norm = any(self.reference.vectors(path) is not None for path, _ in live)
        # Sites are checked in order, so each of these errors can come first.
        errors = [
            IN_ROUTED if self.reference.is_routed(scope) else None,
            IS_MERGED if names and len(live) < len(chosen) else None,
            IS_OFF if names and len(live) < len(chosen) else None,
            OUT_OF_ORDER if self.reference.out_of_order(scope, names, merging=True) else None,
            CANNOT_STORE if stored_by_norm else None,
        ]
        messages = [error[1] for error in errors if error is not None]
        return [
            self.bad_name(names, scope),
            (pl.StateError, "|".join(messages)) if messages else None,
            None if live else NOTHING,
        ]

    @precondition(lambda self: self.reference.names())
    @rule(names=some_names, scope=a_scope)
    def merge(self, names: list[str], scope: str) -> None:
        if self.stores_the_norm(scope):
            return
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
        if self.stores_the_norm():
            return
        baked = self.checked.copied()
        reference = baked.reference
        before = {
            path: reference.dense(path) for path in reference.adapters if reference.adapters[path]
        }
        off = any(not adapter.active for _, _, adapter in reference.all_adapters())
        normed = any(
            adapter.live and reference.vectors(path) is not None
            for path, _, adapter in reference.all_adapters()
        )
        if self.attempt(
            lambda: pl.bake(baked.model), IS_OFF if off else None, CANNOT_STORE if normed else None
        ):
            reference.detach(reference.names())
            reference.holders.clear()
            for path, expected in before.items():
                assert_near(stored(baked.model, path).detach(), expected)
                reference.parameter(path).data.copy_(stored(baked.model, path).detach())
            baked.fingerprint = ""
        self.set_aside(baked, switch)

    @rule(training=st.booleans())
    def mode(self, training: bool) -> None:
        training = training and not (self.reference.normed and self.reference.is_routed())
        self.model.train(training)
        self.reference.training = training
        self.reference.plain.train(training)

    @precondition(
        lambda self: any(
            adapter.live and adapter.trainable for _, _, adapter in self.reference.all_adapters()
        )
    )
    @rule()
    def train_step(self) -> None:
        """Take a step along the gradient; compare the gradients of a trained base too."""
        loss = self.model(self.ids).tanh().mean()
        adapters = [adapter for _, _, adapter in self.reference.all_adapters()]
        leaves = {
            adapter: {
                key: value.clone().requires_grad_(key in adapter.trained())
                for key, value in adapter.factors.items()
            }
            for adapter in adapters
            if adapter.live and adapter.trainable
        }
        bases = {p: self.reference.stored(p).requires_grad_() for p in self.reference.paths}
        expected = self.reference.outputs(self.ids, leaves, bases)
        self.checked.take_buffers()
        if not loss.requires_grad:
            return  # no row has an adapter
        try:
            loss.backward()
        except pl.StateError as error:
            untrained = any(adapter.merged and adapter.trainable for adapter in adapters)
            # Not if an attention reads the weight of its `out_proj`, which has no forward of ours.
            if not untrained or not re.search(NO_BACKWARD[1], str(error)):
                raise
            self.model.zero_grad()
            return
        with torch.no_grad():
            for parameter in pl.parameters(self.model):
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad / 4)
        expected.tanh().mean().backward()
        for path, base in bases.items():
            actual = stored(self.model, path).grad
            assert (actual is None) != self.reference.flag(path)
            if actual is not None and base.grad is not None:
                assert_near(actual, base.grad)
        for adapter, factors in leaves.items():
            for key, leaf in factors.items():
                if leaf.grad is not None:
                    adapter.factors[key] = leaf.detach() - leaf.grad / 4
        self.model.zero_grad()
