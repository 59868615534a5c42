"""Sequences of tasks: the tasks, the methods of combining adapters, and the matrix."""

import doctest
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import paramlora as pl
from experiments.__main__ import main
from experiments.analysis.task_metrics import all_metrics
from experiments.digits.data import load_data
from experiments.digits.model import DigitNet
from experiments.harness.rundir import RunDirectory
from experiments.harness.settings import StudyError
from experiments.tasks import streams
from experiments.tasks.learner import Learner, drawn_jointly
from experiments.tasks.report import METRICS, differences, scenario_of, table
from experiments.tasks.settings import FULL, METHODS, TaskSettings
from experiments.tasks.streams import Task, rotated, stream
from experiments.tasks.tasks import accuracies

SMALL: dict[str, Any] = {
    "data": "digits",
    "device": "cpu",
    "hidden": (24, 16),
    "tasks": 3,
    "base_steps": 60,
    "steps": 20,
    "bases": 1,
    "rank": 4,
}


def tasks_of(name: str, **more: Any) -> list[Task]:
    data = load_data("digits")
    return stream(TaskSettings.of_preset(name, **{**SMALL, **more}), data.train, data.test)


def test_examples_in_docstrings_run():
    """The examples in the docstrings pass."""
    result = doctest.testmod(streams)
    assert result.attempted
    assert not result.failed


def test_split_tasks_have_two_digits_each():
    """Each task has two digits and all images of them."""
    tasks = tasks_of("split", tasks=5)
    assert [task.classes for task in tasks] == [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9)]
    assert sum(len(task.train[1]) for task in tasks) == 1437
    assert sum(len(task.test[1]) for task in tasks) == 360
    for task in tasks:
        assert set(task.train[1].tolist()) == set(task.classes)


def test_rotated_and_permuted_tasks_are_the_same_images_changed():
    """The first task is unchanged, the last rotated by 90°; a permutation keeps all pixels."""
    plain = load_data("digits").test.images.float() / 255
    turned = tasks_of("rotated")
    for task, quarter in ((turned[0], 0), (turned[2], 1)):
        expected = (plain.rot90(quarter, (1, 2)).flatten(1) - 0.1307) / 0.3081
        assert_close(task.test[0], expected, rtol=0, atol=1e-3)
    mixed = tasks_of("permuted")
    assert_close(mixed[0].test[0], turned[0].test[0])
    assert not torch.equal(mixed[1].test[0], mixed[2].test[0])
    assert_close(mixed[1].test[0].sort(1).values, mixed[0].test[0].sort(1).values)
    again = tasks_of("permuted")
    assert torch.equal(again[1].test[0], mixed[1].test[0])


def test_turning_back_gives_the_image_again():
    """Rotating a smooth image forth and back nearly restores its middle."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, 28), torch.linspace(-1, 1, 28), indexing="ij")
    image = torch.exp(-4 * ((x - 0.2) ** 2 + (y + 0.1) ** 2))[None]
    back = rotated(rotated(image, 30.0), -30.0)
    assert float((back - image)[0, 7:21, 7:21].abs().max()) < 0.02


def learner(combine: str, **more: Any) -> tuple[Learner, list[Task]]:
    """Return a learner with two random adapters, and the tasks."""
    settings = TaskSettings.of_preset("split", **{**SMALL, **more})
    torch.manual_seed(0)
    made = Learner(settings, DigitNet(settings.network.hidden, "relu"), combine)
    for seed in range(2 if combine not in FULL else 0):
        for factor in made.begin(torch.Generator().manual_seed(seed)):
            nn.init.normal_(factor, std=0.2)
    return made, tasks_of("split")


@pytest.mark.parametrize("combine", [name for name in METHODS if name not in FULL])
def test_a_stage_trains_its_own_adapter_alone(combine):
    """Only the last stage's factors train; `one` and `joint-lora` have one adapter in all."""
    made, _ = learner(combine)
    assert len(made.names) == (1 if combine in ("one", "joint-lora") else 2)
    trainable = {id(p) for p in made.model.parameters() if p.requires_grad}
    assert trainable == {id(p) for p in pl.parameters(made.model, made.names[-1])}


