"""A factored Linear, by each path and implementation, against the dense product in float64."""

import functools
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import paramlora as pl
from paramlora.compute import lowrank, products
from paramlora.compute import plan as paths
from paramlora.kinds.spec import LowRank
from tests.support.helpers import BOUNDS, error, keeping, leaves

# Sizes (n, k, m) for which the forward and the backward take each pair of paths on the CPU.
SHAPES = {
    ("factored", "factored"): (3, 7, 5),
    ("dense", "factored"): (40, 7, 12),
    ("factored", "dense"): (40, 12, 7),
    ("dense", "dense"): (60, 7, 5),
}


def force_plan(pair: tuple[str, str], implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the native extension take these paths; its own rule differs."""
    if implementation == "native":
        plan = paths.Plan(*pair, native=True)  # type: ignore[arg-type]
        monkeypatch.setattr(paths, "choose", lambda *given: plan)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("rank", [1, 2, 15, 16, 33])
@pytest.mark.parametrize("shape", [(130, 264), (1000, 10)], ids=str)
def test_products_with_dy(shape: tuple[int, int], rank: int, dtype: torch.dtype) -> None:
    """s·dyB and s·dyᵀh agree with float64, computed as transposes or not, and dB is row-major."""
    n, m = shape
    torch.manual_seed(0)
    dy, B, h = (torch.randn(size, dtype=dtype) for size in ((n, m), (m, rank), (n, rank)))
    dh, dB = products.grads_of_h_and_B(dy, B, h, 0.3)
    assert error(dh, 0.3 * dy.double() @ B.double()) < BOUNDS[dtype]
    assert error(dB, 0.3 * dy.double().T @ h.double()) < BOUNDS[dtype]
    assert dB.is_contiguous()


class TestPaths:
    @pytest.mark.usefixtures("as_large")
    @pytest.mark.parametrize("pair", SHAPES, ids="-".join)
    def test_each_direction_takes_its_path(
        self, pair: tuple[str, str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The update is added to the product on the factored path, to the weight on the dense."""
        n, k, m = SHAPES[pair]
        x, W, b, A, B = leaves(n, k, m, torch.float32)
        shapes, plain = [], products.add_product

        def add_product(C: Tensor, *given: Any, **options: Any) -> Tensor:
            shapes.append(tuple(C.shape))
            return plain(C, *given, **options)

        monkeypatch.setattr(products, "add_product", add_product)
        lowrank.linear(x, W, b, [LowRank(A, B, 0.7)]).sum().backward()
        sizes = (n, m), (n, k)
        assert shapes == [
            (m, k) if path == "dense" else product
            for path, product in zip(pair, sizes, strict=True)
        ]

    @pytest.mark.usefixtures("as_large")
    def test_paths_of_the_shapes(self) -> None:
        """Each size of SHAPES takes the paths that it is listed under."""
        for pair, (n, k, m) in SHAPES.items():
            assert paths.choose(n, k, m, torch.float32, "cpu", True)[:2] == pair

    def test_rule(self) -> None:
        """Small products are plain; else fewer rows win, at a weight of 4 on the CPU."""
        plain, factored, dense = "plain", "factored", "dense"
        fp32, bf16 = torch.float32, torch.bfloat16

        def choose(*given: Any) -> tuple[str, str]:
            return paths.choose(*given)[:2]

        assert choose(10, 784, 256, fp32, "cpu", True) == (plain, plain)
        assert choose(1000, 784, 256, fp32, "cpu", True) == (factored, factored)
        assert choose(2000, 784, 256, fp32, "cpu", True) == (factored, dense)
        assert choose(1000, 784, 256, fp32, "cpu", False) == (dense, dense)
        assert choose(100, 784, 256, fp32, "cuda", True) == (plain, plain)
        assert choose(100, 784, 256, fp32, "cuda", False) == (dense, dense)
        assert choose(100, 784, 256, bf16, "cuda", False) == (plain, plain)
        assert choose(512, 4096, 14336, bf16, "cuda", True) == (plain, plain)
        assert choose(512, 4096, 14336, bf16, "cuda", False) == (factored, factored)
        assert choose(4096, 4096, 14336, bf16, "cuda", True) == (factored, factored)
        assert choose(16384, 4096, 14336, bf16, "cuda", True) == (factored, factored)
        assert choose(16384, 4096, 14336, bf16, "cuda", False) == (factored, factored)
        assert choose(16384, 4096, 14336, fp32, "cuda", True) == (dense, dense)
        assert choose(9999, 784, 256, bf16, "cpu", False) == (factored, factored)

    def test_rule_with_the_native_extension(self) -> None:
        """If built, the native extension takes all products except those of a Triton kernel."""
        fp32, bf16 = torch.float32, torch.bfloat16
        choose = paths.choose
        assert choose(10, 784, 256, fp32, "cpu", True, True) == ("factored", "factored", True)
        assert choose(1000, 784, 256, fp32, "cpu", False, True) == ("dense", "dense", True)
        assert choose(100, 784, 256, fp32, "cuda", False, True) == ("factored", "factored", True)
        assert choose(512, 4096, 14336, bf16, "cuda", True, True) == ("factored", "factored", True)
        # Many rows and few multiplications: the GPU would wait for Python.
        assert choose(16384, 768, 3072, bf16, "cuda", True, True) == ("factored", "factored", True)
        assert not choose(4096, 4096, 14336, bf16, "cuda", True, True).native
        assert choose(4096, 4096, 14336, fp32, "cuda", True, True).native
        assert not choose(4096, 4096, 14336, fp32, "cuda", True, False).native

    @pytest.mark.parametrize("dtype", BOUNDS, ids=str)
    @pytest.mark.parametrize("pair", SHAPES, ids="-".join)
    def test_values_and_gradients(
        self,
        implementation: str,
        pair: tuple[str, str],
        dtype: torch.dtype,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Output and gradients equal those of the dense product in float64."""
        force_plan(pair, implementation, monkeypatch)
        x, W, b, A, B = tensors = leaves(*SHAPES[pair], dtype)
        y = lowrank.linear(x, W, b, [LowRank(A, B, 0.7)])
        dy = torch.randn(y.shape, dtype=torch.float64).to(dtype)
        grads = torch.autograd.grad(y, tensors, dy)
        exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
        reference = F.linear(exact[0], exact[1] + 0.7 * exact[4] @ exact[3], exact[2])
        expected = torch.autograd.grad(reference, exact, dy.double())
        assert y.dtype == dtype
        assert error(y, reference.detach()) < BOUNDS[dtype]
        for tensor, grad, reference_grad in zip(tensors, grads, expected, strict=True):
            assert grad.dtype == tensor.dtype
            assert grad.shape == tensor.shape
            assert error(grad, reference_grad) < BOUNDS[dtype]

    @pytest.mark.parametrize("pair", SHAPES, ids="-".join)
    def test_first_and_second_derivatives(
        self, implementation: str, pair: tuple[str, str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """First and second derivatives equal finite differences."""
        force_plan(pair, implementation, monkeypatch)
        tensors = leaves(*SHAPES[pair], torch.float64, rank=1)

        def call(*leaves: Tensor) -> Tensor:
            x, W, b, A, B = leaves
            return lowrank.linear(x, W, b, [LowRank(A, B, 0.7)])

        assert torch.autograd.gradcheck(call, tensors, fast_mode=True)
        assert torch.autograd.gradgradcheck(call, tensors, fast_mode=True)

    @pytest.mark.parametrize("only", range(5), ids="xWbAB".__getitem__)
    def test_second_derivatives_of_one_tensor(self, implementation: str, only: int) -> None:
        """If one tensor alone requires a gradient, gradients of gradients are right as well."""
        tensors = [tensor.detach() for tensor in leaves(60, 7, 5, torch.float64)]

        def call(tensor: Tensor) -> Tensor:
            tensors[only] = tensor
            x, W, b, A, B = tensors
            return lowrank.linear(x, W, b, [LowRank(A, B, 0.7)])

        leaf = tensors[only].clone().requires_grad_()
        assert torch.autograd.gradgradcheck(call, [leaf], fast_mode=True)

    @pytest.mark.parametrize("required", list(itertools.product([False, True], repeat=5))[1:])
    def test_requires_grad(self, implementation: str, required: tuple[bool, ...]) -> None:
        """Each tensor that requires a gradient gets the right one, and all others get None."""
        x, W, b, A, B = tensors = leaves(60, 7, 5, torch.float64)
        for tensor, needed in zip(tensors, required, strict=True):
            tensor.requires_grad_(needed)
        lowrank.linear(x, W, b, [LowRank(A, B, 0.7)]).square().sum().backward()
        exact = [tensor.detach().requires_grad_() for tensor in tensors]
        dense = F.linear(exact[0], exact[1] + 0.7 * exact[4] @ exact[3], exact[2])
        expected = torch.autograd.grad(dense.square().sum(), exact)
        for tensor, needed, gradient in zip(tensors, required, expected, strict=True):
            if needed:
                assert_close(tensor.grad, gradient)
            else:
                assert tensor.grad is None

    @pytest.mark.parametrize(
        "shape", [(7,), (0, 7), (2, 0, 7), (1, 7), (2, 3, 7), (2, 1, 3, 7), (2, 30, 7)]
    )
    def test_batch_shapes(self, implementation: str, shape: tuple[int, ...]) -> None:
        """Any number of batch dimensions, also empty ones, in training and in inference."""
        _, W, b, A, B = leaves(1, 7, 5, torch.float64)
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        dense = F.linear(x, W + 0.7 * B @ A, b)
        y = lowrank.linear(x, W, b, [LowRank(A, B, 0.7)])
        assert_close(y, dense)
        assert_close(torch.autograd.grad(y.sum(), [x, A]), torch.autograd.grad(dense.sum(), [x, A]))
        with torch.no_grad():
            assert_close(lowrank.linear(x, W, b, [LowRank(A, B, 0.7)]), dense.detach())

    def test_strides(self, implementation: str) -> None:
        """Transposed, expanded and sliced inputs, and a transposed gradient of the output."""
        _, W, b, A, B = leaves(1, 7, 5, torch.float64)
        base = torch.randn(7, 60, dtype=torch.float64)
        for x in (
            base.T,
            base.T[::2],
            base.T[:1].expand(40, 7),
            base.expand(3, 7, 60).mT,
        ):
            x = x.detach().requires_grad_()
            y = lowrank.linear(x, W, b, [LowRank(A, B, 0.7)])
            dense = F.linear(x, W + 0.7 * B @ A, b)
            dy = torch.ones_like(dense.mT).mT
            found, expected = (torch.autograd.grad(out, [x, A, B], dy) for out in (y, dense))
            assert_close(found, expected)

    def test_tensor_scale(self, implementation: str) -> None:
        """A single update with a scale that is a tensor: values, and the gradient of the scale."""
        x, W, b, A, B = leaves(60, 7, 5, torch.float64)
        s = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
        outputs = lowrank.linear(x, W, b, [LowRank(A, B, s)]), F.linear(x, W + s * B @ A, b)
        found, expected = (torch.autograd.grad(y.square().sum(), [x, A, B, s]) for y in outputs)
        assert_close(outputs[0], outputs[1])
        assert_close(found, expected)

    def test_several_updates(self, implementation: str) -> None:
        """Updates of different ranks and scales, one a tensor, add up."""
        x, W, b, A, B = leaves(60, 7, 5, torch.float64)
        _, _, _, C, D = leaves(60, 7, 5, torch.float64, rank=1)
        s = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
        y = lowrank.linear(x, W, b, [LowRank(A, B, 0.7), LowRank(C, D, s)])
        dense = F.linear(x, W + 0.7 * B @ A + s * D @ C, b)
        assert_close(y, dense)
        tensors = [x, A, B, C, D, s]
        found, expected = (torch.autograd.grad(out.square().sum(), tensors) for out in (y, dense))
        assert_close(found, expected)


class TestTracers:
    """Tracers, dispatch modes and tensor subclasses see plain operations."""

    @pytest.mark.parametrize("autocast", [False, True])
    def test_selective_checkpointing(self, implementation: str, autocast: bool) -> None:
        """Gradients are the same under a policy that saves the outputs of products."""
        x, W, b, A, B = leaves(3, 7, 5, torch.float32)

        def call(x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                return lowrank.linear(x, W, b, [LowRank(A, B, 0.7)]).float().tanh()

        aten = torch.ops.aten
        saved = [aten.mm.default, aten.addmm.default, aten.linear.default]
        context = functools.partial(create_selective_checkpoint_contexts, saved)
        y = checkpoint(call, x, use_reentrant=False, context_fn=context)
        found, expected = (torch.autograd.grad(out.sum(), [x, A, B]) for out in (y, call(x)))
        bound = BOUNDS[torch.bfloat16 if autocast else torch.float32]
        for grad, reference_grad in zip(found, expected, strict=True):
            assert error(grad, reference_grad.double()) < bound

    def test_saved_trace(self, implementation: str, tmp_path: Path) -> None:
        """A trace with gradients can be saved, and computes the same when loaded."""
        layer = nn.Linear(7, 5)
        pl.attach(layer, pl.LoRA(2, init="gaussian"), "weight")
        x = torch.randn(60, 7)
        torch.jit.save(torch.jit.trace(layer, x), tmp_path / "traced.pt")
        assert_close(torch.jit.load(tmp_path / "traced.pt")(x), layer(x))

    @pytest.mark.parametrize("autocast", [False, True])
    def test_nested_tensors(self, implementation: str, autocast: bool) -> None:
        """Each sequence of a nested tensor has the output that it has alone."""
        layer = nn.Linear(7, 5)
        pl.attach(layer, pl.LoRA(2, init="gaussian"), "weight")
        parts = [torch.randn(n, 7) for n in (20, 40)]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found = layer(torch.nested.nested_tensor(parts)).unbind()
            expected = [layer(part) for part in parts]
        bound = BOUNDS[torch.bfloat16 if autocast else torch.float32]
        for sequence, alone in zip(found, expected, strict=True):
            assert error(sequence, alone.detach().double()) < bound


class TestSavedTensors:
    def test_x_and_hidden_rows(self, implementation: str) -> None:
        """Besides parameters, the forward saves x and x Aᵀ for the backward."""
        layer = nn.Linear(64, 48)
        pl.attach(layer, pl.LoRA(rank=4), "weight")
        x = torch.randn(32, 64, requires_grad=True)
        with keeping() as saved:
            layer(x)
        parameters = {p.untyped_storage().data_ptr() for p in layer.parameters()}
        saved_by_storage = {t.untyped_storage().data_ptr(): t for t in saved}
        sizes = sorted(t.numel() for ptr, t in saved_by_storage.items() if ptr not in parameters)
        assert x.untyped_storage().data_ptr() in saved_by_storage
        assert sizes == [32 * 4, 32 * 64]


def test_add_product() -> None:
    """`add_product` returns C + s·PQ, in place or not, also for P and Q of another dtype."""
    C = torch.randn(6, 5, dtype=torch.float64)
    P, Q = torch.randn(6, 2), torch.randn(2, 5)
    expected = C + 0.5 * P.double() @ Q.double()
    assert_close(products.add_product(C, P, Q, 0.5), expected)
    assert products.add_product(C, P, Q, 0.5, inplace=True) is C
    assert_close(C, expected)
