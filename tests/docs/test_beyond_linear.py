"""Statements of docs/beyond-linear.md that its own examples do not show."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import paramlora as pl
from tests.support.models import CountingLoRA
from tests.support.reference import shake

DOCUMENT = Path(__file__).parents[2] / "docs" / "beyond-linear.md"


def defined(name: str) -> type[Any]:
    """Return a class that the document defines."""
    source = re.search(
        rf"^class {name}\(.*?(?=^\S|\Z)",
        DOCUMENT.read_text(encoding="utf-8"),
        re.MULTILINE | re.DOTALL,
    )
    assert source, f"no class {name} in the document"
    namespace: dict[str, Any] = {"torch": torch, "nn": nn, "F": nn.functional}
    exec(source[0], namespace)
    return namespace[name]


@pytest.mark.parametrize("cell", [nn.RNN, nn.LSTM, nn.GRU])
def test_recurrent_layers_build_their_weights_once(cell: type[nn.Module]) -> None:
    """A recurrent layer builds each W' once per forward, however long the series is."""
    model = defined("Forecaster")(cell)
    pl.attach(model, CountingLoRA(1), "rnn.weight_*")
    shake(model)
    for length in (3, 30):
        CountingLoRA.built = 0
        model(torch.randn(2, length, 1))
        assert CountingLoRA.built == 4


def test_state_space_block_reads_the_adapter() -> None:
    """A block that reads `x_proj.weight` itself computes with W + BA, outputs and gradients."""
    scan = defined("SelectiveScan")().double()
    pl.attach(scan, pl.LoRA(2), ["x_proj", "dt_proj"])
    shake(scan)
    u = torch.randn(2, 5, 8, dtype=torch.float64)
    leaves = {k: f.detach().clone().requires_grad_() for k, f in pl.state_dict(scan).items()}
    updates = {
        key: leaves[f"{key}.B"] @ leaves[f"{key}.A"] for key in ("x_proj.weight", "dt_proj.weight")
    }
    plain = defined("SelectiveScan")().double()
    plain.load_state_dict(pl.base_state_dict(scan))
    weights = {key: plain.state_dict()[key] + update for key, update in updates.items()}
    expected = torch.func.functional_call(plain, weights, (u,))
    found = scan(u)
    assert_close(found, expected)
    assert_close(
        torch.autograd.grad(found.square().sum(), pl.parameters(scan)),
        torch.autograd.grad(expected.square().sum(), list(leaves.values())),
    )


def test_peft_is_not_read_by_a_state_space_block() -> None:
    """PEFT's adapter at a layer whose weight is read has no effect and gets no gradient."""
    peft = pytest.importorskip("peft")
    scan, u = defined("SelectiveScan")(), torch.randn(2, 5, 8)
    before = scan(u).detach()
    config = peft.LoraConfig(target_modules=["x_proj", "dt_proj"], init_lora_weights=False)
    wrapped = peft.get_peft_model(scan, config)
    found = wrapped(u)
    assert torch.equal(found.detach(), before)
    assert not found.requires_grad


def test_stack_of_experts_without_batch_dims() -> None:
    """Without `batch_dims`, a stack of experts is adapted as the matrix (E, out · in)."""
    up = defined("Experts")().up
    factors = pl.LoRA(2).create(up)
    assert factors["A"].shape == (2, 12 * 6)
    assert factors["B"].shape == (4, 2)


@pytest.mark.parametrize("form", [nn.Conv2d, nn.ConvTranspose2d])
def test_convolution_as_a_matrix(form: Any) -> None:
    """A convolution's weight is adapted as the matrix (first dimension, all others)."""
    model = form(4, 6, 3)
    W = model.weight.detach().clone()
    pl.attach(model, pl.LoRA(2), "weight")
    shake(model)
    factors = pl.state_dict(model)
    assert factors["weight.A"].shape == (2, W[0].numel())
    assert_close(model.weight.detach(), W + (factors["weight.B"] @ factors["weight.A"]).view_as(W))
