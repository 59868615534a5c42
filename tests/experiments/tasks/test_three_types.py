"""Three types of incremental learning: units and masks, the losses of the methods, the command."""

import doctest
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import paramlora as pl
from experiments.__main__ import main
from experiments.analysis.task_metrics import all_metrics
from experiments.digits.data import load_data
from experiments.digits.model import DigitNet
from experiments.harness.rundir import RunDirectory
from experiments.harness.settings import StudyError
from experiments.tasks import published
from experiments.tasks.adapters import InfLoRA
from experiments.tasks.contexts import Contexts, Draws, Side
from experiments.tasks.published import accuracy_table, spread
from experiments.tasks.settings import EWC_LAMBDA, SI_C, THREE_TYPES_METHODS, TaskSettings
from experiments.tasks.three_types import KINDS, SI, Method

SMALL: dict[str, Any] = {"device": "cpu", "tasks": 3, "hidden": (6, 5), "steps": 3, "batch": 8}
STREAM = {"split": "split-small", "permuted": "permuted-mnist"}


def settings_of(stream: str = "split", **more: Any) -> TaskSettings:
    return TaskSettings.of_preset(STREAM[stream], **{**SMALL, "data": "digits", **more})


def contexts_of(scenario: str, stream: str = "split", **more: Any) -> Contexts:
    """Return three contexts with images in float64."""
    data = load_data("digits")
    found = Contexts(settings_of(stream, **more), scenario, 0, (data.train, data.test))
    for name in ("train", "test"):
        side = getattr(found, name)
        setattr(found, name, Side(side.images.double(), side.labels, side.members))
    return found


def method_of(name: str, scenario: str, seed: int = 0, **more: Any) -> Method:
    contexts = contexts_of(scenario, **more)
    torch.manual_seed(seed)
    model = DigitNet((6, 5), "relu", outputs=contexts.outputs).double()
    return KINDS[name](settings_of(**more), contexts, model, seed)


def batch_of(method: Method, context: int) -> tuple[Tensor, ...]:
    """Return eight images of a context with their units, contexts and rows."""
    contexts, generator = method.contexts, torch.Generator().manual_seed(5)
    return next(iter(Draws(contexts, contexts.pool([context]), 1, 8, generator)))


def test_examples_in_docstrings_run() -> None:
    """The examples in the docstrings pass."""
    result = doctest.testmod(published)
    assert result.attempted
    assert not result.failed


@pytest.mark.parametrize("stream", ["split", "permuted"])
@pytest.mark.parametrize("scenario", ["task", "domain", "class"])
def test_units_and_masks_of_the_scenarios(stream: str, scenario: str) -> None:
    """Labels have units of their context unless all contexts share them; only `task` masks."""
    contexts, per = contexts_of(scenario, stream), 2 if stream == "split" else 10
    assert contexts.outputs == (per if scenario == "domain" else 3 * per)
    for k in range(3):
        batch = contexts.examples(contexts.test, k)
        first = 0 if scenario == "domain" else k * per
        assert set(batch.units.tolist()) == set(range(first, first + per))
        masked = contexts.masked(torch.zeros(1, contexts.outputs), torch.tensor([k]), 1)[0]
        active = range(k * per, (k + 1) * per) if scenario == "task" else range(contexts.outputs)
        assert masked.isfinite().nonzero().flatten().tolist() == list(active)


def test_units_so_far() -> None:
    """With --units so-far a class is one of the contexts so far, whatever the example's context."""
    data = load_data("digits")
    contexts = Contexts(settings_of(units="so-far"), "class", 0, (data.train, data.test))
    logits, owners = torch.zeros(3, contexts.outputs), torch.arange(3)
    for current in range(3):
        finite = contexts.masked(logits, owners, current).isfinite()
        assert torch.equal(finite.sum(1), torch.full((3,), 2 * (current + 1)))
        assert bool(finite[:, : 2 * (current + 1)].all())


