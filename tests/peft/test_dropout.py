"""Dropout as PEFT computes it, with the same masks, and `lora_dropout` in PEFT's folders."""

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import paramlora as pl
from paramlora import LoRA
from tests.support.reference import shake

peft = pytest.importorskip("peft", reason="the oracle of these tests is PEFT")
conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D

SEED = 3


class Text(nn.Module):
    """The layers that can have dropout, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(9, 6)
        self.conv = conv1d(5, 6)
        self.fc = nn.Linear(5, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.fc(torch.tanh(self.conv(self.emb(ids))))


IDS = torch.tensor([[1, 2, 0], [8, 2, 4]])
CONFIGS: dict[str, dict[str, Any]] = {
    "linear": {"target_modules": ["fc"]},
    "conv1d": {"target_modules": ["conv"], "fan_in_fan_out": True},
    "embedding": {"target_modules": ["emb"]},
    "all": {"target_modules": ["emb", "conv", "fc"], "use_rslora": True},
}


def theirs(config: Any) -> Any:
    """Return PEFT's model in float64, in training mode, with random factors."""
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(Text().double(), config, autocast_adapter_dtype=False)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora" in name:
                parameter.normal_()
    return wrapped.train()


def run(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    """Return the outputs with masks from a fixed seed."""
    torch.manual_seed(SEED)
    return model(ids)


@pytest.mark.filterwarnings("ignore:.*fan_in_fan_out")
@pytest.mark.parametrize("settings", CONFIGS.values(), ids=CONFIGS.keys())
def test_same_masks(settings: dict[str, Any], tmp_path: Path) -> None:
    """From PEFT's folder and the same seed, outputs and gradients in training are PEFT's."""
    config = peft.LoraConfig(r=2, lora_alpha=3, lora_dropout=0.4, **settings)
    wrapped = theirs(config)
    wrapped.save_pretrained(tmp_path)
    torch.manual_seed(0)
    ours = Text().double()
    pl.load_peft(ours, tmp_path)
    wanted, y = run(wrapped), run(ours)
    assert_close(y, wanted, rtol=0, atol=1e-14)
    assert_close(ours.eval()(IDS), wrapped.eval()(IDS), rtol=0, atol=1e-14)
    if settings["target_modules"] != ["emb"]:
        assert (wanted - wrapped(IDS)).abs().max() > 1e-3
    for out in (wanted, y):
        out.square().sum().backward()
    expected = []
    for path in settings["target_modules"]:
        A, B = (p.grad for key, p in wrapped.named_parameters() if f".{path}.lora" in key)
        # PEFT has the factors of Wᵀ for an Embedding and a Conv1D.
        expected += [A, B] if path == "fc" else [B.T, A.T]
    gradients = [parameter.grad for parameter in pl.parameters(ours)]
    assert_close(gradients, expected, rtol=1e-12, atol=1e-12)


def test_two_adapters(tmp_path: Path) -> None:
    """Two active adapters draw their masks in the order in which they were attached."""
    first = peft.LoraConfig(r=2, lora_dropout=0.4, target_modules=["fc"])
    wrapped = theirs(first)
    wrapped.add_adapter("second", peft.LoraConfig(r=3, lora_dropout=0.2, target_modules=["fc"]))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "second" in name:
                parameter.data = torch.randn_like(parameter).double()
    wrapped.save_pretrained(tmp_path)
    torch.manual_seed(0)
    ours = Text().double()
    pl.load_peft(ours, tmp_path)
    pl.load_peft(ours, tmp_path / "second", name="second", activate="also")
    wrapped.base_model.set_adapter(["default", "second"])
    assert_close(run(ours.train()), run(wrapped.train()), rtol=0, atol=1e-14)


def test_saved(tmp_path: Path) -> None:
    """`save_peft` writes the dropout, with which PEFT trains on as we do."""
    torch.manual_seed(0)
    base = Text().double()
    ours = copy.deepcopy(base)
    pl.attach(ours, LoRA(2, dropout=0.4), ["emb", "fc"])
    shake(ours)
    pl.save_peft(ours, tmp_path / "folder")
    content = json.loads((tmp_path / "folder" / "adapter_config.json").read_text())
    assert content["lora_dropout"] == 0.4
    wrapped = peft.PeftModel.from_pretrained(base, tmp_path / "folder", is_trainable=True).train()
    assert_close(run(wrapped), run(ours), rtol=0, atol=1e-14)


def test_saved_with_several_dropouts(tmp_path: Path) -> None:
    """PEFT has one dropout; several are left out, with a warning that names them."""
    model = Text()
    pl.attach(model, {"conv": LoRA(2, dropout=0.4), "fc": LoRA(2)})
    with pytest.warns(UserWarning, match=r"one lora_dropout .*\[0.0, 0.4\].*left out") as caught:
        pl.save_peft(model, tmp_path / "folder")
    assert caught[0].filename == __file__
    assert "lora_dropout" not in (tmp_path / "folder" / "adapter_config.json").read_text()
    model = Text()
    pl.attach(model, {"emb": LoRA(2), "fc": LoRA(2, dropout=0.4)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pl.save_peft(model, tmp_path / "other")  # an Embedding has no dropout in either library


def test_where_there_is_no_dropout(tmp_path: Path) -> None:
    """Layers where only PEFT applies dropout load without it, and a warning names them."""
    model = nn.Sequential(nn.Conv1d(3, 4, 1), nn.Flatten(), nn.Linear(8, 2))
    config = peft.LoraConfig(r=2, lora_dropout=0.4, target_modules=["0", "2"])
    peft.get_peft_model(copy.deepcopy(model), config).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"lora_dropout=0.4 at 0.weight, where") as caught:
        pl.load_peft(model, tmp_path)
    assert caught[0].filename == __file__


@pytest.mark.parametrize("value", [1, -0.1, "0.1", True, [0.1]])
def test_invalid_dropout(tmp_path: Path, value: object) -> None:
    """A dropout that is no probability below 1 is refused."""
    model = Text()
    pl.attach(model, LoRA(2), "fc")
    pl.save_peft(model, tmp_path / "folder")
    file = tmp_path / "folder" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"lora_dropout": value}))
    with pytest.raises(pl.CheckpointError, match="'lora_dropout' must be at least 0 and below 1"):
        pl.load_peft(Text(), tmp_path / "folder")
