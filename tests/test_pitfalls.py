"""What goes wrong around `torch.nn.utils.parametrize`, each by a name of its own."""

import copy
import io
import pickle
import threading
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import unchanged
from mixed import assert_bits, attach_two, mixed, train
from reference import floats, loss, shake
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.optim.swa_utils import AveragedModel
from torch.testing import assert_close

import paramlora as pl


def small(*, bias: bool = True) -> nn.Sequential:
    """Two Linears with an adapter each, its factors random."""
    torch.default_generator.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5, bias=bias), nn.Tanh(), nn.Linear(5, 3, bias=bias))
    pl.attach(model, pl.LoRA(rank=2, alpha=3))
    shake(model)
    return model


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
    layer = nn.Linear(4, 3)
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
    model = nn.LSTM(4, 4, num_layers=2)
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


def test_07_writing_past_a_weight() -> None:
    """Writing to an adapted `.weight` changes nothing; what is written to W or A is seen at once."""
    model = small()
    with unchanged(model), torch.no_grad():
        nn.init.zeros_(model[0].weight)
        model[0].weight.data.zero_()
    with unchanged(model), pytest.raises(KeyError, match="attribute 'weight' already exists"):
        model[0].weight = nn.Parameter(torch.zeros(5, 6))
    with unchanged(model), pytest.raises(RuntimeError, match="does not implement right_inverse"):
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


def test_09_toggling_compiles_two_graphs() -> None:
    """However often adapters are toggled, there are two graphs, and values and gradients agree."""
    torch._dynamo.reset()
    model, x = small(), torch.randn(4, 6)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for _ in range(3):
        for toggle in (pl.disable, pl.enable):
            toggle(model)
            assert_close(compiled(x), model(x))
    assert counter.frame_count == 2


def test_10_the_weight_is_no_subclass() -> None:
    """`.weight` holds W' also for code that goes past `__torch_function__`."""
    model = small()
    weight = model[0].weight
    assert type(weight) is Tensor
    factors = pl.state_dict(model)
    A, B = factors["0.weight.A"], factors["0.weight.B"]
    wanted = pl.base_state_dict(model)["0.weight"] + 1.5 * B @ A
    with torch._C.DisableTorchFunctionSubclass():
        assert_close(weight * 1, wanted)
    assert_close(torch.tensor(weight.tolist()), wanted)
    assert weight.untyped_storage().nbytes() == 4 * weight.numel()


@pytest.mark.parametrize("needs_dx", [True, False])
def test_11_compiled_gradients(needs_dx: bool) -> None:
    """Under the compiler the gradients, dx too, are those of the dense reference."""
    torch._dynamo.reset()
    model, x = small(), torch.randn(4, 6)
    state, factors = pl.base_state_dict(model), pl.state_dict(model)
    leaves = {key: value.clone().requires_grad_() for key, value in factors.items()}
    ours, theirs = (x.clone().requires_grad_(needs_dx) for _ in range(2))
    hidden = theirs
    for i in (0, 2):
        weight = state[f"{i}.weight"]
        weight = weight + 1.5 * leaves[f"{i}.weight.B"] @ leaves[f"{i}.weight.A"]
        hidden = F.linear(torch.tanh(hidden) if i else hidden, weight, state[f"{i}.bias"])
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    inputs = [ours] if needs_dx else []
    actual = torch.autograd.grad(loss([compiled(ours)]), [*pl.parameters(model), *inputs])
    inputs = [theirs] if needs_dx else []
    assert_close(actual, torch.autograd.grad(loss([hidden]), [*leaves.values(), *inputs]))


def test_12_transforms_go_through() -> None:
    """torch.func sees plain operations: per-sample gradients agree with a loop over samples."""
    model, x = small(), torch.randn(4, 6)
    params = {name: p.detach() for name, p in model.named_parameters() if "factors" in name}

    def one(params: dict[str, Tensor], row: Tensor) -> Tensor:
        return torch.func.functional_call(model, params, (row,)).square().sum()

    each = torch.func.vmap(torch.func.grad(one), in_dims=(None, 0))(params, x)
    for i, row in enumerate(x):
        grads = torch.autograd.grad(model(row).square().sum(), pl.parameters(model))
        assert_close([grad[i] for grad in each.values()], list(grads))


