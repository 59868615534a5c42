"""PEFT as the oracle: what it computes with a folder, beside what paramlora does."""

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import paramlora as pl

peft = pytest.importorskip("peft", reason="the oracle of these tests is PEFT")


def loaded(base: nn.Module, folder: Path) -> Any:
    """Return PEFT's model of a folder, with every update added once.

    PEFT to 0.21.2 adds that of an `out_proj` twice (https://github.com/huggingface/peft/pull/3774);
    `test_peft_adds_the_update_of_out_proj_twice` says when that is over. Half of it, twice, is it.
    """
    wrapped = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()
    with torch.no_grad():
        for path, parameter in wrapped.named_parameters():
            if "out_proj.lora_B" in path:
                parameter /= 2
    return wrapped


def trained(model: nn.Module, config: Any, inputs: Any, steps: int = 2) -> Any:
    """Return PEFT's model of a copy of `model`, after some steps of an optimizer."""
    wrapped = peft.get_peft_model(copy.deepcopy(model), config)
    trainable = [p for p in wrapped.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trainable, lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        outputs(wrapped, inputs).square().mean().backward()
        optimizer.step()
    return wrapped.eval()


def outputs(model: nn.Module, inputs: Any) -> Tensor:
    result = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    return getattr(result, "logits", result)


def bound(model: nn.Module) -> dict[str, Any]:
    """Return the tolerance: sums of some tens of terms of order one, in the model's dtype."""
    dtype = next(model.parameters()).dtype
    return {"rtol": 0.0, "atol": {torch.float64: 1e-12, torch.float32: 2e-5}[dtype]}


@torch.no_grad()
def comes_in(model: nn.Module, wrapped: Any, inputs: Any, folder: Path) -> nn.Module:
    """Assert that what PEFT saves is what `model` has when it has loaded that; return it."""
    wrapped.save_pretrained(folder)
    # PEFT's own model of that folder: it does not save all that it trains (in_proj_bias, say).
    again = loaded(model, folder)
    ours = copy.deepcopy(model)
    base = outputs(ours, inputs)
    pl.load_peft(ours, folder)
    expected = outputs(again, inputs)
    assert (expected - base).abs().max() > 1e-3
    assert_close(outputs(ours, inputs), expected, **bound(model))
    with pl.disabled(ours):
        assert torch.equal(outputs(ours, inputs), base)
    return ours


@torch.no_grad()
def goes_out(model: nn.Module, base: nn.Module, inputs: Any, folder: Path) -> Any:
    """Assert that PEFT, given the base, computes what `model` does; return its model."""
    name = pl.summary(model).sites[0].adapter
    pl.save_peft(model, folder, name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # missing or unexpected keys are warnings of PEFT's
        warnings.filterwarnings("ignore", message=".*(fan_in_fan_out|groups > 1).*")
        warnings.filterwarnings("ignore", category=FutureWarning)  # of transformers, about PEFT
        wrapped = loaded(base, folder)
    expected = outputs(model, inputs)
    assert (expected - outputs(base, inputs)).abs().max() > 1e-3
    assert_close(outputs(wrapped, inputs), expected, **bound(base))
    return wrapped


@torch.no_grad()
def same_merged(model: nn.Module, wrapped: Any) -> None:
    """Assert that the merged weights are those of PEFT's model, all of them."""
    ours = copy.deepcopy(model)
    pl.bake(ours)
    theirs = wrapped.merge_and_unload().state_dict()
    assert_close(dict(ours.state_dict()), dict(theirs), **bound(ours))
