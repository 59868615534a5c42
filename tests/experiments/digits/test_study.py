"""The digit study from end to end on small settings: rows, resuming, reports, checks."""

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load as load_bytes
from safetensors.torch import load_file

import paramlora as pl
from experiments.__main__ import main
from experiments.analysis.evaluate import logits_of, score
from experiments.digits import context as context_module
from experiments.digits.bases import find, restore
from experiments.digits.data import load_data
from experiments.digits.report import report as report_module
from experiments.digits.report.explain import explain
from experiments.digits.report.report import columns_legend, markdown, methods_compared
from experiments.digits.report.tables import PUBLISHED, digit_table, published_for, seed_table
from experiments.digits.settings import DigitSettings, preset
from experiments.digits.shared import context_of, prepare
from experiments.digits.study import explored as is_explored
from experiments.digits.study import run_digits
from experiments.harness.rundir import RunDirectory
from experiments.harness.settings import StudyError, flattened

OPTIONS = (
    "--preset blog --data digits --device cpu --hidden 24,16 --no-relu-logits --base-steps 300 "
    "--steps 30 --seeds 2"
)
ATTACHED = ["off", "on", "merged", "unmerged"]
STAGES = ["base", *([*ATTACHED, "wrapped", *ATTACHED] * 2), "full", "joint"]
IMAGES = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]  # MNIST's for testing, by digit
FIGURES = ["wrong-counts.png", "confusion.png", "training-loss.png"]
MADE = ["report.md", "report.html", "results.csv", *FIGURES]


def study(folder: Path, *more: str) -> int:
    """Run the study on small settings in `folder`, and return the exit status."""
    places = ["--out", str(folder / "run"), "--bases", str(folder / "bases")]
    return main(["digits", *OPTIONS.split(), *places, *more])


def rows_in(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "run" / "results.jsonl").open()]


def made_in(folder: Path) -> dict[str, bytes]:
    return {name: (folder / "run" / name).read_bytes() for name in [*MADE, "results.jsonl"]}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run in `run` and its base in `bases`. Tests must not change it."""
    folder = tmp_path_factory.mktemp("study")
    assert study(folder) == 0
    return folder


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished folder, which tests may change."""
    return Path(shutil.copytree(finished, tmp_path / "copy"))


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The labels of the fine-tunings, appended as each starts."""
    made: list[str] = []
    plain = context_module.train

    def train(*args: Any, label: str, **more: Any) -> torch.Tensor:
        made.append(label)
        return plain(*args, label=label, **more)

    monkeypatch.setattr(context_module, "train", train)
    return made


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip the figures, which take most of the time of a small run."""
    monkeypatch.setattr(report_module, "draw", lambda run: [])


def test_a_run_leaves_all_its_rows_and_files(finished):
    """A run has all its stages in order, the figures in each row, and all its files."""
    rows = rows_in(finished)
    assert [row["stage"] for row in rows] == STAGES
    assert [row["seed"] for row in rows] == [None, *[0] * 9, *[1] * 9, None, None]
    for row in rows:
        assert row["n"] == 360
        assert row["accuracy"] == (360 - sum(row["wrong_counts"])) / 360
        assert 0 <= row["other_accuracy"] <= 1
        assert 0 <= row["tuned_accuracy"] <= 1
        assert row["loss"] > 0
        assert row["base_seed"] == 0
        assert row["tuned"] == [2, 3, 5, 8, 9]
    run = finished / "run"
    assert {path.name for path in run.iterdir()} == {
        ".lock",
        "adapters",
        "environment.json",
        "explore.json",
        "results.jsonl",
        "settings.json",
        *MADE,
    }
    environment = json.loads((run / "environment.json").read_text())
    assert environment["data_digest"] == load_data("digits").digest
    assert environment["torch"] == torch.__version__
    assert environment["data_why"] == "as asked"
    assert json.loads((run / "settings.json").read_text())["finetuning"]["steps"] == 30


