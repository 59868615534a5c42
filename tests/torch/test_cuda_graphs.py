"""Training steps of adapted models in CUDA graphs (docs/cuda-graphs.md).

The tests without the mark `gpu` check on a CPU what a graph relies on: a graph reads addresses.
"""

import copy
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import paramlora as pl
from paramlora.compute import plan
from tests.support.helpers import BOUNDS, error

Batches = list[tuple[Tensor, Tensor]]
ROWS, WIDTH, CLASSES, WARM_UP, STEPS = 128, 256, 256, 3, 8


def adapted(device: str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    """Return a model with the adapters "a" and "b", with "a" active, and factors that are not 0."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, 512), nn.GELU(), nn.Linear(512, CLASSES))
    model.to(device, dtype)
    for name in "ab":
        pl.attach(model, pl.LoRA(8), nn.Linear, name=name)
    with torch.no_grad():
        for parameter in pl.parameters(model):
            parameter.normal_(std=0.05)
    pl.activate(model, "a")
    pl.freeze(model)
    pl.unfreeze(model, "a")
    return model


def with_another(model: nn.Module) -> nn.Module:
    pl.attach(model, pl.LoRA(1), "0", name="c")
    return model


def merged(model: nn.Module) -> nn.Module:
    pl.merge(model)
    return model


def addresses(model: nn.Module) -> list[int]:
    return [tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())]


@pytest.mark.parametrize(
    "write",
    [
        lambda model: pl.load_state_dict(model, pl.state_dict(copy.deepcopy(model), "b"), "a"),
        lambda model: pl.load_base_state_dict(model, pl.base_state_dict(copy.deepcopy(model))),
        lambda model: pl.detach(with_another(model), "c"),
        lambda model: pl.activate(model, "b"),
        lambda model: pl.unmerge(merged(model)),
    ],
    ids=["factors", "base", "attach and detach another", "activate", "merge and unmerge"],
)
def test_tensors_stay_at_their_addresses(write: Callable[[nn.Module], object]) -> None:
    """Loading values, switching and merging and back leave all tensors at their addresses."""
    model = adapted()
    before = addresses(model)
    write(model)
    assert addresses(model) == before


def test_a_merged_adapter_leaves_the_weight_before_at_its_address() -> None:
    """While an adapter is merged, the memory that a graph reads still has the base's values."""
    model = adapted()
    weight = model[0].parametrizations.weight.original.data
    before = weight.clone()
    with pl.merged(model):
        assert torch.equal(weight, before)


def test_a_strength_as_a_tensor_is_not_copied() -> None:
    """Writing into a tensor that `scale` was given changes the strength."""
    model, x, strength = adapted(), torch.randn(4, WIDTH), torch.ones(())
    pl.scale(model, strength, "a")
    with pl.disabled(model):
        base = model(x)
    assert not torch.equal(model(x), base)
    strength.fill_(0.0)
    assert torch.equal(model(x), base)


@pytest.fixture(params=["extension", "function and Triton", "plain"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Compute adapted layers by the extension, by our Function with its kernels, or plainly."""
    if request.param == "extension":
        request.getfixturevalue("native_module")
        return request.param
    monkeypatch.setattr("paramlora.native.load.module", lambda: None)
    if request.param == "plain":
        monkeypatch.setattr(plan, "PLAIN_BELOW", defaultdict(lambda: 2**62))
    else:
        monkeypatch.setattr(plan, "PLAIN_BELOW", defaultdict(int))
        monkeypatch.setattr(plan, "WORTH_A_KERNEL", 0)
        monkeypatch.setattr(plan, "WORTH_PYTHON", 0)
    return request.param


@pytest.mark.gpu
class TestGraphs:
    @pytest.fixture(autouse=True)
    def _on_cuda(self) -> None:
        if not torch.cuda.is_available():
            pytest.skip("CUDA graphs need a CUDA GPU")

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_steps_equal_eager_ones(self, path: str, dtype: torch.dtype) -> None:
        """Three eager steps and five replays give the factors of eight eager steps."""
        model = adapted("cuda", dtype)
        eager, before, batches = copy.deepcopy(model), values(model), drawn(dtype)
        train_eagerly(eager, batches)
        train_by_graph(model, batches)
        bound = 1e-3 if dtype is torch.float32 else BOUNDS[dtype]
        assert error(values(model) - before, values(eager) - before) < bound

    def test_the_fused_product_is_in_the_graph(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """After a warm-up, the capture uses the product with its update if its bits allow it."""
        fused = pytest.importorskip("paramlora.compute.fused_product")
        monkeypatch.setattr("paramlora.native.load.module", lambda: None)
        monkeypatch.setattr(plan, "PLAIN_BELOW", defaultdict(int))
        monkeypatch.setattr(plan, "WORTH_A_KERNEL", 0)
        monkeypatch.setattr(plan, "WORTH_PYTHON", 0)
        monkeypatch.setattr(fused, "_same_bits", {})
        product, captured = fused.add_low_rank, []

        def record(*args: Tensor, **options: bool) -> Tensor:
            captured.append(torch.cuda.is_current_stream_capturing())
            return product(*args, **options)

        monkeypatch.setattr(fused, "add_low_rank", record)
        model, batches = adapted("cuda", torch.bfloat16), drawn(torch.bfloat16)
        if not fused.applies(batches[0][0], model[0].parametrizations.weight.original):
            pytest.skip("the fused product needs a Hopper GPU")
        train_by_graph(model, batches)
        # One product in the forward of each layer with equal bits, and the dx of the second layer.
        assert len(fused._same_bits) == 2
        assert sum(captured) == 1 + sum(fused._same_bits.values())

    def test_what_a_replay_reads(self) -> None:
        """A replay reads factors and tensor strengths, but not which adapters are active."""
        model, x = adapted("cuda"), torch.randn(ROWS, WIDTH, device="cuda")
        strength = torch.ones((), device="cuda")
        pl.scale(model, strength, "a")
        graph, found = forward_graph(model, x)
        with torch.no_grad():
            pl.disable(model)
            base = model(x)
            graph.replay()
            assert error(found, base.double()) > 1e-2
            pl.enable(model, "a")
            pl.load_state_dict(model, pl.state_dict(model, "b"), "a")
            graph.replay()
            assert error(found, model(x).double()) < 1e-5
            strength.fill_(0.0)
            graph.replay()
            assert error(found, base.double()) < 1e-5

    def test_routed_rows(self) -> None:
        """Adapters that are trained at once give the same outputs by a graph."""
        model, x = adapted("cuda"), torch.randn(ROWS, WIDTH, device="cuda")
        for ids in (torch.arange(2).repeat_interleave(ROWS // 2), torch.arange(ROWS) % 2):
            with pl.routed(model, ids):
                graph, found = forward_graph(model, x)
                graph.replay()
                with torch.no_grad():
                    assert error(found, model(x).double()) < 1e-5

    def test_graphed_callables(self, path: str) -> None:
        """A model by make_graphed_callables trains as the eager one, and toggles in eval mode."""
        model = adapted("cuda").train()
        eager, before = copy.deepcopy(model), values(model)
        batches = drawn(torch.float32)
        train_eagerly(eager, batches)
        graphed: Any = torch.cuda.make_graphed_callables(model, (batches[0][0].clone(),))
        train_eagerly(graphed, batches)
        assert error(values(model) - before, values(eager) - before) < 1e-3
        x = batches[0][0]
        with torch.no_grad(), pl.disabled(graphed.eval()):
            assert torch.equal(graphed(x), eager_base(eager, x))


def values(model: nn.Module) -> Tensor:
    """Return the factors of "a" as one vector in float64."""
    return torch.cat([p.detach().double().flatten() for p in pl.parameters(model, "a")])


def drawn(dtype: torch.dtype) -> Batches:
    """Return batches of inputs and labels on the GPU."""
    torch.manual_seed(1)
    return [
        (
            torch.randn(ROWS, WIDTH, device="cuda", dtype=dtype),
            torch.randint(CLASSES, (ROWS,), device="cuda"),
        )
        for _ in range(STEPS)
    ]


def stepper(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], None]:
    """Return a function that trains "a" for one step on the present contents of x and y."""
    optimizer = torch.optim.Adam(pl.parameters(model, "a"), 1e-2, eps=1e-4, capturable=True)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x).float(), y).backward()
        optimizer.step()

    return step


def run(step: Callable[[], None], batches: Batches, x: Tensor, y: Tensor) -> None:
    """Copy each batch into x and y, and call `step`."""
    for batch in batches:
        x.copy_(batch[0])
        y.copy_(batch[1])
        step()


def train_eagerly(model: nn.Module, batches: Batches) -> None:
    x, y = map(torch.empty_like, batches[0])
    run(stepper(model, x, y), batches, x, y)


def train_by_graph(model: nn.Module, batches: Batches) -> None:
    """Train on three batches eagerly, and on the others by replays."""
    x, y = map(torch.empty_like, batches[0])
    step, stream = stepper(model, x, y), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(step, batches[:WARM_UP], x, y)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        step()
    run(graph.replay, batches[WARM_UP:], x, y)
    torch.cuda.synchronize()


@torch.no_grad()
def forward_graph(model: nn.Module, x: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """Return a graph of the forward, and its output."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        model(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        found = model(x)
    return graph, found


def eager_base(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad(), pl.disabled(model):
        return model(x)