def test_14_drift_of_running_statistics_shows() -> None:
    """BatchNorm's statistics drift in train mode, frozen or not: `fingerprint` shows it."""
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    pl.attach(model, pl.LoRA(rank=2))
    before = pl.fingerprint(model)
    train(model.eval(), torch.randn(5, 6))
    assert pl.fingerprint(model) == before
    train(model.train(), torch.randn(5, 6))
    assert pl.fingerprint(model) != before


def test_15_merging_a_tied_head_spares_the_embedding() -> None:
    """A tied head and embedding are adapted and merged as the one tensor that they are."""
    model = nn.ModuleDict({"embed": nn.Embedding(7, 4), "head": nn.Linear(4, 7, bias=False)})
    model["head"].weight = model["embed"].weight
    bits = model["embed"].weight.detach().clone()
    pl.attach(model, pl.LoRA(rank=2), "head")
    shake(model)
    adapted, ids = model["head"].weight.detach().clone(), torch.arange(7)
    for _ in range(2):
        assert_close(model["embed"](ids), adapted)
        with pl.merged(model):
            assert_bits(model["embed"](ids).detach(), adapted)
            assert_bits(model["head"].weight.detach(), adapted)
        with pl.disabled(model):
            assert_bits(model["embed"](ids).detach(), bits)


def test_16_unmerging_does_not_subtract() -> None:
    """Where subtracting a bfloat16 update would change a weight in ten, unmerging changes none."""
    layer = nn.Linear(100, 100, dtype=torch.bfloat16)
    W = layer.weight.detach().clone()
    pl.attach(layer, pl.LoRA(rank=4), "weight")
    shake(layer)
    factors = pl.state_dict(layer)
    update = (factors["weight.B"] @ factors["weight.A"]).bfloat16()
    subtracted = (W + update) - update
    assert (subtracted != W).float().mean() > 0.1
    pl.merge(layer)
    pl.unmerge(layer)
    pl.detach(layer)
    assert_bits(layer.weight.detach(), W)


@pytest.mark.parametrize(("size", "lost"), [(1e-5, 0.5), (1e-4, 0.1)])
def test_17_small_updates_survive_half_precision(size: float, lost: float) -> None:
    """A bfloat16 layer applies an update to 3 % that rounding W + ΔW loses to `lost` and more."""
    torch.default_generator.manual_seed(0)
    layer = nn.Linear(256, 256, bias=False, dtype=torch.bfloat16)
    with torch.no_grad():
        # Two equal halves, so that W maps (x, −x) to zero: its output then shows ΔW alone.
        layer.weight.copy_((torch.randn(256, 128) * 0.02).repeat(1, 2))
    W, x = layer.weight.detach().double(), torch.randn(8, 128).bfloat16()
    pl.attach(layer, pl.LoRA(rank=4), "weight")
    assert all(parameter.dtype == torch.float32 for parameter in pl.parameters(layer))
    with torch.no_grad():
        for parameter in pl.parameters(layer):
            parameter.normal_(std=(size / 2) ** 0.5)
        actual = layer(torch.cat([x, -x], dim=1)).double()
    factors = {key: value.double() for key, value in pl.state_dict(layer).items()}
    update = factors["weight.B"] @ factors["weight.A"]
    rounded = layer.weight.detach().double() - W
    assert float((rounded - update).norm() / update.norm()) > lost
    expected = torch.cat([x, -x], dim=1).double() @ update.T
    assert float((actual - expected).norm() / expected.norm()) < 0.03


def test_18_there_is_no_dropout() -> None:
    """Dropout on a layer's input cannot be said in weight space, so no spec takes one."""
    for spec in (pl.LoRA, pl.Delta):
        make: Callable[..., pl.Spec] = spec
        with pytest.raises(TypeError, match="unexpected keyword argument 'dropout'"):
            make(dropout=0.1)
