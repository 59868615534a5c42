"""The native extension: values and derivatives of its node, its build, and work without it."""

import functools
import importlib.util
import itertools
import os
import re
import shutil
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

import paramlora as pl
from paramlora.compute import lowrank
from paramlora.native import load as native
from paramlora.native.build import build
from tests.support.helpers import BOUNDS, error, keeping
from tests.support.reference import shake

posix = pytest.mark.skipif(os.name != "posix", reason="permissions are those of POSIX")
# The arguments `dense` and `dense_backward`.
PATHS = list(itertools.product([False, True], repeat=2))


@pytest.mark.parametrize("paths", PATHS, ids=str)
class TestNode:
    @pytest.mark.parametrize("rank", [1, 4, 16, 65])
    @pytest.mark.parametrize("shape", [(1, 1, 1), (3, 15, 17), (130, 66, 130)], ids=str)
    def test_float32(
        self,
        shape: tuple[int, int, int],
        rank: int,
        paths: tuple[bool, bool],
        native_module: ModuleType,
    ) -> None:
        """Values and gradients agree with the dense product in float64, on each path."""
        n, k, m = shape
        torch.manual_seed(0)
        shapes = [(n, k), (m, k), (m,), (rank, k), (m, rank)]
        exact = [torch.randn(s, dtype=torch.float64).requires_grad_() for s in shapes]
        x, W, b, A, B = exact
        y64 = F.linear(x, W + 0.7 * B @ A, b)
        dy = torch.randn(n, m, dtype=torch.float64)
        expected = (y64, *torch.autograd.grad(y64, exact, dy))
        tensors = [tensor.detach().float().requires_grad_() for tensor in exact]
        y = native_module.linear(*tensors, 0.7, *paths)
        found = (y, *torch.autograd.grad(y, tensors, dy.float()))
        for a, e in zip(found, expected, strict=True):
            assert error(a, e) < BOUNDS[torch.float32]
        with torch.no_grad():
            assert_close(native_module.linear(*tensors, 0.7, *paths), y.detach())

    @pytest.mark.parametrize("bias", [False, True])
    @pytest.mark.parametrize("s", [1.0, 0.7])
    def test_derivatives(
        self, s: float, bias: bool, paths: tuple[bool, bool], native_module: ModuleType
    ) -> None:
        """First and second derivatives agree with numerical ones, also if vmap batches them."""
        torch.manual_seed(0)
        shapes = [(2, 3, 5), (4, 5), (4,), (2, 5), (4, 2)]
        x, W, b, A, B = (torch.randn(s, dtype=torch.float64).requires_grad_() for s in shapes)

        def run(x: Tensor, W: Tensor, A: Tensor, B: Tensor, b: Tensor | None = None) -> Tensor:
            return native_module.linear(x, W, b, A, B, s, *paths)

        given = (x, W, A, B, b) if bias else (x, W, A, B)
        assert torch.autograd.gradcheck(run, given, check_batched_grad=True)
        assert torch.autograd.gradgradcheck(run, given, check_batched_grad=True)

    def test_each_gradient_alone(self, paths: tuple[bool, bool], native_module: ModuleType) -> None:
        """A gradient does not change if all other tensors are frozen."""
        torch.manual_seed(0)
        shapes = [(2, 3, 5), (4, 5), (4,), (2, 5), (4, 2)]
        leaves = [torch.randn(s, dtype=torch.float64).requires_grad_() for s in shapes]
        y = native_module.linear(*leaves, 0.7, *paths)
        dy = torch.randn_like(y)
        expected = torch.autograd.grad(y, leaves, dy)
        for i, leaf in enumerate(leaves):
            given = [other if other is leaf else other.detach() for other in leaves]
            (found,) = torch.autograd.grad(native_module.linear(*given, 0.7, *paths), leaf, dy)
            assert_close(found, expected[i])


