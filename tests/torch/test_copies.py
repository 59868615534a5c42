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
    host_name,
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
from tests.support.reference import Host, floats, loss, shake


class TestCopies:
    @pytest.mark.parametrize("state", ["on", "off", "merged"])
    @pytest.mark.parametrize("host", [MLP, "attention", "lstm"], ids=host_name)
    def test_deepcopy(self, host: str | Host, state: str) -> None:
        """A deep copy after a backward is equal, and neither model affects the other."""
        case = case_of(host)
        case.actual()
        if state == "off":
            pl.disable(case.model)
        if state == "merged":
            pl.merge(case.model)
        other = copy.deepcopy(case.model)
        assert pl.summary(other) == pl.summary(case.model)
        assert_bits(outputs(case, other), outputs(case))
        for one, two in ((other, case.model), (case.model, copy.deepcopy(case.model))):
            with unchanged(two):
                pl.unmerge(one)
                pl.enable(one)
                pl.scale(one, 2.0)
                shake(one)
                loss(floats(one(*case.inputs))).backward()
                with pl.merged(one):
                    pass
                pl.attach(one, pl.LoRA(rank=1), "*weight*", name="two")
                pl.detach(one)
                one.half()
            types = [type(module) for module in case.plain.modules()]
            assert [type(module) for module in one.modules()] == types

    def test_a_copy_has_its_own_class(self) -> None:
        """A deep copy has its own class, so detaching from it leaves the original adapted."""
        for _ in range(2):
            model = small()
            other = copy.deepcopy(model)
            third = copy.deepcopy(other)
            assert len({type(m[0]) for m in (model, other, third)}) == 3
            weight = model[0].weight.detach().clone()
            pl.detach(other)
            pl.attach(third, pl.Delta(), "*.bias", name="more")
            parametrize.register_parametrization(third[0], "bias", nn.Identity())
            with pl.disabled(model):
                assert "bias" in dict(model[0].named_parameters())
            assert_bits(model[0].weight.detach(), weight)
            pl.detach(model)
            assert_bits(third[0].weight.detach(), weight)
            assert type(model[0]) is type(other[0]) is nn.Linear

    def test_pickle(self, tmp_path: Path) -> None:
        """torch refuses to pickle a parametrized model, and pickles a detached or baked one."""
        case = case_of(MLP)
        with pytest.raises(RuntimeError, match="parametrized modules is only supported through"):
            torch.save(case.model, tmp_path / "model.pt")
        with pytest.raises(RuntimeError, match="parametrized modules is only supported through"):
            pickle.dumps(case.model)
        baked = copy.deepcopy(case.model)
        pl.bake(baked)
        pl.detach(case.model)
        for model in (baked, case.model):
            torch.save(model, tmp_path / "model.pt")
            again = torch.load(tmp_path / "model.pt", weights_only=False)
            assert_bits(outputs(case, again), outputs(case, model))
            again = pickle.loads(pickle.dumps(model))
            assert_bits(outputs(case, again), outputs(case, model))

    def test_averaged_model(self) -> None:
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

    def test_exponential_average(self) -> None:
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


def changes(tmp_path: Path) -> dict[str, Callable[[Mixed, Tensor], object]]:
    """Return what can be done to a model with the adapters of `attach_two`, by name."""
    source, _ = mixed()
    attach_two(source.eval())
    shake(source)
    pl.save(source, tmp_path / "low.safetensors", "low")

    def merge_and_unmerge(model: Mixed, x: Tensor) -> None:
        pl.merge(model)
        pl.unmerge(model)

    def load_base(model: Mixed, x: Tensor) -> None:
        state = pl.base_state_dict(model)
        pl.load_base_state_dict(model, {key: value + 1 for key, value in state.items()})

    return {
        "attach": lambda model, x: pl.attach(model, pl.LoRA(rank=1), name="more"),
        "attach_elsewhere": lambda model, x: pl.attach(model, pl.Delta(), "norm", name="more"),
        "detach": lambda model, x: pl.detach(model),
        "detach_one": lambda model, x: pl.detach(model, "low"),
        "disable": lambda model, x: pl.disable(model, "full"),
        "scale": lambda model, x: pl.scale(model, 0.5),
        "merge": lambda model, x: pl.merge(model),
        "merge_and_unmerge": merge_and_unmerge,
        "bake": lambda model, x: pl.bake(model),
        "freeze": lambda model, x: pl.freeze(model, "full"),
        "train": lambda model, x: train(model, x),
        "load": lambda model, x: pl.load(model, tmp_path / "low.safetensors"),
        "load_base": load_base,
        "normalise": lambda model, x: spectral_norm(model.head),
        "double": lambda model, x: model.double(),
        "hook": lambda model, x: model.head.register_forward_hook(lambda *_: None),
    }


CHANGES = [
    *("attach", "attach_elsewhere", "detach", "detach_one", "disable", "scale", "merge"),
    *("merge_and_unmerge", "bake", "freeze", "train", "load", "load_base", "normalise"),
    *("double", "hook"),
]


# What is refused while an adapter is merged.
REFUSED = {"detach", "detach_one", "disable", "scale", "merge", "merge_and_unmerge", "load"}


REFUSED |= {"load_base", "train"}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("started", ["attached", "merged", "normed"])
def test_6_a_deep_copy_is_independent(change: str, started: str, tmp_path: Path) -> None:
    """Whatever is done to a copy leaves the original alone, and the other way round."""
    for done_to_the_copy in (True, False):
        model, x = mixed()
        if started == "normed":
            weight_norm(model.head)
        attach_two(model.eval())
        shake(model)
        if started == "merged" and change not in REFUSED:
            pl.merge(model)
        model(x)
        other = copy.deepcopy(model)
        assert_bits(other(x), model(x))
        changed, kept = (other, model) if done_to_the_copy else (model, other)
        expected = kept(x).detach()
        with unchanged(kept):
            changes(tmp_path)[change](changed, x)
        assert_bits(kept(x).detach(), expected)
        assert_bits(copy.deepcopy(changed)(x.clone()), changed(x))
        pl.unmerge(kept)
        pl.detach(kept)
        assert type(kept.embed) is nn.Embedding
