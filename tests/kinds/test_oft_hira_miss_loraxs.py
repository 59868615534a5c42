"""OFT, HiRA and MiSS equal those of PEFT with the same factors; their limits, and LoRA-XS's."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import paramlora as pl
from tests.support.helpers import pattern, refuses
from tests.support.models import Wrapped
from tests.support.reference import shake

peft = pytest.importorskip("peft", reason="the oracle of these tests is PEFT")

EXACT_OFT: dict[str, Any] = {"oft_block_size": 4, "use_cayley_neumann": False}
CASES: dict[str, tuple[pl.kinds.Spec, Any]] = {
    "oft": (pl.OFT(4), peft.OFTConfig(**EXACT_OFT)),
    "oft_series": (pl.OFT(4, terms=5), peft.OFTConfig(oft_block_size=4)),
    "oft_long_series": (
        pl.OFT(4, terms=7),
        peft.OFTConfig(oft_block_size=4, num_cayley_neumann_terms=7),
    ),
    # PEFT computes eps/√n in float32, where 0.25/√4 is exact.
    "coft": (
        pl.OFT(3, eps=0.25),
        peft.OFTConfig(**(EXACT_OFT | {"oft_block_size": 3}), coft=True, eps=0.25),
    ),
    "hira": (pl.HiRA(2), peft.HiraConfig(r=2)),
    "miss": (pl.MiSS(4), peft.MissConfig(r=4)),
    "miss_last_shard": (pl.MiSS(5), peft.MissConfig(r=5)),
}
NAMES = {"oft_R": "Q", "hira_A": "A", "hira_B": "B", "miss_block": "D"}


def factors_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the factors of PEFT's model, by our names."""
    named = ((key.split("."), value.detach()) for key, value in model.named_parameters())
    return {NAMES[part]: value for key, value in named for part in key if part in NAMES}


@pytest.mark.parametrize(("spec", "config"), CASES.values(), ids=CASES.keys())
def test_equal_to_peft(spec: pl.kinds.Spec, config: Any) -> None:
    """With PEFT's factors, outputs and merged weights equal PEFT's."""
    torch.manual_seed(0)
    plain, x = nn.Linear(12, 10).double(), torch.randn(4, 12, dtype=torch.float64)
    config = copy.deepcopy(config)
    config.target_modules = {"layer"}
    theirs = peft.get_peft_model(Wrapped(copy.deepcopy(plain)), config).double().eval()
    shake_theirs(theirs)
    ours = Wrapped(plain)
    pl.attach(ours, spec, "layer.weight")
    found = factors_of(theirs)
    pl.load_state_dict(ours, {f"layer.weight.{key}": value for key, value in found.items()})
    tolerance: dict[str, Any] = {"rtol": 0, "atol": 1e-12}
    with torch.no_grad():
        expected = theirs(x)
        assert (expected - plain_output(ours, x)).abs().max() > 1e-2
        assert_close(ours(x), expected, **tolerance)
        pl.bake(ours)
        assert_close(ours.layer.weight, theirs.merge_and_unload().layer.weight, **tolerance)


def shake_theirs(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape) / 4)


def plain_output(model: nn.Module, x: Tensor) -> Tensor:
    with pl.disabled(model):
        return model(x)


@pytest.mark.parametrize("strength", [1.0, 0.5, -2.0])
def test_oft_keeps_norms_and_angles(strength: float) -> None:
    """At every strength, OFT keeps the inner products of the rows of W."""
    torch.manual_seed(0)
    W = torch.randn(5, 12, dtype=torch.float64)
    Q = torch.randn(3, 6, dtype=torch.float64)
    rotated = pl.OFT(4).apply(W, {"Q": Q}, strength)
    assert (rotated - W).abs().max() > 0.1
    assert_close(rotated @ rotated.T, W @ W.T, rtol=0, atol=1e-12)


def test_constrained_oft_is_bounded() -> None:
    """With eps, the rotation of the stored factors is that of blocks of norm eps/√n at most."""
    W = torch.eye(8, dtype=torch.float64)
    small, large = (torch.full((2, 6), size, dtype=torch.float64) for size in (1e-3, 50.0))
    spec = pl.OFT(4, eps=0.1)
    assert_close(spec.apply(W, {"Q": small}), pl.OFT(4).apply(W, {"Q": small}))
    bounded = torch.full((2, 6), 0.1 / 2**0.5 / 12**0.5, dtype=torch.float64)
    assert_close(spec.apply(W, {"Q": large}), pl.OFT(4).apply(W, {"Q": bounded}))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_oft_works_in_a_model_that_is_cast_to_half_precision(dtype: torch.dtype) -> None:
    """The rotation is computed in float32, since torch inverts no matrix in half precision."""
    torch.manual_seed(0)
    layer, x = nn.Linear(8, 8).double(), torch.randn(5, 8)
    pl.attach(layer, pl.OFT(4))
    (Q,) = pl.parameters(layer)
    Q.data.normal_()
    expected = layer(x.double())
    found = layer.to(dtype)(x.to(dtype))
    assert_close(found.double(), expected, rtol=0.0, atol=16 * torch.finfo(dtype).eps)


