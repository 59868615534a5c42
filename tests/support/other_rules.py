"""Rules of the state machine that copy, store and sum adapters, or call models elsewhere."""

import contextvars
import copy
import functools
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import torch
from hypothesis.stateful import precondition, rule
from safetensors import safe_open
from torch import Tensor, nn

import paramlora as pl
from tests.support.checked_model import CheckedModel, assert_near, assert_same, weight_of
from tests.support.dense_net import ADDITIVE
from tests.support.reference import parted
from tests.support.reference_model import AdapterState, ReferenceModel
from tests.support.state_machine import (
    CANNOT_BE_ONLY,
    IN_ROUTED,
    IS_MERGED,
    IS_TAKEN,
    NAMES,
    OUT_OF_ORDER,
    File,
    a_free_name,
    a_name,
    a_seed,
    a_strength,
    an_activate,
    any_name,
    mostly,
    some_names,
    two_names,
)
from tests.support.verb_rules import VerbRules

NO_BLOCK = (pl.StateError, r"in a thread that has entered no block itself")
OTHER_BLOCK = (pl.StateError, r"^cannot merge while another thread or task is inside of ")
SUMS: tuple[type[Exception], ...] = (pl.TargetError, ValueError)
# Its one thread is in no block between two calls.
THREAD = ThreadPoolExecutor(1)


