"""Adapters per row: a routed batch equals each row by itself with the adapter that it names."""

import copy
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import BOUNDS, error
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

import paramlora as pl
from paramlora import route

IDS = [2, 0, -1, 0, 1, 2, -1]
NAMES = ("first", "second", "third")


class Model(nn.Module):
    """A host under the path "host", called with the batch first."""

    def __init__(self, host: nn.Module, call: Callable[..., Tensor]) -> None:
        super().__init__()
        self.host, self.call = host, call

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.call(self.host, *inputs)


def plain(host: nn.Module, *inputs: Tensor) -> Tensor:
    return host(*inputs)


def attended(host: nn.Module, x: Tensor) -> Tensor:
    x = x if host.batch_first else x.transpose(0, 1)
    y = host(x, x, x, need_weights=False)[0]
    return y if host.batch_first else y.transpose(0, 1)


def last_state(host: nn.Module, x: Tensor) -> Tensor:
    y, (h, c) = host(x if host.batch_first else x.transpose(0, 1))
    y = y if host.batch_first else y.transpose(0, 1)
    return torch.cat([y[:, -1], h[0], c[0]], dim=1)


def floats(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(len(IDS), *shape, dtype=torch.float64)


def tokens(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randint(0, 9, (len(IDS), *shape))


# Each: the host, what is adapted in it, how it is called, and its inputs.
HOSTS: dict[str, tuple[Callable[[], nn.Module], str, Callable[..., Tensor], list[Any]]] = {
    "linear": (lambda: nn.Linear(6, 5), "host", plain, [floats(6)]),
    "linear-positions": (lambda: nn.Linear(6, 5), "host", plain, [floats(3, 2, 6)]),
    "transformers-conv1d": (lambda: Conv1D(5, 6), "host", plain, [floats(3, 6)]),
    "embedding": (lambda: nn.Embedding(9, 6), "host", plain, [tokens(4)]),
    "embedding-padding": (lambda: nn.Embedding(9, 6, padding_idx=3), "host", plain, [tokens(4)]),
    "bag": (lambda: nn.EmbeddingBag(9, 6), "host", plain, [tokens(4)]),
    "conv": (lambda: nn.Conv2d(4, 6, 3, groups=2), "host", plain, [floats(4, 5, 5)]),
    "conv-transposed": (lambda: nn.ConvTranspose1d(4, 6, 3), "host", plain, [floats(4, 5)]),
    "bilinear": (lambda: nn.Bilinear(4, 3, 5), "host", plain, [floats(4), floats(3)]),
    "attention": (
        lambda: nn.MultiheadAttention(8, 2, batch_first=True),
        "host.in_proj_weight",
        attended,
        [floats(5, 8)],
    ),
    "attention-output": (
        lambda: nn.MultiheadAttention(8, 2),
        "host.out_proj",
        attended,
        [floats(5, 8)],
    ),
    "lstm": (lambda: nn.LSTM(4, 6), "host.weight_*", last_state, [floats(5, 4)]),
    "lstm-batch-first": (
        lambda: nn.LSTM(4, 6, batch_first=True),
        "host.weight_ih_l0",
        last_state,
        [floats(5, 4)],
    ),
}
KINDS: dict[str, Callable[[], pl.Spec]] = {
    "lora": lambda: pl.LoRA(rank=2, alpha=3),
    "pissa": lambda: pl.LoRA(rank=1, init="pissa"),
    "dora": lambda: pl.DoRA(rank=2),
    "loha": lambda: pl.LoHa(rank=2),
    "ia3": pl.IA3,
    "delta": pl.Delta,
}


def adapted(model: nn.Module, spec: Callable[[], pl.Spec], target: str) -> nn.Module:
    """Return the model in float64 with three adapters that all change its outputs."""
    model.double()
    for i, name in enumerate(NAMES):
        its_spec = spec()
        if its_spec == pl.LoRA(rank=2, alpha=3):
            its_spec = pl.LoRA(rank=i + 1, alpha=3)
        pl.attach(model, its_spec, target, name=name)
    with torch.no_grad():
        for parameter in pl.parameters(model):
            parameter.normal_(std=0.5)
    pl.scale(model, 0.7, "second")
    return model


def one_by_one(model: nn.Module, inputs: list[Tensor]) -> Tensor:
    """Return each row's output from a batch of its own, with the adapter that it names."""
    rows = []
    for i, index in enumerate(IDS):
        row = [tensor[i : i + 1] for tensor in inputs]
        with pl.using(model, *([NAMES[index]] if index >= 0 else [])):
            rows.append(model(*row))
    return torch.cat(rows)


@pytest.mark.parametrize("sorts", [False, True], ids=["stacked", "sorted"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("host", HOSTS)
class TestRows:
    @pytest.fixture(autouse=True)
    def _sorts(self, sorts: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        cost = -1.0 if sorts else float("inf")
        monkeypatch.setattr(route, "_WORTH_A_GROUP", defaultdict(lambda: cost))

    def test_rows_are_what_they_are_by_themselves(self, host: str, kind: str) -> None:
        """Outputs, and the gradients of inputs and factors, in training and in inference."""
        torch.manual_seed(0)
        make, target, call, draws = HOSTS[host]
        model = adapted(Model(make(), call), KINDS[kind], target)
        inputs = [draw() for draw in draws]
        leaves = [x.requires_grad_() for x in inputs if x.is_floating_point()]
        leaves += pl.parameters(model)
        expected = one_by_one(model, inputs)
        dy = torch.randn_like(expected)
        gradients = torch.autograd.grad(expected, leaves, dy)
        with pl.routed(model, IDS):
            found = model(*inputs)
        assert_close(found, expected)
        # After the exit: the backward has to know what was routed where.
        assert_close(torch.autograd.grad(found, leaves, dy), gradients)
        with torch.no_grad(), pl.routed(model, IDS):
            assert_close(model(*inputs), expected.detach())


def linear() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    adapted(model, KINDS["lora"], "?")
    return model


class TestRouted:
    def test_contexts_inside_leave_what_is_routed(self) -> None:
        """Entering and leaving `disabled` or `using` inside changes no output, named or not."""
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3))
        pl.attach(model, pl.LoRA(2, init="orthogonal"), "0", name="a")
        pl.attach(model, pl.LoRA(2, init="orthogonal"), "1", name="b")
        with torch.no_grad():
            for factor in pl.parameters(model):
                factor.normal_()
            x = torch.randn(2, 4)
            with pl.routed(model, [0, -1], "a"):
                before = model(x)
                with pl.disabled(model), pl.using(model, "b"):
                    pass
                assert torch.equal(model(x), before)

    def test_a_model_of_mixed_layers(self) -> None:
        """Layers of different kinds, a bias, and a site that one adapter does not have."""
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Embedding(9, 8), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Flatten()
        ).double()
        model.eval()
        pl.attach(model, pl.LoRA(rank=2), ["0", "*.linear1", "*.in_proj_weight"], name="first")
        pl.attach(model, pl.LoRA(rank=3), ["*.linear1", "*.linear2"], name="second")
        pl.attach(model, pl.Delta(), ["*.linear1.*", "*.out_proj"], name="third")
        with torch.no_grad():
            for parameter in pl.parameters(model):
                parameter.normal_(std=0.5)
        x = torch.randint(0, 9, (len(IDS), 4))
        expected = one_by_one(model, [x])
        with pl.routed(model, torch.tensor(IDS, dtype=torch.int32)):
            assert_close(model(x), expected)

    def test_rows_without_an_adapter_are_the_base(self) -> None:
        """−1 for all rows is the base bit for bit, though the adapters are switched on."""
        model, x = linear(), torch.randn(4, 6, dtype=torch.float64)
        with pl.disabled(model):
            base = model(x)
        with pl.routed(model, [-1] * 4):
            assert torch.equal(model(x), base)

    def test_adapters_without_rows_are_off(self) -> None:
        """Adapters that are not named do not act, wherever they are; afterwards they do again."""
        model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)).double()
        x = torch.randn(2, 6, dtype=torch.float64)
        base = model(x)
        pl.attach(model, pl.LoRA(rank=2), "0", name="first")
        pl.attach(model, pl.LoRA(rank=2), "1", name="second")
        with torch.no_grad():
            for parameter in pl.parameters(model):
                parameter.normal_()
        before = model(x)
        with pl.routed(model, [-1, -1], "first"):
            assert torch.equal(model(x), base)
        assert torch.equal(model(x), before)

    def test_another_adapters_infinity(self) -> None:
        """A row does not see that another adapter's factors overflow in it."""
        model, x = linear(), torch.randn(2, 6, dtype=torch.float64)
        with torch.no_grad():
            for key, factor in pl.state_dict(model, "second").items():
                if key.endswith(".A"):
                    factor.fill_(torch.inf)
        with pl.routed(model, [0, -1]):
            expected = model(x)
        with pl.routed(model, [0, 1]):
            assert_close(model(x)[0], expected[0])

    def test_a_copy_made_inside_has_left(self) -> None:
        """A copy of a routed model is not routed, and can be used and merged."""
        model, x = linear(), torch.randn(3, 6, dtype=torch.float64)
        with pl.routed(model, [0, -1]):
            copied = copy.deepcopy(model)
        assert_close(copied(x), model(x))
        pl.merge(copied)

    def test_training_after_inference_mode(self) -> None:
        """What was worked out in inference mode is not kept for a backward."""
        model, x = linear(), torch.randn(2, 6, dtype=torch.float64)
        with pl.routed(model, [0, 1]):
            with torch.inference_mode():
                model(x)
            model(x).sum().backward()

    def test_checkpointing(self) -> None:
        """With the backward inside, checkpointing changes no gradient."""
        model, x = linear(), torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
        parameters = pl.parameters(model)
        with pl.routed(model, [0, 1, 2]):
            expected = torch.autograd.grad(model(x).square().sum(), parameters)
            y = checkpoint(model, x, use_reentrant=False)
            assert_close(torch.autograd.grad(y.square().sum(), parameters), expected)

    def test_names_give_the_order(self) -> None:
        """Ids count in the order of the names given, and what is switched on does not matter."""
        model, x = linear(), torch.randn(2, 6, dtype=torch.float64)
        pl.disable(model)
        with pl.routed(model, [0, 1], "third", "first"):
            found = model(x)
        for i, name in enumerate(("third", "first")):
            with pl.using(model, name):
                assert_close(found[i], model(x[i : i + 1])[0])

    def test_half_precision(self) -> None:
        """In bfloat16 rows are within its rounding of float64, with factors in float32."""
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
    def test_autocast(self, grad: bool) -> None:
        """Under autocast the rows are in its dtype, within its rounding of float64."""
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
    def test_afterwards_all_is_as_it_was(self, fails: bool) -> None:
        """Normally, with an exception inside, and nested: the inner ids count, then the outer."""
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

    def test_compiled(self) -> None:
        """A routed model compiles in one graph, with the values and gradients of the eager one."""
        model, x = linear().float(), torch.randn(len(IDS), 6)
        parameters = pl.parameters(model)
        with pl.routed(model, IDS):
            expected = model(x)
            found = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
        assert_close(found, expected)
        gradients = (torch.autograd.grad(y.square().sum(), parameters) for y in (found, expected))
        assert_close(next(gradients), next(gradients))

    def test_the_cheaper_way(self) -> None:
        """Few rows are stacked; many rows of many adapters are sorted."""
        assert route.stacks_well(512, 4096, 4096, [16] * 32, "cuda")
        assert not route.stacks_well(2**17, 4096, 4096, [16] * 32, "cuda")
        assert route.stacks_well(2**17, 4096, 4096, [16], "cuda")


