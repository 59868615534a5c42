"""The benchmark of a big model does what it says, on a tiny one."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import big_model
from benchmarks.__main__ import main
from benchmarks.harness.contestants import Built, Contestant, paramlora, select
from benchmarks.harness.llama import llama
from tests.support.processes import start

pytest.importorskip("transformers", reason="transformers is not installed")


@pytest.mark.thorough
def test_rows_proofs_and_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every contestant agrees with the dense model in each mode, and every verb has its inverse."""
    # The graphs of the compiler without its code, which takes minutes to build on a CPU.
    monkeypatch.setattr(big_model, "BACKEND", "eager")
    out = tmp_path / "rows.jsonl"
    options = (
        "big-model --model tiny --modes eager checkpointed compiled --batch 2 --length 16 --rank 4"
    )
    options += f" --rounds 1 --verbs --device cpu --only paramlora --out {out}"
    assert main(options.split()) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    trained = [row for row in rows if row["what"] == "train"]
    assert {(row["mode"], row["contestant"]) for row in trained} == {
        (mode, name) for mode in big_model.MODES for name in ("floor", "paramlora")
    }
    assert all(row["error"] < big_model.BOUND for row in trained)
    (proofs,) = (row for row in rows if row["what"] == "proofs")
    claims = ("off_is_base", "on_again", "detached_is_base", "loaded_is_saved")
    assert all(proofs[claim] for claim in claims)
    (meta,) = (row for row in rows if row["what"] == "meta")
    assert meta["same_logits"]
    printed = capsys.readouterr().out
    assert all(table.text() in printed for table in big_model.tables(rows))


def test_a_wrong_contestant_is_not_timed(capsys: pytest.CaptureFixture[str]) -> None:
    """A contestant whose update is half of what it should be is named and left out."""

    def halved(model: torch.nn.Module, rank: int, alpha: float) -> Built:
        return paramlora(model, rank, alpha / 2)

    contestants = [*select([]), Contestant("halved", halved)]
    base = llama("tiny", "cpu")
    rows = big_model.measure(base, contestants, "eager", torch.ones(1, 8, dtype=torch.long), 4, 1)
    assert [row["contestant"] for row in rows] == ["floor"]
    assert "halved, eager, is off by" in capsys.readouterr().err


@pytest.mark.thorough
@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_only_the_factors_are_communicated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes send each other the factors' gradients, and nothing of the base."""
    monkeypatch.setattr(torch.multiprocessing, "spawn", start)
    out = tmp_path / "rows.jsonl"
    options = "scaling --model tiny --processes 2 --batch 2 --length 8 --steps 2 --rounds 1"
    assert main([*options.split(), "--out", str(out)]) == 0
    rows = {row["processes"]: row for row in map(json.loads, out.read_text().splitlines())}
    assert set(rows) == {1, 2}
    assert rows[2]["sent_bytes_a_step"] == rows[2]["factor_bytes"]
    # Two blocks with seven layers each: (out + in) · rank · 4 bytes.
    d, kv, inner, rank = 32, 16, 48, 16
    block = 2 * (d + d) + 2 * (d + kv) + 3 * (d + inner)
    assert rows[2]["factor_bytes"] == 2 * block * rank * 4