class OtherRules(VerbRules):
    """Copies and stores adapters, and calls models in threads, compiled, or in another dtype."""

    @precondition(lambda self: self.reference.names())
    @rule(switch=st.booleans())
    def deepcopy(self, switch: bool) -> None:
        """Copy, and continue with the copy or the original."""
        self.set_aside(self.checked.copied(), switch)

    @precondition(lambda self: self.second is not None)
    @rule()
    def swap(self) -> None:
        assert self.second is not None
        self.second.check(self.ids)
        self.checked, self.second = self.second, self.checked

    @rule(double=st.booleans())
    def move(self, double: bool) -> None:
        """Cast the model, in any state; merged weights keep the bits that they have."""
        if self.reference.merged() and self.reference.tensors["emb.weight"].dtype != torch.float64:
            double = False  # or the merged weights would not be as exact as their dtype
        dtype = torch.float64 if double else torch.float32
        self.model.to(dtype)
        self.reference.plain.to(dtype)
        for _, _, adapter in self.reference.all_adapters():
            for key, factor in adapter.factors.items():
                adapter.factors[key] = factor.to(dtype).double()
        self.checked.fingerprint = ""

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
            sites = {
                f"{path}{index}": (adapter, spec)
                for path, adapter in by_path.items()
                for index, spec in adapter.specs.items()
            }
            assert content["sites"].keys() == sites.keys()
            for site, (adapter, spec) in sites.items():
                assert content["sites"][site]["strength"] == adapter.own_strength
                assert content["sites"][site]["kind"] == type(spec).__name__
            factors = {
                f"{site}{key}": factor
                for site, adapter in by_path.items()
                for key, factor in adapter.factors.items()
            }
            assert set(file.keys()) == factors.keys()
            for key, factor in factors.items():
                assert_same(file.get_tensor(key).double(), factor)
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
        wrong = self.reference.out_of_order("", [target_name], merging=False)
        if self.attempt(
            lambda: pl.load(self.model, file.path, name=name, activate=activate),
            IN_ROUTED if not attached and self.reference.is_routed() else None,
            CANNOT_BE_ONLY if activate == "only" and others_merged else None,
            OUT_OF_ORDER if activate == "also" and wrong else None,
            IS_MERGED if self.reference.merged("", [target_name]) and attached else None,
            IS_TAKEN if attached and shapes(attached) != shapes(file.adapters) else None,
        ):
            self.load_into_reference(self.checked, file, target_name, activate)

    def load_into_reference(
        self, checked: CheckedModel, file: File, name: str, activate: Any = None
    ) -> None:
        reference = checked.reference
        new, before = name not in reference.names(), reference.names()
        dtype = reference.base("emb.weight").dtype
        for site, adapter in file.adapters.items():
            state = reference.adapters[site].setdefault(name, AdapterState({}, {}))
            state.specs = dict(adapter.specs)
            state.factors = {key: value.to(dtype) for key, value in adapter.factors.items()}
            state.strength = adapter.own_strength
        if new or activate:
            reference.add(name, activate or ("no" if before else "only"), freeze=new)

    @precondition(lambda self: len(self.reference.names()) > 1 and len(self.checked.blocks) < 4)
    @rule(names=two_names, how=st.sampled_from(["enable", "enabled", "block", "file"]))
    def merge_beside(self, names: list[str], how: str) -> None:
        """Merge one adapter while another is off, and switch that one on again, or try to."""
        first, later = names[:2]
        if self.reference.merged():
            self.unmerge("")
        blocks = len(self.checked.blocks)
        if how == "block":
            self.enter_toggled("disabled", [first], "")
        else:
            self.toggle("disable", [first], "", 1.0)
        if how == "file":
            self.save(first)
        self.merge([later], "")
        if how == "enable":
            self.toggle("enable", [first], "", 1.0)
        elif how == "enabled":
            self.enter_toggled("enabled", [first], "")
        elif how == "file" and self.files:
            self.load(len(self.files) - 1, None, "also", 1.0)
        elif len(self.checked.blocks) > blocks:
            self.checked.exit_block()

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
        self.load_into_reference(fresh, file, file.name)
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
        state, reference = dict(pl.base_state_dict(self.model)), self.reference
        for first, paths in reference.paths.items():
            value = state[reference.key(first)]
            value = value + torch.randn_like(value) / 8
            state |= {reference.key(path): value for path in paths}
        if self.attempt(
            lambda: pl.load_base_state_dict(self.model, state),
            IS_MERGED if self.reference.merged() else None,
        ):
            self.reference.plain.load_state_dict(state)
            self.checked.fingerprint = ""

    @precondition(lambda self: self.reference.names())
    @rule(name=a_name)
    def peft_folder(self, name: str) -> None:
        """Write a folder for PEFT, if its format can express the adapter, and read it again."""
        folder = Path(self.folder.name) / f"peft-{len(list(Path(self.folder.name).iterdir()))}"
        if self.bad_name([name]):
            self.attempt(lambda: pl.save_peft(self.model, folder, name), self.bad_name([name]))
            return
        adapters = {p: by[name] for p, by in self.reference.adapters.items() if name in by}
        try:
            pl.save_peft(self.model, folder, name)
        except pl.TargetError:
            assert not folder.exists()
            plain_loras = all(
                type(spec) is pl.LoRA and not index and path.endswith(("emb.weight", "head.weight"))
                for path, adapter in adapters.items()
                for index, spec in adapter.specs.items()
            )
            tied = any(len(self.reference.paths[path]) > 1 for path in adapters)
            assert not plain_loras or tied, "PEFT can express these"
            return
        fresh = copy.deepcopy(self.reference.plain)
        pl.load_peft(fresh, folder)
        fresh.eval()
        for path in self.reference.paths:
            expected = self.reference.base(path)
            if path in adapters:
                alone = copy.copy(adapters[path])
                alone.blocks, alone.own_active, alone.merged = [], True, False
                expected = alone.apply(expected)
            assert_near(weight_of(fresh, path).detach(), expected)

    @precondition(lambda self: self.reference.names())
    @rule(
        weights=st.dictionaries(
            a_name, st.sampled_from([1.0, 0.5, -1.0, 2.0]), min_size=1, max_size=2
        ),
        name=mostly(a_free_name, any_name),
        method=st.sampled_from(["cat", "cat", "svd", "linear", "dare"]),
        rank=st.sampled_from([None, 1, 2]),
        activate=an_activate,
    )
    def combine(
        self, weights: dict[str, float], name: str, method: str, rank: int | None, activate: Any
    ) -> None:
        """Attach a sum of adapters."""
        terms: dict[str, list[tuple[float, AdapterState, str]]] = {}
        for other, weight in weights.items():
            for path, by_name in self.reference.adapters.items():
                for index in by_name[other].specs if other in by_name else ():
                    terms.setdefault(path + index, []).append((weight, by_name[other], index))
        options: dict[str, Any] = {"rank": rank} if method == "svd" else {}
        options |= {"density": 1.0} if method == "dare" else {}
        cannot = (SUMS, "cannot combine|needs equal ranks") if not summable(terms, method) else None
        if self.attempt(
            lambda: pl.combine(
                self.model, weights, name=name, method=method, activate=activate, **options
            ),
            self.bad_name(weights),
            IN_ROUTED if self.reference.is_routed() else None,
            IS_TAKEN if name in self.reference.names() else None,
            CANNOT_BE_ONLY if activate == "only" and self.reference.merged() else None,
            cannot,
        ):
            self.record(name, self.kinds_of(name, sorted_like=terms))
            for site, each in terms.items():
                path, _, index = site.partition("[")
                index = f"[{index}" if index else ""
                self.check_sum(self.reference.adapters[path][name], path, index, each, method)
            self.reference.add(name, activate, freeze=True)

    def kinds_of(self, name: str, sorted_like: Any) -> dict[str, pl.kinds.Spec]:
        """Return the specs of a sum or an extracted adapter, LoRAs and Deltas."""
        rows = [row for row in pl.summary(self.model).sites if row.adapter == name]
        assert {row.site for row in rows} == set(sorted_like)
        assert all(row.kind == ("Delta" if row.rank is None else "LoRA") for row in rows)
        return {row.site: pl.Delta() if row.rank is None else pl.LoRA(row.rank) for row in rows}

    def check_sum(
        self,
        found: AdapterState,
        path: str,
        index: str,
        each: list[tuple[float, AdapterState, str]],
        method: str,
    ) -> None:
        """Compare the update of a sum at one tensor or block with the sum of the updates."""
        where = parted(index)[1]
        zeros = torch.zeros_like(self.reference.base(path))
        updates = [weight * own_update(state, zeros)[where] for weight, state, _ in each]
        actual, expected = own_update(found, zeros)[where], torch.stack(updates).sum(0)
        if method == "linear" and expected.dim() > 1 and len(each) > 1:
            return  # test_combine.py compares its factors
        if method == "svd" and expected.dim() > 1 and found.specs[index].rank is not None:
            values = torch.linalg.svdvals(expected.flatten(1))
            missing = (actual - expected).norm()
            assert missing <= values[found.specs[index].rank :].norm() + 1e-3 * (1 + values[0])
            return
        dtype = self.reference.parameter(path).dtype
        assert_near(actual.to(dtype), expected)

    @precondition(lambda self: 0 < len(self.reference.names()) < len(NAMES))
    @rule(
        name=mostly(a_free_name, any_name),
        rank=st.integers(1, 4),
        changed=st.lists(st.integers(0, 40), min_size=1, max_size=3),
        seed=a_seed,
    )
    def extract(self, name: str, rank: int, changed: list[int], seed: int) -> None:
        """Attach an adapter that approximates a fine-tune of the base."""
        torch.manual_seed(seed)
        tuned = ReferenceModel.of(copy.deepcopy(self.reference.plain))
        # For another tensor, the vectors of a spectral_norm could be orthogonal to it.
        plain = [path for path in tuned.paths if tuned.vectors(path) is None]
        paths = [plain[i % len(plain)] for i in changed]
        with torch.no_grad():
            for path in paths:
                tuned.parameter(path).add_(torch.randn_like(tuned.parameter(path)) / 2)
        if self.attempt(
            lambda: pl.extract(tuned.plain, self.model, rank, name=name),
            IN_ROUTED if self.reference.is_routed() else None,
            IS_TAKEN if name in self.reference.names() else None,
            CANNOT_BE_ONLY if self.reference.merged() else None,
        ):
            self.record(name, self.kinds_of(name, sorted_like=paths))
            for path in paths:
                change = tuned.base(path) - self.reference.base(path)
                actual = own_update(self.reference.adapters[path][name], torch.zeros_like(change))
                missing, largest = (actual - change).norm(), change.norm() + 1
                if change.dim() > 1:
                    best = torch.linalg.svdvals(change.flatten(1))[rank:].norm()
                    missing = missing - best
                assert missing <= 1e-4 * largest
            self.reference.add(name, "only", freeze=True)

    @precondition(lambda self: self.reference.names())
    @rule(how=st.sampled_from(["own", "own", "none", "copied", "merge"]), names=some_names)
    def in_thread(self, how: str, names: list[str]) -> None:
        """Call the model in another thread, in blocks of its own or in those of this one."""
        model, reference = self.model, self.reference
        if how == "copied":
            context = contextvars.copy_context()
            self.checked.check_outputs(self.ids, lambda x: on_thread(context.run, model, x))
        elif how == "none":
            bare = functools.partial(on_thread, model_without_gradients, model)
            if reference.in_block:
                model.eval()  # a forward that fails half-way takes steps of spectral_norm
                self.attempt(lambda: bare(self.ids), NO_BLOCK)
                model.train(reference.training)
            else:
                self.checked.check_outputs(self.ids, bare)
        elif how == "merge" and reference.names() and reference.in_block:
            self.attempt(
                lambda: on_thread(pl.merge, model, *names), self.bad_name(names), OTHER_BLOCK
            )
        elif how == "own" and reference.names():
            errors = self.bad_name(names), IS_MERGED if reference.merged() else None

            def call(ids: Tensor) -> Tensor:
                with pl.using(model, *names):
                    return model_without_gradients(model, ids)

            if self.attempt(lambda: on_thread(entered, pl.using(model, *names)), *errors):
                with only_blocks_of(reference, names):
                    self.checked.check_outputs(self.ids, lambda ids: on_thread(call, ids))

    @precondition(lambda self: self.compiles > 0)
    @rule(names=some_names)
    def compiled(self, names: list[str]) -> None:
        """Call the compiled model, once more in a block, after it, and after a switch."""
        self.compiles -= 1
        torch.compiler.reset()
        call = torch.compile(self.model, backend="eager")
        self.checked.check_outputs(self.ids, call)
        if self.reference.names():
            outer = len(self.checked.blocks)
            self.enter_using(names, {}, "")
            self.checked.check_outputs(self.ids, call)
            if len(self.checked.blocks) > outer:
                self.checked.exit_block()
                self.checked.check_outputs(self.ids, call)
            self.toggle("disable", names, "", 1.0)
            self.checked.check_outputs(self.ids, call)
            self.toggle("enable", names, "", 1.0)
            self.checked.check_outputs(self.ids, call)


