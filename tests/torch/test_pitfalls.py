"""What goes wrong around `torch.nn.utils.parametrize`, each by its number: the module's side.

Those on what is computed, from 9 on, are in `test_pitfalls_computed.py`; the one on sharding, 13,
is in `test_distributed.py`.
"""

import copy
import io
import pickle
import threading
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.optim.swa_utils import AveragedModel
from torch.testing import assert_close

import paramlora as pl
from tests.support.helpers import unchanged
from tests.support.mixed import assert_bits, attach_two, mixed, small, train
from tests.support.reference import floats, loss, shake


def test_01_a_copy_has_a_class_of_its_own() -> None:
    """A deep copy shares no injected class: removing or adding on one leaves the other alone."""
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


def test_02_pickling_is_refused_and_copies_work() -> None:
    """Pickling a parametrized module is refused; deepcopy, AveragedModel and state dicts work."""
    model, x = small(), torch.randn(4, 6)
    with pytest.raises(RuntimeError, match="parametrized modules is only supported through state_"):
        pickle.dumps(model)
    with pytest.raises(RuntimeError, match="parametrized modules is only supported through state_"):
        torch.save(model, io.BytesIO())
    assert_bits(copy.deepcopy(model)(x), model(x))
    average = AveragedModel(model)
    average.update_parameters(model)
    first = {key: value.clone() for key, value in pl.state_dict(model).items()}
    shake(model)
    average.update_parameters(model)
    second = pl.state_dict(model)
    wanted = {key: (value + second[key]) / 2 for key, value in first.items()}
    assert_close(pl.state_dict(average.module), wanted)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    fresh = small()
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    assert_bits(fresh(x), model(x))
    pl.detach(model)
    assert_bits(pickle.loads(pickle.dumps(model))(x), model(x))


def test_03_the_base_keeps_its_keys() -> None:
    """`base_state_dict` has the keys from before attaching, and loads into a plain model."""
    model, x = mixed()
    plain = copy.deepcopy(model)
    attach_two(model)
    shake(model)
    assert model.state_dict().keys() != plain.state_dict().keys()
    assert_bits(dict(pl.base_state_dict(model)), dict(plain.state_dict()))
    with pl.merged(model):
        assert_bits(dict(pl.base_state_dict(model)), dict(plain.state_dict()))
    other, _ = mixed()
    shake_base(other)
    other.load_state_dict(pl.base_state_dict(model))
    assert_bits(other.eval()(x), plain.eval()(x))


def shake_base(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)


def test_04_weight_norm_on_top_keeps_g_and_v() -> None:
    """Removing ours from the middle leaves the others: weight_norm keeps g, v and their values."""
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


def test_04_many_sites_of_one_module_are_removed() -> None:
    """Removing while there are several parametrized tensors in one module removes them all."""
    model: Any = nn.LSTM(4, 4, num_layers=2)
    names = [name for name, _ in model.named_parameters()]
    pl.attach(model, pl.Delta(), "*")
    assert len(model.parametrizations) == len(names) == 8
    pl.detach(model)
    assert type(model) is nn.LSTM
    assert [name for name, _ in model.named_parameters()] == names


def test_05_optimizer_state_finds_its_parameters() -> None:
    """The order of parameters survives, and with it an optimizer state that goes by order."""
    model, x = mixed()
    plain, other = copy.deepcopy(model), copy.deepcopy(model)
    for net in (model, plain):
        optimizer = torch.optim.Adam(net.parameters(), lr=0.1)
        for step in range(4):
            if step == 2 and net is model:
                state = optimizer.state_dict()
                attach_two(model)
                shake(model)
                pl.detach(model)
                optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
                optimizer.load_state_dict(state)
            optimizer.zero_grad()
            loss([net(x)]).backward()
            optimizer.step()
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in other.named_parameters()]
    assert_bits(dict(model.state_dict()), dict(plain.state_dict()))


def hosts() -> dict[str, tuple[nn.Module, tuple[Tensor, ...]]]:
    x = torch.randn(3, 2, 4)
    return {
        "linear": (nn.Linear(4, 4), (x,)),
        "conv": (nn.Conv1d(2, 4, 3), (x,)),
        "lstm": (nn.LSTM(4, 4), (x,)),
        "attention": (nn.MultiheadAttention(4, 2), (x, x, x)),
    }


