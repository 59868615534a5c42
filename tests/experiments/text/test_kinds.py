"""The comparison of kinds on texts: what each trains, how its rate is chosen, and the tables."""

import doctest
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from experiments.__main__ import main
from experiments.harness.rundir import Row, RunDirectory
from experiments.harness.settings import StudyError, replace
from experiments.text import front, kinds, kinds_report
from experiments.text.kinds import SELECTION, TEST, best_rate, parse_kinds
from experiments.text.models import spec_of
from experiments.text.settings import KINDS, TextSettings
from tests.support import tiny_text

pytest.importorskip("transformers", reason="transformers is not installed")

MINILM = [*4 * [(384, 384)], (1536, 384), (384, 1536)]  # the linear layers of a block


def test_examples_in_docstrings_run() -> None:
    """The examples in the docstrings pass."""
    result = doctest.testmod(kinds)
    assert result.attempted
    assert not result.failed


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "ia3"])
def test_kinds_train_about_as_many_numbers_as_lora(kind: str) -> None:
    """Within 10 % of a LoRA of rank 8 on the layers of MiniLM."""
    spec, trained = spec_of(replace(TextSettings(), rank=8, kind=kind).adapter), 0
    for shape in MINILM:
        factors = spec.create(torch.zeros(shape))
        trained += sum(f.numel() for name, f in factors.items() if name not in spec.constants)
    assert trained == pytest.approx(8 * sum(map(sum, MINILM)), rel=0.1)


def test_unknown_kinds_and_rates_are_refused() -> None:
    """The error names the kinds, or how rates are written."""
    with pytest.raises(StudyError, match="--kinds vera: unknown; choose among lora, dora"):
        parse_kinds("lora,vera")
    with pytest.raises(StudyError, match="--kinds oft=x: write rates as oft=1e-4/1e-3"):
        parse_kinds("oft=x")


def run_of(figures: dict[tuple[str, str, float], tuple[float, float]], seeds: int) -> RunDirectory:
    """Return a run with (validation, test) accuracy by part, kind and rate."""
    rows = [
        {
            "part": part,
            "method": kind,
            "rate": rate,
            "seed": seed + (seeds if part == SELECTION else 0),
            "trainable": 7,
            "validation_accuracy": validation,
            **dict.fromkeys(kinds_report.MEASURES, test + seed / 100),
        }
        for (part, kind, rate), (validation, test) in figures.items()
        for seed in range(1 if part == SELECTION else seeds)
    ]
    return RunDirectory(Path(), {}, {}, rows)


@pytest.mark.filterwarnings("ignore:Precision loss")  # equal differences
def test_validation_texts_choose_the_rate() -> None:
    """The choice has the best validation accuracy; kinds are paired by seed at their choices."""
    run = run_of(
        {
            (SELECTION, "lora", 1e-3): (0.8, 0.5),
            (SELECTION, "lora", 1e-2): (0.7, 0.9),
            (SELECTION, "lora", 1e-4): (0.6, 0.6),
            (SELECTION, "ia3", 1e-2): (0.9, 0.5),
            (TEST, "lora", 1e-3): (0.9, 0.5),
            (TEST, "lora", 1e-2): (0.9, 0.9),  # a choice before further rates were tried
            (TEST, "ia3", 1e-2): (0.9, 0.7),
        },
        seeds=3,
    )
    assert best_rate(run.rows, "lora") == 1e-3
    assert [line[2] for line in kinds_report.rate_table(run).rows] == ["", "yes", "", "at the edge"]
    lora, ia3 = kinds_report.chosen_table(run).rows
    assert lora[:4] == ["lora", "7", "0.001", "51.00 ± 1.00"]
    assert ia3[3] == "71.00 ± 1.00"
    (line,) = kinds_report.difference_table(run).rows
    assert line[:2] == ["ia3", "+20.00 (20.00 to 20.00)*"]
    assert kinds_report.beyond_noise(run).startswith("- test, %: ia3 +20.00\n")


