"""The Triton kernels give the values of the plain products."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from paramlora.compute import lowrank, products
from paramlora.compute import plan as paths
from paramlora.kinds.spec import LowRank
from tests.support.helpers import BOUNDS, error, leaves


@pytest.mark.gpu
class TestKernel:
    @pytest.fixture(autouse=True)
    def _for_any_size(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(paths, "WORTH_A_KERNEL", 0)
        monkeypatch.setattr(paths, "WORTH_PYTHON", 0)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("rank", [1, 4, 16, 33, 128])
    @pytest.mark.parametrize("shape", [(4096, 4096), (2051, 4099)])
    def test_update(self, shape: tuple[int, int], rank: int, dtype: torch.dtype) -> None:
        """The kernel agrees with C + s·PQ in float64, for each rank, ragged sizes and strides."""
        n, m = shape
        C = torch.randn(n, m, device="cuda", dtype=dtype)
        P, Q = torch.randn(n, rank, device="cuda"), torch.randn(m, rank, device="cuda").T
        assert products.kernel_applies(C, rank)
        expected = C.double() + 0.3 * P.to(dtype).double() @ Q.to(dtype).double()
        assert error(products.add_product(C, P, Q, 0.3), expected) < BOUNDS[dtype]
        assert products.add_product(C, P, Q, 0.3, inplace=True) is C
        assert error(C, expected) < BOUNDS[dtype]

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("rank", [1, 4, 16, 33, 64])
    @pytest.mark.parametrize("shape", [(4096, 4096), (2051, 4099), (16384, 1024)])
    def test_products(self, shape: tuple[int, int], rank: int, dtype: torch.dtype) -> None:
        """The kernel gives s·dyB and s·dyᵀh of float64, and the same bits each time."""
        n, m = shape
        dy = torch.randn(n, m, device="cuda", dtype=dtype)
        B, h = torch.randn(rank, m, device="cuda").T, torch.randn(n, rank, device="cuda").to(dtype)
        assert products.kernel_applies(dy, rank)
        found = products.grads_of_h_and_B(dy, B, h, 0.3)
        assert [t.dtype for t in found] == [dtype, torch.float32]
        exact = 0.3 * dy.double() @ B.to(dtype).double(), 0.3 * dy.double().T @ h.double()
        for a, e in zip(found, exact, strict=True):
            assert error(a, e) < BOUNDS[dtype]
        assert_close(found, products.grads_of_h_and_B(dy, B, h, 0.3), rtol=0, atol=0)

    def test_training_step(self) -> None:
        """A large bfloat16 layer has the values and gradients of the dense layer."""
        drawn = leaves(5000, 1500, 2048, torch.bfloat16, rank=16)
        x, W, b, A, B = tensors = [tensor.detach().cuda().requires_grad_() for tensor in drawn]
        y = lowrank.linear(x, W, b, [LowRank(A, B, 0.1)])
        exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
        dense = F.linear(exact[0], exact[1] + 0.1 * exact[4] @ exact[3], exact[2])
        assert error(y, dense.detach()) < BOUNDS[torch.bfloat16]
        dy = torch.randn_like(y)
        found = torch.autograd.grad(y, tensors, dy)
        expected = torch.autograd.grad(dense, exact, dy.double())
        for a, e in zip(found, expected, strict=True):
            assert error(a, e) < BOUNDS[torch.bfloat16]

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("rank", [1, 16, 33, 128])
    @pytest.mark.parametrize("shape", [(4096, 4096, 1024), (2051, 520, 1032)])
    def test_fused_product(
        self, shape: tuple[int, int, int], rank: int, dtype: torch.dtype
    ) -> None:
        """The product with its update agrees with float64, for W and for W transposed."""
        fused = pytest.importorskip("paramlora.compute.fused_product")
        n, k, m = shape
        x, dy = (torch.randn(n, c, device="cuda", dtype=dtype) for c in (k, m))
        W = torch.randn(m, k, device="cuda", dtype=dtype) / k**0.5
        if not fused.applies(x, W):
            pytest.skip("the fused product needs a Hopper GPU")
        b, h = torch.randn(m, device="cuda", dtype=dtype), torch.randn(n, rank, device="cuda")
        A, B = torch.randn(rank, k, device="cuda"), torch.randn(m, rank, device="cuda")
        h = h.to(dtype)
        exact_A, exact_B = (factor.to(dtype).double() for factor in (A, B))
        y = x.double() @ W.double().T + b.double() + 0.3 * h.double() @ exact_B.T
        assert error(fused.add_low_rank(x, W, h, B, 0.3, b), y) < BOUNDS[dtype]
        dx = dy.double() @ W.double() + h.double() @ exact_A
        found = fused.add_low_rank(dy, W, h, A.T, 1.0, transposed=True)
        assert error(found, dx) < BOUNDS[dtype]

    @pytest.mark.parametrize("bias", [True, False])
    def test_fused_product_keeps_the_bits_of_the_base(self, bias: bool) -> None:
        """With B = 0 a large layer gives the bits of F.linear, on the path taken for its shape."""
        x, W = (torch.randn(c, 2048, device="cuda", dtype=torch.bfloat16) for c in (5000, 1504))
        b = torch.randn(1504, device="cuda", dtype=torch.bfloat16) if bias else None
        A, B = torch.randn(16, 2048, device="cuda"), torch.zeros(1504, 16, device="cuda")
        found = lowrank.linear(x, W, b, [LowRank(A, B, 0.1)])
        assert_close(found, F.linear(x, W, b), rtol=0, atol=0)


INTERPRETED = """
import contextlib, torch
from paramlora.compute import fused_product as fused
torch.cuda.device_of = lambda tensor: contextlib.nullcontext()
fused._processors = lambda device: 3
torch.manual_seed(0)
n, k, m, r = 150, 136, 264, 19
x, dy, W = torch.randn(n, k).half(), torch.randn(n, m).half(), torch.randn(m, k).half()
h, A, B, b = torch.randn(n, r).half(), torch.randn(r, k), torch.randn(m, r), torch.randn(m).half()
y = x.double() @ W.double().T + b.double() + 0.3 * h.double() @ B.half().double().T
dx = dy.double() @ W.double() + h.double() @ A.half().double()
for found, expected in (
    (fused.add_low_rank(x, W, h, B, 0.3, b), y),
    (fused.add_low_rank(dy, W, h, A.T, 1.0, transposed=True), dx),
):
    assert (found.double() - expected).norm() / expected.norm() < 1e-3
