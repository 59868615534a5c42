"""Adapters per row in every layer: each row gives the output of a run alone with its adapter."""

import copy
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

import paramlora as pl
from paramlora.routing import rows as route
from tests.support.helpers import BOUNDS, error
from tests.support.models import IDS, one_by_one, with_three_adapters
from tests.support.reference import shake


class Model(nn.Module):
    """A host under the path "host", called with the batch first."""

    def __init__(self, host: nn.Module, call: Callable[..., Tensor]) -> None:
        super().__init__()
        self.host, self.call = host, call

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.call(self.host, *inputs)


def plain(host: nn.Module, *inputs: Tensor) -> Tensor:
    return host(*inputs)


def attend(host: nn.Module, x: Tensor) -> Tensor:
    x = x if host.batch_first else x.transpose(0, 1)
    y = host(x, x, x, need_weights=False)[0]
    return y if host.batch_first else y.transpose(0, 1)


def last_state(host: nn.Module, x: Tensor) -> Tensor:
    y, (h, c) = host(x if host.batch_first else x.transpose(0, 1))
    y = y if host.batch_first else y.transpose(0, 1)
    return torch.cat([y[:, -1], h[0], c[0]], dim=1)


def normal(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(len(IDS), *shape, dtype=torch.float64)


def ids(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randint(0, 9, (len(IDS), *shape))


# For each host: a function that makes it, the target, the call, functions that make the inputs.
HOSTS: dict[str, tuple[Callable[[], nn.Module], str, Callable[..., Tensor], list[Any]]] = {
    "linear": (lambda: nn.Linear(6, 5), "host", plain, [normal(6)]),
    "linear-positions": (lambda: nn.Linear(6, 5), "host", plain, [normal(3, 2, 6)]),
    "transformers-conv1d": (lambda: Conv1D(5, 6), "host", plain, [normal(3, 6)]),
    "embedding": (lambda: nn.Embedding(9, 6), "host", plain, [ids(4)]),
    "embedding-padding": (lambda: nn.Embedding(9, 6, padding_idx=3), "host", plain, [ids(4)]),
    "bag": (lambda: nn.EmbeddingBag(9, 6), "host", plain, [ids(4)]),
    "conv": (lambda: nn.Conv2d(4, 6, 3, groups=2), "host", plain, [normal(4, 5, 5)]),
    "conv-transposed": (lambda: nn.ConvTranspose1d(4, 6, 3), "host", plain, [normal(4, 5)]),
    "bilinear": (lambda: nn.Bilinear(4, 3, 5), "host", plain, [normal(4), normal(3)]),
    "attention": (
        lambda: nn.MultiheadAttention(8, 2, batch_first=True),
        "host.in_proj_weight",
        attend,
        [normal(5, 8)],
    ),
    "attention-output": (
        lambda: nn.MultiheadAttention(8, 2),
        "host.out_proj",
        attend,
        [normal(5, 8)],
    ),
    "lstm": (lambda: nn.LSTM(4, 6), "host.weight_*", last_state, [normal(5, 4)]),
    "lstm-batch-first": (
        lambda: nn.LSTM(4, 6, batch_first=True),
        "host.weight_ih_l0",
        last_state,
        [normal(5, 4)],
    ),
}
KINDS: dict[str, Callable[[], pl.kinds.Spec]] = {
    "lora": lambda: pl.LoRA(rank=2, alpha=3),
    "pissa": lambda: pl.LoRA(rank=1, init="pissa"),
    "dora": lambda: pl.DoRA(rank=2),
    "loha": lambda: pl.LoHa(rank=2),
    "ia3": pl.IA3,
    "delta": pl.Delta,
}


@pytest.mark.parametrize("sorts", [False, True], ids=["stacked", "sorted"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("host", HOSTS)
class TestRows:
    @pytest.fixture(autouse=True)
    def _sorts(self, sorts: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        cost = -1.0 if sorts else float("inf")
        monkeypatch.setattr(route, "_WORTH_A_GROUP", defaultdict(lambda: cost))

    def test_rows_equal_separate_batches(self, host: str, kind: str) -> None:
        """Outputs, and the gradients of inputs and factors, in training and in inference."""
        torch.manual_seed(0)
        make, target, call, inputs_of = HOSTS[host]
        model = with_three_adapters(Model(make(), call), KINDS[kind], target)
        inputs = [draw() for draw in inputs_of]
        leaves = [x.requires_grad_() for x in inputs if x.is_floating_point()]
        leaves += pl.parameters(model)
        expected = one_by_one(model, inputs)
        dy = torch.randn_like(expected)
        gradients = torch.autograd.grad(expected, leaves, dy)
        with pl.routed(model, IDS):
            found = model(*inputs)
        assert_close(found, expected)
        # The block has ended: the backward must know the adapter of each row.
        assert_close(torch.autograd.grad(found, leaves, dy), gradients)
        with torch.no_grad(), pl.routed(model, IDS):
            assert_close(model(*inputs), expected.detach())


def test_choice_between_stacking_and_sorting() -> None:
    """Few rows are stacked; many rows of many adapters are sorted."""
    assert route.stacks_well(512, 4096, 4096, [16] * 32, "cuda")
    assert not route.stacks_well(2**17, 4096, 4096, [16] * 32, "cuda")
    assert route.stacks_well(2**17, 4096, 4096, [16], "cuda")


@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("rank", [1, 3, 16])
@pytest.mark.parametrize("shape", [(1, 20), (40, 20), (9, 5, 20)], ids=str)
def test_rows_in_inference(
    shape: tuple[int, ...], rank: int, stacked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without gradients each row equals float64's, for adapters with no, one or many rows."""
    monkeypatch.setattr(route, "stacks_well", lambda *sizes: stacked)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 70), nn.ReLU(), nn.Linear(70, 3))
    for i in range(3):
        pl.attach(model, pl.LoRA(rank, 2.0), name=f"a{i}", activate="no")
    shake(model)
    x = torch.randn(shape)
    ids = torch.randint(-1, 3, shape[:1])
    ids[0] = 2
    exact = copy.deepcopy(model).double()
    with torch.no_grad():
        with pl.routed(model, ids):
            found = model(x)
        for i, row, output in zip(ids.tolist(), x.double(), found, strict=True):
            with pl.disabled(exact) if i < 0 else pl.using(exact, f"a{i}"):
                assert error(output, exact(row)) < BOUNDS[torch.float32]
