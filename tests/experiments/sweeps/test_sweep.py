"""Sweeps: the grid, resuming, processes and clusters, and the selection of remedies."""

import csv
import doctest
import itertools
import json
import math
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest
import torch
from torch.testing import assert_close

import paramlora as pl
from experiments.__main__ import main
from experiments.analysis.evaluate import score
from experiments.digits.data import SKLEARN, Data, Split
from experiments.digits.methods import ADAPTER, lora_of
from experiments.digits.settings import AdapterSettings, DigitSettings, preset
from experiments.digits.shared import context_of
from experiments.harness import grid
from experiments.harness.grid import parse_grid
from experiments.harness.rundir import Row, RunDirectory
from experiments.harness.settings import StudyError, replace
from experiments.report.figures import png
from experiments.sweeps import families as families_module
from experiments.sweeps import remedies as remedies_module
from experiments.sweeps import select as select_module
from experiments.sweeps.cells import cells, jobs_of, trains_together
from experiments.sweeps.families import (
    BOTH,
    EIGHT,
    NO_REMEDY,
    Family,
    contenders,
    families,
    schedules,
)
from experiments.sweeps.ranks import rank_figure, rank_table, series
from experiments.sweeps.remedies import Compared, apart, difference, half_width
from experiments.sweeps.report import points, table
from experiments.sweeps.select import SELECTION, TEST, choose, gains, rows_of, run_remedies
from experiments.sweeps.sweep import (
    full_logits,
    run_job,
    run_sweep,
    tune_one_by_one,
    tune_together,
)

SMALL: dict[str, Any] = {
    "data": "digits",
    "device": "cpu",
    "hidden": (24, 16),
    "relu_logits": False,
    "base_steps": 200,
    "steps": 10,
    "seeds": 2,
    "compat": "none",
}
WORDS = [
    "--preset",
    "blog",
    "--data",
    "digits",
    "--device",
    "cpu",
    "--hidden",
    "24,16",
    "--no-relu-logits",
]
WORDS += ["--base-steps", "200", "--steps", "10", "--seeds", "2", "--compat", "none"]


KEY = ("cell", "base_seed", "seed", "strength")


def small(folder: Path, **more: Any) -> DigitSettings:
    return preset("blog", **{**SMALL, **more}, bases=str(folder / "bases"))


