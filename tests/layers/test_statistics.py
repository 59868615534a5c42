"""`hold_statistics`: running statistics keep their bits while adapters train."""

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
    """Train the adapters for two steps, and evaluate after each."""
    optimizer = torch.optim.SGD(pl.parameters(model), lr=0.1)
    for _ in range(2):
        model.train()
        optimizer.zero_grad()
        model(torch.randn(8, 6)).square().sum().backward()
        optimizer.step()
        model.eval()
        model(torch.randn(8, 6))


def test_statistics_keep_their_bits() -> None:
    """With `hold_statistics` training keeps the fingerprint of the base; without it, it does not.

    BatchNorm updates its statistics in training mode although the base is frozen (PEFT issue 1732).
    The summary lists the layers that are held and those that are not.
    """
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


def test_held_layers_compute_as_in_eval_mode() -> None:
    """A held layer in training mode has the outputs and gradients of eval mode."""
    model, x = net(), torch.randn(8, 6)
    model[3].eval()  # it is not held, as it has no statistics
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
@pytest.mark.parametrize("calls", [[], [True], [False], [False, True], [True, False]])
def test_modes_after_a_block(mode: bool, calls: list[bool]) -> None:
    """After the block each layer has the mode of the last call of train() or eval()."""
    model = net().train(mode)
    plain = copy.deepcopy(model)
    contents = [list(vars(module)) for module in model.modules()]
    with pl.hold_statistics(model):
        for mode in calls:
            model.train(mode)
            plain.train(mode)
        assert not model[1].training
        assert not model[2][1].training
    assert [m.training for m in model.modules()] == [m.training for m in plain.modules()]
    assert [list(vars(module)) for module in model.modules()] == contents


def test_modes_after_detach() -> None:
    """Detaching restores each layer's mode, also of a layer that was in eval mode."""
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


def test_nested_blocks_and_errors() -> None:
    """Nested blocks end with the outermost, and an exception inside ends them too."""
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


def test_bake() -> None:
    """Baking an adapter ends its hold."""
    model = net()
    pl.attach(model, LoRA(2), hold_statistics=True)
    pl.bake(model)
    assert model[1].training
    assert all("train" not in vars(module) for module in model.modules())


def test_failed_attach_and_dry_run() -> None:
    """A failed attach and a dry run hold nothing."""
    model = net()
    with unchanged(model):
        with pytest.raises(pl.TargetError, match="no tensor matches"):
            pl.attach(model, LoRA(2), "nothing", hold_statistics=True)
        dry = pl.attach(model, LoRA(2), hold_statistics=True, dry_run=True)
    assert (dry.held, dry.moving) == (("1", "2.1"), ())


def test_dry_run_on_a_part() -> None:
    """A dry run on a part does not change what an adapter of the same name elsewhere has frozen."""
    model = net()
    pl.attach(model[0], LoRA(2), name="a")
    pl.attach(model, LoRA(2), "4", name="b", activate="also", hold_statistics=True)
    with unchanged(model):
        pl.attach(model[2], LoRA(2), name="b", hold_statistics=True, dry_run=True)
    assert not model[2][1].training
    pl.detach(model)
    assert model[2][1].training
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_detach_a_part() -> None:
    """Detaching from a part releases its layers only; detaching the whole releases all."""
    model = net()
    pl.attach(model, LoRA(2), hold_statistics=True)
    pl.detach(model[2])
    assert (model[1].training, model[2][1].training) == (False, True)
    pl.detach(model[0])
    pl.detach(model[4])
    pl.detach(model)
    assert model[1].training


def test_copy_of_a_held_model() -> None:
    """A deep copy is held like the original, and released on its own."""
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
def test_held_layer_with_an_adapter(first: bool) -> None:
    """A layer can be held and adapted, attached and detached in any order."""
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
def test_layer_types(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    """Each layer with running statistics keeps their bits, and computes as in eval mode."""
    model, x = nn.Sequential(make()), torch.randn(shape) + 3
    before = copy.deepcopy(dict(model.named_buffers()))
    with pl.hold_statistics(model):
        held = model.train()(x)
    assert_close(dict(model.named_buffers()), before, rtol=0, atol=0)
    assert_close(held, model.eval()(x), rtol=0, atol=0)
    # Outputs of zero would be equal without any computation.
    assert held.any()


def test_compiled_model() -> None:
    """Holding works on a model that was compiled before, and ends with the block."""
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


def test_copy_made_in_a_block() -> None:
    """A copy made in a block is not held."""
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    with pl.hold_statistics(model):
        copied = copy.deepcopy(model)
        pl.attach(copied, LoRA(2))
    assert not pl.summary(copied).held
    assert copied.train()[1].training


def test_eva_keeps_the_mode() -> None:
    """The pass of `eva` through a held layer does not count as a call of eval()."""
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)).train()
    pl.attach(model, pl.LoRA(2), hold_statistics=True)
    pl.eva(model, [torch.randn(20, 6)])
    pl.detach(model)
    assert model[1].training


class Noisy(nn.BatchNorm1d):
    """A BatchNorm with a child of its own."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.noise = nn.Dropout()


def test_children_of_a_held_layer() -> None:
    """A held layer stays in evaluation mode; its children follow train() and eval()."""
    model = nn.Sequential(nn.Linear(4, 4), Noisy(4))
    pl.attach(model, LoRA(2), hold_statistics=True)
    held: Any = model[1]
    for mode in (False, True):
        model.train(mode)
        assert (held.training, held.noise.training) == (False, mode)
