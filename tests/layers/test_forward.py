"""The third invariant: the forward agrees with the dense W', however it is computed."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import paramlora as pl
from tests.support.reference import loss, shake


class TestInvariant3:
    """The forward path and its gradients agree with the dense W', however they are computed.

    Each layer kind and dtype is in the conformance tests.
    """

    @pytest.fixture(autouse=True, params=["small", "large"])
    def _as_large(self, request: pytest.FixtureRequest) -> None:
        # A large Linear is computed by a Function of its own where nothing is looking on.
        if request.param == "large":
            request.getfixturevalue("as_large")

    @staticmethod
    def layer() -> tuple[nn.Linear, Tensor, Tensor, Tensor]:
        torch.default_generator.manual_seed(0)
        layer = nn.Linear(7, 5, dtype=torch.float64)
        W = layer.weight.detach().clone()
        pl.attach(layer, pl.LoRA(rank=2, alpha=3), "weight")
        shake(layer)
        A, B = (tensor.clone().requires_grad_() for tensor in pl.state_dict(layer).values())
        return layer, W, A, B

    def check(self, call: Callable[[nn.Module, Tensor], Tensor], x: Tensor) -> None:
        """Compare outputs and the gradients of A, B and x with those of the dense layer."""
        layer, W, A, B = self.layer()
        ours, theirs = (x.detach().requires_grad_() for _ in range(2))
        actual, expected = call(layer, ours), F.linear(theirs, W + 1.5 * B @ A, layer.bias)
        assert_close(actual, expected)
        loss([actual]).backward()
        loss([expected]).backward()
        grads = [leaf.grad for leaf in (*pl.parameters(layer), ours)]
        assert_close(grads, [A.grad, B.grad, theirs.grad])

    @pytest.mark.parametrize(
        "shape", [(7,), (1, 7), (0, 7), (3, 0, 7), (2, 3, 7), (2, 1, 3, 7), (400, 7)]
    )
    def test_3_batch_shapes(self, shape: tuple[int, ...]) -> None:
        """Any number of batch dimensions, none and empty ones too."""
        self.check(lambda layer, x: layer(x), torch.randn(shape, dtype=torch.float64))

    def test_3_strides(self) -> None:
        """A transposed, an expanded and a sliced input."""
        x = torch.randn(7, 6, dtype=torch.float64)
        for strided in (x.T, x.T[::2], x.T[:1].expand(4, 7), x.expand(3, 7, 6).mT):
            self.check(lambda layer, x: layer(x), strided)

    @pytest.mark.filterwarnings("ignore::UserWarning")
    def test_3_compiled(self) -> None:
        """Compiled without a graph break, gradients compared too, not only outputs."""
        torch._dynamo.reset()
        compiled = torch.compile(lambda layer, x: layer(x), fullgraph=True, backend="aot_eager")
        self.check(compiled, torch.randn(3, 7, dtype=torch.float64))

    @pytest.mark.parametrize("reentrant", [True, False])
    def test_3_checkpointed(self, reentrant: bool) -> None:
        """Recomputed in the backward by torch.utils.checkpoint, of both kinds."""
        x = torch.randn(3, 7, dtype=torch.float64)
        self.check(lambda layer, x: checkpoint(layer, x, use_reentrant=reentrant), x)

    def test_3_functional(self) -> None:
        """Under torch.func: vmap over rows, and grad of a functional call."""
        x = torch.randn(3, 7, dtype=torch.float64)
        self.check(lambda layer, x: torch.func.vmap(layer)(x), x)
        layer, W, A, B = self.layer()
        params: dict[str, Tensor] = dict(layer.named_parameters())

        def total(params: dict[str, Tensor]) -> Tensor:
            return loss([torch.func.functional_call(layer, params, (x,))])

        grads = torch.func.grad(total)(params)
        expected = loss([F.linear(x, W + 1.5 * B @ A, layer.bias)])
        ours = [grads[key] for key in params if key.endswith((".A", ".B"))]
        assert_close(ours, [*torch.autograd.grad(expected, [A, B])])

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_3_autocast(self, dtype: torch.dtype) -> None:
        """Under autocast: its dtype, its error, float32 gradients, and W' as without it."""
        layer, W, A, B = self.layer()
        layer.float()
        x = torch.randn(3, 7)
        with torch.autocast("cpu", dtype):
            assert_close(layer.weight, (W + 1.5 * B @ A).float())
            actual = layer(x)
            base = F.linear(x, (W + 1.5 * B @ A).float(), layer.bias)
        assert actual.dtype == base.dtype == dtype
        expected = F.linear(x.double(), W + 1.5 * B @ A, layer.bias.double())
        grads = torch.autograd.grad(loss([actual]), pl.parameters(layer))
        wanted = torch.autograd.grad(loss([expected]), [A, B])
        assert all(grad.dtype == torch.float32 for grad in grads)
        for one, other in zip([actual, *grads], [expected, *wanted], strict=True):
            # Four products follow each other, each rounded to half precision.
            error = (one.double() - other).detach().norm() / other.detach().norm()
            assert float(error) <= 4 * torch.finfo(dtype).eps