def test_zero_factors_give_the_base(native_module: ModuleType) -> None:
    """With B = 0 the output is bit for bit the base layer's, also if x is strided."""
    layer = nn.Linear(24, 40)
    base = torch.randn(24, 50).T
    x = torch.stack([base, base]).transpose(0, 1)
    A, B = torch.randn(4, 24), torch.zeros(40, 4)
    with torch.no_grad():
        for rows in (base, x, base.contiguous()):
            found = native_module.linear(rows, layer.weight, layer.bias, A, B, 1.0, False, False)
            assert torch.equal(found, layer(rows))


@pytest.mark.gpu
class TestGpu:
    @pytest.mark.parametrize("dtype", BOUNDS, ids=str)
    @pytest.mark.parametrize("paths", PATHS, ids=str)
    def test_values_and_gradients(
        self, paths: tuple[bool, bool], dtype: torch.dtype, native_module: ModuleType
    ) -> None:
        """On a GPU, too, they agree with it, also with float32 factors on half precision."""
        torch.manual_seed(0)
        shapes = [(2, 50, 130), (90, 130), (90,), (4, 130), (90, 4)]
        drawn = [torch.randn(s, dtype=torch.float64, device="cuda") for s in shapes]
        dtypes = [dtype] * 3 + [torch.float64 if dtype is torch.float64 else torch.float32] * 2
        tensors = [t.to(dtype).requires_grad_() for t, dtype in zip(drawn, dtypes, strict=True)]
        y = native_module.linear(*tensors, 0.7, *paths)
        dy = torch.randn_like(y)
        exact = [t.detach().double().requires_grad_() for t in tensors]
        x, W, b, A, B = exact
        y64 = F.linear(x, W + 0.7 * B @ A, b)
        found = (y, *torch.autograd.grad(y, tensors, dy))
        expected = (y64, *torch.autograd.grad(y64, exact, dy.double()))
        for a, e in zip(found, expected, strict=True):
            assert error(a, e) < BOUNDS[dtype]
        assert [t.dtype for t in found[1:]] == dtypes