def test_off_and_unmerged_rows_are_the_bases(finished):
    """Off and unmerged rows have the base's confusion counts and loss."""
    base, *rows = rows_in(finished)
    for row in rows:
        alike = row["stage"] in ("off", "unmerged")
        assert (row["confusion"] == base["confusion"]) is alike
        assert (row["loss"] == base["loss"]) is alike
    assert all(row["same_logits"] for row in rows if "same_logits" in row)
    merged = [row["wrong_counts"] for row in rows if row["stage"] == "merged"]
    assert merged == [r["wrong_counts"] for r in rows if r["stage"] == "on"]


def test_the_saved_adapter_gives_the_row_that_was_recorded(finished):
    """A saved adapter, loaded on the run's base, gives the scores in its row."""
    settings = preset("blog", hidden=(24, 16), relu_logits=False)
    base = find(next((finished / "bases").iterdir()))
    assert base is not None
    model = restore(settings, base, torch.device("cpu"))
    pl.load(model, finished / "run" / "adapters" / "lora-1.safetensors")
    test = load_data("digits").test
    got = score(
        logits_of(model, test.inputs(settings.network.mean, settings.network.std)), test.labels, [2]
    )
    row = next(r for r in rows_in(finished) if r["stage"] == "on" and r["seed"] == 1)
    assert got["confusion"] == row["confusion"]
    assert got["loss"] == row["loss"]


@pytest.mark.usefixtures("undrawn")
def test_a_run_says_what_it_does(finished, tmp_path, capsys):
    """The terminal shows base, digits, parameters before and after, the table and the checks."""
    assert study(tmp_path) == 0
    shown = capsys.readouterr().out
    for words in (
        "data     scikit-learn digits: as asked",
        "small    This is the small version of the study",
        "base     19,410 parameters, trained for 300 steps",
        "tuned    digits 2, 3, 5, 8, 9: 716 training images",
        "19,410 parameters before, 1,748 now: 9.01%",
        "digit    images",
        "4/4 passed: adapter off, logits bit-for-bit the base's",
    ):
        assert words in shown
    learned, forgotten, off, _, report, following = shown.splitlines()[-6:]
    assert "of the tuned digits (2, 3, 5, 8, 9) are right" in learned
    assert "of the other digits are right" in forgotten
    assert off.startswith("With the adapter off, weights and answers are bit-for-bit the base's")
    run = tmp_path / "run"
    assert report.startswith(f"report   {run / 'report.html'}: open it in a browser")
    assert following.startswith(f"next     python -m experiments report {run} --explain")
    assert rows_in(tmp_path) == rows_in(finished)


@pytest.mark.filterwarnings("ignore:.*incomplete row")
@pytest.mark.parametrize("left", [0, 0.02, 0.1, 0.33, 0.5, 0.77, 0.999])
@pytest.mark.usefixtures("undrawn")
def test_an_interrupted_run_ends_as_one_that_was_not(copied, left, trainings):
    """Resuming from any part of results.jsonl, even half a line, gives the same bytes."""
    path = copied / "run" / "results.jsonl"
    content = path.read_bytes()
    path.write_bytes(content[: int(left * len(content))])
    whole = path.read_bytes().count(b"\n")
    assert study(copied) == 0
    assert path.read_bytes() == content
    done = sum(STAGES[:whole].count(last) for last in ("unmerged", "wrapped", "full", "joint"))
    assert len(trainings) == 8 - done


def test_stopping_by_keyboard_and_going_on(finished, tmp_path, monkeypatch, capsys):
    """A run that is interrupted during a fine-tuning resumes and gives the same files."""
    plain, calls = context_module.train, []

    def stopped(*args: Any, **more: Any) -> torch.Tensor:
        calls.append(more["label"])
        if more["label"] == "scrambled 0":
            raise KeyboardInterrupt
        return plain(*args, **more)

    with monkeypatch.context() as patch:
        patch.setattr(context_module, "train", stopped)
        assert study(tmp_path) == 130
    assert "run the same command again" in capsys.readouterr().err
    assert [row["stage"] for row in rows_in(tmp_path)] == STAGES[:6]
    assert study(tmp_path) == 0
    shown = capsys.readouterr().out
    assert "resumed  6 rows recorded, 6 stages remaining" in shown
    assert "loaded from" in shown
    assert made_in(tmp_path) == made_in(finished)


