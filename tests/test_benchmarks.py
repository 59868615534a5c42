"""The benchmark checks its contestants before it times them."""

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.harness.contestants import CONTESTANTS, Built, Contestant, ours
from benchmarks.harness.measure import Case, check
from benchmarks.harness.models import SUITES, Cell, Encoder, cells
from benchmarks.layers import main, table


def tiny(autocast: torch.dtype | None = None) -> Case:
    cell = Cell("cpu-encoder", lambda: Encoder(16, 32, 2), (2, 5, 16), 3, autocast=autocast)
    return Case.of(cell, "cpu")


@pytest.mark.parametrize("contestant", [c for c in CONTESTANTS if c.there], ids=lambda c: c.name)
def test_contestants_agree_with_float64(contestant: Contestant) -> None:
    """Each contestant that is installed computes the dense reference's outputs and gradients."""
    case = tiny()
    assert check(case, case.enter(contestant, "eager")) < 1e-4


@pytest.mark.parametrize("contestant", [c for c in CONTESTANTS if c.there], ids=lambda c: c.name)
def test_contestants_agree_under_autocast(contestant: Contestant) -> None:
    """So they do with bfloat16 products, to their rounding and not better."""
    case = tiny(torch.bfloat16)
    assert 1e-4 < check(case, case.enter(contestant, "eager")) < 2e-2


def test_a_wrong_contestant_is_not_timed() -> None:
    """A contestant whose update has another scale is refused."""

    def wrong(model: nn.Module, rank: int, alpha: float) -> Built:
        return ours(model, rank, 1.1 * alpha)

    case = tiny()
    with pytest.raises(AssertionError, match=r"wrong is off by .* not timed"):
        check(case, case.enter(Contestant("wrong", wrong), "eager"))


def test_all_start_from_the_same_base() -> None:
    """No contestant changes the base that the others copy."""
    case = tiny()
    before = copy.deepcopy(case.base.state_dict())
    for contestant in CONTESTANTS:
        if contestant.there:
            check(case, case.enter(contestant, "eager"))
    after = case.base.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_every_suite_has_cells() -> None:
    """Each suite yields cells of its own name, and `--quick` the first of them."""
    for suite in SUITES:
        found = list(cells(suite, quick=False))
        assert found
        assert {cell.suite for cell in found} == {suite}
        assert [cell.shape for cell in cells(suite, quick=True)] == [found[0].shape]


def test_rows_and_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run writes a row for each contestant and work, with versions and machine, and a table."""
    main(["--suites", "cpu-mlp", "--quick", "--only", "paramlora", "naive", "--out", str(tmp_path)])
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert {(row["contestant"], row["work"]) for row in rows} == {
        (name, work) for name in ("floor", "paramlora", "naive") for work in ("train", "infer")
    }
    assert all(row["torch"] == torch.__version__ and row["machine"] for row in rows)
    assert all(row["ratio"] == 1 for row in rows if row["contestant"] == "floor")
    printed = capsys.readouterr().out
    assert table(rows) in printed
    assert "cpu-mlp" in printed