class TestTransforms:
    """Tracers, dispatch modes and transforms get plain operations in place of the extension."""

    @staticmethod
    def adapted(rows: int = 5) -> tuple[nn.Module, Tensor]:
        torch.manual_seed(0)
        layer = nn.Linear(64, 48)
        pl.attach(layer, pl.LoRA(2, alpha=3), "weight")
        shake(layer)
        return layer, torch.randn(rows, 64)

    @pytest.mark.parametrize("grad", [False, True])
    def test_traced(self, grad: bool, native_module: ModuleType) -> None:
        """torch.jit.trace and make_fx record the adapter, with and without gradients."""
        layer, x = self.adapted()
        other = torch.randn(5, 64)
        with torch.set_grad_enabled(grad):
            traced = torch.jit.trace(layer, x)
            made = make_fx(lambda x: layer(x))(x)
            for recorded in (traced, made):
                assert_close(recorded(other), layer(other))

    def test_counted(self, native_module: ModuleType) -> None:
        """A dispatch mode sees the products of the factors and can count their operations."""
        layer, x = self.adapted()
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            layer(x)
        assert counter.get_total_flops() == 2 * len(x) * (64 * 48 + 2 * (64 + 48))

    def test_selective_checkpointing(self, native_module: ModuleType) -> None:
        """Gradients are the same if a checkpointing policy keeps the outputs of linear layers."""
        layer, x = self.adapted()
        model = nn.Sequential(layer, nn.Tanh())
        leaves = list(pl.parameters(model))
        expected = torch.autograd.grad(model(x).square().sum(), leaves)
        aten = torch.ops.aten
        kept = [aten.mm.default, aten.addmm.default, aten.linear.default]
        context = functools.partial(create_selective_checkpoint_contexts, kept)
        y = checkpoint(model, x, use_reentrant=False, context_fn=context)
        assert_close(torch.autograd.grad(y.square().sum(), leaves), expected)

    @pytest.mark.parametrize("rows", [5, 200])
    def test_batched_gradients(self, rows: int, native_module: ModuleType) -> None:
        """Gradients of several outputs, batched by vmap, are the same as one by one."""
        layer, x = self.adapted(rows)
        layer, x = layer.double(), x.double()
        x.requires_grad_()
        leaves = [x, *pl.parameters(layer)]
        y = layer(x)
        dy = torch.randn(3, *y.shape, dtype=y.dtype)
        batched = torch.autograd.grad(y, leaves, dy, retain_graph=True, is_grads_batched=True)
        single = [torch.autograd.grad(y, leaves, one, retain_graph=True) for one in dy]
        assert_close(list(batched), [torch.stack(parts) for parts in zip(*single, strict=True)])

    def test_tangents_of_gradients(self, native_module: ModuleType) -> None:
        """Forward-mode differentiation of the backward gives the tangents of all gradients."""
        layer, x = self.adapted()
        x.requires_grad_()
        leaves = [x, *pl.parameters(layer)]
        y = layer(x)
        v, t = torch.randn_like(y), torch.randn_like(y)
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(v, t)
            grads = torch.autograd.grad(y, leaves, dual, retain_graph=True)
            tangents = [forward_ad.unpack_dual(grad).tangent for grad in grads]
        # A gradient is linear in the gradient of the output.
        assert_close(tangents, list(torch.autograd.grad(y, leaves, t)))

    def test_other_types_of_weights(self, native_module: ModuleType) -> None:
        """The __torch_function__ of a weight of a Tensor subclass is called for F.linear."""
        calls = []

        class Weight(Tensor):
            @classmethod
            def __torch_function__(cls, func, types, args=(), kwargs=None):
                calls.append(func)
                return super().__torch_function__(func, types, args, kwargs or {})

        A, B = torch.randn(2, 6), torch.randn(4, 2)
        W = torch.randn(4, 6).as_subclass(Weight)
        lowrank.linear(torch.randn(3, 6), W, None, [lowrank.LowRank(A, B, 1.0)])
        assert F.linear in calls

    def test_a_negative_view(self, native_module: ModuleType) -> None:
        """A tensor with the negative bit has its negated values."""
        layer, x = self.adapted()
        with torch.no_grad():
            assert_close(layer(torch._neg_view(x)), layer(-x))


class TestWrong:
    @pytest.mark.parametrize("grad", [False, True])
    def test_an_input_of_another_width(self, grad: bool, native_module: ModuleType) -> None:
        """torch raises its own error before any memory is read."""
        layer = nn.Linear(1024, 64)
        pl.attach(layer, pl.LoRA(2), "weight")
        with torch.set_grad_enabled(grad):
            for width in (1, 2048, 1024 * 1024):
                with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
                    layer(torch.randn(1, width))

    def test_factors_that_do_not_fit(self, native_module: ModuleType) -> None:
        """Factors of other shapes are refused; the error gives their shapes and the weight's."""
        given = [torch.ones(s) for s in ((2, 3), (4, 3), (1, 3), (5, 1))]
        with pytest.raises(RuntimeError, match=r"\[1, 3\] and \[5, 1\] do not fit .*\[4, 3\]"):
            native_module.linear(given[0], given[1], None, given[2], given[3], 1.0, False, False)

    def test_a_weight_of_another_dtype(self, native_module: ModuleType) -> None:
        """Without autocast a weight of another dtype than the input is torch's own error."""
        x, W, A, B = (torch.ones(s) for s in ((2, 3), (4, 3), (1, 3), (4, 1)))
        with pytest.raises(RuntimeError, match="same dtype"):
            native_module.linear(x, W.double(), None, A, B, 1.0, False, False)

    def test_frozen_factors_keep_nothing(self, native_module: ModuleType) -> None:
        """If only dx is wanted, x is not saved and may be overwritten; W is saved only for dx."""
        layer = nn.Linear(64, 48)
        pl.attach(layer, pl.LoRA(2), "weight")
        x = torch.randn(5, 64, requires_grad=True)
        with keeping() as kept:
            layer(x)
            assert any(t.shape == (48, 64) for t in kept)
            kept.clear()
            layer(x.detach())
            assert not any(t.shape == (48, 64) for t in kept)
        pl.freeze(layer)
        z = x * 1.0
        y = layer(z)
        z.relu_()
        y.sum().backward()
        assert x.grad is not None


