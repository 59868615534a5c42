"""Quantized layers beside PEFT's: the same factors give the same outputs and gradients."""

from pathlib import Path
from typing import Any

import pytest
import torch

import paramlora as pl
from tests.support.quantized import inputs, quantized, randomize

peft = pytest.importorskip("peft", reason="the oracle of these tests is PEFT")
pytestmark = pytest.mark.filterwarnings(
    "ignore:TorchaoLoraLinear was instantiated without:UserWarning:peft"
)
# PEFT's adapters of a plain Linear serve torchao and quanto; it has its own for the others.
FORMS = (
    *("torchao int8", "torchao int4", "torchao float8", "bitsandbytes 4", "bitsandbytes 8"),
    *("hqq", "quanto int8", "quanto int4"),
)


def peft_model(form: str, dropout: float = 0.0) -> Any:
    """Return PEFT's model of quantized layers, with an adapter that computes something."""
    options = {"target_modules": ["0", "2"], "init_lora_weights": False, "lora_dropout": dropout}
    config = peft.LoraConfig(r=3, lora_alpha=2, **options)
    torch.manual_seed(3)
    return peft.get_peft_model(quantized(form), config)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("form", FORMS)
def test_equal_to_peft(form: str, dropout: float, tmp_path: Path) -> None:
    """Outputs and the gradients of x, A and B are those of PEFT's model of the same folder.

    The same seed gives the same elements that dropout zeroes.
    """
    theirs, ours = peft_model(form, dropout), quantized(form)
    theirs.save_pretrained(tmp_path)
    pl.load_peft(ours, tmp_path)
    results = []
    factors = [p for name, p in theirs.named_parameters() if "lora_" in name]
    for model, trained in ((ours, pl.parameters(ours)), (theirs, factors)):
        x = inputs().requires_grad_()
        torch.manual_seed(4)
        y = model.train()(x)
        results.append((y, *torch.autograd.grad(y.square().mean(), [x, *trained])))
    assert len(results[0]) == 6
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", ["torchao int8", "bitsandbytes 8", "hqq"])
def test_folders(form: str, tmp_path: Path) -> None:
    """A folder that we write of a quantized model computes the same in PEFT."""
    ours = quantized(form).eval()
    pl.attach(ours, pl.LoRA(3, alpha=2))
    randomize(ours)
    pl.save_peft(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(quantized(form), tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(theirs(inputs()), ours(inputs()), rtol=1e-4, atol=1e-5)
