"""LoHa, LoKr and (IA)³ equal those of PEFT and of LyCORIS with the same factors."""

import copy
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import paramlora as pl
from tests.support.models import Wrapped

pytest.importorskip("lycoris", reason="LyCORIS, an oracle, needs a newer torch than 2.6")
from lycoris.functional.general import factorization
from lycoris.functional.loha import diff_weight as loha_update
from lycoris.functional.lokr import diff_weight as lokr_update
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule

LAYERS: dict[str, tuple[Any, Any]] = {
    "linear": (lambda: nn.Linear(12, 10), lambda: torch.randn(4, 12)),
    "conv1d": (lambda: nn.Conv1d(6, 10, 3), lambda: torch.randn(2, 6, 9)),
    "conv2d": (lambda: nn.Conv2d(6, 10, 3), lambda: torch.randn(2, 6, 5, 5)),
}
NAMES = {
    "hada_w1_a": "B1",
    "hada_w1_b": "A1",
    "hada_w2_a": "B2",
    "hada_w2_b": "A2",
    "lokr_w1": "W1",
    "lokr_w1_a": "B1",
    "lokr_w1_b": "A1",
    "lokr_w2": "W2",
    "lokr_w2_a": "B2",
    "lokr_w2_b": "A2",
}


def as_ours(named: Any) -> dict[str, Tensor]:
    """Select the factors among named tensors, and give them our names."""
    parts = ((key.split("."), value.detach()) for key, value in named)
    return {NAMES[part]: value for key, value in parts for part in key if part in NAMES}


def fill(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape) / 2)


CASES = {
    "loha": (pl.LoHa(rank=2, alpha=3), peft.LoHaConfig(r=2, alpha=3)),
    "lokr": (pl.LoKr(rank=1, alpha=2), peft.LoKrConfig(r=1, alpha=2)),
    "lokr_full": (pl.LoKr(rank=8, alpha=2), peft.LoKrConfig(r=8, alpha=2)),
    "lokr_factor": (pl.LoKr(rank=1, factor=2), peft.LoKrConfig(r=1, alpha=1, decompose_factor=2)),
    "lokr_both": (
        pl.LoKr(rank=1, alpha=2, decompose_both=True),
        peft.LoKrConfig(r=1, alpha=2, decompose_both=True),
    ),
}


# Not a full W2 on a Conv1d: PEFT's product has its dimensions in the wrong order there. torch.kron
# pads the shape of W1 at the front, LyCORIS at the end.
PAIRS = [(kind, layer) for kind in CASES for layer in LAYERS]
PAIRS.remove(("lokr_full", "conv1d"))


