"""The Triton kernels give the values of the plain products."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from paramlora.compute import lowrank
from paramlora.compute import plan as paths
from paramlora.kinds.spec import LowRank
from tests.support.helpers import BOUNDS, error, leaves


@pytest.mark.gpu
class TestKernel:
    @pytest.fixture(autouse=True)
    def _for_any_size(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(paths, "WORTH_A_KERNEL", 0)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("rank", [1, 4, 16, 33, 128])
    @pytest.mark.parametrize("shape", [(4096, 4096), (2051, 4099)])
    def test_update(self, shape: tuple[int, int], rank: int, dtype: torch.dtype) -> None:
        """The kernel agrees with C + s·PQ in float64, for each rank, ragged sizes and strides."""
        n, m = shape
        C = torch.randn(n, m, device="cuda", dtype=dtype)
        P, Q = torch.randn(n, rank, device="cuda"), torch.randn(m, rank, device="cuda").T
        assert lowrank._kernel_applies(C, rank)
        expected = C.double() + 0.3 * P.to(dtype).double() @ Q.to(dtype).double()
        assert error(lowrank.add_product(C, P, Q, 0.3), expected) < BOUNDS[dtype]
        assert lowrank.add_product(C, P, Q, 0.3, inplace=True) is C
        assert error(C, expected) < BOUNDS[dtype]

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("rank", [1, 4, 16, 33, 64])
    @pytest.mark.parametrize("shape", [(4096, 4096), (2051, 4099), (16384, 1024)])
    def test_products(self, shape: tuple[int, int], rank: int, dtype: torch.dtype) -> None:
        """The kernel gives s·dyB and s·dyᵀh of float64, and the same bits each time."""
        n, m = shape
        dy = torch.randn(n, m, device="cuda", dtype=dtype)
        B, h = torch.randn(rank, m, device="cuda").T, torch.randn(n, rank, device="cuda").to(dtype)
        assert lowrank._kernel_applies(dy, rank)
        found = lowrank.grads_of_h_and_B(dy, B, h, 0.3)
        assert [t.dtype for t in found] == [dtype, torch.float32]
        exact = 0.3 * dy.double() @ B.to(dtype).double(), 0.3 * dy.double().T @ h.double()
        for a, e in zip(found, exact, strict=True):
            assert error(a, e) < BOUNDS[dtype]
        assert_close(found, lowrank.grads_of_h_and_B(dy, B, h, 0.3), rtol=0, atol=0)

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
