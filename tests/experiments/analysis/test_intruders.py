"""Intruder dimensions: their count on both sides, and scaling them, beside PEFT's."""

import doctest

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from experiments.analysis import intruders
from experiments.analysis.intruders import scaled, spectrum


def test_examples_in_docstrings_run():
    """The examples in the docstrings pass."""
    result = doctest.testmod(intruders, extraglobs={"torch": torch})
    assert result.attempted
    assert not result.failed


def test_a_planted_direction_is_found_on_its_side():
    """W + c·u v with a new u and a v of W's is an intruder among the left vectors only."""
    torch.manual_seed(0)
    W = torch.randn(20, 6).double()
    U, S, V = torch.linalg.svd(W, full_matrices=False)
    new = torch.linalg.qr(torch.cat([U, torch.randn(20, 1).double()], 1))[0][:, -1]
    found = spectrum(W, W + 100 * torch.outer(new, V[2]), 4)
    assert found.intruders(0.1) == [0]
    assert found.intruders(0.9, "right") == []
    assert found.neighbour(0, 0.1) == 1
    removed = scaled(W, spectrum(W, W, 6), [1], 0.25)
    assert_close(
        torch.linalg.svdvals(removed),
        torch.cat([S[:1], S[2:], S[1:2] / 4]).sort(descending=True).values,
    )
    control = scaled(W, spectrum(W, W, 6), [3], 0.25, norm=2.0)
    assert_close((control - W).norm(), W.new_tensor(0.75 * 2))


def test_a_complete_basis_has_a_bound():
    """With out ≤ in, no left vector is less similar than 1/√out; right vectors can be."""
    torch.manual_seed(0)
    W, other = torch.randn(4, 50).double(), torch.randn(4, 50).double()
    found = spectrum(W, other, 10)
    assert len(found.S) == 4
    assert float(found.left.min()) >= 0.5
    assert float(found.right.max()) < 0.5


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_intruders_and_their_reduction_are_pefts(shape):
    """The count is that of PEFT's reduction, which keeps the share `mitigation_lambda`."""
    peft = pytest.importorskip("peft")
    reduce = pytest.importorskip("peft.tuners.lora.intruders").reduce_intruder_dimension
    torch.manual_seed(0)
    rank, kept, epsilon = 3, 0.75, 0.6
    model = peft.get_peft_model(
        nn.Sequential(nn.Linear(shape[1], shape[0])), peft.LoraConfig(r=rank, target_modules=["0"])
    )
    layer = model.base_model.model[0]
    nn.init.normal_(layer.lora_B["default"].weight, std=3)
    W, update = layer.base_layer.weight.detach(), layer.get_delta_weight("default").detach()
    lines: list[str] = []
    reduce(
        model, top_k=5, threshold_epsilon=epsilon, mitigation_lambda=kept, logging_sink=lines.append
    )
    found = spectrum(W, W + update, 5)
    mine = found.intruders(epsilon)
    assert mine
    assert any(line.endswith(f"Intruders: {len(mine)}") for line in lines)
    U, S, V = torch.linalg.svd(scaled(W + update, found, mine, kept) - W, full_matrices=False)
    expected = (U[:, :rank] * S[:rank]) @ V[:rank]  # PEFT cuts the result to the adapter's rank
    assert_close(
        layer.get_delta_weight("intruder_reduced").detach(), expected, rtol=1e-4, atol=1e-4
    )
