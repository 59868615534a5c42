"""The native extension of a factored Linear: values, recorders, building it, going without it."""

import functools
import itertools
import os
import shutil
import subprocess
import sys
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

# One row, ragged sizes, and ranks above and below the sizes.
SHAPES = [(1, 1, 1), (3, 15, 17), (4, 16, 64), (7, 100, 33), (66, 130, 65), (9, 784, 10)]
RANKS = [1, 2, 3, 4, 7, 16, 65]


class TestValues:
    @pytest.mark.parametrize("rank", RANKS)
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_values_and_gradients(
        self, shape: tuple[int, int, int], rank: int, native_module: ModuleType
    ) -> None:
        """Values and gradients of ragged sizes are the dense product's in float64, on each path."""
        n, k, m = shape
        torch.manual_seed(0)
        shapes = [(n, k), (m, k), (m,), (rank, k), (m, rank)]
        exact = [torch.randn(s, dtype=torch.float64).requires_grad_() for s in shapes]
        x, W, b, A, B = exact
        y64 = F.linear(x, W + 0.7 * B @ A, b)
        dy = torch.randn(n, m, dtype=torch.float64)
        expected = (y64, *torch.autograd.grad(y64, exact, dy))
        for paths in ((False, False), (True, False), (False, True), (True, True)):
            tensors = [tensor.detach().float().requires_grad_() for tensor in exact]
            y = native_module.linear(*tensors, 0.7, *paths)
            found = (y, *torch.autograd.grad(y, tensors, dy.float()))
            for a, e in zip(found, expected, strict=True):
                assert error(a, e) < BOUNDS[torch.float32]
            with torch.no_grad():
                again = native_module.linear(*tensors, 0.7, *paths)
            assert_close(again, y.detach())

    def test_nothing_gives_the_base(self, native_module: ModuleType) -> None:
        """With B = 0 the output is bitwise the base's, of strided inputs too."""
        layer = nn.Linear(24, 40)
        base = torch.randn(24, 50).T
        x = torch.stack([base, base]).transpose(0, 1)
        with torch.no_grad():
            for rows in (base, x, base.contiguous()):
                expected = layer(rows)
                A, B = torch.randn(4, 24), torch.zeros(40, 4)
                found = native_module.linear(
                    rows, layer.weight, layer.bias, A, B, 1.0, False, False
                )
                assert torch.equal(found, expected)


@pytest.mark.gpu
class TestGpu:
    @pytest.mark.parametrize("dtype", BOUNDS, ids=str)
    @pytest.mark.parametrize("paths", list(itertools.product([False, True], repeat=2)), ids=str)
    def test_values_and_gradients(
        self, paths: tuple[bool, bool], dtype: torch.dtype, native_module: ModuleType
    ) -> None:
        """On a GPU, for factors in float32 beside half precision too: the dense product's."""
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


class TestSeen:
    """Under a tracer, a dispatch mode or a transform, a layer uses plain operations."""

    @staticmethod
    def adapted() -> tuple[nn.Module, Tensor]:
        torch.manual_seed(0)
        layer = nn.Linear(64, 48)
        pl.attach(layer, pl.LoRA(2), "weight")
        shake(layer)
        return layer, torch.randn(5, 64)

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
        """A dispatch mode sees the products of the factors, and can count their operations."""
        layer, x = self.adapted()
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            layer(x)
        assert counter.get_total_flops() == 2 * 5 * (64 * 48 + 2 * (64 + 48))

    def test_selective_checkpointing(self, native_module: ModuleType) -> None:
        """Gradients are the same where a policy keeps the outputs of linear layers."""
        layer, x = self.adapted()
        model = nn.Sequential(layer, nn.Tanh())
        leaves = list(pl.parameters(model))
        expected = torch.autograd.grad(model(x).square().sum(), leaves)
        aten = torch.ops.aten
        kept = [aten.mm.default, aten.addmm.default, aten.linear.default]
        context = functools.partial(create_selective_checkpoint_contexts, kept)
        y = checkpoint(model, x, use_reentrant=False, context_fn=context)
        assert_close(torch.autograd.grad(y.square().sum(), leaves), expected)

    def test_batched_gradients(self, native_module: ModuleType) -> None:
        """Several gradients at once, by vmap over the backward, are those one by one."""
        layer, x = self.adapted()
        x.requires_grad_()
        leaves = [x, *pl.parameters(layer)]
        y = layer(x)
        dy = torch.randn(3, *y.shape)
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
        # A gradient is linear in that of the output.
        assert_close(tangents, list(torch.autograd.grad(y, leaves, t)))

    def test_second_derivatives_in_float32(self, native_module: ModuleType) -> None:
        """Gradients of gradients of the float32 loops are those of float64."""
        layer, x = self.adapted()
        found = []
        for dtype in (torch.float32, torch.float64):
            layer, its = layer.to(dtype), x.to(dtype).detach().requires_grad_()
            leaves = [its, *pl.parameters(layer)]
            first = torch.autograd.grad(layer(its).tanh().sum(), leaves, create_graph=True)
            total = torch.stack([grad.square().sum() for grad in first]).sum()
            found.append(torch.autograd.grad(total, leaves))
        for a, e in zip(*found, strict=True):
            assert error(a, e) < 1e-4

    def test_other_types_of_weights(self, native_module: ModuleType) -> None:
        """A subclass of Tensor as the weight is asked what F.linear is to it."""
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
        """A tensor whose memory has the other sign is read as what it is."""
        layer, x = self.adapted()
        with torch.no_grad():
            assert_close(layer(torch._neg_view(x)), layer(-x))