class TestGraph:
    def test_a_changed_tensor_is_noticed(self, native_module: ModuleType) -> None:
        """Changing a factor between forward and backward is an error, as always in autograd."""
        layer = nn.Linear(8, 6)
        pl.attach(layer, pl.LoRA(2), "weight")
        _, B = pl.parameters(layer)
        y = layer(torch.randn(3, 8))
        with torch.no_grad():
            B.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()

    @pytest.mark.parametrize("shape", [(5, 8), (2, 5, 8)], ids=str)
    def test_its_output_can_be_written_to(
        self, shape: tuple[int, ...], native_module: ModuleType
    ) -> None:
        """The gradients are the same with nn.ReLU(inplace=True) on the output."""
        torch.manual_seed(0)
        layer = nn.Linear(8, 6)
        pl.attach(layer, pl.LoRA(2, init="gaussian"), "weight")
        x = torch.randn(shape)
        grads = []
        for inplace in (False, True):
            out = F.relu(layer(x), inplace=inplace)
            grads.append(torch.autograd.grad(out.square().sum(), list(pl.parameters(layer))))
        assert_close(grads[0], grads[1], rtol=0, atol=0)

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_checkpointing(self, reentrant: bool, native_module: ModuleType) -> None:
        """Both kinds of checkpointing give the same gradients."""
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        pl.attach(model, pl.LoRA(2))
        shake(model)
        x = torch.randn(5, 8, requires_grad=True)
        leaves = list(pl.parameters(model))
        expected = torch.autograd.grad(model(x).square().sum(), leaves)
        y = checkpoint(model, x, use_reentrant=reentrant)
        y.square().sum().backward()
        # Not bit for bit: reentrant checkpointing runs its first forward without gradients, and
        # that may take another path.
        assert_close([leaf.grad for leaf in leaves], list(expected))

    def test_threads_of_a_program(self, native_module: ModuleType) -> None:
        """Several threads at once get the outputs that each gets alone."""
        torch.manual_seed(0)
        layer = nn.Linear(64, 48)
        pl.attach(layer, pl.LoRA(4), "weight")
        shake(layer)
        inputs = [torch.randn(30, 64) for _ in range(8)]
        expected = [layer(x).detach() for x in inputs]
        found: list[Tensor | None] = [None] * len(inputs)

        def run(i: int) -> None:
            for _ in range(50):
                found[i] = layer(inputs[i]).detach()

        threads = [threading.Thread(target=run, args=(i,)) for i in range(len(inputs))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert_close(found, expected, rtol=0, atol=0)


class TestBuilt:
    @pytest.fixture(autouse=True)
    def _enabled(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("PARAMLORA_NATIVE", raising=False)

    @pytest.mark.parametrize("case", ["no home", "a home that cannot be read", "no source"])
    def test_where_nothing_can_be_built(
        self, case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Without a home folder, read permission or the source, everything runs in Python."""
        monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
        if case == "no home":

            def home() -> Path:
                raise RuntimeError("Could not determine home directory.")

            monkeypatch.setattr(Path, "home", home)
        elif case == "no source":
            monkeypatch.setattr(native, "SOURCE", tmp_path / "native.cpp")
        else:
            monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "secret"))
            look = os.stat

            def stat(path: Any, *given: Any, **named: Any) -> os.stat_result:
                if "secret" in str(path):
                    raise PermissionError(13, "Permission denied", str(path))
                return look(path, *given, **named)

            # Tests may run as root, who can read every folder.
            monkeypatch.setattr(os, "stat", stat)
        native.module.cache_clear()
        try:
            assert native.module() is None
        finally:
            native.module.cache_clear()

    def test_it_is_found_by_itself(
        self, native_module: ModuleType, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The first call finds the built file, and ignores it with PARAMLORA_NATIVE=0."""
        for value, expected in (("0", False), ("", True)):
            monkeypatch.setenv("PARAMLORA_NATIVE", value)
            native.module.cache_clear()
            try:
                assert (native.module() is not None) == expected
                assert native.state().startswith("loaded from" if expected else "switched off")
            finally:
                native.module.cache_clear()

    def test_without_a_built_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """If nothing is built, everything runs in Python."""
        monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
        assert native.path().is_relative_to(tmp_path)
        native.module.cache_clear()
        try:
            assert native.module() is None
            assert native.state() == "not built: python -m paramlora.native.build"
            x, W, A, B = torch.ones(2, 3), torch.ones(4, 3), torch.ones(1, 3), torch.ones(4, 1)
            y = lowrank.linear(x, W, None, [lowrank.LowRank(A, B, 1.0)])
            assert_close(y, torch.full((2, 4), 6.0))
        finally:
            native.module.cache_clear()

    @posix
    def test_a_damaged_file_is_named(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A warning names a file that cannot be loaded, and everything runs in Python."""
        monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
        native.path().parent.mkdir(parents=True)
        native.path().write_bytes(b"no library")
        native.module.cache_clear()
        try:
            with pytest.warns(UserWarning, match=r"paramlora_native-.*cannot be loaded.*delete it"):
                assert native.module() is None
        finally:
            native.module.cache_clear()

    @posix
    @pytest.mark.parametrize("what", ["file", "folder", "file of another", "folder of another"])
    def test_what_others_can_change_is_not_loaded(
        self, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A file or folder of other users, or that they can write to, is neither loaded nor
        built into; the warning, the state and the error name it and the way out."""
        monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
        monkeypatch.setattr(importlib.util, "module_from_spec", lambda spec: pytest.fail("loaded"))
        file = native.path()
        file.parent.mkdir(mode=0o755)
        file.write_bytes(b"code")
        file.chmod(0o755)
        place = file if what.startswith("file") else file.parent
        if what.endswith("another"):
            expected = rf"{place} belongs to another user \(id {os.geteuid() + 7}\); delete it"
            look = os.stat

            def stat(path: Any, *given: Any, **named: Any) -> os.stat_result:
                found = list(look(path, *given, **named))
                found[4] = os.geteuid() + 7 if Path(path) == place else 0
                return os.stat_result(found)

            monkeypatch.setattr(os, "stat", stat)
        else:
            expected = f"other users can write to {place}; check it, then chmod go-w {place}"
            place.chmod(0o775 if place == file else 0o757)
        native.module.cache_clear()
        try:
            with pytest.warns(UserWarning, match=f"adapters are computed in Python: {expected}"):
                assert native.module() is None
            assert re.search(f"^cannot be loaded from {file}: {expected}$", native.state())
            with pytest.raises(RuntimeError, match=f"is not built: {expected}"):
                build()
        finally:
            native.module.cache_clear()
        assert file.read_bytes() == b"code"

    def test_a_system_that_does_not_tell_who_can_write(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """On a system without owners of files, such as Windows, nothing is trusted."""
        monkeypatch.delattr(os, "geteuid", raising=False)
        assert "does not tell who can write" in native.untrusted(tmp_path)

    @posix
    def test_a_build_that_fails_leaves_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """If the compiler fails, its output is in the error, and no file is left behind."""
        if shutil.which("ninja") is None:
            pytest.skip("no ninja on this machine")
        monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
        monkeypatch.setenv("CXX", "false")
        with pytest.raises(RuntimeError, match="cannot be built: it needs a C"):
            build()
        assert not list((tmp_path / "paramlora").iterdir())
