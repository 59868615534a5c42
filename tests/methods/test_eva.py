"""EVA starts A along the main directions of the inputs, and changes no output."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import paramlora as pl
from tests.support.helpers import refuses


class Net(nn.Module):
    """Two Linears with layers between them that differ in training mode."""

    def __init__(self, *, embed: bool = False) -> None:
        super().__init__()
        self.fc1 = nn.Linear(40, 24)
        self.norm = nn.BatchNorm1d(24)
        self.drop = nn.Dropout(0.5)
        self.fc2 = nn.Linear(24, 5)
        self.unused = nn.Linear(24, 5)
        self.emb = nn.Embedding(7, 4)

    def forward(self, x: Tensor, shift: float = 0.0) -> Tensor:
        return self.fc2(self.drop(self.norm(self.fc1(x) + shift)).tanh())


def net(dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(0)
    return Net().to(dtype)


def batches(rows: int = 40, count: int = 20, decay: float = 0.7) -> list[Tensor]:
    """Return inputs whose variance decays from direction to direction."""
    torch.manual_seed(1)
    basis = torch.linalg.qr(torch.randn(40, 40, dtype=torch.float64))[0]
    scales = decay ** torch.arange(40, dtype=torch.float64)
    return [torch.randn(rows, 40, dtype=torch.float64) * scales @ basis for _ in range(count)]


@pytest.mark.parametrize("spec", [pl.LoRA(rank=4), pl.DoRA(rank=4)])
def test_equal_to_svd(spec: pl.kinds.Spec) -> None:
    """A holds the first right-singular vectors of all inputs in one matrix, up to sign."""
    model, data = net(), batches()
    pl.attach(model, spec, ["fc1", "fc2"])
    found = pl.eva(model, data)
    X = torch.cat(data)
    model.eval()
    hidden = model.norm(nn.functional.linear(X, *base(model))).tanh()
    for name, inputs in (("fc1", X), ("fc2", hidden.detach())):
        _, S, Vh = torch.linalg.svd(inputs, full_matrices=False)
        A = pl.state_dict(model)[f"{name}.weight.A"]
        # Each batch keeps twenty directions; the rest are below a thousandth of the first.
        assert_close((A * Vh[:4]).sum(1).abs(), torch.ones(4, dtype=A.dtype), rtol=0, atol=1e-5)
        assert_close(A @ A.T, torch.eye(4, dtype=A.dtype))
        energy = float(S[:4].square().sum() / S.square().sum())
        assert found[f"{name}.weight"] == pytest.approx(energy, rel=1e-4)


def base(model: Any) -> tuple[Tensor, Tensor]:
    return model.fc1.parametrizations.weight.original, model.fc1.bias


def test_exact_with_enough_directions() -> None:
    """If as many directions are kept as the inputs have, the result is exact."""
    model, data = net(), batches(decay=0.97)
    pl.attach(model, pl.LoRA(rank=4), "fc1")
    pl.eva(model, data, oversampling=36)
    Vh = torch.linalg.svd(torch.cat(data), full_matrices=False)[2]
    A = pl.state_dict(model)["fc1.weight.A"]
    assert_close((A * Vh[:4]).sum(1).abs(), torch.ones(4, dtype=A.dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_keep_their_bits(dtype: torch.dtype) -> None:
    """Outputs, statistics, modes, hooks and active adapters stay; only the named A changes."""
    model = net(dtype)
    pl.attach(model, pl.LoRA(rank=3), ["fc1", "fc2"], name="one")
    pl.attach(model, pl.LoRA(rank=2), "fc1", name="two", activate="also")
    pl.disable(model, "two")
    model.norm.eval()
    x = torch.randn(8, 40).to(dtype)
    modes = [module.training for module in model.modules()]
    base_before, two = pl.fingerprint(model), pl.state_dict(model, "two")["fc1.weight.A"].clone()
    one = pl.state_dict(model, "one")["fc1.weight.A"].clone()
    model.eval()
    before = model(x)
    for module, mode in zip(model.modules(), modes, strict=True):
        module.training = mode
    pl.eva(model, ({"x": batch.to(dtype), "shift": 0.1} for batch in batches(count=2)), "one")
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert [row.active for row in pl.summary(model).sites if row.adapter == "two"] == [False]
    assert pl.fingerprint(model) == base_before
    assert torch.equal(pl.state_dict(model, "two")["fc1.weight.A"], two)
    assert not torch.equal(pl.state_dict(model, "one")["fc1.weight.A"], one)
    assert torch.equal(model.eval()(x), before)


def test_two_ranks_at_one_layer() -> None:
    """A layer keeps as many directions as the adapter of the highest rank needs."""
    torch.manual_seed(0)
    model, X = net(), torch.randn(30, 4, dtype=torch.float64) @ torch.randn(4, 40).double()
    for rank in (1, 4, 2):
        pl.attach(model, pl.LoRA(rank), "fc1", name=f"rank {rank}", activate="also")
    found = pl.eva(model, X.split(10), *(f"rank {rank}" for rank in (1, 4)), oversampling=0)
    A = pl.state_dict(model, "rank 4")["fc1.weight.A"]
    assert_close(X @ A.T @ A, X)
    assert found.keys() == {"fc1.weight"}


def test_share_of_energy() -> None:
    """A holds far more of the energy of the inputs than a random start, as `eva` returns."""
    model, data = net(), batches()
    pl.attach(model, pl.LoRA(rank=4, init="orthogonal"), "fc1")
    X = torch.cat(data)

    def share() -> float:
        return float((X @ pl.state_dict(model)["fc1.weight.A"].T).square().sum() / X.square().sum())

    before = share()
    [found] = pl.eva(model, [(batch,) for batch in data]).values()
    assert share() == pytest.approx(found, rel=1e-4)
    assert share() > 2 * before


def test_errors() -> None:
    """A site without inputs raises an error, and nothing changes."""

    def start(model: Any) -> object:
        return pl.eva(model, batches(count=1))

    model = net()
    pl.attach(model, pl.LoRA(rank=2), "emb")
    refuses(
        model,
        start,
        pl.TargetError,
        "cannot start 'emb.weight' from inputs: it is not the weight of an nn.Linear; name other "
        "adapters",
    )
    model = net()
    pl.attach(model, pl.LoHa(rank=2), "fc1")
    refuses(
        model, start, pl.TargetError, "cannot start 'fc1.weight' from inputs: only LoRA and[...]"
    )
    model = net()
    pl.attach(model, pl.LoRA(rank=2), ["fc1", "unused"])
    message = (
        "cannot start 'unused.weight' at rank 2 from 0 rows of inputs; give more batches, or[...]"
    )
    refuses(model, start, pl.StateError, message)
    model = net()
    pl.attach(model, pl.LoRA(rank=2), "fc1")
    nn.init.ones_(pl.parameters(model)[1])
    refuses(model, start, pl.StateError, "cannot start 'fc1.weight' from inputs: its B is[...]")
    pl.merge(model)
    refuses(model, start, pl.StateError, "cannot start adapter 'default' while it is merged[...]")


def test_error_in_the_forward() -> None:
    """If the model or the batches raise, modes, hooks and active adapters are restored."""
    model = net()
    pl.attach(model, pl.LoRA(rank=2), "fc1")
    with pytest.raises(RuntimeError, match=re.escape("mat1 and mat2 shapes")):
        pl.eva(model, [torch.randn(3, 7, dtype=torch.float64)])
    assert model.training
    assert not model.fc1._forward_pre_hooks
    assert pl.summary(model).sites[0].active
