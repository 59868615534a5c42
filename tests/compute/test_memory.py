"""A factored layer never builds W' in training, and keeps no more than x, x Aᵀ and the factors."""

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
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import paramlora as pl
from tests.support.reference import HOSTS, KINDS, Case, floats, loss, shake

N, IN, OUT, RANK = 6, 40, 30, 2


class Made(TorchDispatchMode):
    """Records the tensors that operations make, views of known ones left out."""

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


class Kept:
    """Records what a forward keeps for the backward: the elements of each storage, once."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self.hooks = saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        self.tensors.append(tensor.detach())
        return tensor

    def elements_beside(self, *known: Tensor) -> int:
        """Return how many elements are kept beside those of the known tensors."""
        leave_out = {tensor.untyped_storage().data_ptr() for tensor in known}
        sizes = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in self.tensors}
        left = sum(size for pointer, size in sizes.items() if pointer not in leave_out)
        return left // self.tensors[0].element_size()

    def keeps_shape(self, shape: tuple[int, ...], *known: Tensor) -> bool:
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
def test_training_step_makes_no_tensor_of_the_weights_size(
    make: Make, dtype: torch.dtype, adapters: int
) -> None:
    """Forward and backward of `layer(x)` make no tensor as large as W, however many adapters."""
    model, x, W = make(dtype)
    for i in range(adapters):
        pl.attach(model, pl.LoRA(rank=RANK), targets="weight", name=f"a{i}")
    shake(model)
    pl.scale(model, torch.tensor(0.5), "a0")
    with Made(W) as recorded:
        loss([model(x)]).backward()
    assert all(parameter.grad is not None for parameter in pl.parameters(model))
    assert recorded.largest < W.numel()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, nullcontext])
@both
def test_evaluation_makes_no_tensor_of_the_weights_size(make: Make, mode: Any) -> None:
    """`layer(x)` in eval mode makes no tensor as large as W either, with and without gradients."""
    model, x, W = make()
    pl.attach(model.eval(), pl.LoRA(rank=RANK), targets="weight")
    with mode(), Made(W) as recorded:
        model(x)
    assert recorded.largest < W.numel()


@both
def test_reading_the_weight_does_make_it(make: Make) -> None:
    """The same count for a reader of `layer.weight` finds W', so the tests above can fail."""
    model, x, W = make()
    pl.attach(model, pl.LoRA(rank=RANK), targets="weight")
    function: Any = F.linear if make is linear else F.embedding
    with Made(W) as recorded:
        function(x, model.weight)
    assert recorded.largest == W.numel()
    kept = Kept()
    with kept.hooks:
        F.linear(torch.randn(N, IN, requires_grad=True), model.weight.view(OUT, IN))
    assert kept.keeps_shape((OUT, IN), W)


def test_linear_keeps_x_and_the_hidden_rows() -> None:
    """A Linear keeps n·(k + r) elements for the backward, beside the model's parameters."""
    model, x, W = linear()
    pl.attach(model, pl.LoRA(rank=RANK, alpha=3), targets="weight")
    kept = Kept()
    with kept.hooks:
        model(x)
    assert not kept.keeps_shape((OUT, IN), W)
    assert kept.elements_beside(*model.parameters()) == N * (IN + RANK)


def test_linear_keeps_x_once_for_all_adapters() -> None:
    """Each further adapter keeps n·r elements more and at most its factors again; x stays one."""
    model, x, W = linear()
    for name in ("one", "two", "three"):
        pl.attach(model, pl.LoRA(rank=RANK), targets="weight", name=name)
    kept = Kept()
    with kept.hooks:
        model(x)
    assert not kept.keeps_shape((OUT, IN), W)
    beside = kept.elements_beside(*model.parameters())
    assert beside <= N * (IN + 3 * RANK) + 3 * RANK * (IN + OUT)


def test_linear_never_keeps_the_adapted_weight() -> None:
    """With many rows too, where W' may be built, it is not kept: n·(k + r) elements at most."""
    for rows in (1, IN, 4 * OUT, 4 * IN, 40 * IN):
        model, _, W = linear()
        pl.attach(model, pl.LoRA(rank=RANK, alpha=3), targets="weight")
        kept = Kept()
        with kept.hooks:
            model(torch.randn(rows, IN, requires_grad=True))
        assert not kept.keeps_shape((OUT, IN), W)
        assert kept.elements_beside(*model.parameters()) <= rows * (IN + RANK)