def test_answers_are_those_of_the_adapters_that_count():
    """Stacked: both on. Merged: both at half strength. Routed, task given: its adapter."""
    for combine, told in (("stacked", "class"), ("merged", "class"), ("routed", "task")):
        made, tasks = learner(combine, scenario=told)
        x, model = tasks[1].test[0], made.model
        on = {"stacked": {"stage1": 1.0, "stage2": 1.0}, "merged": {"stage1": 0.5, "stage2": 0.5}}
        with torch.no_grad(), pl.using(model, **on.get(combine, {"stage1": 1.0})):
            logits = model(x)
        only = logits if told == "class" else logits[:, [2, 3]]
        expected = only.argmax(1) + (0 if told == "class" else 2)
        assert torch.equal(made.answer(x, tasks, 1), expected)


def test_a_route_that_is_not_told_takes_the_surest():
    """Without the task, each image gets the class of the most confident stage."""
    made, tasks = learner("routed")
    x = tasks[0].test[0]
    best, expected = torch.full((len(x),), -1.0), torch.full((len(x),), -1)
    for number, names in enumerate([[], ["stage1"], ["stage2"]]):
        with torch.no_grad(), pl.using(made.model, *names):
            p = made.model(x).softmax(1)
        for label in tasks[number].classes:
            surer = p[:, label] > best
            best = torch.where(surer, p[:, label], best)
            expected = torch.where(surer, label, expected)
    assert torch.equal(made.answer(x, tasks, 0), expected)