@pytest.mark.usefixtures("undrawn")
def test_a_finished_run_trains_nothing_again(copied, trainings):
    """Repeating the command of a finished run only reports, even without the base's file."""
    shutil.rmtree(copied / "bases")
    assert study(copied) == 0
    assert trainings == []
    assert not (copied / "bases").exists()


@pytest.mark.usefixtures("undrawn")
def test_damaged_and_deleted_adapters_are_trained_again(copied, finished, trainings, capsys):
    """A run trains adapters that are missing or damaged again, and makes the page's data again."""
    adapters = copied / "run" / "adapters"
    content = (adapters / "lora-1.safetensors").read_bytes()
    (adapters / "lora-0.safetensors").unlink()
    (adapters / "lora-1.safetensors").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    (adapters / "scrambled-1.safetensors").write_bytes(content[:100])
    (copied / "run" / "explore.json").write_text('{"adapters": {')
    for words, said in (
        ([], "explore.json is damaged"),
        (["--explain", "--seed", "1"], "lora-1.safetensors is damaged: its content does not match"),
    ):
        assert main(["report", str(copied / "run"), *words]) == 2
        error = capsys.readouterr().err
        assert said in error
        assert "run the command of the run again, which" in error
    assert study(copied) == 0
    assert trainings == ["lora 0", "lora 1", "scrambled 1"]
    assert "lora-0.safetensors is missing: it is trained again" in capsys.readouterr().out
    for name in ("results.jsonl", "explore.json"):
        assert (copied / "run" / name).read_bytes() == (finished / "run" / name).read_bytes()
    again, first = load_file(adapters / "lora-1.safetensors"), load_bytes(content)
    torch.testing.assert_close(again, first, rtol=0, atol=0)


def test_a_full_disk_ends_a_run_that_can_go_on(finished, tmp_path, monkeypatch, capsys, undrawn):
    """If an adapter does not fit on the disk, the run ends with status 2 and later goes on."""
    shutil.copytree(finished / "bases", tmp_path / "bases")
    plain = pl.save

    def save(model: torch.nn.Module, path: Path, name: str) -> None:
        if "scrambled-0" in path.name:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        plain(model, path, name)

    with monkeypatch.context() as patch:
        patch.setattr(pl, "save", save)
        assert study(tmp_path) == 2
    assert "error: the disk has no space left for" in capsys.readouterr().err
    assert [row["stage"] for row in rows_in(tmp_path)] == STAGES[:6]
    assert study(tmp_path) == 0
    assert rows_in(tmp_path) == rows_in(finished)


@pytest.mark.usefixtures("undrawn")
def test_full_and_joint_training_change_no_adapter_and_have_no_seed_of_their_own(finished):
    """With the same images for all seeds there is one row each, of all parameters and a tenth of
    the rate, and the report says so. Their images differ: the tuned digits', and all digits'."""
    full, joint = (r for r in rows_in(finished) if r["stage"] in ("full", "joint"))
    base = rows_in(finished)[0]
    for row in (full, joint):
        assert row["seed"] is None
        assert row["trainable"] == base["parameters"]
        assert row["lr"] == pytest.approx(1e-4)
    assert full["train_curve"] != joint["train_curve"]
    legend = "\n".join(columns_legend(RunDirectory.read(finished / "run")))
    assert "full and joint have n = 1" in legend


def test_runs_share_a_base(copied, capsys):
    """A run with other settings of fine-tuning loads the existing base."""
    assert study(copied, "--out", str(copied / "two"), "--rank", "1", "--compat", "none") == 0
    assert "loaded from" in capsys.readouterr().out
    assert len(list((copied / "bases").iterdir())) == 1
    rows = [json.loads(line) for line in (copied / "two" / "results.jsonl").open()]
    assert {row["method"] for row in rows} == {"base", "lora", "wrapped", "full", "joint"}
    assert set(rows[2]["ranks"].values()) == {1}


