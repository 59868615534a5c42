"""`extract`: the adapter that is closest to a full fine-tune."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import paramlora as pl
from paramlora import TargetError
from tests.support.helpers import EXACT, refuses, unchanged
from tests.support.models import Tied, attached, plain


def fine_tuned(dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module]:
    """Return a model and its base: one update of rank 2, full updates, one unchanged tensor."""
    base = plain().to(dtype)
    model = copy.deepcopy(base)
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    with torch.no_grad():
        model.get_parameter("fc1.weight").add_(noise(4, 2) @ noise(2, 5))
        model.get_parameter("emb.weight").add_(noise(7, 5))
        model.get_parameter("fc2.bias").add_(noise(3))
        model.get_parameter("gain").add_(1)
    return model, base


def test_best_adapter() -> None:
    """An update of rank 2 is found exactly, and a full update gets its best rank-2 part."""
    model, base = fine_tuned()
    expected = copy.deepcopy(model.state_dict())
    change = expected["emb.weight"] - base.state_dict()["emb.weight"]
    with unchanged(model):
        lost = pl.extract(model, base, rank=2, name="tuned")
    values = torch.linalg.svdvals(change)
    assert lost == {
        "emb.weight": pytest.approx(float(values[2:].norm() / values.norm())),
        "fc1.weight": pytest.approx(0, abs=1e-14),
        "fc2.bias": 0.0,
        "gain": 0.0,
    }
    kinds = {row.site: (row.kind, row.rank) for row in pl.summary(base).sites}
    assert kinds == {
        "emb.weight": ("LoRA", 2),
        "fc1.weight": ("LoRA", 2),
        "fc2.bias": ("Delta", None),
        "gain": ("Delta", None),
    }
    pl.bake(base)
    actual = base.state_dict()
    error = (actual.pop("emb.weight") - expected.pop("emb.weight")).norm()
    assert_close(error, values[2:].norm(), **EXACT)
    assert_close(dict(actual), dict(expected), **EXACT)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_full_rank(dtype: torch.dtype) -> None:
    """At a large rank the loss is zero, and the factors have only the rank that they need."""
    model, base = fine_tuned(dtype)
    lost = pl.extract(model, base, rank=64)
    assert max(lost.values()) < 1e-6
    assert {row.site: row.rank for row in pl.summary(base).sites}["emb.weight"] == 5
    pl.bake(base)
    assert_close(dict(base.state_dict()), dict(model.state_dict()))


def test_buffers() -> None:
    """Buffers that changed in the fine-tune are reported as lost."""
    base = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    model = copy.deepcopy(base)
    with torch.no_grad():
        model.get_parameter("0.weight").add_(1)
    model(torch.randn(5, 3))
    lost = pl.extract(model, base, rank=1)
    assert {path for path, share in lost.items() if share == 1} == {
        "1.running_mean",
        "1.running_var",
        "1.num_batches_tracked",
    }


def test_invalid_arguments() -> None:
    """Models that are not a base and its fine-tune raise, and change nothing."""
    model, base = fine_tuned()
    refuses(
        base,
        lambda m: pl.extract(attached().double(), m, 2),
        pl.StateError,
        "the model to extract from has adapters; bake or detach them first",
    )
    refuses(
        base,
        lambda m: pl.extract(nn.Linear(3, 3), m, 2),
        TargetError,
        "model is not a fine-tune of base: bias, emb.weight, [...] are missing from one "
        "of them or differ in shape",
    )
    refuses(
        base,
        lambda m: pl.extract(copy.deepcopy(m), m, 2),
        TargetError,
        "the models have the same parameters: there is nothing to extract",
    )
    refuses(
        base,
        lambda m: pl.extract(model, m, 0),
        ValueError,
        "rank must be a whole number of at least 1, got 0",
    )
    refuses(
        attached().double(),
        lambda m: pl.extract(model, m, 2, name="digits"),
        pl.AdapterNameError,
        "an adapter 'digits' is attached already [...]",
    )


def test_tied_tensors() -> None:
    """A tied tensor is extracted once; a fine-tune that untied it raises TargetError."""
    base = Tied().double()
    model, untied = copy.deepcopy(base), Tied(tied=False).double()
    untied.load_state_dict(base.state_dict())
    with torch.no_grad():
        model.emb.weight.add_(1)
    assert list(pl.extract(model, base, 1)) == ["emb.weight"]
    assert_close(base.head.weight, model.head.weight, **EXACT)
    with torch.no_grad():
        untied.emb.weight.add_(1)
    refuses(
        Tied().double(),
        lambda m: pl.extract(untied, m, 1),
        TargetError,
        "'emb.weight' and 'head.weight' are tied in the base but differ in the fine-tune",
    )
