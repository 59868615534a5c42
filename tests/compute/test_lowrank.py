"""Every path of a factored Linear against the dense product in float64."""

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
from paramlora.compute import lowrank
from paramlora.compute import plan as paths
from paramlora.kinds.spec import LowRank
from tests.support.helpers import BOUNDS, error, keeping, leaves

# Rows and widths (n, k, m) that lead each direction to each of its paths on the CPU.
SHAPES = {
    ("factored", "factored"): (3, 7, 5),
    ("dense", "factored"): (40, 7, 12),
    ("factored", "dense"): (40, 12, 7),
    ("dense", "dense"): (60, 7, 5),
}


def take(pair: tuple[str, str], way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the compiled twin take these paths, whose own rule differs."""
    if way == "native":
        plan = paths.Plan(*pair, native=True)  # type: ignore[arg-type]
        monkeypatch.setattr(paths, "choose", lambda *given: plan)


class TestPaths:
    @pytest.mark.usefixtures("as_large")
    @pytest.mark.parametrize("pair", SHAPES, ids="-".join)
    def test_each_direction_takes_its_path(
        self, pair: tuple[str, str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The update is added to the product on the factored path, to the weight on the dense."""
        n, k, m = SHAPES[pair]
        x, W, b, A, B = leaves(n, k, m, torch.float32)
        shapes, plain = [], lowrank.add_product

        def add_product(C: Tensor, *given: Any, **options: Any) -> Tensor:
            shapes.append(tuple(C.shape))
            return plain(C, *given, **options)

        monkeypatch.setattr(lowrank, "add_product", add_product)
        lowrank.linear(x, W, b, [LowRank(A, B, 0.7)]).sum().backward()
        products = (n, m), (n, k)
        assert shapes == [
            (m, k) if path == "dense" else product
            for path, product in zip(pair, products, strict=True)
        ]

    @pytest.mark.usefixtures("as_large")
    def test_shapes_lead_to_their_paths(self) -> None:
        """Each shape of this file takes the path that it is listed under."""
        for pair, (n, k, m) in SHAPES.items():
            assert paths.choose(n, k, m, torch.float32, "cpu", True)[:2] == pair

    def test_rule(self) -> None:
        """Little work is plain; else the fewer rows decide, the CPU's weights counting fourfold."""
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

    def test_rule_with_the_compiled_twin(self) -> None:
        """It takes all that a Triton kernel does not, and nothing where it is not built."""
        fp32, bf16 = torch.float32, torch.bfloat16
        choose = paths.choose
        assert choose(10, 784, 256, fp32, "cpu", True, True) == ("factored", "factored", True)
        assert choose(1000, 784, 256, fp32, "cpu", False, True) == ("dense", "dense", True)
        assert choose(100, 784, 256, fp32, "cuda", False, True) == ("factored", "factored", True)
        assert choose(512, 4096, 14336, bf16, "cuda", True, True) == ("factored", "factored", True)
        assert not choose(4096, 4096, 14336, bf16, "cuda", True, True).native
        assert choose(4096, 4096, 14336, fp32, "cuda", True, True).native
        assert not choose(4096, 4096, 14336, fp32, "cuda", True, False).native

    @pytest.mark.parametrize("dtype", BOUNDS, ids=str)
    @pytest.mark.parametrize("pair", SHAPES, ids="-".join)
    def test_values_and_gradients(
        self,
        way: str,
        pair: tuple[str, str],
        dtype: torch.dtype,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Output and gradients are those of the dense product in float64."""
        take(pair, way, monkeypatch)
        x, W, b, A, B = tensors = leaves(*SHAPES[pair], dtype)
        y = lowrank.linear(x, W, b, [LowRank(A, B, 0.7)])
        dy = torch.randn(y.shape, dtype=torch.float64).to(dtype)
        grads = torch.autograd.grad(y, tensors, dy)
        exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
        reference = F.linear(exact[0], exact[1] + 0.7 * exact[4] @ exact[3], exact[2])
        expected = torch.autograd.grad(reference, exact, dy.double())
        assert y.dtype == dtype
        assert error(y, reference.detach()) < BOUNDS[dtype]
        for tensor, grad, its_reference in zip(tensors, grads, expected, strict=True):
            assert grad.dtype == tensor.dtype
            assert grad.shape == tensor.shape
            assert error(grad, its_reference) < BOUNDS[dtype]

    @pytest.mark.parametrize("pair", SHAPES, ids="-".join)
    def test_first_and_second_derivatives(
        self, way: str, pair: tuple[str, str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Gradients, and gradients of gradients, are those of finite differences."""
        take(pair, way, monkeypatch)
        tensors = leaves(*SHAPES[pair], torch.float64, rank=1)

        def call(*leaves: Tensor) -> Tensor:
            x, W, b, A, B = leaves
            return lowrank.linear(x, W, b, [LowRank(A, B, 0.7)])

        assert torch.autograd.gradcheck(call, tensors, fast_mode=True)
        assert torch.autograd.gradgradcheck(call, tensors, fast_mode=True)

    @pytest.mark.parametrize("only", range(5), ids="xWbAB".__getitem__)
    def test_second_derivatives_of_one_tensor(self, way: str, only: int) -> None:
        """If one tensor alone requires a gradient, gradients of gradients are right as well."""
        tensors = [tensor.detach() for tensor in leaves(60, 7, 5, torch.float64)]

        def call(tensor: Tensor) -> Tensor:
            tensors[only] = tensor
            x, W, b, A, B = tensors
            return lowrank.linear(x, W, b, [LowRank(A, B, 0.7)])

        leaf = tensors[only].clone().requires_grad_()
        assert torch.autograd.gradgradcheck(call, [leaf], fast_mode=True)

    @pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=5))[1:])
    def test_only_what_is_wanted(self, way: str, wanted: tuple[bool, ...]) -> None:
        """Whatever requires a gradient gets the right one, and nothing else gets any."""
        x, W, b, A, B = tensors = leaves(60, 7, 5, torch.float64)
        for tensor, needed in zip(tensors, wanted, strict=True):
            tensor.requires_grad_(needed)
        lowrank.linear(x, W, b, [LowRank(A, B, 0.7)]).square().sum().backward()
        exact = [tensor.detach().requires_grad_() for tensor in tensors]
        dense = F.linear(exact[0], exact[1] + 0.7 * exact[4] @ exact[3], exact[2])
        expected = torch.autograd.grad(dense.square().sum(), exact)
        for tensor, needed, gradient in zip(tensors, wanted, expected, strict=True):
            if needed:
                assert_close(tensor.grad, gradient)
            else:
                assert tensor.grad is None

    @pytest.mark.parametrize("shape", [(0, 7), (2, 0, 7), (1, 7), (2, 3, 7), (2, 30, 7)])
    def test_batch_shapes(self, way: str, shape: tuple[int, ...]) -> None:
        """Any number of batch dimensions, empty ones too, in training and in inference."""
        _, W, b, A, B = leaves(1, 7, 5, torch.float64)
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        dense = F.linear(x, W + 0.7 * B @ A, b)
        y = lowrank.linear(x, W, b, [LowRank(A, B, 0.7)])
        assert_close(y, dense)
        assert_close(torch.autograd.grad(y.sum(), [x, A]), torch.autograd.grad(dense.sum(), [x, A]))
        with torch.no_grad():
            assert_close(lowrank.linear(x, W, b, [LowRank(A, B, 0.7)]), dense.detach())

    def test_strides(self, way: str) -> None:
        """Transposed, expanded and sliced inputs, and such a gradient of the output."""
        _, W, b, A, B = leaves(1, 7, 5, torch.float64)
        base = torch.randn(7, 60, dtype=torch.float64)
        for x in (base.T, base.T[::2], base.T[:1].expand(40, 7)):
            x = x.detach().requires_grad_()
            y = lowrank.linear(x, W, b, [LowRank(A, B, 0.7)])
            dense = F.linear(x, W + 0.7 * B @ A, b)
            dy = torch.ones(5, len(x), dtype=torch.float64).T
            found, expected = (torch.autograd.grad(out, [x, A, B], dy) for out in (y, dense))
            assert_close(found, expected)

    def test_several_updates(self, way: str) -> None:
        """Updates of different ranks and scales, one of them a tensor, add up."""
        x, W, b, A, B = leaves(60, 7, 5, torch.float64)
        _, _, _, C, D = leaves(60, 7, 5, torch.float64, rank=1)
        s = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
        y = lowrank.linear(x, W, b, [LowRank(A, B, 0.7), LowRank(C, D, s)])
        dense = F.linear(x, W + 0.7 * B @ A + s * D @ C, b)
        assert_close(y, dense)
        tensors = [x, A, B, C, D, s]
        found, expected = (torch.autograd.grad(out.square().sum(), tensors) for out in (y, dense))
        assert_close(found, expected)


