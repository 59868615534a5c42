"""Dropout on the input of a low-rank update: values, masks, and the layers that cannot have it."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrizations
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import paramlora as pl
from paramlora import LoRA
from tests.support.helpers import LEAVE_OUT, keeping, refuses
from tests.support.reference import shake

SEED = 5


class Scaled(nn.Linear):
    """A Linear with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def layer_with(**dropouts: float) -> nn.Linear:
    """Return a Linear in float64 in training mode, with an active adapter for each dropout."""
    torch.manual_seed(0)
    layer = nn.Linear(6, 4).double()
    for name, p in dropouts.items():
        pl.attach(layer, LoRA(2, 3, dropout=p), name=name, activate="also")
    shake(layer)
    return layer


def rows(seed: int = 1) -> Tensor:
    torch.manual_seed(seed)
    return torch.randn(5, 6, dtype=torch.float64)


def seeded(call: Callable[[], Any]) -> Any:
    """Return the result of a call that draws its masks from a fixed seed."""
    torch.manual_seed(SEED)
    return call()


def dense(layer: Any, x: Tensor, *names: str) -> Tensor:
    """Return x W'ᵀ + b without dropout, with these adapters alone."""
    W = layer.get_parameter("weight").detach()
    for name in names:
        factors = pl.state_dict(layer, name)
        W = W + 1.5 * factors["weight.B"] @ factors["weight.A"]
    return x @ W.T + layer.bias


def expected(layer: Any, x: Tensor, **dropouts: float) -> Tensor:
    """Return the output with a mask for each adapter, drawn in this order from the fixed seed."""
    torch.manual_seed(SEED)
    y = dense(layer, x)
    for name, p in dropouts.items():
        mask = torch.empty_like(x).bernoulli_(1 - p) / (1 - p) if p else 1
        factors = pl.state_dict(layer, name)
        y = y + 1.5 * (mask * x) @ factors["weight.A"].T @ factors["weight.B"].T
    return y


def test_each_adapter_has_its_own_mask() -> None:
    """Adapters side by side drop elements of their inputs by themselves, each at its strength."""
    dropouts = {"one": 0.5, "none": 0.0, "two": 0.25}
    layer, x = layer_with(**dropouts), rows()
    assert_close(seeded(lambda: layer(x)), expected(layer, x, one=0.5, two=0.25, none=0.0))
    with pl.using(layer, "two"):
        assert_close(seeded(lambda: layer(x)), expected(layer, x, two=0.25))
    with pl.using(layer, one=0.5):
        half = dense(layer, x) + 0.5 * (expected(layer, x, one=0.5) - dense(layer, x))
        assert_close(seeded(lambda: layer(x)), half)


def test_the_base_has_no_dropout() -> None:
    """With the adapter off or merged, in evaluation mode and in `.weight`, nothing is dropped."""
    layer, x = layer_with(one=0.5), rows()
    whole = dense(layer, x, "one")
    assert (layer(x) - whole).abs().max() > 0.1
    assert_close(F.linear(x, layer.weight, layer.bias), whole)
    with pl.disabled(layer):
        assert torch.equal(layer(x), F.linear(x, layer.get_parameter("weight"), layer.bias))
    with pl.merged(layer), torch.no_grad():
        assert_close(layer(x), whole)
    assert_close(pl.merged_state_dict(layer)["weight"], layer.weight)
    assert_close(layer.eval()(x), whole)


def test_without_dropout_no_random_number_is_drawn() -> None:
    """An adapter without dropout takes its usual path in training, beside one that is off."""
    layer, x = layer_with(one=0.5, none=0.0), rows()
    pl.activate(layer, "none")
    before = torch.get_rng_state()
    assert_close(layer(x), dense(layer, x, "none"))
    assert torch.equal(torch.get_rng_state(), before)