def test_another_runs_folder_is_refused(copied, capsys):
    """A folder with other settings or data is refused; the message names the differences."""
    before = made_in(copied)
    assert study(copied, "--rank", "3", "--lr", "0.01") == 2
    message = capsys.readouterr().err
    assert "lr 0.001 there, 0.01 now; rank 2 there, 3 now. Choose another --out" in message
    environment = json.loads((copied / "run" / "environment.json").read_text())
    path = copied / "run" / "environment.json"
    path.write_text(json.dumps({**environment, "data": "MNIST", "torch": "1.0"}))
    assert study(copied) == 2
    message = capsys.readouterr().err
    assert f"torch '1.0' there, '{torch.__version__}' now" in message
    assert "data 'MNIST' there, 'scikit-learn digits' now" in message
    assert made_in(copied) == before


def test_a_row_that_comes_out_otherwise_is_refused(copied, capsys):
    """If a repeated evaluation differs from its row, the run fails and names the figure."""
    path = copied / "run" / "results.jsonl"
    rows = rows_in(copied)[:3]
    rows[2]["accuracy"] = 0.123
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert study(copied) == 2
    assert "'on lora 0 0'" in (message := capsys.readouterr().err)
    assert "differs in accuracy" in message


def test_rows_that_come_together_are_written_or_refused_together(tmp_path):
    """If one of several rows differs from its recorded row, record_all writes none of them."""
    run = RunDirectory.start(tmp_path, {}, {}, ())
    one, two, three = ({"stage": "on", "seed": seed, "accuracy": 0.5} for seed in range(3))
    run.record_all([one, two])
    with pytest.raises(StudyError, match="differs in accuracy"):
        run.record_all([three, {**one, "accuracy": 0.6}])
    run.record_all([two, three])
    assert run.rows == RunDirectory.read(tmp_path).rows == [one, two, three]


def test_the_explorer_shows_what_the_rows_say(finished):
    """The explorer's counts are the base's at strength 0 and the adapter's at strength 1.

    It has every seed with every set of layers.
    """
    explored = json.loads((finished / "run" / "explore.json").read_text())
    masks = {name: len(states) for name, states in explored["adapters"].items()}
    assert masks == {"seed 0": 7, "seed 1": 7}
    zero, one = (explored["strengths"].index(strength) for strength in (0.0, 1.0))
    rows = {(row["stage"], row["method"], row["seed"]): row for row in rows_in(finished)}
    for seed in range(2):
        states = explored["adapters"][f"seed {seed}"]["7"]
        assert states[zero] == rows["base", "base", None]["confusion"]
        assert states[one] == rows["on", "lora", seed]["confusion"]


@pytest.mark.usefixtures("undrawn")
def test_a_page_that_lacks_seeds_says_so_until_the_run_is_called_again(copied, finished):
    """The page says how many seeds its explorer has; the run's command adds the others."""
    path, page = copied / "run" / "explore.json", copied / "run" / "report.html"
    explored = json.loads(path.read_text())
    del explored["adapters"]["seed 1"]
    path.write_text(json.dumps(explored))
    assert main(["report", str(copied / "run")]) == 0
    assert "The explorer has the first 1 of 2 adapter seeds." in page.read_text()
    assert study(copied) == 0
    assert path.read_bytes() == (finished / "run" / "explore.json").read_bytes()
    assert "The explorer has the first" not in page.read_text()


def test_page_data_without_adapters_is_made_again(tmp_path):
    """JSON that lacks the adapters counts as missing, as JSON that is cut off does."""
    for text in ("{}", '{"adapters": {'):
        (tmp_path / "explore.json").write_text(text)
        assert not is_explored(tmp_path, 2)


def test_a_report_is_made_from_rows_alone(finished, tmp_path, trainings, capsys):
    """A report needs four files and no training, and is the same in another folder."""
    (tmp_path / "run").mkdir()
    for name in ("settings.json", "environment.json", "explore.json", "results.jsonl"):
        shutil.copy(finished / "run" / name, tmp_path / "run")
    assert main(["report", str(tmp_path / "run")]) == 0
    assert made_in(tmp_path) == made_in(finished)
    assert trainings == []
    assert "digit    images" in capsys.readouterr().out