def swept(folder: Path, *more: str) -> list[Row]:
    """Run a sweep over ranks and strengths from the command line, and return its rows."""
    words = ["sweep", *WORDS, "--vary", "rank=1,3", "--vary", "strength=0,0.5,1", *more]
    places = ["--bases", str(folder / "bases"), "--out", str(folder / "run")]
    assert main([*words, *places]) == 0
    return [json.loads(line) for line in (folder / "run" / "results.jsonl").open()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    swept(folder, "--base-seeds", "2")
    return folder


def rows_in(folder: Path) -> list[Row]:
    return [json.loads(line) for line in (folder / "run" / "results.jsonl").open()]


def test_examples_in_docstrings_run():
    """The examples in the docstrings pass."""
    for module in (grid, families_module, remedies_module):
        result = doctest.testmod(module)
        assert result.attempted
        assert not result.failed


def test_a_sweep_has_every_combination(finished):
    """Rows cover every rank, base, seed and strength, and the base of each cell."""
    rows = rows_in(finished)
    got = {
        (r["cell"], r["base_seed"], r["seed"], r["strength"]) for r in rows if r["stage"] == "on"
    }
    assert got == {
        (f"rank={rank}", base, seed, strength)
        for rank in (1, 3)
        for base in (0, 1)
        for seed in (0, 1)
        for strength in (0.0, 0.5, 1.0)
    }
    assert len(rows) == len(got) + 4
    assert len(list((finished / "bases").iterdir())) == 2
    bases = {(r["cell"], r["base_seed"]): r for r in rows if r["stage"] == "base"}
    for row in rows:
        same = row["confusion"] == bases[row["cell"], row["base_seed"]]["confusion"]
        assert same or row["strength"] > 0


def test_rows_are_those_of_the_study(finished, tmp_path):
    """At strength 1 a cell's counts equal those of the digit study with the same seed."""
    places = ["--out", str(tmp_path / "run"), "--bases", str(finished / "bases")]
    assert main(["digits", *WORDS, "--rank", "3", *places]) == 0
    study = [row for row in rows_in(tmp_path) if row["stage"] == "on" and row["method"] == "lora"]
    for row in study:
        wanted = ("rank=3", 0, row["seed"], 1.0)
        ours = next(r for r in rows_in(finished) if tuple(r[key] for key in KEY) == wanted)
        assert ours["confusion"] == row["confusion"]
        assert ours["loss"] == pytest.approx(row["loss"], rel=1e-5)
        assert ours["train_loss"] == pytest.approx(row["train_loss"], rel=1e-5)


def test_csv_says_what_the_rows_say(finished):
    """results.csv has the plain values of the rows in results.jsonl."""
    lines = list(csv.DictReader((finished / "run" / "results.csv").open()))
    rows = rows_in(finished)
    assert len(lines) == len(rows)
    for line, row in zip(lines, rows, strict=True):
        assert (line["cell"], float(line["accuracy"])) == (row["cell"], row["accuracy"])
        assert "confusion" not in line


def test_the_report_of_a_sweep_is_its_rows_summed_up(finished):
    """The table has mean, sd and n per cell and strength; all fronts start at the same point."""
    run = RunDirectory.read(finished / "run")
    lines = {(line[0], float(line[1])): line[2:] for line in table(run).rows}
    assert len(lines) == 6
    rows = [r for r in rows_in(finished) if (r["cell"], r["strength"]) == ("rank=3", 0.5)]
    values = [100 * r["tuned_accuracy"] for r in rows]
    assert lines["rank=3", 0.5][1] == f"{mean(values):.2f} ± {stdev(values):.2f}"
    assert lines["rank=3", 0.5][3] == "4"
    assert points(run, "rank=1")[0] == points(run, "rank=3")[0]
    assert (finished / "run" / "fronts.png").stat().st_size > 10_000
    assert "| rank=1 | 0.5 |" in (finished / "run" / "sweep.md").read_text()


def test_the_report_of_a_sweep_is_made_again(finished, tmp_path, capsys):
    """Three files suffice to write the same report elsewhere; a run without rows is refused."""
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("settings.json", "environment.json", "results.jsonl"):
        (folder / name).write_bytes((finished / "run" / name).read_bytes())
    assert main(["report", str(folder)]) == 0
    assert capsys.readouterr().out.startswith("cell ")
    for name in ("sweep.md", "fronts.png", "ranks.png", "results.csv"):
        assert (folder / name).read_bytes() == (finished / "run" / name).read_bytes()
    environment = json.loads((folder / "environment.json").read_text())
    assert environment.pop("study") == "sweeps"  # as in older sweeps, which did not record it
    (folder / "environment.json").write_text(json.dumps(environment))
    assert main(["report", str(folder)]) == 0
    (folder / "results.jsonl").unlink()
    capsys.readouterr()
    assert main(["report", str(folder)]) == 2
    assert "has no rows yet" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:.*incomplete row")
def test_a_sweep_resumes_by_cells(finished, tmp_path, capsys):
    """A resumed sweep keeps its rows, and the missing rows equal those of a full run."""
    import shutil

    shutil.copytree(finished, tmp_path / "copy")
    path = tmp_path / "copy" / "run" / "results.jsonl"
    whole = path.read_text().splitlines(keepends=True)
    # The last cell has its last row, but not the one before.
    path.write_text("".join([*whole[:9], whole[-1]]) + whole[9][:20])
    rows = swept(tmp_path / "copy", "--base-seeds", "2")
    assert "4 cells, 1 of them done" in capsys.readouterr().out
    assert sorted(map(json.dumps, rows)) == sorted(map(json.dumps, map(json.loads, whole)))


@pytest.mark.slow
def test_jobs_in_processes_give_the_same_rows(finished, tmp_path):
    """Two parallel processes give the same rows as one."""
    rows = swept(tmp_path, "--jobs", "2")
    assert rows == [row for row in rows_in(finished) if row["base_seed"] == 0]


def test_a_dask_cluster_gives_the_same_rows(finished, tmp_path):
    """A local Dask cluster gives the same rows, with the call from the documentation."""
    distributed = pytest.importorskip("distributed")
    joblib = pytest.importorskip("joblib")
    settings = small(tmp_path)
    todo = list(cells(settings, {"rank": [1, 3], "strength": [0.0, 0.5, 1.0]}))
    with (
        distributed.LocalCluster(
            n_workers=1, threads_per_worker=1, dashboard_address=None, processes=False
        ) as cluster,
        distributed.Client(cluster),
        joblib.parallel_config(backend="dask"),
    ):
        run = run_sweep(todo, tmp_path / "run", {}, jobs=-1, say=lambda line: None)
    mine = [{**row, "commit": None} for row in run.rows]
    theirs = [{**r, "commit": None} for r in rows_in(finished) if r["base_seed"] == 0]
    assert mine == theirs


def test_seeds_together_are_seeds_one_by_one(tmp_path):
    """A cell trained with vmap has the counts of one trained seed by seed."""
    settings = small(tmp_path, seeds=8, steps=40)
    made = [
        run_job([next(cells(settings, {}, together=together))])[0] for together in (True, False)
    ]
    for one, two in zip(*made, strict=True):
        assert one["confusion"] == two["confusion"]
        assert one["accuracy"] == two["accuracy"]


@pytest.mark.parametrize("order", ["blog", "seeded"])
def test_ranks_together_are_ranks_one_by_one(tmp_path, order):
    """Adapters of several ranks, scales and inits train in one stack as they would separately."""
    settings = small(tmp_path, seeds=3, order=order)
    grid = {"rank": [1, 3, 8], "scale_rule": ["alpha/r", "alpha"], "init": ["gaussian", "kaiming"]}
    contexts = [context_of(cell.settings) for cell in cells(settings, grid)]
    todo = [(context, seed) for context in contexts for seed in range(3)]
    for (context, _), one, two in zip(
        todo, tune_one_by_one(todo), tune_together(todo), strict=True
    ):
        assert two[0]["linear1.parametrizations.weight.0.factors.digits.A"].shape == (
            context.settings.adapter.rank,
            784,
        )
        assert_close(two[0], one[0], rtol=1e-3, atol=1e-4)
        assert two[1] == pytest.approx(one[1], rel=1e-5)


def test_full_fine_tuning_is_that_of_the_plain_network(tmp_path):
    """A full cell trains all weights and biases as Adam on the plain network does, on its images.

    Seeds that train together agree with it, and λ interpolates between the base and the result.
    """
    context = context_of(small(tmp_path, order="seeded", activation="relu"))
    for seed, (deltas, loss) in enumerate(tune_together([(context, 0), (context, 1)], full=True)):
        plain, base = context.model(), dict(context.model().named_parameters())
        batches = context.batches(torch.Generator().manual_seed(seed))
        losses = context.fine_tune(plain, batches, list(plain.parameters()), "plain")
        assert loss == pytest.approx(float(losses.mean()), rel=1e-4)
        half = context.model()
        half.load_state_dict({k: (p + base[k]) / 2 for k, p in plain.named_parameters()})
        found = full_logits(context, deltas, (0.0, 0.5, 1.0))
        assert torch.equal(found[0], context.base_logits)
        for got, model in zip(found[1:], (half, plain), strict=True):
            assert_close(got, context.evaluate(model), rtol=1e-3, atol=1e-3)
        assert not torch.equal(found[2].argmax(1), found[0].argmax(1))


def test_an_update_of_no_scale_is_a_cell_like_any_other(tmp_path):
    """At alpha 0 all predictions equal the base's, also beside cells that learn."""
    settings = small(tmp_path, seeds=2)
    rows = [run_job([cell])[0] for cell in cells(settings, {"alpha": [0.0, 1.0]})]
    assert len(jobs_of(list(cells(settings, {"alpha": [0.0, 0.0, 1.0]})))) == 2
    assert all(row["confusion"] == rows[0][0]["confusion"] for row in rows[0])
    assert any(row["confusion"] != rows[1][0]["confusion"] for row in rows[1])


def test_strengths_are_those_of_a_pass_for_each(tmp_path):
    """A row's counts and loss equal those of the model with its adapter scaled by the library."""
    strengths = [0.0, 0.5, 1.5]
    cell = next(cells(small(tmp_path, activation="relu"), {"strength": strengths}))
    context = context_of(cell.settings)
    rows = [row for row in run_job([cell])[0] if row["stage"] == "on"]
    for seed, (factors, _) in enumerate(tune_together([(context, 0), (context, 1)])):
        model = context.model()
        pl.attach(model, lora_of(cell.settings.adapter), name=ADAPTER)
        model.load_state_dict(factors, strict=False)
        for strength in strengths:
            row = next(r for r in rows if (r["seed"], r["strength"]) == (seed, strength))
            pl.scale(model, strength, ADAPTER)
            its = score(context.evaluate(model), context.test_labels, context.tuned)
            assert row["confusion"] == its["confusion"]
            assert row["loss"] == pytest.approx(its["loss"], rel=1e-5)


def test_cells_that_can_train_together_are_one_job():
    """Ranks and scales share a job; other bases, trainings or too many images do not."""
    settings = DigitSettings(seeds=10)

    def sizes(grid: dict[str, list[Any]], **more: Any) -> list[int]:
        todo = list(cells(replace(settings, **more), grid, base_seeds=2))
        jobs = jobs_of(todo)
        assert sorted(map(id, itertools.chain(*jobs))) == sorted(map(id, todo))
        return [len(job) for job in jobs]

    ranks = [1, 2, 4, 8, 16]
    assert sizes({"rank": ranks}) == [5, 5]
    assert sizes({"rank": ranks, "margin": [0.0, 5.0]}) == [5] * 4
    assert sizes({"rank": ranks, "scale_rule": ["alpha", "alpha/r"]}) == [10, 10]
    assert sizes({"rank": ranks}, tune_batch=50) == [2, 2, 2, 2, 1, 1]
    assert sizes({"rank": ranks}, validation=5, patience=1) == [1] * 10


@pytest.mark.parametrize("rank", [1, 2, 3, 16])
@pytest.mark.parametrize(
    ("rule", "scale"),
    [
        ("alpha/r", lambda alpha, r: alpha / r),
        ("alpha/sqrt_r", lambda alpha, r: pl.LoRA(r, alpha, rank_stabilized=True).scaling),
        ("alpha", lambda alpha, r: alpha),
    ],
)
def test_the_rule_of_the_scale_is_kept_at_every_rank(rule, scale, rank):
    """B A is multiplied by alpha/r, by the rank-stabilized scale, or by alpha."""
    settings = AdapterSettings(rank=rank, alpha=3.0, scale_rule=rule)
    assert lora_of(settings).scaling == pytest.approx(scale(3.0, rank), rel=1e-15)
    assert AdapterSettings(rank=rank).numerator == 1.0  # by default exactly alpha


def test_a_sweep_over_ranks_is_drawn_by_rank(tmp_path):
    """Each scale rule is a series; all agree at rank 1; differences in points are paired."""
    words = ["sweep", *WORDS, "--vary", "rank=3,1", "--vary", "scale_rule=alpha/r,alpha"]
    places = ["--bases", str(tmp_path / "bases"), "--out", str(tmp_path / "run")]
    assert main([*words, "--vary", "seed=0,1", *places]) == 0
    run = RunDirectory.read(tmp_path / "run")
    found = series(run)
    assert list(found) == ["fixed alpha: s = alpha/r", "fixed alpha/r: s = alpha"]
    assert [[(r, len(its)) for r, its in by.items()] for by in found.values()] == [
        [(1, 4), (3, 4)]
    ] * 2
    one, two = ([row["confusion"] for row in by_rank[1]] for by_rank in found.values())
    assert one == two
    one, two = ([row["loss"] for row in by_rank[3]] for by_rank in found.values())
    assert one != two
    line = next(
        line for line in rank_table(run).rows if line[:2] == ["fixed alpha/r: s = alpha", "3"]
    )
    its = {
        rank: [
            r for r in rows_in(tmp_path) if r["cell"].startswith(f"rank={rank} scale_rule=alpha ")
        ]
        for rank in (1, 3)
    }
    gained = [
        100 * (high["other_accuracy"] - low["other_accuracy"])
        for low, high in zip(its[1], its[3], strict=True)
        if low["stage"] == "on"
    ]
    assert line[5] == f"{mean(gained):.2f} ± {stdev(gained):.2f}"
    assert line[6] == "4"
    text = (tmp_path / "run" / "sweep.md").read_text(encoding="utf-8")
    assert "![Accuracy against rank" in text
    assert rank_table(run).markdown() in text
    figure = rank_figure([run, run])
    drawn = [axes.get_xlabel() + axes.get_ylabel() for axes in figure.axes]
    png(figure)  # closes it
    assert drawn == [
        "accuracy on tuned digits, %",
        "",
        "rank raccuracy on other digits, %",
        "rank r",
    ]
    folder = str(tmp_path / "run")
    assert (
        main(["report", folder, folder, "--figure", "ranks", "--out", str(tmp_path / "two.png")])
        == 0
    )
    assert (tmp_path / "two.png").stat().st_size > 10_000
    assert main(["report", folder, "--out", str(tmp_path / "one.png")]) == 2
    assert main(["report", folder, "--explain"]) == 2


def test_a_figure_by_rank_needs_ranks(tmp_path, capsys):
    """A run that did not vary the rank is refused, and the error says what to run."""
    RunDirectory.start(tmp_path, {}, {"study": "sweeps"}, ())
    words = ["report", str(tmp_path), "--figure", "ranks", "--out", str(tmp_path / "no.png")]
    assert main(words) == 2
    assert "has no rows by rank: run a sweep with --vary rank=1,2,4" in capsys.readouterr().err
    assert not (tmp_path / "no.png").exists()


def test_what_cannot_train_together_is_known():
    """Early stopping and Fisher information or null spaces of replayed images cannot be stacked."""
    assert trains_together(preset("blog", replay=5, margin=math.inf, schedule="cosine"))
    assert not trains_together(preset("blog", validation=5, patience=1))
    assert not trains_together(preset("blog", replay=5, ewc=1.0))
    assert not trains_together(preset("blog", replay=5, null_space=0.5, null_space_of="old"))


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("rank", r"--vary takes SETTING=VALUES such as rank=1,2,4, got 'rank'"),
        ("ranks=1", r"--vary takes SETTING=VALUES"),
        ("rank=one", r"--vary rank=one: invalid literal for int"),
        ("rank=0", r"--rank must be a whole number of at least 1"),
        ("out=a", r"--vary out is not a setting; there are activation, alpha"),
    ],
)
def test_a_grid_that_cannot_be_is_refused(word, message):
    """Unknown settings and invalid values are refused before anything runs."""
    with pytest.raises(StudyError, match=message):
        list(cells(DigitSettings(), parse_grid([word], DigitSettings)))


