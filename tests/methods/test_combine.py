"""Weighted sums of adapters, compared with PEFT's and with dense updates."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import paramlora as pl
from paramlora import Delta, LoRA, TargetError
from tests.support.helpers import EXACT, refuses
from tests.support.models import Tied, plain
from tests.support.reference import shake


class Net(nn.Module):
    """Layers of each type that PEFT can combine; the input is ids (n, 5)."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(7, 6)
        self.conv = nn.Conv2d(1, 4, (3, 1), padding=(1, 0))
        self.fc = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.emb(ids)
        return self.head(self.fc(x + self.conv(x.unsqueeze(1)).mean(1)).tanh())


def net() -> nn.Module:
    torch.manual_seed(0)
    return Net().double()


# The settings of each adapter in PEFT.
SETTINGS: dict[str, dict[str, Any]] = {
    "a": {"r": 2, "lora_alpha": 3, "target_modules": ["emb", "conv", "fc"]},
    "b": {"r": 2, "lora_alpha": 5, "target_modules": ["emb", "conv", "fc", "head"]},
    "c": {"r": 4, "lora_alpha": 3, "target_modules": ["fc"], "use_rslora": True},
}
SUMS: dict[str, tuple[str, dict[str, float], int | None]] = {
    "cat": ("cat", {"a": 0.7, "b": 0.3}, None),
    "cat, ranks and signs": ("cat", {"a": 1.5, "c": -0.4, "b": 1.0}, None),
    "linear": ("linear", {"a": 0.7, "b": 0.3}, None),
    "linear, a sign": ("linear", {"a": 0.7, "b": -0.3}, None),
    "linear, one adapter": ("linear", {"b": -0.3}, None),
    "svd": ("svd", {"a": 0.7, "b": 0.3}, None),
    "svd, rank 1": ("svd", {"a": 0.7, "b": -0.3}, 1),
    "svd, ranks": ("svd", {"a": 0.7, "c": 0.3}, 3),
}


@pytest.mark.filterwarnings("ignore:Adapter name '\\w+' should not be:UserWarning:peft")
@pytest.mark.filterwarnings("ignore:method='linear' sums factors:UserWarning")
@pytest.mark.parametrize(("method", "weights", "rank"), SUMS.values(), ids=SUMS.keys())
def test_equal_to_peft(
    method: str, weights: dict[str, float], rank: int | None, tmp_path: Path
) -> None:
    """Each method gives the merged weights of PEFT's `add_weighted_adapter`."""
    peft = pytest.importorskip("peft", reason="the oracle of this test is PEFT")
    model, wrapped = net(), None
    for name, settings in SETTINGS.items():
        config = peft.LoraConfig(init_lora_weights=False, **settings)
        if wrapped is None:
            wrapped = peft.get_peft_model(net(), config, adapter_name=name)
        else:
            wrapped.add_adapter(name, config)
    assert wrapped is not None
    wrapped.save_pretrained(tmp_path)
    for name in SETTINGS:
        pl.load_peft(model, tmp_path / name, name=name)
    names, numbers = list(weights), list(weights.values())
    wrapped.add_weighted_adapter(names, numbers, "sum", combination_type=method, svd_rank=rank)
    wrapped.set_adapter("sum")
    pl.combine(model, weights, name="sum", method=method, rank=rank, activate="only")
    pl.detach(model, *SETTINGS)
    ids = torch.arange(5).view(1, 5)
    # PEFT rounds the weights of "linear" and "svd" to float32.
    bound = EXACT if method == "cat" else {"rtol": 1e-6, "atol": 1e-6}
    assert_close(model(ids), wrapped(ids), **bound)
    pl.bake(model)
    assert_close(dict(model.state_dict()), dict(wrapped.merge_and_unload().state_dict()), **bound)


def dense(model: nn.Module, weights: dict[str, float]) -> dict[str, Tensor]:
    """Return the weighted sum of the updates by tensor, computed from the factors."""
    total: dict[str, Tensor] = {}
    rows = {(row.adapter, row.site): row for row in pl.summary(model).sites}
    for name, weight in weights.items():
        state = pl.state_dict(model, name)
        for (adapter, site), row in rows.items():
            if adapter == name:
                D = state.get(f"{site}.D")
                update = state[f"{site}.B"] @ state[f"{site}.A"] if D is None else D
                total[site] = total.get(site, 0) + weight * row.scale * update.view(row.shape)
    return total


def with_two_adapters() -> nn.Module:
    """Return a model with "a" and "b" of several ranks, strengths and sites, "b" off."""
    model = plain().double()
    pl.attach(model, {"fc1": LoRA(2, 3), "rnn.weight*": LoRA(1), "fc2.bias": Delta()}, name="a")
    pl.attach(model, {"fc?": LoRA(3), "fc?.bias": Delta()}, name="b", activate="no")
    shake(model)
    pl.scale(model, 0.5, "a")
    return model