def test_a_run_that_does_not_name_its_study_is_a_digit_study(copied, capsys):
    """An old run without "study" in environment.json is reported as a digit study."""
    path = copied / "run" / "environment.json"
    environment = json.loads(path.read_text())
    assert environment.pop("study") == "digits"
    path.write_text(json.dumps(environment))
    assert main(["report", str(copied / "run")]) == 0
    assert "digit    images" in capsys.readouterr().out
    path.write_text(json.dumps({"study": "opera", **environment}))
    assert main(["report", str(copied / "run")]) == 2
    assert "of study 'opera'; known studies: digits, " in capsys.readouterr().err


def test_a_run_with_flat_settings_is_reported_and_resumed(copied, trainings, capsys):
    """An old run with a flat settings.json is resumed; other settings are refused."""
    path = copied / "run" / "settings.json"
    flat = flattened(json.loads(path.read_text()))
    path.write_text(json.dumps(flat))
    assert main(["report", str(copied / "run")]) == 0
    assert study(copied) == 0
    assert trainings == []
    assert json.loads(path.read_text()) == flat
    path.write_text(json.dumps({**flat, "rank": 3, "colour": "red"}))
    capsys.readouterr()
    assert study(copied) == 2
    said = capsys.readouterr().err
    assert "has a run with other settings: rank 3 there, 2 now; colour 'red' there, None" in said


def test_a_report_follows_its_rows(finished):
    """Changing a figure in a row changes it in the report."""
    run = RunDirectory.read(finished / "run")
    before = markdown(run, [])
    for row in run.rows:
        if row["method"] == "lora" and row["stage"] == "on":
            row["wrong_counts"] = [7000 + row["seed"] * 10] * 10
    after = markdown(run, [])
    assert "7005 ± 7" not in before
    assert after.count("7005 ± 7") == 10


@pytest.mark.filterwarnings("ignore:.*has damaged rows")
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("settings.json", None, "settings.json is missing"),
        ("environment.json", None, "environment.json is missing"),
        ("results.jsonl", None, "has no fine-tuned network yet"),
        ("results.jsonl", "{}{\n", "has no fine-tuned network yet"),
        ("settings.json", "{", "is damaged"),
    ],
)
def test_a_folder_without_a_run_is_refused(copied, name, content, message, capsys):
    """Reporting on a folder with an incomplete run names the missing file or row."""
    path = copied / "run" / name
    path.unlink() if content is None else path.write_text(content)
    assert main(["report", str(copied / "run")]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("stage", "key", "value", "claim"),
    [
        (
            "off",
            "same_logits",
            False,
            "FAILED, 3/4 passed: adapter off, logits bit-for-bit the base's",
        ),
        (
            "off",
            "same_fingerprint",
            False,
            "FAILED, 3/4 passed: adapter off, base weights unchanged",
        ),
        ("merged", "distance_from_on", 0.1, "FAILED, 3/4 passed: merged, logits within 1e-05"),
        (
            "merged",
            "distance_from_on",
            float("nan"),
            "FAILED, 3/4 passed: merged, logits within 1e-05",
        ),
        ("unmerged", "same_logits", False, "FAILED, 3/4 passed: unmerged and off, logits"),
        ("unmerged", "same_on_logits", False, "FAILED, 3/4 passed: unmerged and on, logits"),
    ],
)
@pytest.mark.usefixtures("undrawn")
def test_a_failed_check_is_reported(copied, stage, key, value, claim, capsys):
    """One row that fails a check ends the command with status 1; the report names the check."""
    rows = rows_in(copied)
    next(row for row in rows if row["stage"] == stage)[key] = value
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (copied / "run" / "results.jsonl").write_text(text)
    assert main(["report", str(copied / "run")]) == 1
    assert claim in capsys.readouterr().out
    assert claim in (copied / "run" / "report.md").read_text()


def test_checks_detect_a_changed_base(finished, tmp_path):
    """The checks against the base fail if one bit of a weight or a logit differs."""
    settings = small(finished, tmp_path)
    device, data = torch.device("cpu"), load_data("digits")
    run = RunDirectory(tmp_path, {}, {}, [])
    context = prepare(settings, run, device, data, lambda line: None)
    model = context.model()
    logits = context.evaluate(model)
    assert context.compare_to_base(model, logits) == {"same_fingerprint": True, "same_logits": True}
    other = logits.clone()
    other[5, 5] = other[5, 5].nextafter(torch.tensor(2.0))
    assert not context.compare_to_base(model, other)["same_logits"]
    with torch.no_grad():
        weight = next(model.parameters())
        weight[0, 0] = weight[0, 0].nextafter(torch.tensor(2.0))
    assert not context.compare_to_base(model, logits)["same_fingerprint"]


