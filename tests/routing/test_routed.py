"""`routed`: rows of one batch with an adapter each, and calls that raise."""

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

import paramlora as pl
from tests.support.helpers import BOUNDS, error
from tests.support.models import IDS, one_by_one, with_three_adapters
from tests.support.reference import shake


def linear() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    with_three_adapters(model, lambda: pl.LoRA(rank=2, alpha=3), "?")
    return model


def test_other_blocks_inside() -> None:
    """Entering and leaving `disabled` or `using` inside changes no output."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3))
    pl.attach(model, pl.LoRA(2, init="orthogonal"), "0", name="a")
    pl.attach(model, pl.LoRA(2, init="orthogonal"), "1", name="b", activate="also")
    with torch.no_grad():
        for factor in pl.parameters(model):
            factor.normal_()
        x = torch.randn(2, 4)
        with pl.routed(model, [0, -1], "a"):
            before = model(x)
            with pl.disabled(model), pl.using(model, "b"):
                pass
            assert torch.equal(model(x), before)


def test_mixed_layers() -> None:
    """Layers of several types, a bias, and a site that one adapter does not have."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Embedding(9, 8), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Flatten()
    ).double()
    model.eval()
    pl.attach(model, pl.LoRA(rank=2), ["0", "*.linear1", "*.in_proj_weight"], name="first")
    pl.attach(model, pl.LoRA(rank=3), ["*.linear1", "*.linear2"], name="second", activate="also")
    pl.attach(model, pl.Delta(), ["*.linear1.*", "*.out_proj"], name="third", activate="also")
    with torch.no_grad():
        for parameter in pl.parameters(model):
            parameter.normal_(std=0.5)
    x = torch.randint(0, 9, (len(IDS), 4))
    expected = one_by_one(model, [x])
    with pl.routed(model, torch.tensor(IDS, dtype=torch.int32)):
        assert_close(model(x), expected)


def test_rows_without_an_adapter() -> None:
    """Id −1 for all rows gives bit-for-bit the base's outputs, even if adapters are active."""
    model, x = linear(), torch.randn(4, 6, dtype=torch.float64)
    with pl.disabled(model):
        base = model(x)
    with pl.routed(model, [-1] * 4):
        assert torch.equal(model(x), base)


def test_adapters_without_rows() -> None:
    """Adapters that are not named have no effect inside, and are active again afterwards."""
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)).double()
    x = torch.randn(2, 6, dtype=torch.float64)
    base = model(x)
    pl.attach(model, pl.LoRA(rank=2), "0", name="first")
    pl.attach(model, pl.LoRA(rank=2), "1", name="second", activate="also")
    with torch.no_grad():
        for parameter in pl.parameters(model):
            parameter.normal_()
    before = model(x)
    with pl.routed(model, [-1, -1], "first"):
        assert torch.equal(model(x), base)
    assert torch.equal(model(x), before)


def test_infinity_in_another_adapter() -> None:
    """Infinite factors of one adapter do not affect the rows of others."""
    model, x = linear(), torch.randn(2, 6, dtype=torch.float64)
    with torch.no_grad():
        for key, factor in pl.state_dict(model, "second").items():
            if key.endswith(".A"):
                factor.fill_(torch.inf)
    with pl.routed(model, [0, -1]):
        expected = model(x)
    with pl.routed(model, [0, 1]):
        assert_close(model(x)[0], expected[0])


def test_copy_made_inside() -> None:
    """A copy of a routed model is not routed, and can be used and merged."""
    model, x = linear(), torch.randn(3, 6, dtype=torch.float64)
    with pl.routed(model, [0, -1]):
        copied = copy.deepcopy(model)
    assert_close(copied(x), model(x))
    pl.merge(copied)


def test_training_after_inference_mode() -> None:
    """Tensors cached in inference mode are not used by a later backward."""
    model, x = linear(), torch.randn(2, 6, dtype=torch.float64)
    with pl.routed(model, [0, 1]):
        with torch.inference_mode():
            model(x)
        model(x).sum().backward()


def test_checkpointing() -> None:
    """Checkpointing changes no gradient if the backward runs inside."""
    model, x = linear(), torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    parameters = pl.parameters(model)
    with pl.routed(model, [0, 1, 2]):
        expected = torch.autograd.grad(model(x).square().sum(), parameters)
        y = checkpoint(model, x, use_reentrant=False)
        assert_close(torch.autograd.grad(y.square().sum(), parameters), expected)


def test_order_of_names() -> None:
    """Ids refer to the names in the order given, whether or not they are active."""
    model, x = linear(), torch.randn(2, 6, dtype=torch.float64)
    pl.disable(model)
    with pl.routed(model, [0, 1], "third", "first"):
        found = model(x)
    for i, name in enumerate(("third", "first")):
        with pl.using(model, name):
            assert_close(found[i], model(x[i : i + 1])[0])