class TestWrong:
    @pytest.mark.parametrize("grad", [False, True])
    def test_an_input_of_another_width(self, grad: bool, native_module: ModuleType) -> None:
        """It is torch's own error, before anything is read."""
        layer = nn.Linear(1024, 64)
        pl.attach(layer, pl.LoRA(2), "weight")
        with torch.set_grad_enabled(grad):
            for width in (1, 2048, 1024 * 1024):
                with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
                    layer(torch.randn(1, width))

    def test_factors_that_do_not_fit(self, native_module: ModuleType) -> None:
        """Factors of other shapes are refused, with theirs and the weight's."""
        given = [torch.ones(s) for s in ((2, 3), (4, 3), (1, 3), (5, 1))]
        with pytest.raises(RuntimeError, match=r"\[1, 3\] and \[5, 1\] do not fit .*\[4, 3\]"):
            native_module.linear(given[0], given[1], None, given[2], given[3], 1.0, False, False)

    def test_frozen_factors_keep_nothing(self, native_module: ModuleType) -> None:
        """For dx alone x is not kept, and may be written to; W is not kept for the factors'."""
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
        """A factor written to between forward and backward is an error, as ever in autograd."""
        layer = nn.Linear(8, 6)
        pl.attach(layer, pl.LoRA(2), "weight")
        _, B = pl.parameters(layer)
        y = layer(torch.randn(3, 8))
        with torch.no_grad():
            B.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()

    def test_its_output_can_be_written_to(self, native_module: ModuleType) -> None:
        """nn.ReLU(inplace=True) behind it gives the gradients that a new tensor would."""
        torch.manual_seed(0)
        layer = nn.Linear(8, 6)
        pl.attach(layer, pl.LoRA(2, init="gaussian"), "weight")
        x = torch.randn(5, 8)
        grads = []
        for inplace in (False, True):
            out = F.relu(layer(x), inplace=inplace)
            grads.append(torch.autograd.grad(out.square().sum(), list(pl.parameters(layer))))
        assert_close(grads[0], grads[1], rtol=0, atol=0)

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_checkpointing(self, reentrant: bool, native_module: ModuleType) -> None:
        """Computed again for the backward, whichever way, it gives the same gradients."""
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        pl.attach(model, pl.LoRA(2))
        shake(model)
        x = torch.randn(5, 8, requires_grad=True)
        leaves = list(pl.parameters(model))
        expected = torch.autograd.grad(model(x).square().sum(), leaves)
        y = checkpoint(model, x, use_reentrant=reentrant)
        y.square().sum().backward()
        # Not the same bits: the reentrant way has a first forward without gradients, another path.
        assert_close([leaf.grad for leaf in leaves], list(expected))

    def test_threads_of_a_program(self, native_module: ModuleType) -> None:
        """Several threads at once get what each alone gets."""
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
    @pytest.mark.parametrize("case", ["no home", "a home that cannot be read", "no source"])
    def test_where_nothing_can_be_built(
        self, case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Where there is no home, no right to look, or no source, all is computed in Python."""
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

            # root, whom tests may run as, can look everywhere.
            monkeypatch.setattr(os, "stat", stat)
        native.module.cache_clear()
        try:
            assert native.module() is None
        finally:
            native.module.cache_clear()

    def test_it_is_found_by_itself(self, native_module: ModuleType) -> None:
        """A process that finds the built file uses it; PARAMLORA_NATIVE=0 leaves it out."""
        program = "from paramlora.native import load as native; print(native.module() is not None)"
        for value, expected in (("", "True"), ("0", "False")):
            done = subprocess.run(
                [sys.executable, "-c", program],
                env={**os.environ, "PARAMLORA_NATIVE": value},
                capture_output=True,
                text=True,
                check=True,
            )
            assert done.stdout.strip() == expected

    def test_without_a_built_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Where nothing is built, all is computed in Python."""
        monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
        assert native.path().is_relative_to(tmp_path)
        native.module.cache_clear()
        try:
            assert native.module() is None
            x, W, A, B = torch.ones(2, 3), torch.ones(4, 3), torch.ones(1, 3), torch.ones(4, 1)
            y = lowrank.linear(x, W, None, [lowrank.LowRank(A, B, 1.0)])
            assert_close(y, torch.full((2, 4), 6.0))
        finally:
            native.module.cache_clear()

    def test_a_damaged_file_is_named(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A file that cannot be loaded is named, and all is computed in Python."""
        monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
        native.path().parent.mkdir(parents=True)
        native.path().write_bytes(b"no library")
        native.module.cache_clear()
        try:
            with pytest.warns(UserWarning, match=r"paramlora_native-.*cannot be loaded.*delete it"):
                assert native.module() is None
        finally:
            native.module.cache_clear()

    def test_a_build_that_fails_leaves_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Where the compiler fails, its words are the error, and no file is left to be found."""
        if shutil.which("ninja") is None:
            pytest.skip("no ninja on this machine")
        monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
        monkeypatch.setenv("CXX", "false")
        with pytest.raises(RuntimeError, match="cannot be built: it needs a C"):
            build()
        assert not list((tmp_path / "paramlora").iterdir())
