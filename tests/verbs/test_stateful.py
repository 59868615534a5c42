"""Random sequences of verbs on random models, against plain dense models kept beside them.

Each verb that is called on a model is entered into its book (`reference_model.py`). After every
step the two must agree in outputs, weights, flags, base, factors and summary, and so must a second
model, copied or loaded from the first, that was set aside.

`PARAMLORA_EXAMPLES=2000` runs so many sequences, other ones each time.
"""

import copy
import functools
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from safetensors import safe_open
from torch import Tensor, nn

import paramlora as pl
from tests.support.reference_model import (
    LAYERS,
    Book,
    Net,
    Part,
    World,
    close,
    exactly,
    same,
    stored,
)
from tests.support.state_machine import (
    ALREADY_MERGED,
    BAD_NAME,
    IS_MERGED,
    IS_OFF,
    IS_TAKEN,
    NAMES,
    NOTHING,
    File,
    Refusal,
    a_free_name,
    a_name,
    a_scope,
    a_seed,
    a_spec,
    a_strength,
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


class Machine(RuleBasedStateMachine):
    """Calls verbs on a model and does the same to its book."""

    world: World
    ids: Tensor
    scopes: list[str]

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.files: list[File] = []
        self.aside: World | None = None

    def teardown(self) -> None:
        self.folder.cleanup()

    @initialize(
        layers=st.lists(st.sampled_from(sorted(LAYERS)), min_size=1, max_size=2),
        tied=st.booleans(),
        double=st.booleans(),
        untrained=st.sets(st.integers(0, 40), max_size=2),
        seed=a_seed,
    )
    def build(
        self, layers: list[str], tied: bool, double: bool, untrained: set[int], seed: int
    ) -> None:
        torch.manual_seed(seed)
        plain = Net(layers, tied).to(torch.float64 if double else torch.float32)
        parameters = list(plain.parameters())
        for index in untrained:
            parameters[index % len(parameters)].requires_grad_(False)
        self.ids = torch.tensor([[0, 1, 2], [4, 3, 2]])
        self.world = World(copy.deepcopy(plain), Book.of(plain))
        self.scopes = ["emb.", "head.", *(f"layers.{i}." for i in range(len(layers)))]

    @invariant()
    def agrees(self) -> None:
        self.world.agree(self.ids)
        if self.aside is not None:
            self.aside.agree(self.ids)

    @property
    def model(self) -> nn.Module:
        return self.world.model

    @property
    def book(self) -> Book:
        return self.world.book

    def part(self, scope: str) -> nn.Module:
        """Return the part of the model in which paths start so."""
        return self.model.get_submodule(scope.rstrip("."))

    def bad_name(self, names: Any, scope: str = "") -> Refusal | None:
        return BAD_NAME if set(names) - set(self.book.names(scope)) else None

    def attempt(self, call: Callable[[], Any], *refusals: Refusal | None) -> bool:
        """Call; expect the first refusal that there is, and return whether there was none."""
        refusal = next(filter(None, refusals), None)
        if refusal is None:
            call()
            return True
        error, message = refusal
        with pytest.raises(error, match=message):
            call()
        return False

    def factors(self, name: str) -> dict[str, dict[str, Tensor]]:
        """Return the model's own values of an adapter's factors, by site."""
        found: dict[str, dict[str, Tensor]] = {}
        for key, tensor in pl.state_dict(self.model, name).items():
            site, _, factor = key.rpartition(".")
            found.setdefault(site, {})[factor] = tensor.double().clone()
        return found

    def fill(self, name: str, seed: int) -> None:
        """Load random numbers into an adapter, of the model and of the book."""
        state = pl.state_dict(self.model, name)
        generator = torch.Generator().manual_seed(seed)
        values = {
            key: torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype) / 2
            for key, tensor in state.items()
        }
        pl.load_state_dict(self.model, values, name)
        for path, held in self.book.parts.items():
            for key in held[name].factors if name in held else ():
                held[name].factors[key] = values[f"{path}.{key}"].double()

    @precondition(lambda self: len(self.book.names()) < len(NAMES))
    @rule(
        name=mostly(a_free_name, any_name),
        to=st.lists(st.tuples(st.integers(0, 40), a_spec), min_size=2, max_size=6),
        freeze=st.sampled_from([True, True, False]),
        filled=st.booleans(),
        seed=a_seed,
    )
    def attach(
        self, name: str, to: list[tuple[int, pl.kinds.Spec]], freeze: bool, filled: bool, seed: int
    ) -> None:
        firsts = self.book.firsts()
        specs: dict[Any, pl.kinds.Spec] = {}
        for index, spec in to:
            path = list(firsts)[index % len(firsts)]
            specs[path] = spec if self.book.base(firsts[path]).dim() > 1 else pl.Delta()
        before = exactly(self.model, self.ids)
        generator = torch.Generator().manual_seed(seed)
        if self.attempt(
            lambda: pl.attach(self.model, specs, name=name, freeze=freeze, generator=generator),
            IS_TAKEN if name in self.book.names() else None,
        ):
            # Beside others that are active, sums may be rounded in another order.
            others = any(part.active for _, _, part in self.book.all_parts())
            (close if others else same)(exactly(self.model, self.ids), before)
            self.note(name, specs, freeze)
            if filled:
                self.fill(name, seed)

    def note(self, name: str, specs: dict[Any, pl.kinds.Spec], freeze: bool) -> None:
        """Put an adapter that was attached into the book, after a look at its factors."""
        factors = self.factors(name)
        for path, spec in specs.items():
            first = self.book.firsts()[path]
            # Of the two paths of a tied tensor the one that is named first counts.
            if name not in self.book.parts[first]:
                own, base = factors.pop(first), self.book.base(first)
                if isinstance(spec, pl.LoRA):
                    assert own["A"].shape == (spec.rank, base[0].numel())
                    same(own["B"], torch.zeros(len(base), spec.rank, dtype=torch.float64))
                else:
                    same(own["D"], torch.zeros_like(base).double())
                self.book.parts[first][name] = Part(spec, own)
        assert not factors
        if freeze:
            self.book.freeze_base(name)

    @precondition(lambda self: self.book.names() and not self.book.merged())
    @rule(name=a_name, alpha=st.sampled_from([2.0, None]), freeze=st.booleans(), seed=a_seed)
    def attach_anew(self, name: str, alpha: float | None, freeze: bool, seed: int) -> None:
        """Detach an adapter and attach it to the same tensors again, with another alpha."""
        held = {path: parts[name] for path, parts in self.book.parts.items() if name in parts}
        if held:
            specs: dict[Any, pl.kinds.Spec] = {path: part.spec for path, part in held.items()}
            for path, spec in specs.items():
                if isinstance(spec, pl.LoRA):
                    specs[path] = replace(spec, alpha=alpha)
            pl.detach(self.model, name)
            self.book.detach([name])
            pl.attach(self.model, specs, name=name, freeze=freeze)
            self.note(name, specs, freeze)
            self.fill(name, seed)

    @precondition(lambda self: self.book.names())
    @rule(names=some_names)
    def detach(self, names: list[str]) -> None:
        if self.attempt(
            lambda: pl.detach(self.model, *names),
            self.bad_name(names),
            IS_MERGED if self.book.merged("", names) else None,
        ):
            self.book.detach(names or self.book.names())

    @precondition(lambda self: self.book.names())
    @rule(
        verb=st.sampled_from(["enable", "disable", "scale"]),
        names=some_names,
        scope=a_scope,
        strength=a_strength,
    )
    def toggle(self, verb: str, names: list[str], scope: str, strength: float) -> None:
        options = [strength] if verb == "scale" else []
        if self.attempt(
            lambda: getattr(pl, verb)(self.part(scope), *options, *names),
            self.bad_name(names, scope),
            IS_MERGED if self.book.merged(scope, names) else None,
        ):
            self.book.toggle(verb, scope, names, strength)

    @precondition(lambda self: self.book.names())
    @rule(verb=st.sampled_from(["freeze", "unfreeze"]), names=some_names, scope=a_scope)
    def train_or_not(self, verb: str, names: list[str], scope: str) -> None:
        if self.attempt(
            lambda: getattr(pl, verb)(self.part(scope), *names), self.bad_name(names, scope)
        ):
            for _, one in self.book.select(scope, names):
                one.trainable = verb == "unfreeze"

    def enter(
        self, context: AbstractContextManager[None], scope: str, *refusals: Refusal | None
    ) -> bool:
        """Enter a context, at whose end what is active and its strengths are put back."""
        if not self.attempt(context.__enter__, *refusals):
            return False
        before = [(one, one.active, one.strength) for _, one in self.book.select(scope, ())]

        def end() -> None:
            for one, active, strength in before:
                if not one.merged:
                    one.active, one.strength = active, strength

        self.world.contexts.append((context, end))
        return True

    @precondition(lambda self: self.book.names() and len(self.world.contexts) < 4)
    @rule(verb=st.sampled_from(["enabled", "disabled"]), names=some_names, scope=a_scope)
    def enter_toggled(self, verb: str, names: list[str], scope: str) -> None:
        if self.enter(
            getattr(pl, verb)(self.part(scope), *names),
            scope,
            self.bad_name(names, scope),
            IS_MERGED if self.book.merged(scope, names) else None,
        ):
            self.book.toggle(verb, scope, names)

    @precondition(lambda self: self.book.names() and len(self.world.contexts) < 4)
    @rule(names=some_names, scales=st.dictionaries(a_name, a_strength, max_size=2), scope=a_scope)
    def enter_using(self, names: list[str], scales: dict[str, float], scope: str) -> None:
        if self.enter(
            pl.using(self.part(scope), *names, **scales),
            scope,
            self.bad_name([*names, *scales], scope),
            IS_MERGED if self.book.merged(scope) else None,
        ):
            for name, one in self.book.select(scope, ()):
                one.active = name in names or name in scales
                one.strength = scales.get(name, one.strength)

    @precondition(lambda self: self.book.names() and len(self.world.contexts) < 4)
    @rule(names=some_names, scope=a_scope)
    def enter_merged(self, names: list[str], scope: str) -> None:
        context = pl.merged(self.part(scope), *names)
        already = ALREADY_MERGED if self.book.merged(scope) else None
        if self.attempt(context.__enter__, already, *self.cannot_merge(names, scope)):
            self.book.merge(scope, names)
            self.world.contexts.append((context, functools.partial(self.book.unmerge, scope)))

    @precondition(lambda self: self.world.contexts)
    @rule(fails=st.booleans(), merges=st.booleans())
    def leave(self, fails: bool, merges: bool) -> None:
        """Leave a context, after a merge or not; merged adapters stay as they are."""
        if merges:
            self.merge([], "")
        self.world.leave(ZeroDivisionError() if fails else None)

    def cannot_merge(self, names: list[str], scope: str) -> list[Refusal | None]:
        chosen = [one for _, one in self.book.select(scope, names)]
        live = [one for one in chosen if one.active and not one.merged]
        return [
            self.bad_name(names, scope),
            # Site by site, so either can come first.
            (pl.StateError, f"{IS_MERGED[1]}|{IS_OFF[1]}")
            if names and len(live) < len(chosen)
            else None,
            None if live else NOTHING,
        ]

    @precondition(lambda self: self.book.names())
    @rule(names=some_names, scope=a_scope)
    def merge(self, names: list[str], scope: str) -> None:
        if self.attempt(
            lambda: pl.merge(self.part(scope), *names), *self.cannot_merge(names, scope)
        ):
            self.book.merge(scope, names)

    @precondition(lambda self: self.book.merged())
    @rule(scope=a_scope)
    def unmerge(self, scope: str) -> None:
        pl.unmerge(self.part(scope))
        self.book.unmerge(scope)

    @precondition(lambda self: self.book.names())
    @rule(onward=st.sampled_from([False, False, False, True]))
    def bake(self, onward: bool) -> None:
        """Bake a copy, and mostly go on with the original."""
        baked = self.world.copied()
        book = baked.book
        before = {path: book.dense(path) for path in book.parts if book.parts[path]}
        off = any(not part.active for _, _, part in book.all_parts())
        if self.attempt(lambda: pl.bake(baked.model), IS_OFF if off else None):
            book.detach(book.names())
            for path, expected in before.items():
                close(stored(baked.model, path).detach(), expected)
            book.rebase({path: stored(baked.model, path).detach() for path in before})
        self.set_aside(baked, onward)

    @precondition(lambda self: self.book.names())
    @rule(training=st.booleans())
    def mode(self, training: bool) -> None:
        self.model.train(training)
        self.book.training = training

    @precondition(
        lambda self: any(
            part.active and part.trainable and not part.merged
            for _, _, part in self.world.book.all_parts()
        )
    )
    @rule()
    def train_step(self) -> None:
        """One step of SGD on the factors; gradients of the base, where it has them, agree too."""
        optimizer = torch.optim.SGD(pl.parameters(self.model), lr=0.5)
        optimizer.zero_grad()
        self.model(self.ids).tanh().mean().backward()
        optimizer.step()
        leaves = {
            part: {key: value.clone().requires_grad_() for key, value in part.factors.items()}
            for _, _, part in self.book.all_parts()
            if part.active and part.trainable and not part.merged
        }
        weights = {path: self.book.dense(path, leaves) for path in self.book.parts}
        for weight in weights.values():
            weight.requires_grad_() if weight.is_leaf else weight.retain_grad()
        self.book.outputs(self.ids, weights).tanh().mean().backward()
        for path, weight in weights.items():
            actual = stored(self.model, path).grad
            assert (actual is None) != self.book.flag(path)
            if actual is not None:
                assert weight.grad is not None
                close(actual, weight.grad)
        for part, factors in leaves.items():
            for key, leaf in factors.items():
                assert leaf.grad is not None
                part.factors[key] = leaf.detach() - 0.5 * leaf.grad
        self.model.zero_grad()

    @precondition(lambda self: self.book.names())
    @rule(onward=st.booleans())
    def deepcopy(self, onward: bool) -> None:
        """Go on with a copy, or with the original; the other one is set aside."""
        self.set_aside(self.world.copied(), onward)

    def set_aside(self, other: World, onward: bool) -> None:
        while self.aside is not None and self.aside.contexts:
            self.aside.leave()
        self.world, self.aside = (other, self.world) if onward else (self.world, other)

    @precondition(lambda self: self.aside is not None)
    @rule()
    def swap(self) -> None:
        assert self.aside is not None
        self.world, self.aside = self.aside, self.world

    @precondition(lambda self: self.book.names() and len(self.files) < 5)
    @rule(name=a_name)
    def save(self, name: str) -> None:
        path = Path(self.folder.name) / f"{len(self.files)}.safetensors"
        if not self.attempt(lambda: pl.save(self.model, path, name), self.bad_name([name])):
            assert not path.exists()
            return
        held = {site: parts[name] for site, parts in self.book.parts.items() if name in parts}
        with safe_open(path, framework="pt") as file:
            content = json.loads(file.metadata()["paramlora"])
            assert content["name"] == name
            assert content["sites"].keys() == held.keys()
            keys = {f"{site}.{key}" for site, part in held.items() for key in part.factors}
            assert set(file.keys()) == keys
            for site, part in held.items():
                assert content["sites"][site]["strength"] == part.strength
                assert content["sites"][site]["kind"] == type(part.spec).__name__
                for key, factor in part.factors.items():
                    same(file.get_tensor(f"{site}.{key}").double(), factor)
        self.files.append(File(path, name, copy.deepcopy(held)))

    @precondition(lambda self: self.files)
    @rule(index=st.integers(0, 9), name=mostly(st.none(), any_name), strength=a_strength)
    def load(self, index: int, name: str | None, strength: float) -> None:
        """Load a file as a new adapter, or into the one of that name, at whatever strength."""
        file = self.files[index % len(self.files)]
        known = name or file.name
        self.toggle("scale", [known], "", strength)
        attached = {site: held[known] for site, held in self.book.parts.items() if known in held}
        fits = attached.keys() == file.parts.keys() and all(
            (type(part.spec), part.spec.rank)
            == (type(attached[site].spec), attached[site].spec.rank)
            for site, part in file.parts.items()
        )
        if self.attempt(
            lambda: pl.load(self.model, file.path, name=name),
            IS_MERGED if self.book.merged("", [known]) and attached else None,
            IS_TAKEN if attached and not fits else None,
        ):
            self.do_load(self.book, file, known)

    def do_load(self, book: Book, file: File, name: str) -> None:
        if name not in book.names():
            book.freeze_base(name)
        for site, part in file.parts.items():
            there = book.parts[site].setdefault(name, Part(part.spec, {}))
            there.spec, there.factors = part.spec, dict(part.factors)
            there.strength = part.strength

    @precondition(lambda self: self.files)
    @rule(index=st.integers(0, 9), onward=st.booleans())
    def load_fresh(self, index: int, onward: bool) -> None:
        """Load a file into a model that never had an adapter."""
        file = self.files[index % len(self.files)]
        fresh = World(copy.deepcopy(self.book.plain), Book.of(copy.deepcopy(self.book.plain)))
        pl.load(fresh.model, file.path)
        self.do_load(fresh.book, file, file.name)
        self.set_aside(fresh, onward)

    @precondition(lambda self: self.book.names())
    @rule(name=a_name, seed=a_seed)
    def load_values(self, name: str, seed: int) -> None:
        self.attempt(
            lambda: self.fill(name, seed),
            self.bad_name([name]),
            IS_MERGED if self.book.merged("", [name]) else None,
        )

    @precondition(lambda self: self.book.names())
    @rule(seed=a_seed)
    def load_base(self, seed: int) -> None:
        """Load another base under the adapters."""
        torch.manual_seed(seed)
        state = {
            key: value + torch.randn_like(value) / 8
            for key, value in pl.base_state_dict(self.model).items()
        }
        for first, paths in self.book.paths.items():
            state |= dict.fromkeys(paths, state[first])
        if self.attempt(
            lambda: pl.load_base_state_dict(self.model, state),
            IS_MERGED if self.book.merged() else None,
        ):
            self.book.plain.load_state_dict(state)
            self.book.rebase({})


@pytest.fixture
def _one_thread() -> Iterator[None]:
    """At these sizes more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.usefixtures("_one_thread")
def test_any_sequence_of_verbs_agrees_with_a_dense_model() -> None:
    """Whatever verbs are called in whatever order, a model agrees with its dense book."""
    run_state_machine_as_test(Machine, settings=SETTINGS)