class TestSeen:
    """What records operations, or is no common tensor, gets plain ones."""

    @pytest.mark.parametrize("autocast", [False, True])
    def test_selective_checkpointing(self, way: str, autocast: bool) -> None:
        """Gradients are the same where a policy keeps the outputs of products."""
        x, W, b, A, B = leaves(3, 7, 5, torch.float32)

        def call(x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                return lowrank.linear(x, W, b, [LowRank(A, B, 0.7)]).float().tanh()

        aten = torch.ops.aten
        kept = [aten.mm.default, aten.addmm.default, aten.linear.default]
        context = functools.partial(create_selective_checkpoint_contexts, kept)
        y = checkpoint(call, x, use_reentrant=False, context_fn=context)
        found, expected = (torch.autograd.grad(out.sum(), [x, A, B]) for out in (y, call(x)))
        bound = BOUNDS[torch.bfloat16 if autocast else torch.float32]
        for grad, its_reference in zip(found, expected, strict=True):
            assert error(grad, its_reference.double()) < bound

    def test_exported_trace(self, way: str, tmp_path: Path) -> None:
        """A trace with gradients can be saved, and computes the same from the file."""
        layer = nn.Linear(7, 5)
        pl.attach(layer, pl.LoRA(2, init="gaussian"), "weight")
        x = torch.randn(60, 7)
        torch.jit.save(torch.jit.trace(layer, x), tmp_path / "traced.pt")
        assert_close(torch.jit.load(tmp_path / "traced.pt")(x), layer(x))

    @pytest.mark.parametrize("autocast", [False, True])
    def test_nested_tensors(self, way: str, autocast: bool) -> None:
        """Sequences of several lengths in one nested tensor get what each gets."""
        layer = nn.Linear(7, 5)
        pl.attach(layer, pl.LoRA(2, init="gaussian"), "weight")
        parts = [torch.randn(n, 7) for n in (20, 40)]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found = layer(torch.nested.nested_tensor(parts)).unbind()
            expected = [layer(part) for part in parts]
        bound = BOUNDS[torch.bfloat16 if autocast else torch.float32]
        for its, alone in zip(found, expected, strict=True):
            assert error(its, alone.detach().double()) < bound


class TestKept:
    def test_function_keeps_x_and_the_hidden_rows(self, way: str) -> None:
        """Kept for the backward are x itself and x Aᵀ, beside the parameters."""
        layer = nn.Linear(64, 48)
        pl.attach(layer, pl.LoRA(rank=4), "weight")
        x = torch.randn(32, 64, requires_grad=True)
        with keeping() as kept:
            layer(x)
        parameters = {p.untyped_storage().data_ptr() for p in layer.parameters()}
        others = {t.untyped_storage().data_ptr(): t for t in kept}
        sizes = sorted(t.numel() for ptr, t in others.items() if ptr not in parameters)
        assert x.untyped_storage().data_ptr() in others
        assert sizes == [32 * 4, 32 * 64]

    def test_update_is_one_rounding(self) -> None:
        """The update of a matrix is C + s·PQ, in place or not, for factors of another dtype."""
        C = torch.randn(6, 5, dtype=torch.float64)
        P, Q = torch.randn(6, 2), torch.randn(2, 5)
        expected = C + 0.5 * P.double() @ Q.double()
        assert_close(lowrank.add_product(C, P, Q, 0.5), expected)
        assert lowrank.add_product(C, P, Q, 0.5, inplace=True) is C
        assert_close(C, expected)