def test_half_precision() -> None:
    """In bfloat16 with float32 factors, rows are within rounding of float64."""
    exact = linear()
    model = copy.deepcopy(exact).float()
    for module in (model[0], model[2]):
        for key in ("bias", "parametrizations.weight.original"):
            parameter = module.get_parameter(key)
            parameter.data = parameter.data.bfloat16()
    x = torch.randn(len(IDS), 6, dtype=torch.bfloat16)
    with pl.routed(model, IDS), pl.routed(exact, IDS):
        found, expected = model(x), exact(x.double())
    assert found.dtype == torch.bfloat16
    assert error(found, expected) < BOUNDS[torch.bfloat16]


@pytest.mark.parametrize("grad", [False, True])
def test_autocast(grad: bool) -> None:
    """Under autocast the outputs have its dtype and are within rounding of float64."""
    exact = linear()
    model = copy.deepcopy(exact).float()
    x = torch.randn(len(IDS), 6)
    with pl.routed(model, IDS), pl.routed(exact, IDS), torch.set_grad_enabled(grad):
        expected = exact(x.double())
        with torch.autocast("cpu", torch.bfloat16):
            found = model(x)
    assert found.dtype == torch.bfloat16
    assert error(found, expected) < BOUNDS[torch.bfloat16]


@pytest.mark.parametrize("fails", [False, True])
def test_state_after_the_block(fails: bool) -> None:
    """Blocks nest, and each restores the previous state, also after an exception."""
    model, x = linear(), torch.randn(2, 6, dtype=torch.float64)
    before = model(x)
    with pl.routed(model, [0, 0]):
        outer = model(x)
        try:
            with pl.routed(model, [1, -1]):
                assert not torch.equal(model(x), outer)
                if fails:
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            pass
        assert torch.equal(model(x), outer)
    assert torch.equal(model(x), before)


def test_compiled() -> None:
    """A routed model compiles to one graph, with the values and gradients of the eager one."""
    torch.compiler.reset()  # other tests in this process may have reached the limit of graphs
    model, x = linear().float(), torch.randn(len(IDS), 6)
    parameters = pl.parameters(model)
    with pl.routed(model, IDS):
        expected = model(x)
        found = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    assert_close(found, expected)
    gradients = (torch.autograd.grad(y.square().sum(), parameters) for y in (found, expected))
    assert_close(next(gradients), next(gradients))


class Read(nn.Module):
    """A module whose own code reads its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([0.5], r"vector of integers.* got torch.float32 of shape \(1,\)"),
        ([[0]], r"vector of integers.* got torch.int64 of shape \(1, 1\)"),
        ([True], r"vector of integers.* got torch.bool"),
        ([0, 3], r"−1 \(none\), 0 = 'first', 1 = 'second', 2 = 'third'; got 3"),
        ([-2], "got -2"),
    ],
)
def test_invalid_ids(ids: Any, message: str) -> None:
    """Ids that are not a vector of valid indices raise ValueError with what is allowed."""
    with pytest.raises(ValueError, match=message), pl.routed(linear(), ids):
        pass


def test_batch_of_another_size() -> None:
    """A batch of another size raises at the first site, and names it."""
    model = linear()
    message = "route 2 rows, and the input of '0.weight' has 3"
    with pl.routed(model, [0, 1]), pytest.raises(ValueError, match=message):
        model(torch.randn(3, 6, dtype=torch.float64))


def test_invalid_names() -> None:
    """An unknown adapter and a merged one raise."""
    model = linear()
    with pytest.raises(pl.AdapterNameError, match="no adapter 'fourth'"):
        pl.routed(model, [0], "fourth").__enter__()
    with pl.merged(model, "first"), pytest.raises(pl.StateError, match=r"route to .*unmerge"):
        pl.routed(model, [0]).__enter__()


def test_module_with_its_own_forward() -> None:
    """A module whose own code reads the tensor raises: all rows would get the same one."""
    model = nn.Sequential(Read())
    pl.attach(model, pl.LoRA(rank=1), "0")
    with pytest.raises(pl.StateError, match=r"'0.weight': Read reads it"):
        pl.routed(model, [0]).__enter__()


def test_reading_a_weight() -> None:
    """Using an adapted weight inside raises, as there is no single W'; its dtype can be asked."""
    model = linear()
    expected = model[0].weight
    uses: list[Callable[[Any], object]] = [
        lambda W: W + 0,
        lambda W: torch.eye(6) @ W.T,
        lambda W: F.linear(torch.ones(6), W),
        lambda W: W.data,
        lambda W: W.detach(),
        lambda W: W.tolist(),
        lambda W: W.sum(),
        lambda W: W.copy_(expected),
        repr,
    ]
    with pl.routed(model, [0]):
        W = model[0].weight
        assert isinstance(W, Tensor)
        assert (W.dtype, W.shape, W.device) == (expected.dtype, expected.shape, expected.device)
        for use in uses:
            with pytest.raises(pl.StateError, match=r"'0.weight' was read insi"):
                use(W)