class Read(nn.Module):
    """A module whose own code reads its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class TestRefused:
    @pytest.mark.parametrize(
        ("ids", "message"),
        [
            ([0.5], r"vector of whole numbers.* got torch.float32 of shape \(1,\)"),
            ([[0]], r"vector of whole numbers.* got torch.int64 of shape \(1, 1\)"),
            ([True], r"vector of whole numbers.* got torch.bool"),
            ([0, 3], r"−1 \(none\), 0 = 'first', 1 = 'second', 2 = 'third'; got 3"),
            ([-2], "got -2"),
        ],
    )
    def test_ids(self, ids: Any, message: str) -> None:
        """Ids that are no vector of indices are refused with what was given and what may be."""
        with pytest.raises(ValueError, match=message), pl.routed(linear(), ids):
            pass

    def test_another_number_of_rows(self) -> None:
        """A batch of another size is refused where it is met, by the site's path."""
        model = linear()
        message = "route 2 rows, and the input of '0.weight' has 3"
        with pl.routed(model, [0, 1]), pytest.raises(ValueError, match=message):
            model(torch.randn(3, 6, dtype=torch.float64))

    def test_names(self) -> None:
        """An adapter that is not there, and one that is merged."""
        model = linear()
        with pytest.raises(pl.AdapterNameError, match="no adapter 'fourth'"):
            pl.routed(model, [0], "fourth").__enter__()
        with pl.merged(model, "first"), pytest.raises(pl.StateError, match=r"route to .*unmerge"):
            pl.routed(model, [0]).__enter__()

    def test_a_module_that_reads_its_tensor(self) -> None:
        """A module's own code would give all rows the same tensor, and is named."""
        model = nn.Sequential(Read())
        pl.attach(model, pl.LoRA(rank=1), "0")
        with pytest.raises(pl.StateError, match=r"'0.weight': Read reads it"):
            pl.routed(model, [0]).__enter__()

    def test_reading_a_weight(self) -> None:
        """There is no one W' inside, and whoever reads it is told so."""
        model = linear()
        with pl.routed(model, [0]), pytest.raises(pl.StateError, match=r"'0.weight' was read insi"):
            _ = model[0].weight

    def test_merging_inside(self) -> None:
        """Merging would give all rows the adapter, and is refused."""
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
    def test_calls_whose_rows_cannot_be_told(self, host: nn.Module, call: Any) -> None:
        """A call without a batch dimension, or with a mask of each row's own, is refused."""
        target = {"LSTM": "weight_ih_l0", "MultiheadAttention": "in_proj_weight"}
        pl.attach(host, pl.LoRA(rank=1), target.get(type(host).__name__, "weight"))
        with pl.routed(host, [0, 0]), pytest.raises(ValueError, match="cannot route the rows"):
            call(host)