@pytest.mark.parametrize(("kind", "layer"), PAIRS)
def test_equal_to_peft(kind: str, layer: str) -> None:
    """With PEFT's factors, outputs equal PEFT's, and the factors have the same shapes."""
    spec, config = CASES[kind]
    make, inputs = LAYERS[layer]
    torch.manual_seed(0)
    plain = make().double()
    ours: Any = Wrapped(copy.deepcopy(plain))
    config = copy.deepcopy(config)
    config.target_modules = ["layer"]
    theirs = peft.get_peft_model(Wrapped(plain), config).double()
    fill(theirs)
    pl.attach(ours, spec, "layer")
    state = as_ours(theirs.named_parameters())
    pl.load_state_dict(ours, {f"layer.weight.{key}": value for key, value in state.items()})
    x = inputs().double()
    assert_close(ours(x), theirs(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(
    ("spec", "make_theirs"),
    [
        (pl.LoHa(rank=3), lambda layer: LohaModule("x", layer, lora_dim=3, alpha=3)),
        (pl.LoKr(rank=1), lambda layer: LokrModule("x", layer, lora_dim=1, alpha=1)),
        (
            pl.LoKr(rank=1, factor=5, decompose_both=True),
            lambda layer: LokrModule(
                "x", layer, lora_dim=1, alpha=1, factor=5, decompose_both=True
            ),
        ),
        (pl.LoKr(rank=None), lambda layer: LokrModule("x", layer, full_matrix=True)),
    ],
)
def test_equal_to_lycoris_modules(spec: pl.kinds.Spec, make_theirs: Any, layer: str) -> None:
    """With the factors of LyCORIS' modules, the update equals theirs.

    The factors have the same shapes, and the same ones start at zero.
    """
    torch.manual_seed(0)
    plain = LAYERS[layer][0]()
    theirs = make_theirs(plain)
    ours = spec.create(plain.weight.detach())
    start = as_ours(theirs.named_parameters())
    assert {key: value.shape for key, value in ours.items()} == {
        key: value.shape for key, value in start.items()
    }
    assert {key for key in ours if not ours[key].any()} == {
        key for key in start if not start[key].any()
    }
    fill(theirs)
    W = plain.weight.detach()
    update = spec.apply(W, as_ours(theirs.named_parameters())) - W
    expected = theirs.get_diff_weight(shape=W.shape)[0].detach()
    assert_close(update, expected, rtol=1e-4, atol=1e-5)


def test_equal_to_lycoris_functions() -> None:
    """The scale is that of LyCORIS' functions: alpha/r on the product."""
    torch.manual_seed(0)
    W = torch.zeros(10, 12)
    loha, lokr = pl.LoHa(rank=3, alpha=2), pl.LoKr(rank=1, alpha=2)
    f = {key: torch.randn_like(value) for key, value in loha.create(W).items()}
    expected = loha_update(f["A1"], f["B1"], f["A2"], f["B2"], None, None, gamma=2 / 3)
    assert_close(loha.apply(W, f), expected)
    f = {key: torch.randn_like(value) for key, value in lokr.create(W).items()}
    expected = lokr_update(f["W1"], None, None, None, f["B2"], f["A2"], None, gamma=2.0)
    assert_close(lokr.apply(W, f), expected)


def test_lokr_factorization() -> None:
    """The first factor of LoKr has the sides that LyCORIS chooses, for any size and factor."""
    for size in (*range(1, 200), 768, 1024, 50257):
        for factor in (-1, 1, 2, 3, 4, 7, 8, 16, 100):
            spec = pl.LoKr(rank=None, factor=factor)
            sides = spec.create(torch.empty(size, 1, device="meta"))["W1"].shape
            assert sides[0] == factorization(size, factor)[0], (size, factor)


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("layer", ["linear", "conv2d"])
def test_ia3_equals_peft(layer: str, dim: int) -> None:
    """With PEFT's vector, on outputs and their bias or on inputs, outputs equal PEFT's."""
    make, inputs = LAYERS[layer]
    torch.manual_seed(0)
    plain = make().double()
    ours: Any = Wrapped(copy.deepcopy(plain))
    config = peft.IA3Config(
        target_modules=["layer"], feedforward_modules=["layer"] if dim == 1 else []
    )
    theirs = peft.get_peft_model(Wrapped(plain), config).double()
    fill(theirs)
    [vector] = [p.detach().flatten() for p in theirs.parameters() if p.requires_grad]
    pl.attach(ours, pl.IA3(dim=dim), "layer.weight" if dim else ["layer.weight", "layer.bias"])
    pl.load_state_dict(ours, dict.fromkeys(pl.state_dict(ours), vector))
    x = inputs().double()
    assert_close(ours(x), theirs(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (pl.DoRA(), "with DoRA: a low-rank update needs two dimensions, it has 1"),
        (pl.LoHa(), "with LoHa: a low-rank update needs two dimensions, it has 1"),
        (pl.LoKr(), "with LoKr: a low-rank update needs two dimensions, it has 1"),
        (pl.IA3(dim=1), "with IA3: dim=1 is out of range, its number of dimensions is 1"),
    ],
)
def test_bias_needs_another_kind(spec: pl.kinds.Spec, message: str) -> None:
    """A kind that needs a matrix raises TargetError for a bias."""
    with pytest.raises(pl.TargetError, match=message):
        pl.attach(nn.Linear(3, 2), spec, "bias")