@pytest.mark.parametrize("name", ["Linear", "GRU"])
def test_repeated_rows(name: str) -> None:
    """A batch with each row several times side by side, as beams are, is routed row by row."""
    model: Any = nn.Linear(4, 3) if name == "Linear" else nn.GRU(4, 3, batch_first=True)
    for adapter in ("a", "b"):
        target = "weight" if name == "Linear" else "weight_ih_l0"
        pl.attach(model, pl.LoRA(rank=2, init="gaussian"), target, name=adapter)
    shake(model)
    run: Callable[[Tensor], Tensor] = model if name == "Linear" else lambda x: model(x)[0]
    x = torch.randn(6, 2, 4)
    with pl.routed(model, [1, -1], "a", "b"):
        repeated = run(x)
        run(x[:2])
        for rows in (0, 1, 3, 5):
            with pytest.raises(ValueError, match="ids route 2 rows"):
                run(x[:rows])
    with pl.routed(model, [1, 1, 1, -1, -1, -1], "a", "b"):
        torch.testing.assert_close(repeated, run(x))


def test_repeated_rows_of_an_embedding() -> None:
    """An Embedding routes repeated rows, and refuses inputs that ids do not fit.

    One row would be broadcast to those of the ids.
    """
    model = nn.Embedding(9, 4)
    with_three_adapters(model, lambda: pl.LoRA(rank=2), "weight")
    x = torch.randint(0, 9, (4, 3))
    with pl.routed(model, [2, 2, -1, -1]):
        expected = model(x)
    with pl.routed(model, [2, -1]):
        assert_close(model(x), expected)
        for wrong in (x[:1], x[:3], x[0], x[0, 0]):
            with pytest.raises(ValueError, match="ids route 2 rows, and the input of 'weight' has"):
                model(wrong)


class Calls(TorchDispatchMode):
    """Counts the operations of torch by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counter[str]()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[op.overloadpacket.__name__] += 1
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "host", [nn.Linear, lambda k, m: Conv1D(m, k)], ids=["linear", "transformers-conv1d"]
)
@pytest.mark.parametrize("ids", [IDS, [0, 0, 2, 2]], ids=["stacked", "batched"])
@torch.no_grad()
def test_products_of_factored_rows(host: Callable[..., nn.Module], ids: list[int]) -> None:
    """A layer and all its low-rank adapters take three products, however many there are."""
    model = with_three_adapters(host(6, 5), lambda: pl.LoRA(rank=2), "weight")
    x = torch.randn(len(ids), 6, dtype=torch.float64)
    with pl.routed(model, ids), Calls() as calls:
        model(x)
    assert sum(count for name, count in calls.counts.items() if name.endswith("mm")) == 3


@torch.no_grad()
def test_lookups_of_factored_rows() -> None:
    """An Embedding is looked up once, and each low-rank adapter once, for all rows together."""
    model = with_three_adapters(nn.Embedding(9, 4), lambda: pl.LoRA(rank=2), "weight")
    with pl.routed(model, IDS), Calls() as calls:
        model(torch.randint(0, 9, (len(IDS), 3)))
    assert calls.counts["embedding"] == 1 + 3


def test_merging_inside() -> None:
    """Merging inside raises, as all rows would get the adapter."""
    model = linear()
    with pl.routed(model, [0]), pytest.raises(pl.StateError, match="routed"):
        pl.merge(model)


@pytest.mark.parametrize(
    ("host", "call"),
    [
        (nn.Conv1d(2, 3, 1), lambda m: m(torch.randn(2, 5))),
        (nn.EmbeddingBag(4, 3), lambda m: m(torch.tensor([0, 1]), torch.tensor([0]))),
        (nn.LSTM(2, 3), lambda m: m(torch.randn(5, 2))),
        (
            nn.MultiheadAttention(4, 2),
            lambda m: m(*[torch.randn(3, 2, 4)] * 3, attn_mask=torch.zeros(4, 3, 3)),
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_calls_without_a_batch(host: nn.Module, call: Any) -> None:
    """A call without a batch dimension, or with a mask for each row, raises ValueError."""
    target = {"LSTM": "weight_ih_l0", "MultiheadAttention": "in_proj_weight"}
    pl.attach(host, pl.LoRA(rank=1), target.get(type(host).__name__, "weight"))
    with pl.routed(host, [0, 0]), pytest.raises(ValueError, match="cannot route the rows"):
        call(host)


def test_verbs_inside() -> None:
    """Persistent verbs inside change the model for later; what would reach all rows raises."""
    model, x = linear(), torch.randn(2, 6, dtype=torch.float64)
    alone = []
    for names in (["first"], ["second"], []):
        with pl.using(model, *names):
            alone.append(model(x))
    with pl.routed(model, ["first", "second"]):
        rows = torch.stack([alone[0][0], alone[1][1]])
        pl.disable(model)
        assert_close(model(x), rows)
        with pl.using(model, "second"):
            assert_close(model(x), alone[1])
        with pl.disabled(model, "first"):
            assert_close(model(x), torch.stack([alone[2][0], alone[1][1]]))
        with pl.disabled(model):
            assert_close(model(x), alone[2])
        with pytest.raises(pl.StateError, match=r"cannot switch adapters on inside of routed"):
            pl.enabled(model, "third").__enter__()
        with pytest.raises(pl.StateError, match=r"cannot attach an adapter inside of routed"):
            pl.attach(model, pl.LoRA(rank=1), "0", name="fourth")
        pl.detach(model, "first")
        assert_close(model(x), torch.stack([alone[2][0], alone[1][1]]))
    assert_close(model(x), alone[2])
    pl.enable(model, "second")
    assert_close(model(x), alone[1])


def test_adapter_merged_elsewhere() -> None:
    """An adapter merged anywhere in the model raises, since all rows would get it."""
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    pl.attach(model, pl.LoRA(rank=2), "0", name="first")
    pl.merge(model)
    pl.attach(model, pl.LoRA(rank=2), "1", name="second", activate="also")
    with pytest.raises(pl.StateError, match=r"route to adapter 'first' while it is merged"):
        pl.routed(model, [0], "second").__enter__()


def test_adapter_on_a_bias_only() -> None:
    """Rows of an adapter on the bias and of one on the weight of the same layer."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 5)).double(), torch.randn(3, 6, dtype=torch.float64)
    pl.attach(model, pl.LoRA(rank=2), "*.weight", name="first")
    pl.attach(model, pl.Delta(), "*.bias", name="second", activate="also")
    with torch.no_grad():
        for parameter in pl.parameters(model):
            parameter.normal_()
    rows = []
    for row, names in zip(x.split(1), (["first"], ["second"], []), strict=True):
        with pl.using(model, *names):
            rows.append(model(row))
    with pl.routed(model, ["first", "second", None]):
        assert_close(model(x), torch.cat(rows))
    with pl.routed(model, [-1, 0, -1], "second"):
        assert_close(model(x)[1:], torch.cat(rows[1:]))