def test_orthogonality_penalises_the_overlap_with_earlier_stages():
    """The loss of a second stage grows by the weight times Σ|A_1 A_2ᵀ| over the layers."""
    plain, tasks = learner("stacked")
    weighed, _ = learner("stacked", orthogonal=0.5)
    batch = tuple(tensor[:8] for tensor in tasks[2].train)
    difference = weighed.objective(tasks[2])(weighed.model, *batch) - plain.objective(tasks[2])(
        plain.model, *batch
    )
    one, two = (pl.state_dict(plain.model, name) for name in ("stage1", "stage2"))
    overlap = sum((one[k] @ two[k].T).abs().sum() for k in one if k.endswith(".A"))
    assert_close(difference, 0.5 * overlap, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*incomplete row")
def test_a_run_records_the_matrix_and_resumes(tmp_path: Path, capsys):
    """The command runs every method, records matrix, metrics and curve, and resumes."""
    words = ["tasks", "--preset", "rotated", "--data", "digits", "--device", "cpu", "--tasks", "3"]
    words += [
        "--hidden",
        "24,16",
        "--base-steps",
        "100",
        "--steps",
        "20",
        "--seeds",
        "2",
        "--bases",
        "1",
    ]
    words += ["--out", str(tmp_path / "run")]
    assert main(words) == 0
    run = RunDirectory.read(tmp_path / "run")
    assert [(row["method"], row["seed"]) for row in run.rows] == [
        (method, seed) for method in METHODS for seed in range(2)
    ]
    for row in run.rows:
        matrix = row["matrix"]
        assert len(matrix) == 3
        assert {key: row[key] for key in ("ACC", "BWT", "forgetting", "LA")} == all_metrics(matrix)
        assert row["way"]["first"][0] == matrix[0][0]
        assert row["way"]["steps"][-1] == 40
        # The digits have fewer test images than are watched, so the curve ends at the matrix.
        assert row["way"]["first"][-1] == matrix[-1][0]
        lowest = row["WC-ACC"] * 3 - matrix[-1][-1]  # of the two earlier tasks together
        assert lowest <= sum(min(m[j] for m in matrix[j:]) for j in range(2)) + 1e-9
    assert (tmp_path / "run" / "accuracy-matrix.png").stat().st_size > 10_000
    shown = capsys.readouterr().out
    assert "BWT" in shown
    path = tmp_path / "run" / "results.jsonl"
    whole = path.read_text()
    path.write_text("".join(line + "\n" for line in whole.splitlines()[:3]) + "half")
    assert main(words) == 0
    assert [json.loads(line)["matrix"] for line in path.open()] == [
        json.loads(line)["matrix"] for line in whole.splitlines()
    ]
    # The report can be written again from the rows; a run without rows is refused.
    (tmp_path / "run" / "tasks.md").unlink()
    assert main(["report", str(tmp_path / "run")]) == 0
    text = (tmp_path / "run" / "tasks.md").read_text()
    assert text.startswith("# Tasks: rotated, domain-incremental\n")
    assert "n adapter seeds on one base" in text
    assert "| difference from full | ACC | LA | forgetting | n |" in text
    page = (tmp_path / "run" / "tasks.html").read_text()
    assert page.count("<figure>") == 2
    assert "difference from full" in page
    path.unlink()
    capsys.readouterr()
    assert main(["report", str(tmp_path / "run")]) == 2
    assert "has no rows yet" in capsys.readouterr().err


def test_the_single_adapter_forgets_what_routing_keeps(tmp_path: Path):
    """With the task given, routed adapters keep the first task exactly; method `one` forgets."""
    settings = {**SMALL, "scenario": "task", "steps": 60}
    made = {combine: learner(combine, **settings) for combine in ("one", "routed")}
    kept = {}
    for combine, (its, tasks) in made.items():
        before = accuracies(its, tasks, 1)
        with torch.no_grad():
            for factor in pl.parameters(its.model, its.names[-1]):
                factor.add_(1.0)
        kept[combine] = accuracies(its, tasks, 1) == before
    assert kept == {"one": False, "routed": True}


def test_full_fine_tuning_trains_every_weight_and_forgets():
    """`full` has no adapter, trains all parameters at a rate of its own, and answers by them."""
    made, tasks = learner("full", full_lr=1e-4)
    parameters = made.begin(torch.Generator())
    assert made.names == []
    assert [id(p) for p in parameters] == [id(p) for p in made.model.parameters()]
    assert made.rate == 1e-4
    with torch.no_grad():
        expected = made.model(tasks[1].test[0]).argmax(1)
    assert torch.equal(made.answer(tasks[1].test[0], tasks, 1), expected)


def test_joint_stages_draw_from_all_tasks_so_far():
    """The images of a joint stage are those of the tasks so far, each at most once an epoch."""
    tasks = tasks_of("split")
    count = sum(len(task.train[1]) for task in tasks[:2])
    joint = drawn_jointly(tasks[:2], count, torch.Generator().manual_seed(0))
    assert joint.classes == (0, 1, 2, 3)
    images = torch.cat([task.train[0] for task in tasks[:2]])
    labels = torch.cat([task.train[1] for task in tasks[:2]])
    drawn = {(tuple(x.tolist()), int(y)) for x, y in zip(*joint.train, strict=True)}
    assert drawn == {(tuple(x.tolist()), int(y)) for x, y in zip(images, labels, strict=True)}
    for combine, others in (("joint", True), ("joint-lora", True), ("one", False)):
        made, _ = learner(combine)
        task, order = made.task_of_stage(tasks, 2, torch.Generator().manual_seed(0))
        assert ({0, 1, 2, 3} <= set(task.train[1][order].tolist())) == others


def test_intervals_are_over_bases(tmp_path: Path):
    """With several bases n counts them: two adapters of a base count as one, their mean."""
    rows = [
        {"method": method, "base_seed": base, "seed": seed, **dict.fromkeys(METRICS, value)}
        for base in range(3)
        for seed in range(2)
        for method, value in (("one", 0.5 + 0.1 * base), ("full", 0.4 + 0.1 * base + 0.02 * seed))
    ]
    run = RunDirectory(tmp_path, {"bases": 3}, {}, rows)
    assert table(run).rows[0] == ["one", *["60.0 ± 10.0"] * 6, "3"]
    assert differences(run).rows == [["one", *["+9.0 (9.0 to 9.0)"] * 3, "3"]]


@pytest.mark.parametrize(
    ("stream_name", "given", "expected"),
    [("split", "class", "class"), ("rotated", "class", "domain"), ("permuted", "task", "task")],
)
def test_the_scenario_of_tasks_with_the_same_classes_is_domain(stream_name, given, expected):
    """Older runs called it class; new settings refuse that, and name what is allowed."""
    run = RunDirectory(Path(), {"stream": stream_name, "scenario": given}, {}, [])
    assert scenario_of(run) == expected
    if given != expected:
        with pytest.raises(StudyError, match="--scenario must be task or domain for rotated"):
            TaskSettings.of_preset("split", stream=stream_name)