@pytest.mark.parametrize("method", ["cat", "svd"])
def test_exact_sum(method: str) -> None:
    """At full rank the sum equals that of the updates, strengths included, merged or off."""
    model, weights = with_two_adapters(), {"a": 0.7, "b": -0.3}
    expected = dense(model, weights)
    pl.merge(model, "a")
    rank = 9 if method == "svd" else None
    row = pl.combine(model, weights, name="ab", method=method, rank=rank).sites[-1]
    assert (row.adapter, row.scale, row.active, row.trainable) == ("ab", 1.0, False, True)
    actual = dense(model, {"ab": 1.0})
    assert_close(actual, expected, **EXACT)
    pl.unmerge(model)
    with pl.using(model, "ab"), torch.no_grad():
        for path, update in expected.items():
            owner, _, name = path.rpartition(".")
            weight = getattr(model.get_submodule(owner), name)
            assert_close(weight, plain().double().get_parameter(path) + update, **EXACT)


def test_sum_is_independent(tmp_path: Path) -> None:
    """A sum keeps its values when its parts change or are detached, and can be saved."""
    model = with_two_adapters()
    pl.combine(model, {"a": 0.7, "b": 0.3}, name="ab")
    before = {key: tensor.clone() for key, tensor in pl.state_dict(model, "ab").items()}
    with torch.no_grad():
        for parameter in pl.parameters(model, "a", "b"):
            parameter.zero_()
    pl.detach(model, "a", "b")
    pl.save(model, tmp_path / "ab.safetensors", "ab")
    other = plain().double()
    pl.load(other, tmp_path / "ab.safetensors")
    assert_close(pl.state_dict(other, "ab"), before, rtol=0, atol=0)


def test_svd_is_optimal() -> None:
    """The error of "svd" is the norm of the singular values left out, the least possible."""
    model, weights = with_two_adapters(), {"a": 1.0, "b": 1.0}
    expected = dense(model, weights)["fc1.weight"]
    for rank in (1, 2, 3):
        pl.combine(model, weights, name=f"r{rank}", method="svd", rank=rank)
        actual = dense(model, {f"r{rank}": 1.0})["fc1.weight"]
        left_out = torch.linalg.svdvals(expected)[rank:]
        assert_close((expected - actual).norm(), left_out.norm(), **EXACT)


def test_blocks() -> None:
    """Each block is a site in a sum, and overlapping blocks raise TargetError."""
    model = plain().double()
    pl.attach(model, {"fc1.weight[:2]": LoRA(1), "fc1.weight[2:]": LoRA(2)}, name="a")
    pl.attach(model, {"fc1.weight[:2]": LoRA(1)}, name="b")
    pl.attach(model, {"fc1.weight[1:3]": LoRA(1)}, name="c")
    shake(model)
    expected = dense(model, {"a": 2.0, "b": 1.0})
    pl.combine(model, {"a": 2.0, "b": 1.0}, name="ab")
    assert_close(dense(model, {"ab": 1.0}), expected, **EXACT)
    refuses(
        model,
        lambda m: pl.combine(m, {"a": 1.0, "c": 1.0}, name="ac"),
        TargetError,
        "cannot combine: 'fc1.weight[:2]' and 'fc1.weight[1:3]' share elements, and one adapter "
        "cannot have both",
    )


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "empty weights": (
        {"weights": {}, "name": "ab"},
        ValueError,
        "no weights: name at least one adapter, such as {'a': 0.7, 'b': 0.3}",
    ),
    "a weight of NaN": (
        {"weights": {"a": math.nan}, "name": "ab"},
        ValueError,
        "the weight of 'a' must be a finite number, got nan",
    ),
    "an unknown method": (
        {"weights": {"a": 1}, "name": "ab", "method": "mean"},
        ValueError,
        "method must be one of cat, linear, svd, ties, dare, got 'mean'",
    ),
    "no density": (
        {"weights": {"a": 1}, "name": "ab", "method": "ties"},
        ValueError,
        "method='ties' needs density=, the share of elements to keep, above 0 and at most 1; got "
        "None",
    ),
    "density 0": (
        {"weights": {"a": 1}, "name": "ab", "method": "dare", "density": 0},
        ValueError,
        "method='dare' needs density=, the share of elements to keep, above 0 and at most 1; got 0",
    ),
    "a density for 'cat'": (
        {"weights": {"a": 1}, "name": "ab", "density": 0.5},
        ValueError,
        "density= is for 'ties' and 'dare' only; 'cat' keeps all",
    ),
    "an unknown adapter": (
        {"weights": {"a": 1, "d": 1}, "name": "ab"},
        pl.AdapterNameError,
        "no adapter 'd' here; attached are: 'a', 'b'[...]",
    ),
    "a name that is taken": (
        {"weights": {"a": 1, "b": 1}, "name": "a"},
        pl.AdapterNameError,
        "an adapter 'a' is attached already (there are 'a', 'b'); choose another name=, or detach "
        "it first",
    ),
    "a rank for 'cat'": (
        {"weights": {"a": 1, "b": 1}, "name": "ab", "rank": 3},
        ValueError,
        "rank= is for 'svd', 'ties' and 'dare' only; 'cat' determines its own rank",
    ),
    "rank 0": (
        {"weights": {"a": 1, "b": 1}, "name": "ab", "method": "svd", "rank": 0},
        ValueError,
        "rank must be a whole number of at least 1, got 0",
    ),
    "unequal ranks for 'linear'": (
        {"weights": {"a": 1, "b": 1}, "name": "ab", "method": "linear"},
        ValueError,
        "method='linear' needs equal ranks, and those at 'fc1.weight' are 2, 3; use 'cat' or 'svd'",
    ),
}