def test_contexts_have_the_images_of_their_classes() -> None:
    """Split: each image is in one context, by name. Permuted: all images, in another order."""
    data = load_data("digits")
    split = Contexts(settings_of(tasks=5), "class", 3, (data.train, data.test))
    assert split.names != Contexts(settings_of(tasks=5), "class", 4, (data.train, data.test)).names
    assert sorted("".join(split.names).replace("-", "")) == list("0123456789")
    for name, rows in zip(split.names, split.test.members, strict=True):
        assert {str(label) for label in data.test.labels[rows].tolist()} == set(name.split("-"))
        assert_close(split.test.images[rows], data.test.images[rows].flatten(1) / 255)
    permuted = contexts_of("domain", "permuted")
    one, two = (permuted.examples(permuted.test, k, 5).inputs for k in (0, 1))
    assert one.shape == (5, 1024)
    assert not torch.equal(one, two)
    assert_close(one.sort(1).values, two.sort(1).values)
    padded = torch.zeros(32, 32).double()
    padded[2:30, 2:30] = data.test.images[0].double() / 255
    assert permuted.pixels is not None
    for x, order in zip((one, two), permuted.pixels, strict=False):
        for place in range(0, 1024, 37):
            pixel = int(order[place])
            assert float(x[0, place]) == pytest.approx(float(padded[pixel // 32, pixel % 32]))


def cross_entropy(
    method: Method, z: Tensor, units: Tensor, owners: Tensor, active: int | None = None
) -> Tensor:
    """Return the mean cross-entropy, image by image, over the units that are active."""
    total = torch.zeros(()).double()
    for logits, unit, owner in zip(z, units.tolist(), owners.tolist(), strict=True):
        among = [2 * owner, 2 * owner + 1] if method.contexts.scenario == "task" else slice(active)
        total += logits[among].logsumexp(0) - logits[unit]
    return total / len(z)


CASES = [
    (n, s, "all") for n in ("none", "ewc", "si", "lwf", "er") for s in ("task", "domain", "class")
]


@pytest.mark.parametrize(("name", "scenario", "units"), [*CASES, ("lwf", "class", "so-far")])
def test_losses_are_those_of_the_authors(name: str, scenario: str, units: str) -> None:
    """Each method's loss is cross-entropy and its term, with its weight, in the third context.

    With the units so far it is the second of three, in which four of six units are active.
    """
    method, now = method_of(name, scenario, replay=3, lwf_weight=4.0, units=units), 2
    if units == "so-far":
        now = 1
    parameters, before = list(method.model.parameters()), []
    if isinstance(method, SI):
        method.start([torch.full_like(p, 0.3) for p in parameters])
    for context in range(2):
        before.append([p.detach().clone() for p in parameters])
        method.end(context)
        with torch.no_grad():
            for p in parameters:
                p.add_(0.01)
    if name == "lwf":
        method.begin(now)
        with torch.no_grad():
            teacher = method.model(batch_of(method, now)[0])
            parameters[0].add_(0.1)
    x, answers, owners, rows = batch_of(method, now)
    z = method.model(x)
    expected = cross_entropy(method, z, answers, owners, 4 if units == "so-far" else None)
    if name == "ewc":
        weight = EWC_LAMBDA["split"][scenario] / 2
        for context, centers in enumerate(before):
            old = method_of(name, scenario)  # one term for each context
            with torch.no_grad():
                for p, center in zip(old.model.parameters(), centers, strict=True):
                    p.copy_(center)
            old.end(context)
            strengths = old.sum.strengths  # type: ignore[attr-defined]
            for p, F, center in zip(parameters, strengths, centers, strict=True):
                expected = expected + weight * (F * (p - center) ** 2).sum()
    elif name == "si":  # the anchor is the first context's end, as no later path was followed
        for p, center in zip(parameters, before[0], strict=True):
            expected = expected + SI_C["split"][scenario] * 0.3 * ((p - center) ** 2).sum()
    elif name == "lwf":
        active = list(range(4 if units == "so-far" else 6))
        groups = {"task": [[0, 1], [2, 3]], "domain": [[0, 1]] * 2, "class": [active]}
        for group in groups[scenario]:
            soft, log_q = (teacher[:, group] / 2).softmax(1), (z[:, group] / 2).log_softmax(1)
            weight = 4.0
            if units == "so-far":  # the two units of the first context have targets
                soft, weight = torch.zeros_like(soft), 4 / 2
                soft[:, :2] = (teacher[:, :2] / 2).softmax(1)
            expected = expected - weight * (soft * log_q).sum() / len(z)
    loss = method.objective(now)
    if name == "er":
        memory = method.memory  # type: ignore[attr-defined]
        assert memory[1].bincount().tolist() == [6, 6]  # three of each class
        draws = Draws(method.contexts, memory, 3, 8, method.generator(2, 2))
        old_x, old_units, old_owners, _ = next(iter(draws))
        stored = cross_entropy(method, method.model(old_x), old_units, old_owners)
        expected = expected / 3 + 2 / 3 * stored
    assert_close(loss(method.model, x, answers, owners, rows), expected)


def test_joint_draws_from_all_contexts_so_far() -> None:
    """Joint has the images of all contexts so far, the others those of the current one."""
    for name, sizes in (("joint", [0, 1, 2]), ("none", [2]), ("routed", [2])):
        assert method_of(name, "class").pool(2)[1].unique().tolist() == sizes


@pytest.mark.parametrize("scenario", ["task", "domain", "class"])
def test_routing_takes_the_context_that_is_given_or_the_most_confident(scenario: str) -> None:
    """Image by image: the adapter of the context, or the highest probability over the contexts."""
    method = method_of("routed", scenario)
    for context in (1, 2):
        for factor in method.begin(context) or []:
            torch.nn.init.normal_(factor, std=0.5, generator=torch.Generator().manual_seed(context))
    x = method.contexts.examples(method.contexts.test, 1, 20).inputs
    found = method.logits(x, torch.full((20,), 1), 3).argmax(1)
    outputs = []
    for names in ([], ["stage1"], ["stage2"]):
        with torch.no_grad(), pl.using(method.model, *names):
            outputs.append(method.model(x))
    for image in range(20):
        best, answer = -1.0, -1
        for k in [1] if scenario == "task" else range(3):
            units = range(2) if scenario == "domain" else range(2 * k, 2 * k + 2)
            for unit in units:
                p = float(outputs[k][image].softmax(0)[unit])
                if scenario == "class":
                    p = float(outputs[k][image][list(units)].softmax(0)[unit - 2 * k])
                if p > best:
                    best, answer = p, unit
        assert int(found[image]) == answer


def test_inflora_leaves_the_outputs_for_protected_inputs() -> None:
    """An adapter cannot change the outputs for images in the protected span, but for others."""
    method = method_of("inflora", "task", rank=2)
    earlier = method.contexts.examples(method.contexts.train, 0, 30).inputs
    assert isinstance(method, InfLoRA)
    span = torch.linalg.svd(earlier.T, full_matrices=False).U  # (784, 30)
    method.bases = [span, torch.zeros(6, 0).double(), torch.zeros(5, 0).double()]
    trained = method.begin(1) or []
    assert {p.shape[1] for p in trained} == {2}  # B alone
    before = method.model.get_submodule("linear1")(earlier)
    with torch.no_grad():
        for p in trained:
            p.add_(1.0)
    assert_close(method.model.get_submodule("linear1")(earlier), before)
    later = method.contexts.examples(method.contexts.train, 1, 30).inputs
    moved = method.model.get_submodule("linear1")(later)
    with pl.disabled(method.model):
        assert not torch.allclose(moved, method.model.get_submodule("linear1")(later))


def test_the_small_preset_runs_all_methods_and_resumes(tmp_path: Path, capsys: Any) -> None:
    """Every method and scenario has a row, from the same first context, and resumes equal."""
    words = ["tasks", "--preset", "split-small", "--device", "cpu", "--tasks", "3"]
    words += ["--hidden", "12", "--steps", "4", "--rank", "2", "--out", str(tmp_path / "run")]
    assert main(words) == 0
    run = RunDirectory.read(tmp_path / "run")
    rows = {(row["method"], row["scenario"]): row for row in run.rows}
    scenarios = ("task", "domain", "class")
    assert list(rows) == [(name, s) for name in THREE_TYPES_METHODS for s in scenarios]
    for (_, scenario), row in rows.items():
        matrix = row["matrix"]
        assert matrix[0] == rows["none", scenario]["matrix"][0]
        assert {key: row[key] for key in ("ACC", "BWT", "forgetting", "LA")} == all_metrics(matrix)
        # Four evaluations in each later context, and one at each end of a context.
        assert len(row["first"]) == 1 + 2 * 4
        lowest = row["WC-ACC"] * 3 - matrix[-1][-1]  # of the two earlier contexts together
        assert lowest <= sum(min(m[j] for m in matrix[j:]) for j in range(2)) + 1e-9
    assert "within" in capsys.readouterr().out
    text = (tmp_path / "run" / "tasks.md").read_text()
    assert text.startswith("# Three types of incremental learning: split tasks\n")
    path = tmp_path / "run" / "results.jsonl"
    whole = [json.loads(line)["matrix"] for line in path.open()]
    path.write_text("".join(path.open().readlines()[:28]))
    assert main(words) == 0
    assert [json.loads(line)["matrix"] for line in path.open()] == whole


def test_published_figures_are_compared_by_their_spread(tmp_path: Path) -> None:
    """A mean of n seeds is compared with the 95 % interval of means of n further seeds."""
    rows = [
        {"stage": "learned", "method": m, "scenario": "task", "seed": seed, "ACC": acc}
        for m, acc in (("none", 0.92), ("ewc", 0.50), ("er", 0.99))
        for seed in range(2)
    ]
    run = RunDirectory(tmp_path, {"stream": "split"}, {"data": "MNIST"}, rows)
    none, ewc, er = accuracy_table(run).rows
    assert none[2:5] == ["92.00", "2", "85.15 ± 1.00"]
    assert none[6] == "yes"
    assert (ewc[4], ewc[6]) == ("98.64 ± 0.22", "-48.64")  # the paper with this λ
    assert er[4:] == ["-"] * 3
    # Student's t with 19 degrees of freedom, 2.0930, times √20 √(1/2 + 1/20).
    assert spread(50.0, 1.0, 2)[1] - 50.0 == pytest.approx(6.9416, abs=1e-3)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"methods": "none,full"}, "--methods must be a list of none, ewc, .* recipe three-types"),
        ({"stream": "rotated"}, "--stream must be split or permuted for the recipe three-types"),
        ({"bases": 2}, "--bases must be 1 in the recipe three-types"),
        ({"scenario": "task,task"}, "--scenario must be a list of task, domain, class"),
    ],
)
def test_settings_that_do_not_fit_the_recipe_are_refused(given: Any, message: str) -> None:
    """The error names the option and what is allowed."""
    with pytest.raises(StudyError, match=message):
        TaskSettings.of_preset("split-mnist", **given)
    with pytest.raises(StudyError, match="--methods must be a list of one, stacked"):
        TaskSettings.of_preset("split", methods="ewc")
