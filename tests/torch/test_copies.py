"""Copies of an adapted model: deepcopy, pickle and AveragedModel."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.testing import assert_close

import paramlora as pl
from tests.support.helpers import (
    EXACT,
    MLP,
    case_of,
    factors,
    outputs,
    unchanged,
)
from tests.support.mixed import (
    Mixed,
    assert_bits,
    attach_two,
    mixed,
    small,
    train,
)
from tests.support.reference import loss, shake


def load_low(model: Mixed, x: Tensor, folder: Path) -> None:
    source, _ = mixed()
    attach_two(source)
    pl.save(source, folder / "low.safetensors", "low")
    pl.load(model, folder / "low.safetensors")


def load_base(model: Mixed, x: Tensor, folder: Path) -> None:
    state = pl.base_state_dict(model)
    pl.load_base_state_dict(model, {key: value + 1 for key, value in state.items()})


def merge_and_unmerge(model: Mixed, x: Tensor, folder: Path) -> None:
    pl.merge(model)
    pl.unmerge(model)


# Changes of a model with the adapters of `attach_two`.
CHANGES: dict[str, Callable[[Mixed, Tensor, Path], object]] = {
    "attach": lambda model, x, folder: pl.attach(
        model, pl.LoRA(rank=1), name="more", activate="also"
    ),
    "attach elsewhere": lambda model, x, folder: pl.attach(
        model, pl.Delta(), "norm", name="more", activate="also"
    ),
    "detach": lambda model, x, folder: pl.detach(model),
    "detach one": lambda model, x, folder: pl.detach(model, "low"),
    "enable": lambda model, x, folder: pl.enable(model),
    "disable": lambda model, x, folder: pl.disable(model, "full"),
    "scale": lambda model, x, folder: pl.scale(model, 0.5),
    "merge": lambda model, x, folder: pl.merge(model),
    "unmerge": lambda model, x, folder: pl.unmerge(model),
    "merge and unmerge": merge_and_unmerge,
    "bake": lambda model, x, folder: pl.bake(model),
    "freeze": lambda model, x, folder: pl.freeze(model, "full"),
    "train": lambda model, x, folder: train(model, x),
    "load": load_low,
    "load a base": load_base,
    "spectral_norm": lambda model, x, folder: spectral_norm(model.head),
    "cast": lambda model, x, folder: model.double(),
    "hook": lambda model, x, folder: model.head.register_forward_hook(lambda *_: None),
}
# All changes in the usual state, and some in each other state.
CASES = [(change, "on") for change in CHANGES if change not in ("enable", "unmerge")]
CASES += [(change, "off") for change in ("attach", "enable", "load")]
CASES += [(change, "merged") for change in ("attach", "unmerge", "bake", "spectral_norm", "cast")]
CASES += [(change, "normed") for change in ("attach", "detach", "merge and unmerge", "train")]


@pytest.mark.parametrize("changed", ["copy", "original"])
@pytest.mark.parametrize(("change", "state"), CASES)
def test_deepcopy_is_independent(change: str, state: str, changed: str, tmp_path: Path) -> None:
    """A deep copy equals the original, and a change of either one does not affect the other."""
    model, x = mixed()
    if state == "normed":
        weight_norm(model.head)
    attach_two(model.eval())
    shake(model)
    torch.autograd.grad(loss([model(x)]), pl.parameters(model))
    if state == "merged":
        pl.merge(model)
    if state == "off":
        pl.disable(model)
    other = copy.deepcopy(model)
    assert pl.summary(other) == pl.summary(model)
    assert_bits(other(x), model(x))
    target, untouched = (other, model) if changed == "copy" else (model, other)
    expected = untouched(x).detach()
    with unchanged(untouched):
        CHANGES[change](target, x, tmp_path)
    assert_bits(untouched(x).detach(), expected)
    assert_bits(copy.deepcopy(target)(x.clone()), target(x))
    pl.unmerge(untouched)
    pl.detach(untouched)
    assert type(untouched.embed) is nn.Embedding


def test_class_of_a_copy() -> None:
    """A deep copy has its own class, so detaching from it leaves the original adapted."""
    for _ in range(2):
        model = small()
        other = copy.deepcopy(model)
        third = copy.deepcopy(other)
        assert len({type(m[0]) for m in (model, other, third)}) == 3
        weight = model[0].weight.detach().clone()
        pl.detach(other)
        pl.attach(third, pl.Delta(), "*.bias", name="more", activate="also")
        parametrize.register_parametrization(third[0], "bias", nn.Identity())
        with pl.disabled(model):
            assert "bias" in dict(model[0].named_parameters())
        assert_bits(model[0].weight.detach(), weight)
        pl.detach(model)
        assert_bits(third[0].weight.detach(), weight)
        assert type(model[0]) is type(other[0]) is nn.Linear


def test_pickle(tmp_path: Path) -> None:
    """Pickling an adapted model is refused with a remedy; a detached or baked one is pickled."""
    case = case_of(MLP)
    with pytest.raises(pl.StateError, match=r"cannot be pickled.*save\(model\.state_dict"):
        torch.save(case.model, tmp_path / "model.pt")
    with pytest.raises(pl.StateError, match=r"cannot be pickled.*save\(model\.state_dict"):
        pickle.dumps(case.model)
    baked = copy.deepcopy(case.model)
    pl.bake(baked)
    pl.detach(case.model)
    for model in (baked, case.model):
        torch.save(model, tmp_path / "model.pt")
        restored = torch.load(tmp_path / "model.pt", weights_only=False)
        assert_bits(outputs(case, restored), outputs(case, model))
        restored = pickle.loads(pickle.dumps(model))
        assert_bits(outputs(case, restored), outputs(case, model))


def test_averaged_model() -> None:
    """AveragedModel averages the factors, keeps the base's bits, and is independent."""
    case = case_of(MLP)
    averaged = AveragedModel(case.model)
    seen = []
    for _ in range(3):
        shake(case.model)
        averaged.update_parameters(case.model)
        seen.append(factors(case.model))
    mean = [torch.stack(steps).mean(0) for steps in zip(*seen, strict=True)]
    assert_close(factors(averaged), mean, **EXACT)
    assert pl.fingerprint(averaged.module) == pl.fingerprint(case.model)

    pl.load_state_dict(case.model, pl.state_dict(averaged.module, "one"), "one")
    expected = case.expected("one").outputs
    with unchanged(case.model):
        assert_close(outputs(case, averaged), expected, **EXACT)
        with pl.disabled(averaged):
            assert_bits(outputs(case, averaged), outputs(case, case.plain))
        with pl.merged(averaged):
            assert_close(outputs(case, averaged), expected, **EXACT)
        pl.detach(averaged)
    assert_bits(averaged.module.state_dict(), case.plain.state_dict())


def test_exponential_average() -> None:
    """An exponential average is d·mean + (1 − d)·factor, and does not change the base."""
    case = case_of(MLP)
    averaged = AveragedModel(case.model, multi_avg_fn=get_ema_multi_avg_fn(0.75))
    averaged.update_parameters(case.model)  # the first one copies
    expected = factors(case.model)
    for _ in range(3):
        shake(case.model)
        averaged.update_parameters(case.model)
        pairs = zip(expected, factors(case.model), strict=True)
        expected = [0.75 * mean + 0.25 * new for mean, new in pairs]
    assert_close(factors(averaged), expected, **EXACT)
    assert_close(pl.base_state_dict(averaged.module), case.plain.state_dict(), **EXACT)