@pytest.mark.parametrize(("arguments", "error", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_invalid_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    """Invalid weights, names, methods and ranks raise, and change nothing."""
    refuses(with_two_adapters(), lambda m: pl.combine(m, **arguments), error, message)


class Experts(nn.Module):
    """A stack of three matrices, and the same matrices as separate parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = nn.Parameter(torch.randn(3, 4, 5).double())
        self.separate = nn.ParameterList(list(self.stack.detach().clone()))


@pytest.mark.filterwarnings("ignore:method='linear'")
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("method", ["cat", "linear", "svd"])
def test_stacks_of_matrices(method: str, transposed: bool) -> None:
    """The updates of a stack of matrices are combined like those of separate parameters."""
    model, weights = Experts(), {"a": 0.7, "b": -0.3}
    for name, alpha in (("a", 3.0), ("b", 1.0)):
        single = LoRA(2, alpha, transposed=transposed)
        batched = LoRA(2, alpha, transposed=transposed, batch_dims=1)
        pl.attach(model, {"stack": batched, "separate.*": single}, name=name)
        shake(model, name)
        state = pl.state_dict(model, name)
        for i in range(3):
            for key in "AB":
                state[f"separate.{i}.{key}"].copy_(state[f"stack.{key}"][i])
    pl.combine(model, weights, name="ab", method=method)
    with pl.using(model, "ab"), torch.no_grad():
        assert_close(model.stack, torch.stack(list(model.separate)), **EXACT)


@pytest.mark.parametrize(
    ("make", "target", "specs", "message"),
    [
        (
            plain,
            "fc1.weight",
            (LoRA(2), Delta()),
            "cannot combine at 'fc1.weight': the adapters there are of kind LoRA, Delta; "
            "only low-rank updates of one layout can be summed, or Deltas with Deltas",
        ),
        # A DoRA is not W plus an update.
        (
            plain,
            "fc1.weight",
            (pl.DoRA(2), pl.DoRA(2)),
            "cannot combine at 'fc1.weight': the adapters there are of kind DoRA; only low-rank "
            "[...]",
        ),
        (
            Experts,
            "stack",
            (LoRA(2, batch_dims=1), LoRA(2, batch_dims=1, transposed=True)),
            "cannot combine at 'stack': the adapters there are of kind LoRA; only low-rank [...]",
        ),
    ],
    ids=["LoRA and Delta", "DoRA", "two layouts"],
)
def test_kinds_that_cannot_be_combined(
    make: Callable[[], nn.Module],
    target: str,
    specs: tuple[pl.kinds.Spec, pl.kinds.Spec],
    message: str,
) -> None:
    """Only low-rank updates of one layout, or Deltas, can be summed."""
    model = make()
    for name, spec in zip("ab", specs, strict=True):
        pl.attach(model, spec, target, name=name)
    refuses(model, lambda m: pl.combine(m, {"a": 1.0, "b": 1.0}, name="ab"), TargetError, message)


def test_order_of_the_model() -> None:
    """The new adapter is installed in the order of the model, whatever the order of the weights."""
    model = plain()
    blocks = ["fc1.weight[:2]", "fc1.weight[2:]"]
    for name, targets in (("b", ["fc2", blocks[1]]), ("a", ["emb", blocks[0]])):
        pl.attach(model, LoRA(1), targets, name=name)
    pl.combine(model, {"b": 1.0, "a": 1.0}, name="ab")
    pl.attach(model, LoRA(1), ["fc2", "emb", *blocks], name="attached")
    keys = [list(pl.state_dict(model, name)) for name in ("ab", "attached")]
    assert keys[0] == keys[1]
    rows = [
        [row.site for row in pl.summary(model).sites if row.adapter == name]
        for name in ("ab", "attached")
    ]
    assert rows[0] == rows[1] == ["emb.weight", *blocks, "fc2.weight"]


def test_one_side_of_a_tie() -> None:
    """Combining adapters attached to only one of two tied tensors raises StateError."""
    model = Tied()
    pl.attach(model.head, pl.LoRA(2), "weight", name="a")
    with pytest.raises(pl.StateError, match="are tied, and adapters were attached to one side"):
        pl.combine(model, {"a": 1.0}, name="c")
