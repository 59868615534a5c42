"""Adapters that torch's own function registers, as in the tutorial of parametrizations."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.testing import assert_close

import paramlora as pl
from tests.support.mixed import assert_bits
from tests.support.reference import shake


def base() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def register(layer: Any, name: str = "default") -> None:
    """Register an adapter as the tutorial does."""
    torch.manual_seed(1)
    update = pl.LoRA(rank=2, alpha=3).parametrization(layer.weight, name=name)
    parametrize.register_parametrization(layer, "weight", update)


def registered() -> Any:
    model = base()
    for layer in (model[0], model[2]):
        register(layer)
    shake(model)
    return model


def attached() -> Any:
    """Return the model of `registered`, made by `attach`."""
    model = base()
    pl.attach(model, pl.LoRA(rank=2, alpha=3), freeze=False)
    pl.load_state_dict(model, pl.state_dict(registered()))
    return model


X = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_the_published_toggle() -> None:
    """`layer.parametrizations.weight[0].enabled` switches an adapter off and on, to the bit."""
    model = base()
    off = model(X)
    for layer in (model[0], model[2]):
        register(layer)
    assert_bits(model(X), off)  # B is zero at the start
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.parametrizations.weight[0].factors["default"].B.normal_()
    on = model(X)
    assert not torch.allclose(on, off)
    for layer in (model[0], model[2]):
        assert layer.parametrizations.weight[0].enabled is True
        layer.parametrizations.weight[0].enabled = False
        assert layer.parametrizations.weight[0].enabled is False
    assert_bits(model(X), off)
    for layer in (model[0], model[2]):
        layer.parametrizations.weight[0].enabled = True
    assert_bits(model(X), on)


def test_enabled_of_an_attached_adapter() -> None:
    """`enabled` works after `attach` too, and switches those on again that it switched off."""
    model = base()
    pl.attach(model, pl.LoRA(1), "0", name="a")
    pl.attach(model, pl.LoRA(1), "0", name="b")
    pl.attach(model, pl.LoRA(1), "0", name="c", activate="also")
    stack = model[0].parametrizations.weight[0]
    stack.enabled = False
    stack.enabled = False
    assert pl.summary(model).active == ()
    stack.enabled = True
    assert pl.summary(model).active == ("b", "c")
    stack.enabled = False
    pl.detach(model, "b", "c")
    stack.enabled = True
    assert pl.summary(model).active == ("a",)
    with pytest.raises(TypeError, match="enabled is True or False, got 0"):
        stack.enabled = 0
    pl.merge(model)
    with pytest.raises(pl.StateError, match="adapter 'a' is merged; unmerge first"):
        stack.enabled = False


def test_the_same_site_as_attach() -> None:
    """Outputs, weights, gradients, summary and class are those of an attached adapter."""
    ours, theirs = registered(), attached()
    for model in (ours, theirs):
        model(X).square().sum().backward()
    assert_close(ours(X), theirs(X))
    assert str(pl.summary(ours)) == str(pl.summary(theirs))
    for one, other in zip(pl.parameters(ours), pl.parameters(theirs), strict=True):
        assert_close(one.grad, other.grad)
    for one, other in zip(ours.modules(), theirs.modules(), strict=True):
        assert type(one).__name__ == type(other).__name__
        assert sorted(vars(type(one))) == sorted(vars(type(other)))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert_bits(ours(X), theirs(X))


def test_forward_after_a_verb_does_not_build_the_weight() -> None:
    """Once a verb has seen the model, a registered adapter takes the factored path."""
    model = registered()
    pl.summary(model)
    built = []
    stack = model[0].parametrizations.weight[0]
    stack.register_forward_hook(lambda *_: built.append(1))
    model(X)
    assert not built


VERBS: dict[str, Callable[[Any, Path], object]] = {
    "disable": lambda m, path: pl.disable(m),
    "scale": lambda m, path: pl.scale(m, 0.5),
    "activate": lambda m, path: pl.activate(m, default=2.0),
    "merge": lambda m, path: pl.merge(m),
    "merge and unmerge": lambda m, path: [verb(m) for verb in (pl.merge, pl.unmerge)],
    "bake": lambda m, path: pl.bake(m),
    "detach": lambda m, path: pl.detach(m),
    "freeze": lambda m, path: pl.freeze(m),
    "attach": lambda m, path: pl.attach(m, pl.Delta(), name="two"),
    "attach on top": lambda m, path: pl.attach(m, pl.Delta(), name="two", activate="also"),
    "save and load": lambda m, path: [
        verb(m, path / "a", name=name) for verb, name in ((pl.save, None), (pl.load, "two"))
    ],
    "load_state_dict": lambda m, path: pl.load_state_dict(
        m, {key: torch.ones_like(value) for key, value in pl.state_dict(m).items()}
    ),
    "base": lambda m, path: pl.load_base_state_dict(
        m, {key: value + 1 for key, value in pl.base_state_dict(m).items()}
    ),
}


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("verb", VERBS)
def test_verbs(verb: str, copied: bool, tmp_path: Path) -> None:
    """Each verb does to a registered adapter what it does to an attached one; copies too."""
    original, theirs = registered(), attached()
    before = original(X)
    ours = copy.deepcopy(original) if copied else original
    for model in (ours, theirs):
        VERBS[verb](model, tmp_path)
    assert_bits(ours(X), theirs(X))
    assert str(pl.summary(ours)) == str(pl.summary(theirs))
    for (key, one), (other_key, other) in zip(
        ours.named_parameters(), theirs.named_parameters(), strict=True
    ):
        assert key == other_key
        assert one.requires_grad == other.requires_grad
        assert_bits(one.detach(), other.detach())
    if copied:
        assert_bits(original(X), before)
        pl.detach(original)
        assert type(original[0]) is nn.Linear


def test_detach_gives_back() -> None:
    """Detaching restores class, parameters, their identity and order."""
    model = base()
    before = list(model.named_parameters())
    weight = model[0].weight
    register(model[0])
    pl.detach(model)
    assert type(model[0]) is nn.Linear
    assert [key for key, _ in model.named_parameters()] == [key for key, _ in before]
    assert model[0].weight is weight


def test_blocks_of_rows() -> None:
    """`routed` and `using` work on a registered adapter."""
    model = registered()
    with pl.disabled(model):
        off = model(X)
    on = model(X)
    with pl.routed(model, [0, -1, 0, -1, 0, -1]):
        found = model(X)
    assert_close(found[0::2], on[0::2])
    assert_close(found[1::2], off[1::2])


@pytest.mark.parametrize("first", ["attach", "register"])
def test_a_second_adapter_at_one_tensor(first: str) -> None:
    """A second registered adapter joins the first one; both are switched by their names."""
    model = base()
    if first == "attach":
        pl.attach(model, pl.LoRA(2), "0", name="one")
    else:
        register(model[0], "one")
    register(model[0], "two")
    shake(model)
    assert pl.names(model) == ["one", "two"]
    assert len(model[0].parametrizations.weight) == 1
    weights = []
    for chosen in ((), ("one",), ("two",), ("one", "two")):
        with pl.using(model, *chosen):
            weights.append(model[0].weight.detach())
    off, one, two, both = weights
    assert_close(both, one + two - off)
    pl.detach(model)
    assert type(model[0]) is nn.Linear


def test_two_of_one_name() -> None:
    """Two adapters of one name at one tensor raise, and the message says what to do."""
    model = base()
    register(model[0])
    register(model[0])
    with pytest.raises(pl.AdapterNameError, match=r"'0\.weight' has two adapters of one"):
        pl.summary(model)


@pytest.mark.parametrize("norm_first", [True, False])
def test_beside_another_parametrization(norm_first: bool) -> None:
    """A registered adapter stays before or after another parametrization; detach leaves that."""

    class Double(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    model = base()
    if norm_first:
        parametrize.register_parametrization(model[0], "weight", Double())
    register(model[0])
    if not norm_first:
        parametrize.register_parametrization(model[0], "weight", Double())
    shake(model)
    before = model(X)
    pl.summary(model)
    assert_close(model(X), before)
    pl.detach(model)
    assert [type(one) for one in model[0].parametrizations.weight] == [Double]
    assert_bits(model[0].weight.detach(), 2 * base()[0].weight.detach())


def test_bias_and_weight() -> None:
    """Two tensors of one layer can be registered, of different kinds."""
    model = base()
    register(model[0])
    update = pl.Delta().parametrization(model[0].bias)
    parametrize.register_parametrization(model[0], "bias", update)
    sites = [(row.site, row.kind) for row in pl.summary(model).sites]
    assert sorted(sites) == [("0.bias", "Delta"), ("0.weight", "LoRA")]
    pl.detach(model)
    assert list(dict(model[0].named_parameters())) == ["weight", "bias"]


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: pl.LoRA(2).parametrization(torch.ones(3)), pl.TargetError, "needs two dimensions"),
        (lambda: pl.LoRA(2).parametrization(torch.ones(3, 3), "a.b"), pl.AdapterNameError, "a.b"),
    ],
)
def test_errors(make: Callable[[], object], error: type[Exception], match: str) -> None:
    """A tensor or a name that `attach` refuses is refused here too."""
    with pytest.raises(error, match=match):
        make()