OTHERS: dict[str, pl.kinds.Spec] = {
    "delta": pl.Delta(),
    "loha": pl.LoHa(2),
    "ia3": pl.IA3(),
    "dora": pl.DoRA(2),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_beside_another_kind(kind: str) -> None:
    """Beside another kind that was attached first, W' of that kind is used without dropout."""
    torch.manual_seed(0)
    layer, x = nn.Linear(6, 4).double(), rows().requires_grad_()
    pl.attach(layer, OTHERS[kind], "weight", name="other")
    pl.attach(layer, LoRA(2, 3, dropout=0.5), name="one", activate="also")
    shake(layer)
    pl.unfreeze(layer)
    with pl.using(layer, "other"):
        W = layer.weight
    *others, A, B = pl.parameters(layer)
    wanted = F.linear(x, W, layer.bias) + 1.5 * seeded(lambda: F.dropout(x, 0.5)) @ A.T @ B.T
    y = seeded(lambda: layer(x))
    assert_close(y, wanted)
    inputs = [x, *others, A, B]
    gradients = [torch.autograd.grad(out.square().sum(), inputs) for out in (y, wanted)]
    assert_close(*gradients)


def test_a_kind_that_rescales_the_update() -> None:
    """A kind that would act on the dropped update raises in training, and works in evaluation."""
    layer, x = layer_with(one=0.5), rows()
    pl.attach(layer, pl.IA3(), "weight", name="gains", activate="also")
    with pytest.raises(pl.StateError, match=r"'gains' acts on the update of 'one'.*attach 'gains'"):
        layer(x)
    with pl.using(layer, "gains"):
        layer(x)
    layer.eval()(x)


def test_blocks() -> None:
    """Each block of an adapter has the dropout of its own spec."""
    torch.manual_seed(0)
    layer, x = nn.Linear(6, 4).double(), rows()
    pl.attach(layer, {"weight[:2]": LoRA(1, dropout=0.5), "weight[2:]": LoRA(1)})
    shake(layer)
    whole, state = layer.eval()(x), pl.state_dict(layer)
    y = seeded(lambda: layer.train()(x))
    assert_close(y[:, 2:], whole[:, 2:])
    torch.manual_seed(SEED)
    update = F.dropout(x, 0.5) @ state["weight[:2].A"].T @ state["weight[:2].B"].T
    assert_close(y[:, :2], dense(layer, x)[:, :2] + update)


@pytest.mark.parametrize("ids", [[0, 0, 1, 1, -1], [1, -1, 0, 1, 0]])
def test_routed(ids: list[int]) -> None:
    """Inside `routed` the rows of each adapter have its dropout, and the others none."""
    layer, x = layer_with(one=0.5, none=0.0), rows()
    with pl.routed(layer, ids, "one", "none"):
        y = seeded(lambda: layer(x))
    of = torch.tensor(ids)
    for index, names in ((-1, ()), (1, ("none",))):
        assert_close(y[of == index], dense(layer, x[of == index], *names))
    assert_close(y[of == 0], expected(layer, x[of == 0], one=0.5))


def test_checkpointing_uses_the_same_mask() -> None:
    """A checkpointed forward has the gradients of the plain one, for torch restores its seed."""
    found = []
    for recompute in (False, True):
        layer, x = layer_with(one=0.5), rows().requires_grad_()
        torch.manual_seed(SEED)
        y = checkpoint(layer, x, use_reentrant=False) if recompute else layer(x)
        y.square().sum().backward()
        found.append([x.grad, *[p.grad for p in pl.parameters(layer)]])
    assert_close(found[1], found[0], rtol=0, atol=0)


def test_autocast() -> None:
    """Under autocast an update with dropout is that of the dropped input, in bfloat16."""
    layer = layer_with(one=0.5).float()
    x = rows().float()
    with torch.autocast("cpu", torch.bfloat16):
        y = seeded(lambda: layer(x))
    assert y.dtype is torch.bfloat16
    assert_close(y.float(), expected(layer, x, one=0.5), rtol=0.05, atol=0.05)


def test_compiled() -> None:
    """A compiled model has one graph, with dropout in training only, also after switching."""
    layer, x = layer_with(one=0.5, none=0.0), rows()
    torch._dynamo.reset()
    model = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert_close(seeded(lambda: model(x)), expected(layer, x, one=0.5, none=0.0))
    with pl.using(layer, "none"):
        assert_close(model(x), dense(layer, x, "none"))
    assert_close(seeded(lambda: model(x)), expected(layer, x, one=0.5, none=0.0))
    layer.eval()
    assert_close(model(x), dense(layer, x, "one", "none"))


def test_func() -> None:
    """torch.func differentiates through dropout, and vmap draws a mask for each row if told to."""
    layer, x = layer_with(one=0.5), rows()
    parameters = {key: value.detach() for key, value in layer.named_parameters()}

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return functional_call(layer, parameters, (x,)).square().sum()

    found = seeded(lambda: torch.func.grad(loss)(parameters))
    seeded(lambda: layer(x)).square().sum().backward()
    for key, parameter in layer.named_parameters():
        if "factors" in key:
            assert_close(found[key], parameter.grad)
    assert torch.func.vmap(layer, randomness="different")(x).shape == (5, 4)
    with pytest.raises(RuntimeError, match="randomness"):
        torch.func.vmap(layer)(x)


def test_the_weight_is_not_kept() -> None:
    """The backward keeps x, its dropped copy and x Aᵀ, and no W'."""
    layer, x = layer_with(one=0.5), rows()
    with keeping() as kept:
        layer(x)
    stored = layer.get_parameter("weight").data_ptr()
    assert not any(t.shape == (4, 6) and t.data_ptr() != stored for t in kept)


def holders() -> nn.Module:
    model = nn.Module()
    model.conv = nn.Conv1d(4, 4, 1)
    model.mha = nn.MultiheadAttention(4, 2)
    model.rnn = nn.GRU(4, 4)
    model.bag = nn.EmbeddingBag(4, 4)
    model.own = Scaled(4, 4)
    model.emb, model.fc = nn.Embedding(4, 4), nn.Linear(4, 4)
    model.normed = parametrizations.weight_norm(nn.Linear(4, 4))
    model.pair, model.twin = Scaled(4, 4), nn.Linear(4, 4)
    model.twin.weight = model.pair.weight
    model.raw = nn.Parameter(torch.ones(4, 4))
    return model


NEEDS = (
    "dropout needs a layer that computes the update from its input, which are Linear, "
    "transformers' Conv1D and quantized layers, and not {}; use dropout=0 here"
)
REFUSED = {
    "conv.weight": NEEDS.format("Conv1d"),
    "mha.in_proj_weight": NEEDS.format("MultiheadAttention"),
    "mha.out_proj.weight": NEEDS.format("NonDynamicallyQuantizableLinear"),
    "rnn.weight_ih_l0": NEEDS.format("GRU"),
    "bag.weight": NEEDS.format("EmbeddingBag"),
    "own.weight": NEEDS.format("Scaled with a forward of its own"),
    "raw": NEEDS.format("Module"),
    "normed.weight": "dropout needs a tensor without other parametrizations; use dropout=0 here",
    "pair.weight": NEEDS.format("Scaled with a forward of its own"),
}


@pytest.mark.parametrize("path", REFUSED)
def test_refused(path: str) -> None:
    """A layer that would compute without the dropout is refused by name, and nothing changes."""
    refuses(
        holders(),
        lambda m: pl.attach(m, LoRA(2, dropout=0.1), ["fc.weight", path]),
        pl.TargetError,
        f"cannot adapt {path!r} with LoRA: {REFUSED[path]} {LEAVE_OUT}",
    )
    pl.attach(holders(), LoRA(2), path)


def test_refused_tie() -> None:
    """A tied tensor is refused if one of its layers cannot have dropout."""
    refuses(
        holders(),
        lambda m: pl.attach(m, LoRA(2, dropout=0.1), "twin.weight[:2]"),
        pl.TargetError,
        f"cannot adapt 'pair.weight[:2]' with LoRA: {REFUSED['pair.weight']} {LEAVE_OUT}",
    )


def test_embedding_is_without() -> None:
    """An Embedding accepts dropout and has none, as in PEFT; a tied Linear has it."""
    emb, head = nn.Embedding(7, 6), nn.Linear(6, 7, bias=False)
    head.weight = emb.weight
    model = nn.Sequential(emb, head).double()
    pl.attach(model, LoRA(2, dropout=0.5), "0")
    shake(model)
    ids, x = torch.tensor([1, 2, 1]), rows()
    before = torch.get_rng_state()
    assert_close(emb(ids), emb.weight[ids])
    assert torch.equal(torch.get_rng_state(), before)
    assert (head(x) - x @ emb.weight.T).abs().max() > 0.01


def test_a_parametrization_of_torch() -> None:
    """`spec.parametrization` refuses dropout, because it does not see the layer's input."""
    with pytest.raises(pl.TargetError, match=r"dropout acts on the input of a layer.*attach\(\)"):
        LoRA(2, dropout=0.1).parametrization(torch.ones(3, 3))


@pytest.mark.filterwarnings("ignore:.*weight_norm.*")
def test_a_parametrization_on_top() -> None:
    """A parametrization registered on top of dropout raises in training; reading W' works."""
    layer, x = layer_with(one=0.5), rows()
    parametrizations.spectral_norm(layer)
    with pytest.raises(pl.StateError, match="on top of an adapter with dropout"):
        layer(x)
    with pl.disabled(layer):
        layer(x)
    layer.eval()(x)


def test_reloading_sets_dropout(tmp_path: Any) -> None:
    """A file keeps the dropout, and loading it into an attached adapter sets it there."""
    layer, other, x = layer_with(one=0.5), layer_with(one=0.0), rows()
    pl.save(layer, tmp_path / "one.safetensors")
    before = torch.get_rng_state()
    other(x)
    assert torch.equal(torch.get_rng_state(), before)
    pl.load(other, tmp_path / "one.safetensors")
    assert_close(seeded(lambda: other(x)), seeded(lambda: layer(x)))
    fresh = nn.Linear(6, 4).double()
    fresh.load_state_dict(pl.base_state_dict(layer))
    pl.load(fresh, tmp_path / "one.safetensors")
    assert_close(seeded(lambda: fresh(x)), seeded(lambda: layer(x)))


def test_training_a_merged_adapter_raises() -> None:
    """A backward through a merged adapter raises beside one with dropout, too."""
    layer, x = layer_with(one=0.5, none=0.0), rows()
    pl.merge(layer, "none")
    with pytest.raises(pl.StateError, match="cannot train adapter 'none' while it is merged"):
        layer(x).sum().backward()


def test_copies_drop_by_themselves() -> None:
    """A deep copy has dropout, and keeps it after the original is detached."""
    layer, x = layer_with(one=0.5), rows()
    copied = copy.deepcopy(layer)
    want = seeded(lambda: layer(x))
    pl.detach(layer)
    assert_close(seeded(lambda: copied(x)), want)
