"""TIES and DARE on full-size updates, against dense references, and the warning of "linear"."""

import math
import re
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import paramlora as pl
from paramlora import Delta, LoRA, TargetError
from paramlora.methods.sparse_sums import dare
from tests.support.helpers import EXACT, refuses
from tests.support.reference import shake

WEIGHTS = {"a": 0.7, "b": 1.5, "c": -0.4}


def model_of(*specs: pl.kinds.Spec) -> nn.Module:
    """Return a layer with random adapters "a", "b", … of these kinds, "a" at strength 0.5."""
    torch.manual_seed(0)
    model = nn.Linear(6, 5).double()
    for name, spec in zip("abc", specs, strict=False):
        pl.attach(model, spec, "weight", name=name)
        shake(model, name)
    pl.scale(model, 0.5, "a")
    return model


def update(model: nn.Module, name: str) -> Tensor:
    """Return W' − W with one adapter, read from the layer."""
    with pl.disabled(model):
        base = weight(model).clone()
    with pl.using(model, name):
        return weight(model) - base


def weight(model: nn.Module) -> Tensor:
    return model.weight.detach()  # type: ignore[operator]


def ties_by_element(updates: list[Tensor], weights: list[float], density: float) -> Tensor:
    """Return TIES of matrices, element by element, in Python numbers."""
    trimmed = []
    for matrix in updates:
        values = matrix.flatten().tolist()
        kept = sorted(values, key=abs, reverse=True)[: int(density * len(values))]
        trimmed.append([value if abs(value) >= abs(kept[-1]) else 0.0 for value in values])
    result = []
    for values in zip(*trimmed, strict=True):
        sign = 1 if sum(values) >= 0 else -1
        agree = [w * v for w, v in zip(weights, values, strict=True) if v * sign > 0]
        result.append(sum(agree) / len(agree) if agree else 0.0)
    return torch.tensor(result, dtype=torch.float64).view(updates[0].shape)


KINDS: dict[str, tuple[pl.kinds.Spec, ...]] = {
    "LoRA": (LoRA(2, 3), LoRA(1), LoRA(3)),
    "several kinds": (pl.LoHa(2), Delta(), pl.MiSS(2)),
    "starts from W": (LoRA(2, init="pissa"), pl.LoRAXS(2), pl.LoKr(1)),
}


@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
@pytest.mark.parametrize("specs", KINDS.values(), ids=KINDS.keys())
def test_ties(specs: tuple[pl.kinds.Spec, ...], density: float) -> None:
    """TIES of any additive kinds equals the dense reference, at each density."""
    model = model_of(*specs)
    expected = ties_by_element(
        [update(model, name) for name in WEIGHTS], list(WEIGHTS.values()), density
    )
    pl.combine(model, WEIGHTS, name="sum", method="ties", density=density)
    assert pl.summary(model).sites[-1].kind == "Delta"
    assert_close(update(model, "sum"), expected, **EXACT)


def test_ties_equals_peft() -> None:
    """TIES gives what PEFT's function gives for the same updates."""
    merge = pytest.importorskip("peft.utils.merge_utils", reason="the oracle is PEFT")
    model = model_of(*KINDS["LoRA"])
    numbers = torch.tensor(list(WEIGHTS.values()), dtype=torch.float64)
    expected = merge.ties([update(model, name) for name in WEIGHTS], numbers, 0.4)
    pl.combine(model, WEIGHTS, name="sum", method="ties", density=0.4)
    assert_close(update(model, "sum"), expected, **EXACT)


@pytest.mark.parametrize("method", ["ties", "dare"])
def test_rank(method: str) -> None:
    """With a rank the result is a LoRA, the best approximation of the sum at that rank."""
    model = model_of(*KINDS["LoRA"])
    for name, rank in (("full", None), ("two", 2)):
        pl.combine(
            model,
            WEIGHTS,
            name=name,
            method=method,
            density=0.5,
            rank=rank,
            generator=torch.Generator().manual_seed(3),
        )
    assert (pl.summary(model).sites[-1].kind, pl.summary(model).sites[-1].rank) == ("LoRA", 2)
    left_out = torch.linalg.svdvals(update(model, "full"))[2:].norm()
    assert_close((update(model, "full") - update(model, "two")).norm(), left_out, **EXACT)