@pytest.mark.parametrize("host", [nn.Linear(6, 5), nn.Conv1d(6, 5, 1), nn.Embedding(6, 5)])
def test_empty_batch(host: nn.Module) -> None:
    """A batch without rows gives outputs without rows."""
    x = torch.zeros(0, 3, dtype=torch.int64) if isinstance(host, nn.Embedding) else None
    x = torch.zeros(0, 6, 1)[..., : None if isinstance(host, nn.Conv1d) else 1] if x is None else x
    x = x.squeeze(-1) if isinstance(host, nn.Linear) else x
    pl.attach(host, pl.LoRA(rank=1), "weight")
    with pl.routed(host, []):
        assert host(x).shape[0] == 0
    pl.detach(host)


def test_unknown_name_in_ids() -> None:
    """An id that names an adapter to which no row is routed raises, with the names."""
    with pytest.raises(pl.AdapterNameError, match=r"'second', and rows are routed to 'first'"):
        pl.routed(linear(), ["second"], "first").__enter__()


def test_order_of_merge_and_enable() -> None:
    """An adapter that acts before a merged one cannot be switched on if their order counts."""
    model = nn.Linear(4, 3)
    pl.attach(model, pl.IA3(), "weight", name="a")
    pl.attach(model, pl.Delta(), "weight", name="b")
    pl.merge(model, "b")
    with pytest.raises(pl.StateError, match=r"cannot switch on 'a' while 'b', which was attached"):
        pl.enable(model, "a")
    with pytest.raises(pl.StateError, match=r"cannot switch on 'a' while 'b'"):
        pl.enabled(model, "a").__enter__()


def test_ids_that_change_inside() -> None:
    """A block keeps the ids that it was entered with if their tensor is written to later."""
    model, x = linear(), torch.randn(2, 6, dtype=torch.float64)
    ids = torch.tensor([0, 1])
    with pl.routed(model, [0, 1]):
        expected = model(x)
    with pl.routed(model, ids):
        ids.fill_(-1)
        assert torch.equal(model(x), expected)
        # Two rows for each id, as in a beam search: these ids are computed inside.
        assert_close(model(x.repeat_interleave(2, 0)), expected.repeat_interleave(2, 0))
