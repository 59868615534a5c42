"""Adapters and weight_norm, spectral_norm, orthogonal or prune on the same weight.

Notes on PEFT were checked with version 0.21.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.testing import assert_close

import paramlora as pl
from paramlora import LoRA
from tests.support.helpers import (
    EXACT,
    LEAVE_OUT,
    refuses,
    unchanged,
)
from tests.support.mixed import assert_bits, train
from tests.support.reference import loss, shake


def normed(norm: Callable[..., nn.Module]) -> tuple[nn.Sequential, Tensor]:
    """Return a model in eval mode whose first layer has a norm, and an input."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    norm(model[0])
    return model.eval(), torch.randn(6, 5, dtype=torch.float64)


def norm_by_hand(model: nn.Sequential) -> Tensor:
    """Return W of the first layer from the stored tensors, by the formula of its norm."""
    stored = {key.rpartition(".")[2]: v for key, v in model[0].named_parameters()}
    stored |= {key.rpartition(".")[2]: v for key, v in model[0].named_buffers()}
    if "original1" in stored:  # g · v / ‖v‖, one norm a row
        v = stored["original1"]
        return stored["original0"] * v / v.norm(dim=1, keepdim=True)
    W = stored["original"]  # W / σ(W)
    return W / (stored["_u"] @ W @ stored["_v"])


@pytest.mark.parametrize("norm", [weight_norm, spectral_norm])
def test_norm_before_attach(norm: Callable[..., nn.Module]) -> None:
    """On an existing norm, W' = norm(W) + s·BA; the base keeps its keys, digest and bits.

    Detaching restores the model with its norm, also after training.
    """
    model, x = normed(norm)
    keys, digest, before = model.state_dict().keys(), pl.fingerprint(model), model(x)
    with unchanged(model):
        pl.attach(model, pl.LoRA(rank=2, alpha=3), freeze=False)
        assert_bits(model(x), before)
        shake(model)
        assert pl.base_state_dict(model).keys() == keys
        assert pl.fingerprint(model) == digest

        leaves = [p for p in model.parameters() if p.requires_grad]
        A, B, A2, B2 = pl.parameters(model)
        assert {A, B, A2, B2} < set(leaves)
        first = norm_by_hand(model) + 1.5 * B @ A
        second = model[2].parametrizations.weight.original + 1.5 * B2 @ A2
        expected = F.linear(F.linear(x, first, model[0].bias).tanh(), second, model[2].bias)
        assert_close(model[0].weight, first, **EXACT)
        assert_close(model(x), expected, **EXACT)
        assert_close(
            torch.autograd.grad(loss([model(x)]), leaves),
            torch.autograd.grad(loss([expected]), leaves),
            **EXACT,
        )
        with pl.disabled(model):
            assert_bits(model(x), before)
        other = copy.deepcopy(model)
        pl.detach(other)
        assert_bits(other(x), before)
        assert_close(model(x), expected, **EXACT)
        pl.detach(model)
        pl.attach(model, pl.LoRA(rank=2), name="frozen")
        pl.attach(model, pl.Delta(), "*.bias", name="biases", activate="also")
        train(model, x)
        assert not torch.equal(model(x), before)
        pl.detach(model)
    for detached in (model, other):
        parametrize.remove_parametrizations(detached[0], "weight")
        assert type(detached[0]) is nn.Linear
        assert_close(detached(x), before, **EXACT)


def test_merging_into_weight_norm() -> None:
    """Merging on a weight_norm stores g and v of W'; unmerging restores the bits."""
    model, x = normed(weight_norm)
    pl.attach(model, pl.LoRA(rank=2, alpha=3))
    shake(model)
    expected, digest = model(x), pl.fingerprint(model)
    base = {key: value.clone() for key, value in pl.base_state_dict(model).items()}
    with unchanged(model):
        pl.merge(model)
        assert_close(model(x), expected, **EXACT)
        assert_close(norm_by_hand(model), model[0].weight, **EXACT)
        assert pl.fingerprint(model) == digest
        assert_bits(dict(pl.base_state_dict(model)), base)
        pl.unmerge(model)