def shapes(adapters: dict[str, AdapterState]) -> Any:
    """Return the kinds and shapes of an adapter; if equal, values can be loaded."""
    return {
        path: (
            {index: type(spec) for index, spec in adapter.specs.items()},
            {key: factor.shape for key, factor in adapter.factors.items()},
        )
        for path, adapter in adapters.items()
    }


def own_update(state: AdapterState, zeros: Tensor) -> Tensor:
    """Return the update of an additive adapter at its own strength, whatever blocks are open."""
    alone = copy.copy(state)
    alone.blocks = []
    return alone.apply(zeros)


def summable(terms: dict[str, list[tuple[float, AdapterState, str]]], method: str) -> bool:
    """Return whether the kinds at each tensor can be summed, and no two blocks overlap."""
    for site, each in terms.items():
        path, _, index = site.partition("[")
        if not index and any(other.startswith(f"{path}[") for other in terms):
            return False
        specs = [state.specs[at] for _, state, at in each]
        if method == "dare":
            if not all(isinstance(spec, ADDITIVE) for spec in specs):
                return False
            continue
        if all(type(spec) is pl.Delta for spec in specs):
            continue
        if not all(type(spec) in (pl.LoRA, pl.LoRAXS) for spec in specs):
            return False
        ranks = {
            state.factors[f"{at}.A"].shape[0] * (1 + (f"{at}.A0" in state.factors))
            for _, state, at in each
        }
        if method == "linear" and len(ranks) > 1:
            return False
    return True


def on_thread(function: Any, *args: Any) -> Any:
    return THREAD.submit(function, *args).result()


def entered(block: Any) -> None:
    with block:
        pass


@torch.no_grad()
def model_without_gradients(model: nn.Module, ids: Tensor) -> Tensor:
    return model(ids)


@contextmanager
def only_blocks_of(reference: ReferenceModel, names: list[str]) -> Iterator[None]:
    """Compute with `using` of these names and without the blocks that are open."""
    adapters = [(name, adapter) for _, name, adapter in reference.all_adapters()]
    before = [adapter.blocks for _, adapter in adapters], reference.routes
    for name, adapter in adapters:
        adapter.blocks = [{"active": name in names}]
    reference.routes = {path: [[None]] for path in reference.paths}
    try:
        yield
    finally:
        for (_, adapter), blocks in zip(adapters, before[0], strict=True):
            adapter.blocks = blocks
        reference.routes = before[1]
