"""PiSSA, OLoRA and MiLoRA: the start is PEFT's or the paper's; the stored weight keeps its bits."""

import copy
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import paramlora as pl

INITS = ["pissa", "olora"]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(12, 9)
        self.fc2 = nn.Linear(9, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x).tanh())


def models(init: str) -> tuple[Any, Any, Any]:
    """Return a base, a copy with our adapter, and a copy with PEFT's."""
    torch.manual_seed(0)
    base = Net()
    ours, theirs = copy.deepcopy(base), copy.deepcopy(base)
    pl.attach(ours, pl.LoRA(rank=3, alpha=2, init=init))
    config = peft.LoraConfig(
        r=3, lora_alpha=2, target_modules=["fc1", "fc2"], init_lora_weights=init
    )
    return base, ours, peft.get_peft_model(theirs, config)


@pytest.mark.parametrize("init", INITS)
def test_factors_equal_peft(init: str) -> None:
    """The starting factors equal PEFT's, up to the sign of each of the r directions."""
    _, ours, theirs = models(init)
    state = pl.state_dict(ours)
    for name in ("fc1", "fc2"):
        layer = theirs.get_submodule(f"base_model.model.{name}")
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        signs = (state[f"{name}.weight.A"] * A).sum(1).sign()
        assert_close(state[f"{name}.weight.A"] * signs.unsqueeze(1), A.detach())
        assert_close(state[f"{name}.weight.B"] * signs, B.detach())


@pytest.mark.parametrize("init", INITS)
def test_trains_as_peft_does(init: str) -> None:
    """Ten steps of Adam on the same data give the same function as in PEFT."""
    base, ours, theirs = models(init)
    x, y = torch.randn(32, 12), torch.randn(32, 5)
    for model in (ours, theirs):
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(trained, lr=1e-2, weight_decay=0.1)
        for _ in range(10):
            optimizer.zero_grad()
            (model(x) - y).square().mean().backward()
            optimizer.step()
    assert_close(ours(x), theirs(x), rtol=1e-3, atol=1e-5)
    # Training has moved the outputs by more than these bounds.
    assert float((ours(x) - base(x)).detach().abs().mean()) > 0.05


@pytest.mark.parametrize("shape", [(9, 12), (12, 9)])
def test_milora_starts_from_the_minor_part(shape: tuple[int, int]) -> None:
    """The starting update of "milora", which PEFT lacks, has the r smallest singular values."""
    torch.manual_seed(0)
    W = torch.randn(shape, dtype=torch.float64)
    factors = pl.LoRA(rank=3, alpha=2, init="milora").create(W)
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    minor = U[:, -3:] @ S[-3:].diag() @ Vh[-3:]
    assert_close(2 / 3 * factors["B"] @ factors["A"], minor, rtol=0, atol=1e-12)
    # Both factors have the roots of the singular values, as in the paper's code.
    assert_close(factors["A"].norm(dim=1), factors["B"].norm(dim=0))


@pytest.mark.parametrize("init", [*INITS, "milora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_stored_weight_keeps_its_bits(init: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """The stored weight keeps the bits of the base: at the start, trained, off and saved."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(12, 9), nn.Conv1d(1, 4, 3), nn.Flatten()).to(dtype)
    model: Any = copy.deepcopy(base)
    x = torch.randn(6, 1, 12).to(dtype)
    before = pl.fingerprint(model)
    pl.attach(model, pl.LoRA(rank=2, alpha=3, init=init), ["0", "1"])
    assert torch.equal(model(x), base(x))
    for parameter in pl.parameters(model):
        with torch.no_grad():
            parameter.add_(torch.randn(parameter.shape) / 4)
    assert pl.fingerprint(model) == before
    trained = model(x)
    assert not torch.equal(trained, base(x))
    with pl.disabled(model):
        assert torch.equal(model(x), base(x))
    pl.save(model, tmp_path / "a.safetensors")
    other = copy.deepcopy(base)
    pl.load(other, tmp_path / "a.safetensors")
    assert_close(other(x), trained)
    update = (model[0].weight.double() - base.get_parameter("0.weight").double()).detach()
    if dtype == torch.float64:
        assert torch.linalg.matrix_rank(update, rtol=1e-9) == 4


def test_constants_are_not_trained() -> None:
    """The constants A0 and B0 are saved, loaded and cast, but never trained or counted."""
    model = nn.Linear(6, 5)
    found = pl.attach(model, pl.LoRA(rank=2, init="pissa"), "weight")
    assert found.trainable == found.sites[0].parameters == 2 * (6 + 5)
    assert len(pl.parameters(model)) == 2
    state = pl.state_dict(model)
    assert list(state) == [f"weight.{key}" for key in ("A", "B", "A0", "B0")]
    assert_close(state["weight.A"], state["weight.A0"], rtol=0, atol=0)
    pl.freeze(model)
    pl.unfreeze(model)
    assert not any(buffer.requires_grad for buffer in model.buffers())
    with pytest.raises(pl.CheckpointError, match=r"missing weight\.A0, weight\.B0"):
        pl.load_state_dict(model, {k: v for k, v in state.items() if "0" not in k})
    pl.load_state_dict(model, {key: value + 1 for key, value in state.items()})
    assert_close(pl.state_dict(model)["weight.A0"], state["weight.A0"])
    model.double()
    assert all(tensor.dtype == torch.float64 for tensor in pl.state_dict(model).values())


def test_rank_above_the_matrix() -> None:
    """A rank above the smaller side of the matrix raises TargetError."""
    model = nn.Sequential(nn.Linear(6, 2))
    message = "cannot adapt '0.weight' with LoRA: init='olora' needs a rank of at most 2"
    with pytest.raises(pl.TargetError, match=re.escape(message)):
        pl.attach(model, pl.LoRA(rank=3, init="olora"))