"""


def test_fused_product_in_the_interpreter() -> None:
    """Without a GPU, Triton's interpreter runs the fused product on ragged sizes."""
    pytest.importorskip("triton", "3.7", reason="older interpreters fail with numpy 2.4")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", INTERPRETED]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


class TestFusedPath:
    """Which layers use the fused product, decided without a GPU."""

    def test_other_bits(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """If the product has other bits than F.linear, a layer adds the update afterwards."""
        fused = pytest.importorskip("paramlora.compute.fused_product")
        monkeypatch.setattr(products, "fused_applies", lambda X, W, rank: True)
        monkeypatch.setattr(fused, "same_bits", lambda x, W, b: False)
        x, W, b, A, B = leaves(5, 8, 16, torch.float32, rank=2)
        y, _ = products.forward(x, W, b, A, B, 0.3, "factored")
        assert_close(y, F.linear(x, W, b) + 0.3 * x @ A.T @ B.T)

    def test_zeros_show_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A comparison of outputs that are mostly zero is not remembered."""
        fused = pytest.importorskip("paramlora.compute.fused_product")
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        monkeypatch.setattr(fused, "_same_bits", {})
        monkeypatch.setattr(fused, "add_low_rank", lambda X, W, P, Q, s, b: F.linear(X, W, b))
        W = torch.randn(16, 8)
        assert not fused.same_bits(torch.zeros(5, 8), W, None)
        assert fused.same_bits(torch.randn(5, 8), W, None)

    def test_capture(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """While a CUDA graph is captured, an unknown shape is not compared, which would wait."""
        fused = pytest.importorskip("paramlora.compute.fused_product")
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        monkeypatch.setattr(fused, "_same_bits", {})
        assert not fused.same_bits(torch.randn(5, 8), torch.randn(16, 8), None)
