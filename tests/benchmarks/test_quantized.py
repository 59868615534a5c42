"""The benchmark of quantized bases does what it says, on a tiny model."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.__main__ import main
from benchmarks.harness.quantizers import GROUP, Int4Linear

pytest.importorskip("transformers", reason="transformers is not installed")


@pytest.mark.thorough
def test_rows_and_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Off, paramlora computes the floor bit for bit; PEFT's logits agree up to bfloat16."""
    out = tmp_path / "rows.jsonl"
    options = "quantized --model tiny --device cpu --bases int4 --batch 2 --length 16 --rounds 1"
    assert not main([*options.split(), "--checkpointed", "--out", str(out)])
    rows = {row["contestant"]: row for row in map(json.loads, out.read_text().splitlines())}
    assert rows["paramlora"]["off_is_base"]
    assert rows["paramlora"]["layers"] == 14
    if "PEFT" in rows:
        assert rows["PEFT"]["layers"] == 14
        assert rows["PEFT"]["error"] < 0.05
    assert "off is base" in capsys.readouterr().out


def test_four_bits() -> None:
    """The codes are the weight rounded to 15 steps of each group, and the gradient is theirs."""
    torch.manual_seed(0)
    layer = nn.Linear(4 * GROUP, 6)
    made, x = Int4Linear(layer), torch.randn(3, 4 * GROUP, requires_grad=True)
    groups = layer.weight.detach().view(6, 4, GROUP)
    step = groups.abs().amax(-1, keepdim=True) / 7
    W = ((groups / step).round() * step).view(6, -1)
    assert made.weight.numel() == layer.weight.numel() // 2
    torch.testing.assert_close(made.dequantize(), W)
    y = made(x)
    torch.testing.assert_close(y, x @ W.T + layer.bias)
    (dx,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(dx, torch.ones(3, 6) @ W)
