"""The node of a large layer in a graph of torch.compile: values, gradients, where it is used."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

import paramlora as pl
from paramlora.compute import compiled_node, lowrank
from paramlora.kinds.spec import LowRank
from tests.support.versions import torch_before

pytestmark = pytest.mark.filterwarnings(r"ignore:::torch\..*")


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Use the node for all layers, and collect the numbers of rows that it computes."""
    monkeypatch.setattr(compiled_node, "applies", lambda *given: True)
    rows, forward = [], compiled_node.products.forward

    def counted(x: Tensor, *given: object) -> tuple[Tensor, Tensor | None]:
        rows.append(x.numel() // x.shape[-1])
        return forward(x, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(compiled_node.products, "forward", counted)
    return rows


def compiled(x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor) -> Tensor:
    """Return a compiled layer's output, with an activation behind it."""

    def layer(x: Tensor) -> Tensor:
        return lowrank.linear(x, W, b, [LowRank(A, B, 0.7)]).tanh()

    return torch.compile(layer, fullgraph=True, backend="aot_eager")(x)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(6, 8), (2, 3, 8)], ids=str)
@pytest.mark.parametrize("wanted", ["xAB", "AB", "x", "B"])
def test_values_and_gradients(
    everywhere: list[int], wanted: str, shape: tuple[int, ...], bias: bool
) -> None:
    """Output and wanted gradients are those of dense weights in float64."""
    W, b = torch.randn(5, 8, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    leaves = {
        name: torch.randn(size, dtype=torch.float64, requires_grad=name in wanted)
        for name, size in {"x": shape, "A": (2, 8), "B": (5, 2)}.items()
    }
    x, A, B = leaves.values()
    inputs = [leaves[name] for name in wanted]
    y = compiled(x, W, b if bias else None, A, B)
    found = torch.autograd.grad(y.square().sum(), inputs)
    expected = ((x @ (W + 0.7 * B @ A).T) + (b if bias else 0)).tanh()
    assert everywhere == [6]
    assert_close(y, expected)
    assert_close(found, torch.autograd.grad(expected.square().sum(), inputs))


def test_inference_and_float32_factors(everywhere: list[int]) -> None:
    """Without gradients, and with factors of another dtype than the weight's."""
    x, W = torch.randn(6, 8, dtype=torch.float64), torch.randn(5, 8, dtype=torch.float64)
    A, B = torch.randn(2, 8, requires_grad=True), torch.randn(5, 2, requires_grad=True)
    with torch.no_grad():
        y = compiled(x, W, None, A, B)
    assert everywhere == [6]
    assert_close(y, (x @ (W + 0.7 * B.double() @ A.double()).T).tanh())


def test_a_model_with_the_node_switches_and_vmaps(everywhere: list[int]) -> None:
    """A compiled model follows `disable`, and torch.func.vmap gives each row its output."""
    model = nn.Linear(8, 5)
    off = model(x := torch.randn(4, 3, 8))
    pl.attach(model, pl.LoRA(2))
    _, B = pl.parameters(model)
    nn.init.ones_(B)
    run = torch.compile(model, fullgraph=True, backend="aot_eager")
    on = model(x)
    assert_close(run(x), on)
    with pl.disabled(model):
        assert_close(run(x), off)
    assert_close(torch.compile(torch.func.vmap(model), backend="aot_eager")(x), on)
    if not torch_before("2.14"):  # an older compiler leaves the forward of the layer out after vmap
        with pl.disabled(model):
            assert_close(run(x), off)


def test_where_it_is_used() -> None:
    """Small layers, CPUs, float32 and trained weights keep the form that the compiler fuses."""
    x, W = torch.empty(4, 8), torch.empty(5, 8)
    assert not compiled_node.applies(x, W, None, torch.bfloat16, 2)


@pytest.mark.gpu
class TestOnAGPU:
    def test_large_layers_use_it(self) -> None:
        """From 2^25 elements on, in half precision, to rank 128, if W and b are frozen."""
        x = torch.empty(4096, 8192, device="cuda", dtype=torch.bfloat16)
        W, half = torch.empty(64, 8192, device="cuda", dtype=torch.bfloat16), torch.bfloat16
        assert compiled_node.applies(x, W, None, half, 128)
        assert not compiled_node.applies(x, W, None, half, 129)
        assert not compiled_node.applies(x, W, None, torch.float32, 2)
        assert not compiled_node.applies(x[:4095], W, None, half, 2)
        assert not compiled_node.applies(x, W.clone().requires_grad_(), None, half, 2)
        assert not compiled_node.applies(x, W, W[:, 0].clone().requires_grad_(), half, 2)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("autocast", [False, True])
    def test_gradients_of_a_compiled_model(self, dtype: torch.dtype, autocast: bool) -> None:
        """Output and all gradients of two compiled layers agree with float64, autocast or not."""
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(2048, 4096), nn.GELU(), nn.Linear(4096, 1024)).cuda()
        exact = [parameter.double() for parameter in model.parameters()]
        if not autocast:
            model.to(dtype)
            exact = [parameter.double() for parameter in model.parameters()]
        pl.attach(model, pl.LoRA(16))
        factors = list(pl.parameters(model))
        with torch.no_grad():
            for factor in factors:
                factor.normal_(std=0.05)
        x = torch.randn(8192, 2048, device="cuda", dtype=exact[0].dtype)
        x = x.to(torch.float32 if autocast else dtype).requires_grad_()
        with torch.autocast("cuda", dtype, enabled=autocast):
            y = torch.compile(model, fullgraph=True)(x)
        # 8192 times the mean of squares: in float16 smaller gradients would be rounded to zero.
        found = torch.autograd.grad(8192 * y.float().square().mean(), [x, *factors])
        W1, b1, W2, b2 = exact
        leaves = [tensor.detach().double().requires_grad_() for tensor in (x, *factors)]
        x64, A1, B1, A2, B2 = leaves
        h = F.gelu(x64 @ (W1 + B1 @ A1).T + b1)
        y64 = h @ (W2 + B2 @ A2).T + b2
        expected = torch.autograd.grad(8192 * y64.square().mean(), leaves)
        for one, other in zip(found, expected, strict=True):
            assert (one.double() - other).norm() < 2e-2 * other.norm()