def test_merging_a_convolution_with_weight_norm() -> None:
    """A merged or baked update persists although weight_norm recomputes the weight.

    In PEFT, merging a Linear with weight_norm fails.
    """
    model, x = (
        nn.Sequential(nn.Conv2d(4, 6, 3, groups=2)).double(),
        torch.randn(2, 4, 5, 5).double(),
    )
    weight_norm(model[0])
    base = model(x)
    pl.attach(model, LoRA(2, alpha=3), "0")
    shake(model)
    expected = model(x)
    with unchanged(model):
        pl.merge(model)
        assert_close(model(x), expected, **EXACT)
        assert_close(model(x), expected, **EXACT)
        pl.unmerge(model)
    pl.merge(model)
    pl.bake(model)
    assert_close(model(x), expected, **EXACT)
    assert not torch.allclose(base, expected)


@pytest.mark.parametrize("norm", [spectral_norm, nn.utils.parametrizations.orthogonal])
def test_merging_into_other_norms(norm: Callable[..., nn.Module]) -> None:
    """Merging raises StateError if W' cannot be stored, as when its norm must be 1."""
    model, _ = normed(norm)
    pl.attach(model, pl.LoRA(rank=2, alpha=3))
    shake(model)
    with unchanged(model), pytest.raises(pl.StateError, match=r"cannot merge at '0\.weight'"):
        pl.merge(model)


def test_weight_norm_after_attach() -> None:
    """A weight_norm added after attaching splits W below the adapters; only keys change."""
    model, x = normed(lambda layer: layer)
    base = copy.deepcopy(model)
    pl.attach(model, pl.LoRA(rank=2, alpha=3), "0")
    shake(model)
    expected = model(x)
    weight_norm(model[0])
    plain = copy.deepcopy(base)
    weight_norm(plain[0])
    assert pl.base_state_dict(model).keys() == plain.state_dict().keys()
    assert_close(model(x), expected, **EXACT)
    A, B = pl.state_dict(model).values()
    assert_close(model[0].weight, norm_by_hand(model) + 1.5 * B @ A, **EXACT)
    with pl.disabled(model):
        assert_close(model(x), base(x), **EXACT)
    with pl.merged(model):
        assert_close(model(x), expected, **EXACT)
    pl.detach(model)
    assert_bits(model.state_dict(), plain.state_dict())
    assert all(parameter.requires_grad for parameter in model.parameters())
    parametrize.remove_parametrizations(model[0], "weight")
    assert_close(model.state_dict(), base.state_dict(), **EXACT)
    assert type(model[0]) is nn.Linear


def test_two_norms_after_attach() -> None:
    """Detaching keeps both norms added after attaching; weight_norm keeps its g and v."""
    layer: Any = nn.Linear(4, 3)
    weight = layer.weight.detach().clone()
    pl.attach(layer, pl.LoRA(rank=2), "weight")
    weight_norm(layer)
    spectral_norm(layer)
    shake(layer)
    g, v = (getattr(layer.parametrizations.weight, f"original{i}") for i in range(2))
    assert not torch.equal(layer.weight, weight)
    pl.detach(layer)
    assert [type(p).__name__ for p in layer.parametrizations.weight] == [
        "_WeightNorm",
        "_SpectralNorm",
    ]
    assert layer.parametrizations.weight.original0 is g
    assert layer.parametrizations.weight.original1 is v
    parametrize.remove_parametrizations(layer, "weight")
    assert type(layer) is nn.Linear
    largest = torch.linalg.matrix_norm(layer.weight.detach(), 2)
    assert_close(largest, torch.tensor(1.0), rtol=0.2, atol=0)


def test_spectral_norm_after_attach() -> None:
    """A spectral_norm added after attaching normalizes W' with adapters on, and W with them off."""
    model, _ = normed(lambda layer: layer)
    base = copy.deepcopy(model)
    pl.attach(model, pl.LoRA(rank=2, alpha=3), "0")
    shake(model)
    adapted = model[0].weight.detach().clone()
    # Enough steps of the power iteration to find σ exactly.
    spectral_norm(model[0], n_power_iterations=500)
    assert_close(model[0].weight, adapted / torch.linalg.matrix_norm(adapted, 2), **EXACT)
    with pl.merged(model):
        assert_close(model[0].weight, adapted / torch.linalg.matrix_norm(adapted, 2), **EXACT)
    model.train()  # the iteration runs in training
    with pl.disabled(model):
        W = base[0].weight
        assert_close(model[0].weight, W / torch.linalg.matrix_norm(W, 2), **EXACT)
    pl.detach(model)
    assert_close(model.eval()[0].weight, norm_by_hand(model), **EXACT)
    assert_bits(model[0].parametrizations.weight.original, base[0].weight)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    "old",
    [
        nn.utils.weight_norm,
        nn.utils.spectral_norm,
        lambda layer: prune.l1_unstructured(layer, "weight", 3),
    ],
    ids=["weight_norm", "spectral_norm", "prune"],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