FEW = (
    Family(NO_REMEDY, arms=BOTH),
    Family("strength λ", option="strength", values=(0.0, 0.5), arms=BOTH),
    Family("masked", changes={"margin": math.inf}, arms=BOTH),
)


@pytest.mark.thorough
def test_choices_are_made_without_the_test_images(tmp_path, monkeypatch):
    """Selection uses validation images, other bases and other seeds; only the choice is measured.

    All contenders have the same number of candidates. A difference from no remedy is paired by base
    and adapter seed, and the spread is that over bases.
    """
    monkeypatch.setattr(select_module, "VALIDATION", 20)
    monkeypatch.setattr(families_module, "EIGHT", (1.0, 10.0))
    monkeypatch.setattr(families_module, "FOUR", (10.0,))
    said: list[str] = []
    run = run_remedies(
        small(tmp_path, steps=20, order="seeded"),
        tmp_path / "run",
        chosen=FEW,
        base_seeds=2,
        selection_bases=1,
        say=said.append,
    )
    by_part = {
        part: [row for row in run.rows if row["varied"]["part"] == part]
        for part in (SELECTION, TEST)
    }
    assert {row["n"] for row in by_part[SELECTION]} == {200}
    assert {row["n"] for row in by_part[TEST]} == {360}
    for key in ("base_seed", "seed"):
        seen = [{row[key] for row in rows if row["stage"] == "on"} for rows in by_part.values()]
        assert seen[0].isdisjoint(seen[1])
    assert len(list((tmp_path / "bases").iterdir())) == 3
    compared = Compared(run)
    names = {row["varied"]["contender"] for row in by_part[TEST]}
    assert len(names) == len(FEW) * len(compared.arms) * 2
    for name in names:
        tried = rows_of(run, SELECTION, name)
        merit = [
            mean(gains([r for r in tried if r["varied"]["number"] == n], "accuracy").values())
            for n in (0, 1)
        ]
        assert {row["varied"]["number"] for row in tried} == {0, 1}
        assert {row["varied"]["number"] for row in rows_of(run, TEST, name)} == {choose(run, name)}
        assert merit[choose(run, name)] == max(merit)
    table = compared.arm_table("LoRA")
    masked, plain = (compared.gains(name, "LoRA", "longer") for name in ("masked", NO_REMEDY))
    means = [mean(masked[base, seed] - plain[base, seed] for seed in (0, 1)) for base in (0, 1)]
    assert table.rows[2][5].startswith(f"{mean(means):+.2f} (")
    assert table.rows[0][5] == "0"
    assert main(["report", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run" / "remedies.png").stat().st_size > 10_000
    assert table.markdown() in (tmp_path / "run" / "remedies.md").read_text(encoding="utf-8")


def named(data: str) -> Data:
    """Return a data set with a name and without images."""
    empty = Split(torch.zeros(0, 28, 28, dtype=torch.uint8), torch.zeros(0, dtype=torch.int64))
    return Data(data, "made up", empty, empty)


def test_remedies_are_a_preset_of_the_sweep(tmp_path, monkeypatch):
    """`--preset remedies-NAME` accepts the preset's settings and the options of the selection.

    Without MNIST, the settings are those of the small version.
    """
    asked: dict[str, Any] = {}

    def run(settings: DigitSettings, folder: Path, **options: Any) -> None:
        asked.update(options, settings=settings, folder=folder)

    monkeypatch.setattr(select_module, "run_remedies", run)
    monkeypatch.setattr("experiments.sweeps.cli.report", lambda folders: 0)
    monkeypatch.setattr("experiments.digits.shared.shared_data", lambda *_: named("MNIST"))
    monkeypatch.chdir(tmp_path)
    words = ["sweep", "--preset", "remedies-relu", "--seeds", "3", "--base-seeds", "4"]
    assert main([*words, "--selection-bases", "2", "--jobs", "2"]) == 0
    assert asked.pop("settings") == preset("relu", seeds=3)
    assert asked.pop("folder") == Path("runs/remedies-relu")
    assert asked == {"base_seeds": 4, "selection_bases": 2, "jobs": 2}
    assert main(["sweep", "--preset", "remedies", "--out", str(tmp_path / "blog")]) == 0
    assert asked.pop("settings") == preset("blog", out=str(tmp_path / "blog"))
    monkeypatch.setattr("experiments.digits.shared.shared_data", lambda *_: named(SKLEARN))
    assert main(["sweep", "--preset", "remedies-relu", "--seeds", "3"]) == 0
    assert asked.pop("settings") == preset("small", seeds=3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--preset", "remedies-relu", "--vary", "rank=1,2"], "--vary cannot be used with"),
        (
            ["--selection-bases", "2"],
            "--selection-bases can only be used with a remedies preset, such as remedies-relu",
        ),
        (
            ["--preset", "remedies-red"],
            "--preset must be one of remedies-blog, remedies-relu, remedies-nine, remedies-small",
        ),
    ],
)
def test_options_of_grid_and_remedies_are_told_apart(words, message, capsys):
    """A grid with a remedies preset is refused, and so are remedy options without one."""
    assert main(["sweep", *words]) == 2
    assert message in capsys.readouterr().err


def test_gains_are_over_each_adapters_own_base():
    """Gains are differences from the accuracy of the adapter's own base."""

    def row(stage: str, base: int, accuracy: float, seed: int | None = None) -> Row:
        return {"stage": stage, "base_seed": base, "seed": seed, "accuracy": accuracy}

    rows = [row("base", 0, 0.5), row("base", 1, 0.7), row("on", 0, 0.6, 3), row("on", 1, 0.75, 3)]
    found = gains(rows, "accuracy")
    assert {key: round(value, 9) for key, value in found.items()} == {(0, 3): 10, (1, 3): 5}


def test_an_interval_is_over_bases_and_differences_are_paired():
    """Ten seeds of one base are one value: the interval of 2 bases has 1 degree of freedom."""
    one = {(base, seed): base + 0.1 * seed for base in (0, 1) for seed in range(10)}
    two = {key: value - 0.5 - key[0] for key, value in one.items()}
    assert difference(one, two).values == pytest.approx((0.5, 1.5))
    half = 12.7062 * stdev((0.5, 1.5)) / math.sqrt(2)
    assert half_width(difference(one, two)) == pytest.approx(half, rel=1e-4)
    assert apart(one, two) == f"+1.00 ({1 - half:+.2f} to {1 + half:+.2f})"


def test_every_remedy_can_be(tmp_path):
    """All remedies have valid settings, distinct names and equally many candidates.

    In every arm and schedule, "no remedy" comes first with the same rank and schedule.
    scikit-learn's digits have 139 to 146 training images a digit, of which a quarter is held out.
    """
    assert select_module.validation_images(small(tmp_path)) == 34
    assert families(34)[-1].old == "34 per digit, to stop"
    settings = DigitSettings()
    every = list(contenders(settings, families()))
    assert len({one.name for one in every}) == len(every)
    assert every[0].family.name == NO_REMEDY
    for one in every:
        timing = schedules(settings)[one.schedule]
        tried = [{**one.changes, **candidate} for candidate in one.family.candidates(one.arm)]
        assert len({json.dumps(candidate) for candidate in tried}) == len(EIGHT)
        for changes in tried:
            extra = {"validation": 1} if "patience" in changes else {}
            made = replace(settings, **{**changes, **extra})
            assert made.adapter.rank == settings.adapter.rank
            assert timing.items() <= changes.items()