def test_siblings_keep_a_half_precision_x_once() -> None:
    """Three bfloat16 layers that read the same x keep it once; at most the factors are cast."""
    layers = nn.ModuleList([nn.Linear(IN, OUT, dtype=torch.bfloat16) for _ in range(3)])
    pl.attach(layers, pl.LoRA(rank=RANK))
    x = torch.randn(N, IN, dtype=torch.bfloat16, requires_grad=True)
    kept = Kept()
    with kept.hooks:
        for layer in layers:
            layer(x)
    beside = kept.elements_beside(*layers.parameters())
    assert beside <= N * IN + 3 * RANK * (N + IN + OUT)


@pytest.mark.skipif(
    not hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks"),
    reason="this torch does not tell which hooks on saved tensors there are",
)
@pytest.mark.parametrize("host", ["conv2d", "conv_transpose1d", "bilinear", "attention"])
@pytest.mark.parametrize("spec", [pl.LoRA(rank=RANK), pl.Delta()])
def test_layers_that_build_the_weight_keep_none(host: str, spec: pl.kinds.Spec) -> None:
    """A layer that needs W' dense keeps W and the factors for the backward, and no W'."""
    case = Case.of(HOSTS[host], torch.float32)
    shapes = {tuple(p.shape) for p in case.plain.parameters() if p.dim() > 1}
    pl.attach(case.model, spec, targets=[p for p in case.sites(KINDS["lora"]) if "out" not in p])
    kept = Kept()
    with kept.hooks:
        case.model(*case.inputs)
    for shape in shapes:
        assert not kept.keeps_shape(shape, *case.model.parameters())


class Noting(pl.Delta):
    """A Delta that notes each W' that it makes."""

    made: ClassVar[list[weakref.ref[Tensor]]] = []

    def apply(
        self, weight: Tensor, factors: Mapping[str, Tensor], strength: float | Tensor = 1.0
    ) -> Tensor:
        adapted = super().apply(weight, factors, strength)
        self.made.append(weakref.ref(adapted))
        return adapted


@pytest.mark.parametrize("host", ["lstm", "gru_deep", "attention", "conv2d", "bare_3d"])
def test_nothing_is_held_after_a_forward(host: str) -> None:
    """When a forward's outputs are gone, no W' is alive any more, nor the graph that made it."""
    case = Case.of(HOSTS[host], torch.float32)
    pl.attach(case.model, Noting(), targets="*")
    for mode in (nullcontext, torch.no_grad):
        Noting.made.clear()
        with mode():
            case.model(*case.inputs)
        assert Noting.made
        gc.collect()
        assert [made() for made in Noting.made if made() is not None] == []


def test_embedding_keeps_ids_rows_and_factors() -> None:
    """An Embedding keeps the ids, n·r elements of B's rows and a mask of padding, not W."""
    model, x, W = embedding()
    pl.attach(model, pl.LoRA(rank=RANK), targets="weight")
    kept = Kept()
    with kept.hooks:
        model(x)
    assert not kept.keeps_shape((OUT, IN), W)
    assert all(tensor.data_ptr() != W.data_ptr() for tensor in kept.tensors)
    factors = {parameter.data_ptr() for parameter in pl.parameters(model)}
    rows = [x for x in kept.tensors if x.is_floating_point() and x.data_ptr() not in factors]
    assert sum(tensor.numel() for tensor in rows) == N * RANK


@both
def test_switched_off_or_merged_costs_what_the_base_costs(make: Make) -> None:
    """With adapters off or merged, a layer makes and keeps exactly what the plain layer does."""
    model, x, W = make()

    def cost() -> tuple[int, int, int]:
        kept = Kept()
        with Made(W) as recorded, kept.hooks:
            model(x)
        return len(recorded.made), recorded.largest, len(kept.tensors)

    model.requires_grad_(False)
    plain = cost()
    pl.attach(model, pl.LoRA(rank=RANK), targets="weight")
    shake(model)
    with pl.disabled(model):
        assert cost() == plain
    with pl.merged(model):
        known, W = W, model.weight
        assert known.shape == W.shape
        assert cost() == plain


@both
def test_other_readers_get_the_dense_weight(make: Make) -> None:
    """`layer.weight` and a functional call that reads it are the dense W', as `layer(x)` is."""
    model, x, W = make(torch.float64)
    pl.attach(model, pl.LoRA(rank=RANK, alpha=3), targets="weight")
    shake(model)
    factors = pl.state_dict(model)
    dense = W.detach() + 1.5 * factors["weight.B"] @ factors["weight.A"]
    assert type(model.weight) is Tensor
    assert_close(model.weight, dense, check_dtype=True)
    function: Any = (lambda x, w: F.linear(x, w, model.bias)) if make is linear else F.embedding
    assert_close(function(x, model.weight), function(x, dense))
    assert_close(model(x), function(x, dense))