def test_dare() -> None:
    """DARE keeps elements by the numbers of its generator, and divides them by the density."""
    model = model_of(*KINDS["LoRA"])
    parts = [update(model, name) * w / 0.25 for name, w in WEIGHTS.items()]
    for name in ("one", "two"):
        generator = torch.Generator().manual_seed(7)
        pl.combine(model, WEIGHTS, name=name, method="dare", density=0.25, generator=generator)
    found = update(model, "one")
    assert torch.equal(found, update(model, "two"))
    drawn = torch.Generator().manual_seed(7)
    masks = [torch.rand(5, 6, generator=drawn, dtype=torch.float32) < 0.25 for _ in parts]
    assert 0 < sum(int(mask.sum()) for mask in masks) < 45
    expected = sum(part * mask for part, mask in zip(parts, masks, strict=True))
    assert_close(found, expected, **EXACT)


def test_dare_keeps_the_sum_on_average() -> None:
    """The mean of many draws is the weighted sum of the updates; at density 1 each draw is."""
    model = model_of(*KINDS["LoRA"])
    exact = sum(update(model, name) * w for name, w in WEIGHTS.items())
    pl.combine(model, WEIGHTS, name="all", method="dare", density=1.0)
    assert_close(update(model, "all"), exact, **EXACT)
    updates, numbers = [update(model, name) for name in WEIGHTS], list(WEIGHTS.values())
    generator = torch.Generator().manual_seed(0)
    mean = sum(dare(updates, numbers, 0.5, generator) for _ in range(2000)) / 2000
    # The standard deviation of each mean is below 0.02.
    assert_close(mean, exact, rtol=0, atol=0.1)


def test_kinds_that_depend_on_the_weight() -> None:
    """TIES of a kind whose update depends on W raises TargetError, and changes nothing."""
    refuses(
        model_of(LoRA(2), pl.OFT(2)),
        lambda m: pl.combine(m, {"a": 1.0, "b": 1.0}, name="ab", method="ties", density=0.5),
        TargetError,
        "cannot combine at 'weight': the update of kind OFT depends on the weight, so it cannot be "
        "summed with others",
    )


def test_linear_warns_with_a_negative_weight() -> None:
    """With a negative weight "linear" warns, and says how far its result is from the sum."""
    model = model_of(LoRA(2), LoRA(2, 3))
    exact = update(model, "a") - 0.5 * update(model, "b")
    with pytest.warns(UserWarning, match="method='linear' sums factors") as caught:
        pl.combine(model, {"a": 1.0, "b": -0.5}, name="ab", method="linear")
    assert caught[0].filename == __file__
    far = float((update(model, "ab") - exact).norm() / exact.norm())
    told = re.search(r"distance is (\d+)% of their norm at 'weight'", str(caught[0].message))
    assert told is not None
    assert math.isclose(int(told[1]) / 100, far, abs_tol=0.006)


@pytest.mark.parametrize(
    ("weights", "method"),
    [({"a": 1.0, "b": 0.5}, "linear"), ({"a": -1.0}, "linear"), ({"a": 1.0, "b": -0.5}, "cat")],
    ids=["positive", "one adapter", "cat"],
)
def test_no_warning(weights: dict[str, float], method: str) -> None:
    """Positive weights, a single adapter and "cat" do not warn."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pl.combine(model_of(LoRA(2), LoRA(2)), weights, name="ab", method=method)


ARITHMETIC: dict[str, tuple[dict[str, float], Callable[[Tensor, Tensor], Tensor]]] = {
    "add": ({"a": 1.0, "b": 1.0}, lambda a, b: a + b),
    "subtract": ({"a": 1.0, "b": -1.0}, lambda a, b: a - b),
    "negate": ({"a": -1.0}, lambda a, b: -a),
    "interpolate": ({"a": 0.7, "b": 0.3}, lambda a, b: 0.7 * a + 0.3 * b),
}


@pytest.mark.parametrize(("weights", "formula"), ARITHMETIC.values(), ids=ARITHMETIC.keys())
def test_arithmetic(weights: dict[str, float], formula: Callable[[Tensor, Tensor], Tensor]) -> None:
    """A sum, and strengths in a block, give the same arithmetic of updates."""
    model = model_of(LoRA(2), LoRA(3))
    pl.scale(model, 1.0, "a")
    expected = formula(update(model, "a"), update(model, "b"))
    pl.combine(model, weights, name="sum")
    assert_close(update(model, "sum"), expected, **EXACT)
    with pl.disabled(model):
        base = weight(model).clone()
    with pl.using(model, weights):
        assert_close(weight(model) - base, expected, **EXACT)