def test_norm_of_a_hook(old: Callable[..., nn.Module]) -> None:
    """A weight that a hook computes, as the old norms do, raises TargetError.

    The other layers can be adapted, and so can the tensor that the hook reads.
    """
    model, x = normed(old)
    before = model(x)
    for targets in (nn.Linear, "*.weight", "0", lambda path, module: path == "0"):
        refused = pytest.raises(pl.TargetError, match=r"cannot adapt '0\.weight': a hook")
        with unchanged(model), refused:
            pl.attach(model, pl.LoRA(rank=2), targets)
    with unchanged(model):
        assert [row.site for row in pl.attach(model, pl.LoRA(), exclude="0").sites] == ["2.weight"]
        pl.detach(model)
    source = next(key for key, p in model[0].named_parameters() if p.dim() == 2 and p.shape[1] > 1)
    with unchanged(model[2]):
        pl.attach(model, pl.LoRA(rank=2, alpha=3), f"0.{source}")
        assert_bits(model(x), before)
        stored = model[0].get_parameter(f"parametrizations.{source}.original").detach().clone()
        shake(model)
        A, B = pl.state_dict(model).values()
        assert_close(getattr(model[0], source), stored + 1.5 * B @ A, **EXACT)
        assert not torch.allclose(model(x), before)
        pl.detach(model)
    assert_bits(model(x), before)


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
def test_norm_of_a_hook_after_attach() -> None:
    """torch's old weight_norm is refused on an adapted weight, and nothing changes."""
    model, _ = normed(lambda layer: layer)
    pl.attach(model, pl.LoRA(rank=2))
    with unchanged(model), pytest.raises(pl.StateError, match="because it has adapters: detach"):
        nn.utils.weight_norm(model[0])


def test_modules_of_a_parametrization() -> None:
    """A Linear inside another parametrization is not adapted."""

    class ByLinear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, weight: Tensor) -> Tensor:
            return self.inner(weight)

    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    parametrize.register_parametrization(model[0], "weight", ByLinear())
    x = torch.randn(5, 4)
    expected, digest = model(x), pl.fingerprint(model)
    assert [row.site for row in pl.attach(model, pl.LoRA(2)).sites] == ["0.weight", "2.weight"]
    shake(model)
    assert pl.fingerprint(model) == digest
    pl.disable(model)
    assert torch.equal(model(x), expected)


class Through(nn.Module):
    """A parametrization with a module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, weight: Tensor) -> Tensor:
        return self.inner(weight)


@pytest.mark.parametrize(
    ("target", "part"),
    [
        ("inner", "0.parametrizations.weight.0.inner"),
        ("0.parametrizations.weight.0.inner.bias", "0.parametrizations.weight.0.inner"),
        ("*.original", "0.parametrizations.weight"),
        ("0.parametrizations.weight.0", "0.parametrizations.weight.0"),
        (Through, "0.parametrizations.weight.0"),
    ],
)
def test_a_target_inside_another_parametrization(target: Any, part: str) -> None:
    """A target inside another parametrization raises, and the message names the adapted tensor."""
    model = nn.Sequential(nn.Linear(4, 3))
    parametrize.register_parametrization(model[0], "weight", Through())
    name = repr(target) if isinstance(target, str) else "Through"
    refuses(
        model,
        lambda m: pl.attach(m, pl.LoRA(1), target),
        pl.TargetError,
        f"no tensor matches {name}; {part!r} is a part of the parametrization of '0.weight'; "
        "adapters go on top of that: name '0.weight'",
    )


def test_a_parametrized_part_of_a_parametrization() -> None:
    """A tensor is refused if what its parametrization stores is parametrized in turn."""
    model = nn.Sequential(nn.Linear(4, 3))
    weight_norm(model[0])
    stored: Any = model[0].parametrizations.weight
    parametrize.register_parametrization(stored, "original1", Through())
    refuses(
        model,
        lambda m: pl.attach(m, pl.LoRA(2)),
        pl.TargetError,
        "cannot adapt '0.weight' with LoRA: a tensor that its parametrization stores is "
        f"parametrized in turn {LEAVE_OUT}",
    )
    pl.attach(model, pl.Delta(), "0.bias")
    assert pl.summary(model).trainable == 3
    refuses(
        stored,
        lambda m: pl.attach(m, pl.LoRA(1), "original1"),
        pl.TargetError,
        "cannot attach to a list of parametrizations: attach to the layer that has it, on top of "
        "them",
    )