@pytest.mark.parametrize("spec", [pl.LoRA(rank=2), pl.Delta()])
@pytest.mark.parametrize("host", hosts())
def test_06_nothing_stale_is_read(host: str, spec: pl.Spec) -> None:
    """Every forward and read sees the present factors, after a read under no_grad too."""
    torch.default_generator.manual_seed(0)
    model, inputs = hosts()[host]
    pl.attach(model, spec, "*weight*")
    names = [row.site for row in pl.summary(model).sites if "." not in row.site]
    seen: list[Tensor] = []
    for _ in range(3):
        shake(model)
        with torch.no_grad():
            assert not any(getattr(model, name).requires_grad for name in names)
            without = floats(model(*inputs))[0]
        assert all(getattr(model, name).requires_grad for name in names)
        out = floats(model(*inputs))[0]
        assert_close(out, without)
        assert all(not torch.equal(out, before) for before in seen)
        grads = torch.autograd.grad(out.square().sum(), pl.parameters(model))
        assert all(grad.any() for grad in grads)
        seen.append(out)


class Waiting(pl.Delta):
    """A Delta that waits in the forward until it may go on."""

    inside, go_on = threading.Event(), threading.Event()

    def apply(
        self, weight: Tensor, factors: Mapping[str, Tensor], strength: float | Tensor = 1.0
    ) -> Tensor:
        self.inside.set()
        self.go_on.wait(30)
        return super().apply(weight, factors, strength)


@pytest.mark.parametrize("host", hosts())
def test_06_other_threads_share_nothing(host: str) -> None:
    """While another thread is in a forward of its model, nothing that is read here is stale."""
    (model, inputs), (other, _) = hosts()[host], hosts()[host]
    pl.attach(model, pl.Delta(), "*weight*")
    Waiting.go_on.set()
    pl.attach(other, Waiting(), "*weight*")
    Waiting.go_on.clear()
    Waiting.inside.clear()
    thread = threading.Thread(target=lambda: other(*inputs))
    thread.start()
    try:
        assert Waiting.inside.wait(30)
        with torch.no_grad():
            before = floats(model(*inputs))[0]
        shake(model)
        after = floats(model(*inputs))[0]
        assert after.requires_grad
        assert not torch.equal(before, after)
    finally:
        Waiting.go_on.set()
        thread.join()


class Pausing(nn.LSTM):
    """An LSTM that pauses between reading its weights and using them, where it is told to."""

    paused, inside, go_on = False, threading.Event(), threading.Event()

    def check_forward_args(self, *args: Any) -> None:
        if self.paused:
            self.inside.set()
            self.go_on.wait(30)
        super().check_forward_args(*args)


def test_06_threads_share_a_recurrent_module() -> None:
    """A forward in one thread leaves the weights alone that another thread is about to use."""
    model, x = Pausing(4, 4), torch.randn(3, 2, 4)
    pl.attach(model, pl.LoRA(rank=2), "weight*")
    shake(model)
    expected, found = model(x)[0].detach(), []
    model.paused = True
    thread = threading.Thread(target=lambda: found.append(model(x)[0].detach()))
    thread.start()
    try:
        assert model.inside.wait(30)
        model.paused = False
        model(x)
    finally:
        model.go_on.set()
        thread.join()
    assert_close(found, [expected])


def test_07_writing_past_a_weight() -> None:
    """Writing to an adapted `.weight` changes nothing; what is written to W or A shows."""
    model = small()
    with unchanged(model), torch.no_grad():
        nn.init.zeros_(model[0].weight)
        model[0].weight.data.zero_()
    with unchanged(model), pytest.raises(KeyError, match="attribute 'weight' already exists"):
        model[0].weight = nn.Parameter(torch.zeros(5, 6))
    with unchanged(model), pytest.raises(NotImplementedError, match="cannot be assigned to"):
        model[0].weight = torch.zeros(5, 6)
    x = torch.eye(6)
    for tensor in (pl.parameters(model)[1], pl.base_state_dict(model)["0.weight"]):
        before = model[0].weight.detach().clone()
        tensor.data[0] += 1
        assert not torch.equal(model[0].weight, before)
        assert_close(model[0](x), F.linear(x, model[0].weight, model[0].bias))


def test_08_types_are_those_before() -> None:
    """A target type matches adapted modules and subclasses: out_proj of an attention is trained."""
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0)
    assert type(layer.self_attn.out_proj) is not nn.Linear
    pl.attach(layer, pl.LoRA(rank=2), nn.Linear, name="one")
    summary = pl.attach(layer, pl.LoRA(rank=1), nn.Linear, name="two")
    sites = {row.site for row in summary.sites if row.adapter == "two"}
    assert sites == {"linear1.weight", "linear2.weight", "self_attn.out_proj.weight"}
    before = layer(torch.ones(2, 3, 8))
    train(layer, torch.randn(2, 3, 8), steps=1)
    factors = pl.state_dict(layer, "two")
    assert factors["self_attn.out_proj.weight.B"].any()
    with pl.using(layer), torch.no_grad():
        off = layer(torch.ones(2, 3, 8))
    assert not torch.equal(layer(torch.ones(2, 3, 8)), before)
    assert_close(off, before)