def small(finished: Path, folder: Path, **more: Any) -> DigitSettings:
    """Return the small settings, with the finished run's base."""
    values = {"data": "digits", "device": "cpu", "hidden": (24, 16), "relu_logits": False}
    values |= {"base_steps": 300, "steps": 30, "seeds": 1, "out": str(folder / "run")}
    return preset("blog", **values, bases=str(finished / "bases"), **more)


def test_the_worst_digits_are_tuned_when_asked(finished, tmp_path):
    """worst:2 tunes the digits that the base gets wrong most often among the validation images."""
    said: list[str] = []
    settings = small(finished, tmp_path, digits="worst:2", compat="none", validation=60)
    run = run_digits(settings, said.append)
    context = context_of(settings)
    wrong = logits_of(context.model(), context.held_inputs).argmax(1) != context.held_labels
    counts = torch.bincount(context.held_labels[wrong], minlength=10).tolist()
    assert len(context.held_labels) == 600
    worst = sorted(sorted(range(10), key=lambda digit: -counts[digit])[:2])
    assert all(row["tuned"] == worst for row in run.rows)
    assert any(f"digits {worst[0]}, {worst[1]}:" in line for line in said)


def test_seeds_are_counted_from_the_first(finished, tmp_path):
    """`seed_from=1` runs seed 1 with the rows and the adapter that it has among seeds 0 and 1."""
    one = run_digits(small(finished, tmp_path, seed_from=1), say=lambda line: None)
    both = rows_in(finished)
    assert {row["seed"] for row in one.rows} == {None, 1}
    for row in one.rows:
        assert [row] == [
            r for r in both if all(r[k] == row[k] for k in ("method", "stage", "seed"))
        ]
    assert [path.name for path in (tmp_path / "run" / "adapters").glob("lora-*")] == [
        "lora-1.safetensors"
    ]
    assert explain(tmp_path / "run").exists()


def test_seeds_are_told_apart_by_order_and_factors(finished, tmp_path):
    """Adapter seeds differ in the order "seeded" and agree in the order "blog"."""
    runs = {}
    for order in ("blog", "seeded"):
        settings = small(finished, tmp_path / order, order=order)
        context = prepare(
            settings,
            RunDirectory(tmp_path, {}, {}, []),
            torch.device("cpu"),
            load_data("digits"),
            lambda line: None,
        )
        seen = [context.batches(torch.Generator().manual_seed(s)).order for s in (0, 0, 1)]
        runs[order] = (torch.equal(seen[0], seen[1]), torch.equal(seen[0], seen[2]))
        assert set(context.labels[seen[0]].tolist()) == {2, 3, 5, 8, 9}
    assert runs == {"blog": (True, True), "seeded": (True, False)}


def test_torchs_global_generator_is_left_alone(finished, tmp_path):
    """A study does not change the state of torch's global generator."""
    before = torch.get_rng_state()
    run_digits(small(finished, tmp_path), lambda line: None)
    assert torch.equal(torch.get_rng_state(), before)


def on_mnist(finished: Path, **settings: Any) -> RunDirectory:
    """Return the finished run with the data set MNIST and the settings of a preset."""
    run = RunDirectory.read(finished / "run")
    run.environment["data"] = "MNIST"
    run.settings.update(
        {"hidden": [256, 128], "base_steps": 6000, "steps": 200, "relu_logits": True, **settings}
    )
    return run


def test_published_figures_stand_beside_like_ones_only(finished):
    """Published figures are shown only for MNIST and the unchanged settings of a preset."""
    assert published_for(on_mnist(finished)) == PUBLISHED["blog"]
    assert "published" in digit_table(on_mnist(finished)).text()
    assert published_for(on_mnist(finished, rank=3)) == {}
    assert published_for(on_mnist(finished, seeds=3, device="cuda")) == PUBLISHED["blog"]
    run = on_mnist(finished)
    run.environment["data"] = "scikit-learn digits"
    assert published_for(run) == {}
    assert "published" not in markdown(run, [])


