"""`routed --train`: adapters that are trained at once, beside as many separate trainings."""

import argparse
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import routed_training
from benchmarks.__main__ import main
from benchmarks.harness import jobs
from benchmarks.harness.jobs import Job

TINY = "routed --train --device cpu --clock processor --adapters 2 --batches 2 --rounds 2 --steps 2"


def rows_in(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def test_rows_and_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each cell gets a row with both times, the ratio with its spread, and a line of the table."""
    monkeypatch.setattr(jobs, "mlp", lambda: nn.Linear(784, 10))
    monkeypatch.setattr(jobs, "LENGTH", 3)
    assert main([*TINY.split(), "--models", "mlp", "llama", "--out", str(tmp_path)]) == 0
    rows = rows_in(tmp_path)
    assert [row["model"] for row in rows] == ["digit MLP", "Llama block, width 256"]
    for row in rows:
        assert (row["adapters"], row["n"], row["rounds"], row["clock"]) == (2, 2, 2, "processor")
        assert min(row["separate_s"], row["at_once_s"], row["ratio"]) > 0
        assert 0 <= row["difference"] < 1e-2
    printed = capsys.readouterr().out
    assert all(row["model"] in printed and f"{row['ratio']:.2f} ±" in printed for row in rows)


def test_a_random_model_is_named_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a checkpoint, minilm has random weights, and its row says so."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.BertConfig

    def small(**sizes: int) -> object:
        sizes |= {"hidden_size": 24, "intermediate_size": 8, "num_hidden_layers": 1}
        return config(**sizes, vocab_size=1000)

    monkeypatch.setattr(transformers, "BertConfig", small)
    assert main([*TINY.split(), "--models", "minilm", "--out", str(tmp_path)]) == 0
    assert [row["model"] for row in rows_in(tmp_path)] == ["random MiniLM"]


def test_wrong_gradients_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the two ways differ in the gradients of the first step, nothing is measured."""
    x, labels = torch.randn(1, 2, 3, 4), torch.zeros(1, 2, 3, dtype=torch.long)
    job = Job("tiny", nn.Linear(4, 3), 2, "weight", [(x[0], labels[0])], jobs.row_losses)
    first = routed_training.AtOnce.first_gradients
    monkeypatch.setattr(
        routed_training.AtOnce, "first_gradients", lambda self: [1.1 * g for g in first(self)]
    )
    options = argparse.Namespace(device="cpu", rounds=1, clock="processor")
    with pytest.raises(AssertionError, match=r"gradients are off by .* in tiny; not timed"):
        routed_training.measure(job, options)