def test_kinds_are_compared_with_a_front_at_equal_accuracy() -> None:
    """The front is interpolated at each seed's accuracy; seeds beyond its rates do not count."""
    measures = [key for key in kinds_report.MEASURES if key != "accuracy"]

    def row(method: str, rate: float, seed: int, accuracy: float, kept: float, **more: str) -> Row:
        found = {"method": method, "rate": rate, "seed": seed, "accuracy": accuracy}
        return found | dict.fromkeys(measures, kept) | {"validation_accuracy": accuracy} | more

    seeds = range(3)
    kinds_run = [
        row(kind, 1e-3, seed, 0.9 if seed == 2 else 0.75, kept, part=part)
        for kind, kept in (("lora", 0.5), ("ia3", 0.8))
        for part, seed in [(SELECTION, 3), *((TEST, seed) for seed in seeds)]
    ]
    front_rows = [
        row("lora r 8", rate, seed, accuracy, kept + 0.1 * seed)
        for rate, accuracy, kept in ((1e-3, 0.8, 0.4), (1e-4, 0.7, 0.6), (1e-2, 0.75, 0.0))
        for seed in seeds
    ]
    run, front_run = (RunDirectory(Path(), {}, {}, rows) for rows in (kinds_run, front_rows))
    found = kinds_report.at_equal_accuracy(run, front_run, "lora r 8", "kept_agreement")
    assert list(found) == ["ia3"]  # lora is the reference, and not compared with itself
    assert found["ia3"][0].values == pytest.approx((0.3, 0.2))
    (line,) = kinds_report.equal_table(run, front_run, "lora r 8").rows
    assert (line[0], line[-1]) == ("ia3", "2")


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_kind_is_measured_as_soon_as_its_rates_are_tried(
    jobs: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its seeds follow at the choice, before further kinds; seeds and texts of the choice differ.

    A later call adds kinds to the run and keeps its rows.
    """

    def trained(settings: TextSettings, end: float) -> RunDirectory:
        one = settings.finetuning.lr
        row = {
            "stage": "on",
            "method": "lora",
            "accuracy": one,
            "validation_accuracy": 1 - abs(one - 1e-2),
        }
        return RunDirectory(Path(), {}, {}, [row])

    monkeypatch.setattr(front, "_run", trained)
    monkeypatch.setattr(
        front, "ProcessPoolExecutor", lambda jobs, mp_context: ThreadPoolExecutor(jobs)
    )
    settings = replace(TextSettings(), retention="spam", seeds=2, seed_from=3)
    for given in ("lora=1e-3/1e-2/1e-1,ia3=1e-2", "oft=1e-2"):
        run = kinds.run_kinds(settings, parse_kinds(given), tmp_path, jobs, say=lambda line: None)
    found = [(row["method"], row["part"], row["rate"], row["seed"]) for row in run.rows]
    choices = [("lora", SELECTION, rate, 5) for rate in (1e-3, 1e-2, 1e-1)]
    expected = [*choices, *(("lora", TEST, 1e-2, seed) for seed in (3, 4))]
    for kind in ("ia3", "oft"):
        expected += [(kind, SELECTION, 1e-2, 5), (kind, TEST, 1e-2, 3), (kind, TEST, 1e-2, 4)]
    assert (found if jobs == 1 else sorted(found)) == (expected if jobs == 1 else sorted(expected))


@pytest.mark.slow
def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It chooses a rate on the validation texts, measures it with another seed, and reports."""
    world = tiny_text.world(tmp_path / "world", train=60, test=20, other=80)
    words = ["text-front", "--model", str(world / "bert"), "--data-dir", str(world)]
    words += ["--tokens", str(world / "tokens"), "--retention", str(world / "other.jsonl")]
    words += ["--pooling", "mean", "--targets", "*.query", "--no-forgetting", "--epochs", "1"]
    words += ["--device", "cpu", "--seeds", "1", "--rank", "1", "--out", str(tmp_path / "f")]
    assert main([*words, "--kinds", "lora=1e-3/1e-1,lora-xs=1e-2,full=1e-4"]) == 0
    rows = RunDirectory.read(tmp_path / "f").rows
    assert [row["method"] for row in rows] == ["lora"] * 3 + ["lora-xs"] * 2 + ["full"] * 2
    assert [row["seed"] for row in rows] == [1, 1, 0, 1, 0, 1, 0]
    validation = {row["rate"]: row["validation_accuracy"] for row in rows[:2]}
    assert rows[2]["rate"] == max(validation, key=lambda rate: validation[rate])
    assert 0 < rows[2]["kept_probe"] <= 1
    assert "at the edge" in capsys.readouterr().out
    text = (tmp_path / "f" / "kinds.md").read_text(encoding="utf-8")
    assert "## Differences beyond the noise" in text
    assert "| lora-xs |" in text
