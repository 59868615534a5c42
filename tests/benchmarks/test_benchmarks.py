"""The benchmarks: their command line, the check of contestants, rounds, rows and tables."""

import copy
import functools
import json
import shlex
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.__main__ import COMMANDS, main, module_of, parser_with
from benchmarks.harness.cases import Case, check
from benchmarks.harness.contestants import CONTESTANTS, Built, Contestant, paramlora, select
from benchmarks.harness.models import SUITES, Cell, Encoder, cells
from benchmarks.harness.timing import interleaved
from benchmarks.layers import table

INSTALLED = [contestant for contestant in CONTESTANTS if contestant.installed]


def tiny(autocast: torch.dtype | None = None) -> Case:
    cell = Cell("cpu-encoder", lambda: Encoder(16, 32, 2), (2, 5, 16), 3, autocast=autocast)
    return Case.create(cell, "cpu")


def test_help_lists_every_subcommand(capsys: pytest.CaptureFixture[str]) -> None:
    """`--help` has one line for each subcommand."""
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    lines = [line.split(None, 1) for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert {(name, line) for name, line in COMMANDS.items()} <= {
        (line[0], line[1]) for line in lines if len(line) == 2
    }


@pytest.mark.parametrize("command", COMMANDS)
def test_examples_of_subcommands(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The help of a subcommand ends with examples, and its parser accepts them."""
    if command == "study-speed":
        pytest.importorskip("torchvision", reason="torchvision is not installed")
    module = module_of(command)
    with pytest.raises(SystemExit):
        main([command, "--help"])
    assert capsys.readouterr().out.endswith(module.EXAMPLES)
    examples = module.EXAMPLES.replace("\\\n", " ").splitlines()[1:]
    assert examples
    for line in examples:
        words = shlex.split(line)
        start = words.index("benchmarks")
        assert words[start - 2 : start] == ["python", "-m"]
        options = parser_with({command: module}).parse_args(words[start + 1 :])
        assert options.command == command


@pytest.mark.parametrize("contestant", INSTALLED, ids=lambda c: c.name)
def test_contestants_agree_with_float64(contestant: Contestant) -> None:
    """Each contestant that is installed computes the dense reference's outputs and gradients."""
    case = tiny()
    assert check(case, case.prepare(contestant, "eager")) < 1e-4


@pytest.mark.parametrize("contestant", INSTALLED, ids=lambda c: c.name)
def test_contestants_agree_under_autocast(contestant: Contestant) -> None:
    """With bfloat16 products they agree to the rounding of bfloat16, and not better."""
    case = tiny(torch.bfloat16)
    assert 1e-4 < check(case, case.prepare(contestant, "eager")) < 2e-2


def test_a_wrong_contestant_is_not_timed() -> None:
    """A contestant whose update has another scale is refused."""

    def wrong(model: nn.Module, rank: int, alpha: float) -> Built:
        return paramlora(model, rank, 1.1 * alpha)

    case = tiny()
    with pytest.raises(AssertionError, match=r"wrong is off by .* not timed"):
        check(case, case.prepare(Contestant("wrong", wrong), "eager"))


def test_all_start_from_the_same_base() -> None:
    """No contestant changes the base that the others copy."""
    case = tiny()
    before = copy.deepcopy(case.base.state_dict())
    for contestant in INSTALLED:
        check(case, case.prepare(contestant, "eager"))
    after = case.base.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_select() -> None:
    """The floor comes first in every selection; None selects all; controls are added if asked."""
    assert [contestant.name for contestant in select(["naive"])] == ["floor", "naive"]
    assert select(None) == [c for c in INSTALLED if c.name != "floor, again"]
    controlled = [contestant.name for contestant in select(["naive"], controls=True)]
    assert controlled == ["floor", "floor, again", "paramlora, off", "naive"]
    assert select(None, controls=True) == INSTALLED


def test_every_suite_has_cells() -> None:
    """Each suite yields cells of its own name, and `--quick` the first of them."""
    for suite in SUITES:
        found = list(cells(suite, quick=False))
        assert found
        assert {cell.suite for cell in found} == {suite}
        assert [cell.shape for cell in cells(suite, quick=True)] == [found[0].shape]


def test_rounds_are_interleaved() -> None:
    """Each round calls every run, in a new order; rounds to warm up are called and not counted."""
    calls: list[str] = []
    runs = {name: functools.partial(calls.append, name) for name in "abc"}
    seconds = interleaved(runs, 9, repeats=2, warm_up=1)
    rounds = [calls[i : i + 6] for i in range(0, 60, 6)]
    assert all(sorted(part) == list("aabbcc") and part[::2] == part[1::2] for part in rounds)
    assert len({tuple(part) for part in rounds}) > 2
    assert {name: len(values) for name, values in seconds.items()} == dict.fromkeys("abc", 9)
    calls.clear()
    interleaved(runs, 2, shuffle=False)
    assert calls == list("abcabc")


def test_biased_cells_are_not_ranked() -> None:
    """A cell has no share if a control differs from the floor by more than 2 %."""
    about = {"suite": "s", "shape": [1], "rank": 1, "mode": "eager", "work": "infer"}
    ratios = {"floor": 1.0, "floor, again": 1.01, "paramlora": 1.1, "paramlora, off": 0.99}
    rows = [
        {**about, "contestant": name, "ratio": ratio, "median_s": 1.0}
        for name, ratio in (ratios | {"PEFT": 1.2}).items()
    ]
    assert table(rows).rows[0][-2] == "0.50"
    for biased in ("floor, again", "paramlora, off"):
        other = [row | {"ratio": 1.03} if row["contestant"] == biased else row for row in rows]
        assert table(other).rows[0][-2:] == ["unfair", "unfair"]


def test_rows_and_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run writes a row for each contestant and work, with versions and machine, and a table."""
    command = "layers --suites cpu-mlp --quick --only paramlora naive"
    assert main([*command.split(), "--out", str(tmp_path)]) == 0
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert {(row["contestant"], row["work"]) for row in rows} == {
        (name, work)
        for name in ("floor", "floor, again", "paramlora", "paramlora, off", "naive")
        for work in ("train", "infer")
    }
    assert all(row["torch"] == torch.__version__ and row["machine"] for row in rows)
    assert all(row["ratio"] == 1 for row in rows if row["contestant"] == "floor")
    printed = capsys.readouterr().out
    assert table(rows).text() in printed
    assert "cpu-mlp" in printed
    assert (tmp_path / "overheads.png").stat().st_size
    figure = tmp_path / "again.png"
    assert main(["figure", str(tmp_path / "results.jsonl"), str(figure)]) == 0
    assert figure.stat().st_size


def test_routed_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`routed` checks both libraries, and writes a row for each of them and the floor."""
    pytest.importorskip("peft", reason="PEFT is not installed")
    command = "routed --device cpu --adapters 2 --batches 4 --rounds 1"
    assert main([*command.split(), "--out", str(tmp_path)]) == 0
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [row["contestant"] for row in rows] == ["floor", "paramlora", "PEFT"]
    assert all(row["rounds"] == 1 and row["ratio"] > 0 for row in rows)
    assert "share of" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["LoRA", "DoRA"])
def test_equivalence(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Trained by paramlora and by PEFT, the same adapter has the same losses."""
    pytest.importorskip("peft", reason="PEFT is not installed")
    pytest.importorskip("transformers", reason="transformers is not installed")
    command = f"equivalence --kind {kind} --dtype float64 --steps 6 --batch 2 8 --device cpu"
    assert main([*command.split(), "--out", str(tmp_path)]) == 0
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert len(rows) == 2
    assert rows[1]["losses"] == pytest.approx(rows[0]["losses"], abs=1e-6)
    assert rows[0]["losses"][5] < rows[0]["losses"][0]
    assert "largest difference" in capsys.readouterr().out


def test_host_time_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`host-time` writes the clock's and the host's time and the operations of each contestant."""
    command = "host-time --suites cpu-mlp --quick --runs 2 --steps 1 --only paramlora"
    assert main([*command.split(), "--out", str(tmp_path)]) == 0
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [row["contestant"] for row in rows[:3]] == ["floor", "paramlora", "floor"]
    assert all(len(row["runs_s"]) == 2 and row["host_s"] > 0 for row in rows)
    assert all("aten::addmm" in {name for name, *_ in row["operations"]} for row in rows)
    assert "over floor" in capsys.readouterr().out


def test_verb_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`verbs` writes a row for each verb and library."""
    pytest.importorskip("peft", reason="PEFT is not installed")
    command = "verbs --width 8 --adapters 2 --rounds 1 --clock processor"
    assert main([*command.split(), "--out", str(tmp_path)]) == 0
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    verbs = ("forward", "switch", "using", "disabled", "scale", "merge", "unmerge")
    assert [(row["contestant"], row["verb"]) for row in rows] == [
        (name, verb) for name in ("paramlora", "PEFT") for verb in verbs
    ]
    printed = capsys.readouterr().out
    assert all(verb in printed for verb in verbs)