def test_the_table_over_seeds_has_published_accuracies(finished):
    """The published accuracies are those that the published digit counts give on MNIST."""
    run = on_mnist(finished)
    for row in run.rows:  # all answered rightly
        row["confusion"] = torch.diag(torch.tensor(IMAGES)).tolist()
    table = {(row[0], row[1]): row[-2:] for row in seed_table(run).rows}
    assert table["scrambled", "all digits, %"] == ["68.26", "no"]
    assert table["wrapped", "all digits, %"] == ["78.02", "no"]
    assert table["wrapped", "tuned digits, %"] == ["90.34", "no"]
    assert table["scrambled", "other digits, %"] == ["45.92", "no"]
    assert table["on", "all digits, %"] == ["", ""]


def test_a_dead_output_is_named(finished):
    """A digit that a base with a ReLU on its logits never answers is named in the report."""
    run = on_mnist(finished)
    assert "never answers" not in markdown(run, [])
    for row in run.rows[0]["confusion"]:
        row[1], row[4], row[8] = row[1] + row[4] + row[8], 0, 0
    assert "The base never answers 4 or 8" in markdown(run, [])
    run.settings["relu_logits"] = False
    assert "never answers" not in markdown(run, [])


def test_the_comparison_of_the_two_methods_is_made_of_rows(finished):
    """Accuracies, differences and ranks in the comparison are the rows', whatever they are."""
    run = on_mnist(finished)
    run.rows[0]["confusion"] = torch.diag(torch.tensor(IMAGES)).tolist()
    for row in run.rows:
        if "ranks" in row:
            wrapped, scrambled = row["method"] == "wrapped", row["method"] == "scrambled"
            row["accuracy"] = 0.5 + 0.25 * wrapped - 0.125 * scrambled
            row["ranks"] = {"a": 7 + 90 * scrambled + row["seed"], "b": 5}
    text, differences, table, _ = methods_compared(run)
    assert "68.3 % for its parametrization (method 1) and 78.0 %" in text
    means = {(row[0], row[1]): row[2:] for row in differences.rows}
    assert means["wrapped − scrambled", "all"] == ["37.5", "37.5 to 37.5", "37.5 to 37.5", "2"]
    assert means["corrected − scrambled", "all"][0] == "12.5"
    assert means["wrapped − corrected", "all"][0] == "25.0"
    assert [row[1:3] for row in table.rows] == [
        ["97 to 98, 5", "37.50"],
        ["7 to 8, 5", "50.00"],
        ["7 to 8, 5", "75.00"],
    ]


@pytest.mark.slow
def test_the_published_base_comes_out_exactly(mnist_dir, tmp_path, capsys):
    """Preset blog on MNIST and the CPU: the ten published counts, 3,124 parameters, the ranks."""
    places = ["--out", str(tmp_path / "run"), "--bases", str(tmp_path / "bases")]
    asked = ["digits", "--seeds", "1", "--device", "cpu", "--data", "mnist", "--data-dir"]
    assert main([*asked, str(mnist_dir), *places]) == 0
    shown = capsys.readouterr().out
    assert "wrong answers by digit: 33, 12, 147, 115, 69, 196, 98, 91, 185, 148" in shown
    assert "235,146 parameters before, 3,124 now: 1.33%" in shown
    assert "digits 2, 3, 5, 8, 9: 29,310 training images" in shown
    rows = {(row["method"], row["stage"]): row for row in rows_in(tmp_path)}
    base = rows["base", "base"]
    assert base["wrong_counts"] == list(PUBLISHED["blog"]["base"].wrong_counts)
    assert round(base["train_loss"], 2) == PUBLISHED["blog"]["base"].train_loss
    assert list(rows["scrambled", "on"]["ranks"].values()) == [128, 4, 10]
    assert list(rows["lora", "on"]["ranks"].values()) == [2, 2, 2]
    assert rows["wrapped", "wrapped"]["trainable"] == 3518
    # One seed must lie in the range measured over eight seeds, widened by their sd.
    assert 0.60 < rows["scrambled", "on"]["accuracy"] < 0.80
    assert 0.70 < rows["lora", "on"]["accuracy"] < 0.88
    assert 0.70 < rows["wrapped", "wrapped"]["accuracy"] < 0.88
    report = (tmp_path / "run" / "report.md").read_text()
    assert "The base's ten counts are all the same here" in report


