"""Memory: a factored layer never builds W' in training; the tensors that it saves."""

import gc
import weakref
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

import paramlora as pl
from tests.support.helpers import new_garbage_only
from tests.support.reference import HOSTS, KINDS, Case, floats, loss, shake

N, IN, OUT, RANK = 6, 40, 30, 2


class CreatedTensors(TorchDispatchMode):
    """Records the tensors that operations create, except views of known ones."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.made: list[Tensor] = []  # kept, so that no storage is used twice

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        out = func(*args, **(kwargs or {}))
        self.made += [x for x in floats(out) if x.untyped_storage().data_ptr() not in self.known]
        return out

    @property
    def largest(self) -> int:
        return max(tensor.numel() for tensor in self.made)


class SavedTensors:
    """Records the tensors that a forward saves for the backward."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self.hooks = saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        self.tensors.append(tensor.detach())
        return tensor

    def elements_besides(self, *known: Tensor) -> int:
        """Return the number of saved elements besides those of the known tensors."""
        known_pointers = {tensor.untyped_storage().data_ptr() for tensor in known}
        sizes = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in self.tensors}
        left = sum(size for pointer, size in sizes.items() if pointer not in known_pointers)
        return left // self.tensors[0].element_size()

    def has_shape(self, shape: tuple[int, ...], *known: Tensor) -> bool:
        """Return whether a tensor of this shape or its transpose is saved, besides known ones."""
        pointers = {tensor.untyped_storage().data_ptr() for tensor in known}
        return any(
            tuple(tensor.shape) in (shape, shape[::-1])
            and tensor.untyped_storage().data_ptr() not in pointers
            for tensor in self.tensors
        )


def linear(dtype: torch.dtype = torch.float32) -> tuple[Any, Tensor, Tensor]:
    model = nn.Linear(IN, OUT, dtype=dtype)
    return model, torch.randn(N, IN, dtype=dtype, requires_grad=True), model.weight


def embedding(dtype: torch.dtype = torch.float32) -> tuple[Any, Tensor, Tensor]:
    model = nn.Embedding(OUT, IN, padding_idx=0, dtype=dtype)
    return model, torch.randint(OUT, (N,)), model.weight


both = pytest.mark.parametrize("make", [linear, embedding])
Make = Callable[..., tuple[Any, Tensor, Tensor]]


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("adapters", [1, 3])
def test_training_creates_no_tensor_as_large_as_w(
    make: Make, dtype: torch.dtype, adapters: int
) -> None:
    """Forward and backward of `layer(x)` create no tensor as large as W, with many adapters too."""
    model, x, W = make(dtype)
    for i in range(adapters):
        pl.attach(model, pl.LoRA(rank=RANK), targets="weight", name=f"a{i}", activate="no")
    pl.enable(model)
    shake(model)
    pl.scale(model, torch.tensor(0.5), "a0")
    with CreatedTensors(W) as recorded:
        loss([model(x)]).backward()
    assert all(parameter.grad is not None for parameter in pl.parameters(model))
    assert recorded.largest < W.numel()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, nullcontext])
@both
def test_evaluation_creates_no_tensor_as_large_as_w(make: Make, mode: Any) -> None:
    """In eval mode `layer(x)` creates no tensor as large as W, with and without gradients."""
    model, x, W = make()
    pl.attach(model.eval(), pl.LoRA(rank=RANK), targets="weight")
    with mode(), CreatedTensors(W) as recorded:
        model(x)
    assert recorded.largest < W.numel()


@both
def test_reading_the_weight_creates_it(make: Make) -> None:
    """Reading `layer.weight` creates W', and the recorders of this file find it."""
    model, x, W = make()
    pl.attach(model, pl.LoRA(rank=RANK), targets="weight")
    function: Any = F.linear if make is linear else F.embedding
    with CreatedTensors(W) as recorded:
        function(x, model.weight)
    assert recorded.largest == W.numel()
    saved = SavedTensors()
    with saved.hooks:
        F.linear(torch.randn(N, IN, requires_grad=True), model.weight.view(OUT, IN))
    assert saved.has_shape((OUT, IN), W)


def test_several_adapters_save_x_once() -> None:
    """Each adapter after the first saves n·r elements and at most its factors; x is saved once."""
    model, x, W = linear()
    for name in ("one", "two", "three"):
        pl.attach(model, pl.LoRA(rank=RANK), targets="weight", name=name, activate="no")
    pl.enable(model)
    saved = SavedTensors()
    with saved.hooks:
        model(x)
    assert not saved.has_shape((OUT, IN), W)
    beside = saved.elements_besides(*model.parameters())
    assert beside <= N * (IN + 3 * RANK) + 3 * RANK * (IN + OUT)


