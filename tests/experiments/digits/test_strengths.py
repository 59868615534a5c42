"""Strengths gives the logits of one pass per strength, for all strengths at once."""

import doctest
import itertools
from typing import Any

import pytest
import torch
from torch.testing import assert_close

import paramlora as pl
from experiments.analysis.evaluate import logits_of
from experiments.analysis.explore import explore
from experiments.analysis.insight import only_at, sites_of
from experiments.digits import strengths as strengths_module
from experiments.digits.methods import factors_of
from experiments.digits.model import DigitNet
from experiments.digits.strengths import Strengths, chosen, updates

LAMBDAS = (0.0, 0.25, 1.0, -0.5, 1.5)
SPEC = pl.LoRA(3, 2.0)


def adapted(activation: str, relu_logits: bool) -> tuple[DigitNet, DigitNet, torch.Tensor]:
    """Return a base, the base with an adapter whose B is not zero, and inputs; float64."""
    torch.manual_seed(0)
    base, model = (DigitNet([24, 16], activation, relu_logits).double() for _ in range(2))
    model.load_state_dict(base.state_dict())
    pl.attach(model, SPEC, name="digits")
    for factor in pl.parameters(model):
        torch.nn.init.normal_(factor, std=0.3)
    return base, model, torch.randn(40, 784, dtype=torch.float64)


def test_examples_in_docstrings_run():
    """The examples in the docstrings pass as doctests."""
    result = doctest.testmod(strengths_module)
    assert result.attempted
    assert not result.failed


@pytest.mark.parametrize("relu_logits", [False, True])
@pytest.mark.parametrize("activation", ["none", "relu"])
def test_logits_are_those_of_a_pass_at_each_strength(activation, relu_logits):
    """For any subset of layers the logits equal those of a pass; at strength 0, the base's bits."""
    base, model, inputs = adapted(activation, relu_logits)
    own = logits_of(base, inputs)
    at, update = Strengths(base, inputs, own), updates(factors_of(model), SPEC.scaling)
    assert list(update) == ["linear1", "linear2", "linear3"]
    sites = sites_of(model)
    for size in range(len(sites) + 1):
        for some in itertools.combinations(sites, size):
            got = at.logits(chosen(update, some), LAMBDAS)
            assert torch.equal(got[0], own)
            for λ, logits in zip(LAMBDAS, got, strict=True):
                with only_at(model, some, "digits", strength=λ):
                    assert_close(logits, logits_of(model, inputs), rtol=1e-10, atol=1e-10)


def test_strengths_leave_model_and_base_as_they_were():
    """Strengths changes neither the base's weights nor its logits, and builds no graph."""
    base, model, inputs = adapted("relu", True)
    before, own = pl.fingerprint(base), logits_of(base, inputs)
    kept = own.clone()
    got = Strengths(base, inputs, own).logits(updates(factors_of(model), 1.0), LAMBDAS)
    assert pl.fingerprint(base) == before
    assert torch.equal(own, kept)
    assert not got.requires_grad


def test_an_explorer_that_is_given_logits_shows_the_same():
    """explore gives the same result with these logits as with passes of the model."""
    base, model, inputs = adapted("relu", False)
    labels = torch.arange(40) % 10
    at = Strengths(base, inputs, logits_of(base, inputs))
    update = updates(factors_of(model), SPEC.scaling)
    given: dict[str, Any] = {"images": torch.zeros(40, 28, 28, dtype=torch.uint8)}
    given |= {"all_subsets": ["digits"], "strengths": LAMBDAS}
    found = [
        explore(model, [(inputs, labels)], list("0123456789"), **given, logits=logits)
        for logits in (None, lambda name, sites, λs: at.logits(chosen(update, sites), λs))
    ]
    assert len(found[0]["adapters"]["digits"]) == 7
    assert found[0] == found[1]