def test_looking_and_logging_change_no_row(finished, tmp_path):
    """--look and --tensorboard change no row, except for adding the curve."""
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    shutil.copytree(finished / "bases", tmp_path / "bases")
    assert study(tmp_path, "--look", "10", "--tensorboard", "--compat", "none") == 0
    plain = {(r["method"], r["stage"], r["seed"]): r for r in rows_in(finished)}
    for row in rows_in(tmp_path):
        seen = row.pop("way", None)
        assert row == plain[row["method"], row["stage"], row["seed"]]
        if row["method"] == "lora" and row["stage"] == "on":
            assert seen["steps"] == [10, 20, 30]
            assert seen["tuned"][-1] == row["tuned_accuracy"]
            assert seen["other"][-1] == row["other_accuracy"]
    board = reader.EventAccumulator(str(tmp_path / "run" / "tensorboard" / "lora-1")).Reload()
    assert len(board.Scalars("loss")) == 30
    assert [event.step for event in board.Scalars("other")] == [10, 20, 30]
    assert (tmp_path / "run" / "way.png").stat().st_size > 10_000


def test_a_remedied_study_has_its_own_rows(finished, tmp_path):
    """With remedies the run has `lora` rows only, another fit, and the base's off rows."""
    shutil.copytree(finished / "bases", tmp_path / "bases")
    assert study(tmp_path, "--margin", "inf", "--strength", "0.5", "--route", "soft") == 0
    rows = {(r["method"], r["stage"], r["seed"]): r for r in rows_in(tmp_path)}
    assert {method for method, _, _ in rows} == {"base", "lora"}
    plain = {(r["method"], r["stage"], r["seed"]): r for r in rows_in(finished)}
    for seed in (0, 1):
        assert rows["lora", "off", seed] == plain["lora", "off", seed]
        assert rows["lora", "on", seed]["confusion"] != plain["lora", "on", seed]["confusion"]
        assert rows["lora", "unmerged", seed]["same_on_logits"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seed", "1"], "--seed is used with --explain"),
        (["--figure", "ranks"], "--figure is not an option for the report of a run of study 'dig"),
    ],
)
def test_options_that_a_report_does_not_take_are_refused(finished, words, message, capsys):
    """Options of --explain only, or of another study, are errors that name the option."""
    assert main(["report", str(finished / "run"), *words]) == 2
    assert message in capsys.readouterr().err


def test_several_runs_are_reported_at_once(finished, copied, undrawn, capsys):
    """Each folder gets its report; the status is 1 if a check failed in any of them."""
    assert main(["report", str(copied / "run"), str(copied / "run")]) == 0
    assert capsys.readouterr().out.count("digit    images") == 2
    rows = rows_in(copied)
    next(row for row in rows if row["stage"] == "off")["same_logits"] = False
    path = copied / "run" / "results.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["report", str(copied / "run"), str(finished / "run")]) == 1


def test_the_page_on_an_adapter_is_made_from_the_run(finished, tmp_path):
    """`report --explain` writes one file with the flips, the layers and the geometry."""
    shutil.copytree(finished, tmp_path / "copy")
    folder = tmp_path / "copy" / "run"
    words = ["report", str(folder), "--explain", "--seed", "1"]
    assert main([*words, "--bases", str(tmp_path / "copy" / "bases")]) == 0
    text = (folder / "explain.html").read_text()
    row = next(r for r in rows_in(finished) if r["stage"] == "on" and r["seed"] == 1)
    assert f"<td>{100 * row['tuned_accuracy']:.2f}</td>" in text
    assert "<td>linear1.weight</td><td>2</td>" in text
    assert text.count("<figure>") >= 3