def test_many_rows_do_not_save_w() -> None:
    """With many rows W' may be built, but is not saved: at most n·(k + r) elements are."""
    for rows in (1, IN, 4 * OUT, 4 * IN, 40 * IN):
        model, _, W = linear()
        pl.attach(model, pl.LoRA(rank=RANK, alpha=3), targets="weight")
        saved = SavedTensors()
        with saved.hooks:
            model(torch.randn(rows, IN, requires_grad=True))
        assert not saved.has_shape((OUT, IN), W)
        assert saved.elements_besides(*model.parameters()) <= rows * (IN + RANK)


def test_layers_that_share_x_save_it_once() -> None:
    """Three bfloat16 layers with the same x save it once, and at most cast the factors."""
    layers = nn.ModuleList([nn.Linear(IN, OUT, dtype=torch.bfloat16) for _ in range(3)])
    pl.attach(layers, pl.LoRA(rank=RANK))
    x = torch.randn(N, IN, dtype=torch.bfloat16, requires_grad=True)
    saved = SavedTensors()
    with saved.hooks:
        for layer in layers:
            layer(x)
    beside = saved.elements_besides(*layers.parameters())
    assert beside <= N * IN + 3 * RANK * (N + IN + OUT)


@pytest.mark.skipif(
    not hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks"),
    reason="this torch does not tell which hooks on saved tensors there are",
)
@pytest.mark.parametrize("host", ["conv2d", "conv_transpose1d", "bilinear", "attention"])
@pytest.mark.parametrize("spec", [pl.LoRA(rank=RANK), pl.Delta()])
def test_dense_layers_do_not_save_w(host: str, spec: pl.kinds.Spec) -> None:
    """A layer that needs a dense W' saves W and the factors, but not W'."""
    case = Case.of(HOSTS[host], torch.float32)
    shapes = {tuple(p.shape) for p in case.plain.parameters() if p.dim() > 1}
    pl.attach(case.model, spec, targets=[p for p in case.sites(KINDS["lora"]) if "out" not in p])
    saved = SavedTensors()
    with saved.hooks:
        case.model(*case.inputs)
    for shape in shapes:
        assert not saved.has_shape(shape, *case.model.parameters())


class Tracking(pl.Delta):
    """A Delta that keeps a weak reference to each W' that it builds."""

    made: ClassVar[list[weakref.ref[Tensor]]] = []

    def apply(
        self, weight: Tensor, factors: Mapping[str, Tensor], strength: float | Tensor = 1.0
    ) -> Tensor:
        adapted = super().apply(weight, factors, strength)
        self.made.append(weakref.ref(adapted))
        return adapted


@pytest.mark.parametrize("host", ["lstm", "gru_deep", "attention", "conv2d", "bare_3d"])
def test_nothing_is_alive_after_a_forward(host: str) -> None:
    """After the outputs of a forward are deleted, no W' and no autograd graph is alive."""
    case = Case.of(HOSTS[host], torch.float32)
    pl.attach(case.model, Tracking(), targets="*")
    for mode in (nullcontext, torch.no_grad):
        Tracking.made.clear()
        with new_garbage_only():
            with mode():
                case.model(*case.inputs)
            assert Tracking.made
            gc.collect()
        assert [made() for made in Tracking.made if made() is not None] == []


def test_embedding_saves_ids_rows_and_factors() -> None:
    """An Embedding saves the ids, n·r elements of rows of B and a padding mask, but not W."""
    model, x, W = embedding()
    pl.attach(model, pl.LoRA(rank=RANK), targets="weight")
    saved = SavedTensors()
    with saved.hooks:
        model(x)
    assert not saved.has_shape((OUT, IN), W)
    assert all(tensor.data_ptr() != W.data_ptr() for tensor in saved.tensors)
    factors = {parameter.data_ptr() for parameter in pl.parameters(model)}
    rows = [x for x in saved.tensors if x.is_floating_point() and x.data_ptr() not in factors]
    assert sum(tensor.numel() for tensor in rows) == N * RANK


@both
def test_off_and_merged_cost_of_the_base(make: Make) -> None:
    """With its adapter off or merged, a layer creates and saves the plain layer's tensors."""
    model, x, W = make()

    def cost() -> tuple[int, int, int]:
        saved = SavedTensors()
        with CreatedTensors(W) as recorded, saved.hooks:
            model(x)
        return len(recorded.made), recorded.largest, len(saved.tensors)

    model.requires_grad_(False)
    plain = cost()
    pl.attach(model, pl.LoRA(rank=RANK), targets="weight")
    shake(model)
    with pl.disabled(model):
        assert cost() == plain
    # While merged factors require a gradient, the layer keeps what it takes to refuse a backward.
    pl.freeze(model)
    with pl.merged(model):
        known, W = W, model.weight
        assert known.shape == W.shape
        assert cost() == plain
