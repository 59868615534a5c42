"""Running statistics held still while adapters train, and given back with everything else."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import paramlora as pl
from paramlora import Delta, LoRA
from tests.support.helpers import unchanged
from tests.support.mixed import train


def net() -> Any:
    torch.default_generator.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 4),
        nn.BatchNorm1d(4),
        nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, momentum=None)),
        nn.BatchNorm1d(4, track_running_stats=False),
        nn.Linear(4, 3),
    )
    for _ in range(3):
        model(torch.randn(8, 6) * 2 + 1)
    return model


def steps(model: nn.Module) -> None:
    """Train the adapters as a loop does: in training mode, evaluated between."""
    optimizer = torch.optim.SGD(pl.parameters(model), lr=0.1)
    for _ in range(2):
        model.train()
        optimizer.zero_grad()
        model(torch.randn(8, 6)).square().sum().backward()
        optimizer.step()
        model.eval()
        model(torch.randn(8, 6))


def test_statistics_stay_to_the_bit() -> None:
    """Trained with `hold_statistics` the base is untouched, without it `fingerprint` notices."""
    model = net()
    base = pl.fingerprint(model)
    summary = pl.attach(model, LoRA(2), hold_statistics=True)
    assert (summary.held, summary.moving) == (("1", "2.1"), ())
    assert "running statistics held still: 2 (1, 2.1)" in str(summary).splitlines()
    steps(model)
    assert pl.fingerprint(model) == base
    pl.detach(model)
    summary = pl.attach(model, LoRA(2))
    assert (summary.held, summary.moving) == ((), ("1", "2.1"))
    assert "running statistics that move in training: 2 (1, 2.1)" in str(summary).splitlines()
    steps(model)
    assert pl.fingerprint(model) != base


def test_running_statistics_drift_under_a_frozen_base() -> None:
    """BatchNorm's statistics move in training mode although the base is frozen (PEFT issue 1732).

    `fingerprint` and the summary show it, and `hold_statistics` prevents it.
    """
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    summary = pl.attach(model, LoRA(rank=2), name="first")
    assert summary.moving == ("1",)
    before = pl.fingerprint(model)
    train(model.eval(), torch.randn(5, 6))
    assert pl.fingerprint(model) == before
    with pl.hold_statistics(model):
        train(model.train(), torch.randn(5, 6))
    assert pl.fingerprint(model) == before
    pl.attach(model, LoRA(rank=2), name="second", hold_statistics=True)
    train(model.train(), torch.randn(5, 6))
    assert pl.fingerprint(model) == before
    pl.detach(model, "second")
    train(model.train(), torch.randn(5, 6))
    assert pl.fingerprint(model) != before


def test_held_is_as_in_use() -> None:
    """A held layer computes in training mode what it computes in eval mode, gradients too."""
    model, x = net(), torch.randn(8, 6)
    model[3].eval()  # not one that is held: it has no statistics
    pl.attach(model, LoRA(2), hold_statistics=True)
    model.eval()
    expected = model(x)
    gradients = torch.autograd.grad(expected.square().sum(), pl.parameters(model))
    model.train()
    model[3].eval()
    found = model(x)
    assert_close(found, expected, rtol=0, atol=0)
    assert_close(torch.autograd.grad(found.square().sum(), pl.parameters(model)), gradients)


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("told", [[], [True], [False], [False, True], [True, False]])
def test_modes_are_given_back(mode: bool, told: list[bool]) -> None:
    """Afterwards each layer is in the mode that it was told last, and nothing else is left."""
    model = net().train(mode)
    plain = copy.deepcopy(model)
    contents = [list(vars(module)) for module in model.modules()]
    with pl.hold_statistics(model):
        for one in told:
            model.train(one)
            plain.train(one)
        assert not model[1].training
        assert not model[2][1].training
    assert [m.training for m in model.modules()] == [m.training for m in plain.modules()]
    assert [list(vars(module)) for module in model.modules()] == contents


def test_only_what_was_there_comes_back() -> None:
    """Attaching and detaching changes nothing, a layer that was in eval mode included."""
    model = net()
    model[1].eval()
    with unchanged(model):
        pl.attach(model, Delta(), ["*.weight", "0"], hold_statistics=True)
        assert not model[2][1].training
        pl.detach(model)
    with unchanged(model):
        pl.attach(model, LoRA(2), "0", name="a", hold_statistics=True)
        pl.attach(model, LoRA(2), "4", name="b", hold_statistics=True)
        with pl.hold_statistics(model):
            pl.detach(model, "a")
            assert not model[2][1].training
        assert not model[2][1].training
        pl.detach(model, "b")
    assert (model[1].training, model[2][1].training) == (False, True)


def test_nested_and_with_errors() -> None:
    """Nested holds end with the outermost; an exception inside ends them too."""
    model = net()
    with pl.hold_statistics(model):
        with pl.hold_statistics(model[2]):
            assert not model[2][1].training
        assert not model[2][1].training
    assert model[2][1].training
    with (
        unchanged(model),
        pytest.raises(RuntimeError, match="inside"),
        pl.hold_statistics(model),
        pl.hold_statistics(model),
    ):
        raise RuntimeError("inside")


def test_baking_lets_go() -> None:
    """An adapter that is baked in holds nothing any more."""
    model = net()
    pl.attach(model, LoRA(2), hold_statistics=True)
    pl.bake(model)
    assert model[1].training
    assert all("train" not in vars(module) for module in model.modules())


def test_a_refused_attach_holds_nothing() -> None:
    """After an error, or a dry run, all is as it was."""
    model = net()
    with unchanged(model):
        with pytest.raises(pl.TargetError, match="no tensor matches"):
            pl.attach(model, LoRA(2), "nothing", hold_statistics=True)
        dry = pl.attach(model, LoRA(2), hold_statistics=True, dry_run=True)
    assert (dry.held, dry.moving) == (("1", "2.1"), ())


def test_a_part_lets_go_of_its_own() -> None:
    """Detached through a part, the other parts stay held until the whole is detached."""
    model = net()
    pl.attach(model, LoRA(2), hold_statistics=True)
    pl.detach(model[2])
    assert (model[1].training, model[2][1].training) == (False, True)
    pl.detach(model[0])
    pl.detach(model[4])
    pl.detach(model)
    assert model[1].training


def test_a_copy_is_held_for_itself() -> None:
    """A deep copy is held as the original is, and let go by itself."""
    model = net()
    pl.attach(model, LoRA(2), hold_statistics=True)
    other = copy.deepcopy(model)
    pl.detach(other)
    assert other[1].training
    other.eval()
    model.train()
    assert not model[1].training
    pl.detach(model)
    assert model[1].training
    assert not other[1].training


@pytest.mark.parametrize("first", [True, False])
def test_layers_with_adapters_are_held(first: bool) -> None:
    """Where the layer itself has an adapter, whichever came first, both are taken away again."""
    model = net()
    with unchanged(model):
        if first:
            pl.attach(model, Delta(), "1", name="own")
        pl.attach(model, LoRA(2), "0", name="other", hold_statistics=True)
        if not first:
            pl.attach(model, Delta(), "1", name="own")
        before = pl.fingerprint(model)
        model.train()
        model(torch.randn(8, 6))
        assert pl.fingerprint(model) == before
        pl.detach(model, *(("other", "own") if first else ("own", "other")))


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "2d": (lambda: nn.BatchNorm2d(4), (3, 4, 5, 5)),
    "3d": (lambda: nn.BatchNorm3d(4), (3, 4, 2, 2, 2)),
    "sync": (lambda: nn.SyncBatchNorm(4), (3, 4, 5)),
    "not affine": (lambda: nn.BatchNorm1d(4, affine=False), (3, 4)),
    "instance": (lambda: nn.InstanceNorm1d(4, track_running_stats=True), (3, 4, 5)),
    "no momentum": (lambda: nn.BatchNorm1d(4, momentum=None), (3, 4)),
}


@pytest.mark.parametrize(("make", "shape"), LAYERS.values(), ids=LAYERS.keys())
def test_every_kind_of_layer(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    """Each layer that has running statistics keeps them to the bit."""
    model, x = nn.Sequential(make()), torch.randn(shape) + 3
    before = copy.deepcopy(dict(model.named_buffers()))
    with pl.hold_statistics(model):
        held = model.train()(x)
    assert_close(dict(model.named_buffers()), before, rtol=0, atol=0)
    assert_close(held, model.eval()(x), rtol=0, atol=0)
    # An exact zero would hide that nothing was computed.
    assert held.any()


def test_a_compiled_model_is_held() -> None:
    """A model that is compiled before is held all the same, and let go."""
    torch._dynamo.reset()
    model, x = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4)), torch.randn(8, 6)
    compiled: Any = torch.compile(model, backend="eager", fullgraph=True)
    compiled(x)

    def statistics() -> dict[str, Tensor]:
        return {key: value.clone() for key, value in model.named_buffers()}

    before = statistics()
    with pl.hold_statistics(model):
        compiled.train()
        compiled(x)
        assert_close(statistics(), before, rtol=0, atol=0)
    compiled(x)
    assert not torch.equal(statistics()["1.running_mean"], before["1.running_mean"])


def test_a_copy_made_inside_has_left() -> None:
    """A copy made inside of a block is not held by it for ever; an adapter's hold goes with it."""
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    with pl.hold_statistics(model):
        copied = copy.deepcopy(model)
    assert copied.train()[1].training
    pl.attach(model, pl.LoRA(1), hold_statistics=True)
    held = copy.deepcopy(model)
    assert not held.train()[1].training
    pl.detach(held)
    assert held.train()[1].training


def test_eva_leaves_the_mode() -> None:
    """A pass of eva's through a held layer does not count as the user's eval()."""
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)).train()
    pl.attach(model, pl.LoRA(2), hold_statistics=True)
    pl.eva(model, [torch.randn(20, 6)])
    pl.detach(model)
    assert model[1].training