def test_hira_has_high_rank() -> None:
    """The update of a HiRA of rank 1 has the rank of W."""
    torch.manual_seed(0)
    layer = nn.Linear(6, 6).double()
    W = layer.weight.detach().clone()
    pl.attach(layer, pl.HiRA(rank=1))
    shake(layer)
    assert torch.linalg.matrix_rank(layer.weight - W) == 6


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_loraxs_starts_from_the_singular_vectors(dtype: torch.dtype) -> None:
    """With R = I, LoRA-XS adds the best approximation of W of rank r, and only R is trained."""
    torch.manual_seed(0)
    W = torch.randn(7, 5, dtype=torch.float64).to(dtype)
    spec = pl.LoRAXS(rank=3)
    factors = spec.create(W)
    A, B, scale = spec.low_rank(factors | {"R": torch.eye(3, dtype=factors["R"].dtype)})
    U, S, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    best = (U[:, :3] * S[:3]) @ Vh[:3]
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert_close((scale * B @ A).double(), best, rtol=0, atol=tolerance)
    layer = nn.Linear(5, 7)
    pl.attach(layer, spec)
    assert [tuple(parameter.shape) for parameter in pl.parameters(layer)] == [(3, 3)]


@pytest.mark.parametrize("spec", [pl.MiSS(3), pl.LoRAXS(3)], ids=["miss", "loraxs"])
@pytest.mark.parametrize("layer", ["linear", "embedding"])
def test_fast_forward(spec: pl.kinds.Spec, layer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Linear and an Embedding compute the output without W'."""
    torch.manual_seed(0)
    model: Any = nn.Linear(7, 5) if layer == "linear" else nn.Embedding(9, 5)
    x = torch.randn(4, 7) if layer == "linear" else torch.tensor([1, 8])
    pl.attach(model, spec, "weight")
    shake(model)
    weight = model.weight.detach()
    expected = x @ weight.T + model.bias if layer == "linear" else weight[x]

    def refuse(*_: object) -> Tensor:
        raise AssertionError("W' was built")

    monkeypatch.setattr(type(spec), "apply", refuse)
    assert_close(model(x), expected)


LAYER: Callable[[], nn.Module] = lambda: nn.Linear(12, 5)  # noqa: E731
REFUSED = {
    "oft": (
        pl.OFT(5),
        "weight",
        "cannot adapt 'weight' with OFT: block_size=5 does not divide its 12 inputs; the nearest "
        "that does is 4",
    ),
    "oft, bias": (
        pl.OFT(2),
        "bias",
        "cannot adapt 'bias' with OFT: a rotation of the inputs needs two dimensions, it has 1",
    ),
    "hira": (
        pl.HiRA(),
        "bias",
        "cannot adapt 'bias' with HiRA: a low-rank update needs two dimensions, it has 1[...]",
    ),
    "miss": (
        pl.MiSS(13),
        "weight",
        "cannot adapt 'weight' with MiSS: it needs a rank of at most 12, the inputs of the matrix; "
        "got 13",
    ),
    "miss, bias": (
        pl.MiSS(2),
        "bias",
        "cannot adapt 'bias' with MiSS: a low-rank update needs two dimensions, it has 1[...]",
    ),
    "loraxs": (
        pl.LoRAXS(6),
        "weight",
        "cannot adapt 'weight' with LoRAXS: it needs a rank of at most 5, the smaller side of the "
        "matrix; got 6",
    ),
    "loraxs, bias": (
        pl.LoRAXS(2),
        "bias",
        "cannot adapt 'bias' with LoRAXS: a low-rank update needs two dimensions, it has 1[...]",
    ),
}


@pytest.mark.parametrize(("spec", "target", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refused_tensors(spec: pl.kinds.Spec, target: str, message: str) -> None:
    """A tensor that a kind cannot adapt raises TargetError by name, and nothing changes."""
    refuses(LAYER(), lambda m: pl.attach(m, spec, target), pl.TargetError, message + "[...]")


INVALID: dict[str, tuple[Callable[[], pl.kinds.Spec], str]] = {
    "block_size 1": (
        lambda: pl.OFT(1),
        "block_size must be a whole number of at least 2, got 1",
    ),
    "eps 0": (lambda: pl.OFT(eps=0), "eps must be a finite number above 0 or None, got 0"),
    "three terms": (
        lambda: pl.OFT(terms=3),
        "terms must be a whole number of at least 4, got 3",
    ),
    "HiRA, rank 0": (lambda: pl.HiRA(0), "rank must be a whole number of at least 1, got 0"),
    "HiRA, pissa": (lambda: pl.HiRA(init="pissa"), "init must be one of [...], got 'pissa'"),
    "MiSS, rank 0": (lambda: pl.MiSS(0), "rank must be a whole number of at least 1, got 0"),
    "LoRAXS, rank 0": (lambda: pl.LoRAXS(0), "rank must be a whole number of at least 1, got 0"),
}


@pytest.mark.parametrize(("make", "message"), INVALID.values(), ids=INVALID.keys())
def test_invalid_settings(make: Callable[[], pl.kinds.Spec], message: str) -> None:
    """An invalid setting raises ValueError when the spec is made."""
    with pytest.raises(ValueError, match=pattern(message)):
        make()
