"""Sequences of tasks: several methods learn them on the same bases; the matrix of accuracies.

learner.py has the methods, streams.py the tasks.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import mean
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..analysis.task_metrics import all_metrics, stability_gap, worst_case_accuracy
from ..digits.data import Split, announce, describe, load_data
from ..digits.model import DigitNet
from ..harness.batches import Batches, seeded_order
from ..harness.environment import RESULT_KEYS, resolve_device
from ..harness.rundir import RunDirectory
from ..harness.settings import replace, result_settings
from ..harness.stages import Stage, run_stages
from ..harness.train import cpu_threads, cross_entropy, every, train
from .learner import Learner
from .settings import TaskSettings
from .streams import Task, stream
from .three_types import ThreeTypes, three_types_stages

Shared = TypeVar("Shared")
WATCHED = 1000  # test images of each earlier task that are evaluated during a stage


@dataclass
class TaskContext:
    """The settings, run and data that all stages share, and the tasks and base of one seed."""

    settings: TaskSettings
    run: RunDirectory
    splits: tuple[Split, Split]
    made: dict[int, tuple[list[Task], dict[str, Tensor]]] = field(default_factory=dict)

    def world(self, seed: int) -> tuple[list[Task], nn.Module]:
        """Return the tasks of a base seed, and a new model with the weights of its base."""
        if seed not in self.made:
            self.made.clear()  # the tasks of one seed take gigabytes
            settings = replace(self.settings, seed=seed)
            tasks = stream(settings, *self.splits)
            self.made[seed] = tasks, _pretrained(settings, tasks[0])
        tasks, weights = self.made[seed]
        with torch.random.fork_rng(devices=[]):
            model = DigitNet(self.settings.network.hidden, "relu")
        model.load_state_dict(weights)
        return tasks, model.to(tasks[0].test[0].device).eval()


def accuracies(learner: Learner, tasks: Sequence[Task], count: int | None = None) -> list[float]:
    """Return the accuracy on each task, or on each of the first `count` tasks."""
    return [
        float((learner.answer(task.test[0], tasks, number) == task.test[1]).float().mean())
        for number, task in enumerate(tasks[:count])
    ]


def learn(combine: str, base_seed: int, seed: int, context: TaskContext) -> None:
    """Learn all tasks in order. Row: "learned", with the matrix and the first task's curve.

    The matrix a has one row per stage and one column per task, (T, T): a(i, j) is the accuracy on
    task j after stage i. Row 0 is the base, pre-trained on task 0. For T = 3:

                      task 0    task 1    task 2
        base          a(0, 0)   a(0, 1)   a(0, 2)
        stage 1       a(1, 0)   a(1, 1)   a(1, 2)
        stage 2       a(2, 0)   a(2, 1)   a(2, 2)

    The diagonal is the accuracy on a task just learned. Below it, a(i, j) - a(j, j) shows how much
    of task j was lost (negative) by stage i. Above it are tasks that were not learned yet.

    The curves have the accuracy on the first WATCHED test images of each earlier task, from the end
    of its own stage on.
    """
    tasks, model = context.world(base_seed)
    learner, watched = Learner(context.settings, model, combine), [_watched(t) for t in tasks]
    generator = torch.Generator().manual_seed(seed)
    matrix, curves = [accuracies(learner, tasks)], [accuracies(learner, watched, 1)]
    steps = [0]
    for number in range(1, len(tasks)):
        label = f"{combine} {base_seed}.{seed}"
        steps += learn_stage(learner, tasks, watched, number, generator, curves, label)
        matrix.append(accuracies(learner, tasks))  # row `number`, (T,)
        curves.append(accuracies(learner, watched, number + 1)[-1:])
    context.run.record(
        {
            "stage": "learned",
            "method": combine,
            "base_seed": base_seed,
            "seed": seed,
            "tasks": [task.name for task in tasks],
            "matrix": matrix,
            **all_metrics(matrix),
            "WC-ACC": worst_case_accuracy(matrix[-1][-1], curves[:-1]),
            "stability gap": mean(map(stability_gap, curves[:-1])),
            "way": {"steps": steps, "first": curves[0]},
        }
    )


def _watched(task: Task) -> Task:
    """Return the task with its first WATCHED test images only."""
    images, labels = task.test
    return Task(task.name, task.classes, task.train, (images[:WATCHED], labels[:WATCHED]))


def learn_stage(
    learner: Learner,
    tasks: Sequence[Task],
    watched: Sequence[Task],
    number: int,
    generator: torch.Generator,
    curves: Sequence[list[float]],
    label: str,
) -> list[int]:
    """Learn the task of a stage, and extend the curves of the earlier tasks; return their steps."""
    training, parameters = learner.settings.finetuning, learner.begin(generator)
    task, order = learner.task_of_stage(tasks, number, generator)
    batches, steps = Batches(task.train, order, training.batch), []

    def look(step: int, model: nn.Module, loss: Tensor) -> None:
        steps.append((number - 1) * training.steps + step)
        for curve, value in zip(curves, accuracies(learner, watched, number), strict=True):
            curve.append(value)

    optimizer = torch.optim.Adam(parameters, learner.rate, fused=True)
    hooks, objective = [every(max(1, training.steps // 20), look)], learner.objective(task)
    with cpu_threads(learner.settings.place.threads):
        label = f"{label}, {task.name}"
        train(learner.model, batches, objective, optimizer, label=label, hooks=hooks)
    return steps


def task_stages(settings: TaskSettings) -> Iterator[Stage[TaskContext]]:
    """Yield the stages of a run: one per base, method and adapter seed."""
    for base_seed in range(settings.seed, settings.seed + settings.bases):
        for method in settings.chosen_methods:
            for seed in range(settings.seeds):
                key = {"method": method, "base_seed": base_seed, "seed": seed}
                yield Stage(key, ("learned",), partial(learn, method, base_seed, seed))


def run_tasks(settings: TaskSettings, say: Callable[[str], None] = print) -> RunDirectory:
    """Learn a sequence of tasks with every method; return the run."""
    device = resolve_device(settings.place.device)
    data = load_data(settings.dataset.data, settings.dataset.data_dir)
    environment = {"study": settings.STUDY, **describe(device, data)}
    folder, asked = Path(settings.folder), result_settings(settings)
    with RunDirectory.start(folder, asked, environment, RESULT_KEYS) as run:
        say(f"run      {run.folder}, on {device}")
        announce(data, say)

        def shared(kind: Callable[..., Shared]) -> Shared:
            return kind(settings, run, (data.train.to(device), data.test.to(device)))

        if settings.sequence.recipe == "three-types":
            run_stages(run, three_types_stages(settings), partial(shared, ThreeTypes), say)
        else:
            run_stages(run, task_stages(settings), partial(shared, TaskContext), say)
    return run


def _pretrained(settings: TaskSettings, task: Task) -> dict[str, Tensor]:
    """Train a network on the first task; return its weights. Keep the global generator's state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = DigitNet(settings.network.hidden, "relu").to(task.train[0].device)
    generator = torch.Generator().manual_seed(settings.seed)
    size = settings.finetuning.batch
    order = seeded_order(len(task.train[1]), settings.pretraining.base_steps * size, generator)
    batches = Batches(task.train, order, size)
    optimizer = torch.optim.Adam(model.parameters(), settings.pretraining.base_lr, fused=True)
    with cpu_threads(settings.place.threads):
        train(model, batches, cross_entropy, optimizer, label="pre-training")
    return {key: value.cpu() for key, value in model.state_dict().items()}
