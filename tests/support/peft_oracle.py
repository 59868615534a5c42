"""PEFT as the oracle: compare its outputs from a folder with those of paramlora."""

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
    """Return PEFT's model of a folder, with each update added once.

    PEFT to 0.21.2 adds the update of an `out_proj` twice
    (https://github.com/huggingface/peft/pull/3774), so B is halved here. The test
    `test_out_proj_in_peft` fails when PEFT has changed this.
    """
    wrapped = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()
    with torch.no_grad():
        for path, parameter in wrapped.named_parameters():
            if "out_proj.lora_B" in path:
                parameter /= 2
    return wrapped


def trained(model: nn.Module, config: Any, inputs: Any, steps: int = 2) -> Any:
    """Return PEFT's model of a copy of `model`, trained for some steps."""
    wrapped = peft.get_peft_model(copy.deepcopy(model), config)
    trainable = [p for p in wrapped.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trainable, lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        outputs(wrapped, inputs).square().mean().backward()
        optimizer.step()
    return wrapped.eval()


def outputs(model: nn.Module, inputs: Any) -> Tensor:
    """Return the output tensor of a model: the logits of a transformers model."""
    result = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    return getattr(result, "logits", result)


def bound(model: nn.Module) -> dict[str, Any]:
    """Return the tolerance: sums of some tens of terms of order one, in the model's dtype."""
    dtype = next(model.parameters()).dtype
    return {"rtol": 0.0, "atol": {torch.float64: 1e-12, torch.float32: 2e-5}[dtype]}


@torch.no_grad()
def check_import(model: nn.Module, wrapped: Any, inputs: Any, folder: Path) -> nn.Module:
    """Save PEFT's adapter, assert that it computes the same when loaded here; return the model."""
    wrapped.save_pretrained(folder)
    # PEFT's model of the folder: it does not save all that it trains (in_proj_bias, for one).
    reloaded = loaded(model, folder)
    ours = copy.deepcopy(model)
    base = outputs(ours, inputs)
    pl.load_peft(ours, folder)
    expected = outputs(reloaded, inputs)
    assert (expected - base).abs().max() > 1e-3
    assert_close(outputs(ours, inputs), expected, **bound(model))
    with pl.disabled(ours):
        assert torch.equal(outputs(ours, inputs), base)
    return ours


@torch.no_grad()
def check_export(
    model: nn.Module, base: nn.Module, inputs: Any, folder: Path, ignored: str = "^$"
) -> Any:
    """Save our adapter, assert that it computes the same in PEFT; return PEFT's model.

    PEFT's warnings are errors, except those that match `ignored`.
    """
    name = pl.summary(model).sites[0].adapter
    pl.save_peft(model, folder, name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PEFT warns of missing or unexpected keys
        warnings.filterwarnings("ignore", message=".*(fan_in_fan_out|groups > 1).*")
        warnings.filterwarnings("ignore", message=ignored)
        warnings.filterwarnings("ignore", category=FutureWarning)  # from transformers, about PEFT
        wrapped = loaded(base, folder)
    expected = outputs(model, inputs)
    assert (expected - outputs(base, inputs)).abs().max() > 1e-3
    assert_close(outputs(wrapped, inputs), expected, **bound(base))
    return wrapped


@torch.no_grad()
def check_merged(model: nn.Module, wrapped: Any) -> None:
    """Assert that all merged weights equal those of PEFT's model."""
    ours = copy.deepcopy(model)
    pl.bake(ours)
    theirs = wrapped.merge_and_unload().state_dict()
    assert_close(dict(ours.state_dict()), dict(theirs), **bound(ours))
