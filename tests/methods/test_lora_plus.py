"""LoRA+: the learning rate of each factor, as in PEFT's optimizer."""

import copy
import math
import re
from typing import Any

import peft
import pytest
import torch
from peft.optimizers import create_loraplus_optimizer
from torch import Tensor, nn
from torch.testing import assert_close

import paramlora as pl


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(11, 6)
        self.fc = nn.Linear(6, 5)

    def forward(self, ids: Tensor) -> Tensor:
        return self.fc(self.emb(ids))


def rates(model: Any, **options: Any) -> dict[str, float]:
    """Return the learning rate of each factor, by its key in the state dict."""
    keys = {}
    for name in ("one", "two"):
        if name in {row.adapter for row in pl.summary(model).sites}:
            for key, tensor in pl.state_dict(model, name).items():
                keys[tensor.data_ptr()] = f"{name} {key}"
    groups = pl.parameter_groups(model, **options)
    found = [(keys[p.data_ptr()], group["lr"]) for group in groups for p in group["params"]]
    assert len(dict(found)) == len(found)
    return dict(found)


def test_rates() -> None:
    """B and DoRA's magnitudes get lr · ratio, all else lr, embeddings their own rate if given."""
    model = Net()
    pl.attach(model, {"emb": pl.LoRA(rank=2), "fc": pl.DoRA(rank=2)}, name="one")
    pl.attach(model, {"fc.weight": pl.LoHa(rank=2), "fc.bias": pl.Delta()}, name="two")
    slow = {"emb.weight.A", "fc.weight.A"}
    fast = {"emb.weight.B", "fc.weight.B", "fc.weight.d"}
    two = {"fc.weight.A1", "fc.weight.B1", "fc.weight.A2", "fc.weight.B2", "fc.bias.D"}
    expected = {f"one {key}": 0.01 for key in slow} | {f"one {key}": 0.08 for key in fast}
    expected |= {f"two {key}": 0.01 for key in two}
    assert rates(model, lr=0.01, ratio=8) == expected
    embedding = {"one emb.weight.A": 1e-6, "one emb.weight.B": 1e-6}
    assert rates(model, lr=0.01, ratio=8, embedding_lr=1e-6) == expected | embedding
    assert [g["lr"] for g in pl.parameter_groups(model, "two", lr=0.01)] == [0.01]


def test_trains_as_peft_does() -> None:
    """Ten steps of AdamW in these groups give what PEFT's LoRA+ optimizer gives."""
    torch.manual_seed(0)
    base = Net()
    ours = copy.deepcopy(base)
    config = peft.LoraConfig(r=2, lora_alpha=2, target_modules=["emb", "fc"])
    theirs: Any = peft.get_peft_model(copy.deepcopy(base), config)
    layers = theirs.base_model.model
    pl.attach(ours, pl.LoRA(rank=2), ["emb", "fc"])
    state = {
        "emb.weight.A": layers.emb.lora_embedding_B["default"].T,
        "emb.weight.B": layers.emb.lora_embedding_A["default"].T,
        "fc.weight.A": layers.fc.lora_A["default"].weight,
        "fc.weight.B": layers.fc.lora_B["default"].weight,
    }
    pl.load_state_dict(ours, {key: tensor.detach() for key, tensor in state.items()})
    groups = pl.parameter_groups(ours, lr=1e-3, ratio=4, embedding_lr=1e-4)
    optimizers = [
        torch.optim.AdamW(groups, weight_decay=0.0),
        create_loraplus_optimizer(
            theirs, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=4, loraplus_lr_embedding=1e-4
        ),
    ]
    ids, y = torch.randint(11, (32,)), torch.randn(32, 5)
    for model, optimizer in zip((ours, theirs), optimizers, strict=True):
        for _ in range(10):
            optimizer.zero_grad()
            (model(ids) - y).square().mean().backward()
            optimizer.step()
    assert_close(ours(ids), theirs(ids), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0}, "lr must be a positive number, got 0"),
        ({"lr": 1e-3, "ratio": -1.0}, "ratio must be a positive number, got -1.0"),
        ({"lr": 1e-3, "embedding_lr": math.nan}, "embedding_lr must be a positive number, got nan"),
    ],
)
def test_invalid_arguments(options: dict[str, float], message: str) -> None:
    """A rate that is not positive raises ValueError, an unknown name AdapterNameError."""
    model = nn.Linear(3, 2)
    pl.attach(model, pl.LoRA(rank=1), "weight")
    with pytest.raises(ValueError, match=re.escape(message)):
        pl.parameter_groups(model, **options)
    with pytest.raises(pl.AdapterNameError, match="no adapter 'nobody' here"):
        pl.parameter_groups(model, "nobody", lr=1e-3)
