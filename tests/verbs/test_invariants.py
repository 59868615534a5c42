"""The design's invariants, each by its number, on one model of mixed layers.

The third, on how the forward is computed, is in `test_forward.py` and `test_conformance.py`; those
on what must not touch what, 6 to 8, are in `test_independence.py`.
"""

import copy
import io
import pickle
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

import paramlora as pl
from tests.support.helpers import snapshot, unchanged
from tests.support.mixed import MATRICES, assert_bits, attach_two, flags, mixed, train
from tests.support.reference import shake

DTYPES = [torch.float64, torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mode", [nullcontext, torch.no_grad, torch.inference_mode])
def test_1_new_or_off_is_the_base(
    dtype: torch.dtype, training: bool, mode: Callable[[], AbstractContextManager[Any]]
) -> None:
    """Outputs are bitwise the base's after attach before training; with adapters off, always."""
    model, x = mixed(dtype)
    base = copy.deepcopy(model).train(training)
    model.train(training)
    attach_two(model)
    with mode():
        expected = base(x)
        assert_bits(model(x), expected)
    shake(model)
    pl.scale(model, 0.3, "full")
    with mode():
        assert not torch.equal(model(x), expected)
        with pl.disabled(model):
            assert_bits(model(x), expected)
        with pl.using(model):
            assert_bits(model(x), expected)
        with pl.merged(model):
            pass
        pl.disable(model)
        assert_bits(model(x), expected)


def test_2_the_weight_is_the_adapted_one() -> None:
    """`layer.weight` is W', dense and plain; the layer keeps its class; rank BA is at most r."""
    for dtype in DTYPES:
        model, x = mixed(dtype)
        base = copy.deepcopy(model)
        pl.attach(model, pl.LoRA(rank=2), MATRICES)
        train(model.eval(), x)
        assert isinstance(model.head, nn.Linear)
        assert isinstance(model.rnn, nn.GRU)
        for row in pl.summary(model).sites:
            owner, _, name = row.site.rpartition(".")
            read = getattr(model.get_submodule(owner), name)
            assert type(read) is Tensor
            assert read.dtype == dtype
            assert read.layout is torch.strided
            update = (read - base.get_parameter(row.site)).detach().double().flatten(1)
            assert update.any()
            # What rounding W + ΔW adds to the rank is below √size units in the last place.
            noise = torch.finfo(dtype).eps * float(read.detach().double().norm())
            assert torch.linalg.matrix_rank(update, atol=noise, rtol=0.0) <= 2


class TestInvariant4:
    """Detaching is the exact inverse of attaching."""

    def test_4_all_is_given_back(self) -> None:
        """Class, parameter identity, order, requires_grad, hooks and bits are as they were."""
        model, x = mixed()
        model.eval()
        model.table.requires_grad_(False)
        model.head.register_forward_hook(lambda *_: None)
        model.rnn.register_forward_pre_hook(lambda *_: None)
        model.embed.register_full_backward_hook(lambda *_: None)
        model.head.weight.register_hook(lambda grad: grad)
        with unchanged(model):
            attach_two(model)
            train(model, x)
            pl.detach(model, "low")
            pl.attach(model, pl.LoRA(rank=1), MATRICES, name="low")
            pl.disable(model, "full")
            pl.merge(model, "low")
            pl.unmerge(model)
            pl.detach(model)
        assert model.head.weight._backward_hooks

    def test_4_all_tensors_of_one_module(self) -> None:
        """Detaching from a module with several adapted tensors restores all of them."""
        model: Any = nn.LSTM(4, 4, num_layers=2)
        names = [name for name, _ in model.named_parameters()]
        pl.attach(model, pl.Delta(), "*")
        assert len(model.parametrizations) == len(names) == 8
        pl.detach(model)
        assert type(model) is nn.LSTM
        assert [name for name, _ in model.named_parameters()] == names

    @pytest.mark.parametrize("foreign", [weight_norm, spectral_norm])
    @pytest.mark.parametrize("freeze", [True, False])
    def test_4_foreign_ones_from_before_stay(
        self, foreign: Callable[[nn.Module], nn.Module], freeze: bool
    ) -> None:
        """A weight_norm or spectral_norm from before stays, with its class and its bits."""
        model, x = mixed()
        foreign(model.eval().head)
        weight = model.head.weight.detach().clone()
        with unchanged(model):
            attach_two(model, freeze=freeze)
            assert_bits(model.head.weight.detach(), weight)
            train(model, x)
            assert not torch.equal(model.head.weight, weight)
            pl.detach(model)
            model.zero_grad()
        assert_bits(model.head.weight.detach(), weight)

    @pytest.mark.parametrize(("foreign", "parts"), [(weight_norm, 2), (spectral_norm, 1)])
    def test_4_foreign_ones_from_after_stay(
        self, foreign: Callable[[nn.Module], nn.Module], parts: int
    ) -> None:
        """One that is registered after ours stays and works as on the plain layer."""
        model, x = mixed()
        plain = copy.deepcopy(model.eval())
        attach_two(model)
        torch.manual_seed(1)
        foreign(model.head)
        torch.manual_seed(1)
        foreign(plain.head)
        train(model, x)
        pl.detach(model)
        assert len([n for n, _ in model.head.named_parameters() if "original" in n]) == parts
        assert_bits(model.state_dict(), plain.state_dict())
        assert_bits(model(x), plain(x))
        assert flags(model) == flags(plain)


@pytest.mark.parametrize("dtype", DTYPES)
def test_5_unmerging_gives_back_the_bits(dtype: torch.dtype) -> None:
    """Merging and unmerging two adapters changes no bit, in bfloat16 a thousand times over."""
    layers: Any = nn.Sequential(nn.Linear(4, 4), nn.Embedding(5, 4)).to(dtype)
    targets = [nn.Linear, nn.Embedding]
    pl.attach(layers, pl.LoRA(rank=2), targets, name="one")
    pl.attach(layers, pl.Delta(), targets, name="two")
    shake(layers)
    before, adapted = snapshot(layers), layers[0].weight.detach().clone()
    for i in range(1000 if dtype == torch.bfloat16 else 10):
        if i % 2:
            pl.merge(layers, "two")
            pl.merge(layers, "one")
        else:
            pl.merge(layers)
        if i < 2:
            assert_bits(layers[0].weight.detach(), adapted)
        pl.unmerge(layers)
    assert snapshot(layers) == before


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("init", ["kaiming", "olora"])
def test_5_merged_by_blocks_of_rows(
    dtype: torch.dtype, init: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A weight of many blocks of rows is merged to the bits that reading it gives, and back."""
    monkeypatch.setattr(sys.modules["paramlora.verbs.merge"], "_BLOCK", 20)
    layer: Any = nn.Linear(6, 10).to(dtype)
    pl.attach(layer, pl.LoRA(rank=2, alpha=3, init=init), name="one")
    pl.attach(layer, pl.LoRA(rank=1), "weight[2:, :]", name="two")
    pl.attach(layer, pl.LoRA(rank=3, transposed=True), name="three")
    shake(layer)
    pl.scale(layer, 0.7, "three")
    before, adapted = snapshot(layer), layer.weight.detach().clone()
    with pl.merged(layer):
        assert_bits(layer.weight.detach(), adapted)
        assert_bits(layer.parametrizations.weight.original.detach(), adapted)
    assert snapshot(layer) == before


def test_9_a_bad_file_changes_nothing(tmp_path: Path) -> None:
    """A damaged, foreign or other model's file is refused by name, and the model is as it was."""
    model, _ = mixed()
    pl.attach(model, pl.LoRA(rank=2), "head", name="low")
    path = tmp_path / "low.safetensors"
    pl.save(model, path, "low")
    good = path.read_bytes()
    other = nn.ModuleDict({"head": nn.Linear(9, 3)})
    words = rf"{path}.*'head\.weight'.*\[3, 8\].*\[3, 9\]"
    with unchanged(other), pytest.raises(pl.CheckpointError, match=words):
        pl.load(other, path)
    bomb = io.BytesIO()
    torch.save(Bomb(tmp_path / "exploded"), bomb)
    for content in (
        good[: len(good) // 2],
        good[:-1] + bytes([good[-1] ^ 1]),
        b"",
        pickle.dumps(Bomb(tmp_path / "exploded")),
        bomb.getvalue(),
    ):
        path.write_bytes(content)
        with unchanged(model), pytest.raises(pl.CheckpointError, match=f"{path}.*damaged"):
            pl.load(model, path)
    assert not (tmp_path / "exploded").exists()
    save_file({"head.weight.A": torch.zeros(2, 8)}, path)
    with unchanged(model), pytest.raises(pl.CheckpointError, match="not written by paramlora"):
        pl.load(model, path)
    path.write_bytes(good)
    pl.load(model, path)


class Bomb:
    """Something that makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_9_a_crash_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Saving that fails at any step leaves the old file whole, and nothing beside it."""
    model, _ = mixed()
    pl.attach(model, pl.LoRA(rank=2), "head", name="low")
    path = tmp_path / "low.safetensors"
    pl.save(model, path, "low")
    good = path.read_bytes()

    def crash(*_: object) -> None:
        raise OSError("no space left")

    for step in ("fsync", "replace"):
        shake(model)
        with monkeypatch.context() as patch:
            patch.setattr(f"os.{step}", crash)
            with pytest.raises(OSError, match="no space left"):
                pl.save(model, path, "low")
        assert path.read_bytes() == good
        assert [found.name for found in tmp_path.iterdir()] == [path.name]


UNFIT: dict[str, Callable[[], nn.Module]] = {
    "lazy": lambda: nn.Sequential(nn.LazyLinear(3)),
    "int64": lambda: nn.Sequential(holder(torch.ones(3, 3, dtype=torch.int64))),
    "bool": lambda: nn.Sequential(holder(torch.ones(3, 3, dtype=torch.bool))),
    "complex64": lambda: nn.Sequential(holder(torch.ones(3, 3, dtype=torch.complex64))),
    "qint8": lambda: nn.Sequential(
        holder(torch.quantize_per_tensor(torch.ones(3, 3), 0.1, 0, torch.qint8))
    ),
    "sparse": lambda: nn.Sequential(holder(torch.ones(3, 3).to_sparse())),
    "two dimensions": lambda: nn.Sequential(nn.LayerNorm(3)),
}


def holder(tensor: Tensor) -> nn.Module:
    module = nn.Module()
    module.weight = nn.Parameter(tensor, requires_grad=False)
    return module


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("reason", UNFIT)
def test_10_what_cannot_be_adapted_is_refused(reason: str) -> None:
    """Lazy, integer, complex, quantized, sparse and 1-D tensors are refused by name."""
    model = UNFIT[reason]()
    with unchanged(model), pytest.raises(pl.TargetError, match=rf"'0\.weight'.*{reason}"):
        pl.attach(model, pl.LoRA(rank=2), "0.weight")
