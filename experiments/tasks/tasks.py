"""Sequences of tasks: one adapter per stage on one base, and the matrix of accuracies.

The methods, by how they combine the adapters of the stages:

    one        a single adapter trains in all stages; the baseline for forgetting
    stacked    each stage adds an adapter; the earlier adapters stay on, frozen
    merged     each stage trains an adapter alone on the base; at the end all k adapters are on,
               each at strength 1/k
               (Ilharco et al. 2023, "Editing models with task arithmetic", arXiv 2212.04089)
    routed     trained as merged; the adapter of the given task answers, or the most confident one

Scenarios (van de Ven et al. 2022, "Three types of incremental learning"): in `task`, the task of
each test image is given and only its classes count. In `class`, the task is not given. Rotated and
permuted tasks have the same classes, so there the scenarios differ only for `routed`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

import paramlora as pl

from ..analysis.evaluate import logits_of
from ..analysis.task_metrics import all_metrics, stability_gap, worst_case_accuracy
from ..digits.data import announce, describe, load_data
from ..digits.model import DigitNet
from ..digits.remedies.losses import mask_or_shift_logits
from ..digits.remedies.penalties import orthogonal
from ..harness.batches import Batches, seeded_order
from ..harness.environment import RESULT_KEYS, resolve_device
from ..harness.loggers import Curve
from ..harness.rundir import RunDirectory
from ..harness.settings import result_settings
from ..harness.stages import Stage, run_stages
from ..harness.train import Objective, cpu_threads, cross_entropy, every, train
from .settings import TaskSettings
from .streams import Task, stream

COMBINE = ("one", "stacked", "merged", "routed")


class Learner:
    """A base with the adapters of its stages, and a method of combining them."""

    def __init__(self, settings: TaskSettings, model: nn.Module, combine: str) -> None:
        self.settings, self.model, self.combine = settings, model, combine
        self.names: list[str] = []

    def begin(self, generator: torch.Generator) -> list[nn.Parameter]:
        """Start a stage; return its trainable parameters."""
        if self.combine != "one" or not self.names:
            self.names.append(f"stage{len(self.names) + 1}")
            spec = pl.LoRA(self.settings.adapter.rank, self.settings.adapter.alpha)
            pl.attach(
                self.model,
                spec,
                nn.Linear,
                name=self.names[-1],
                activate="also" if self.combine == "stacked" else "only",
                generator=generator,
            )
        return pl.parameters(self.model, self.names[-1])

    def objective(self, task: Task) -> Objective:
        """Return the loss of a stage, with the remedies in the settings."""
        settings, earlier = self.settings, self.names[:-1]
        penalties = (
            [self._overlap(name) for name in earlier] if settings.remedies.orthogonal else []
        )

        def objective(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
            logits = mask_or_shift_logits(model(inputs), task.classes, settings.remedies.margin)
            loss = nn.functional.cross_entropy(logits, labels)
            for penalty in penalties:
                loss = loss + settings.remedies.orthogonal * penalty(model)
            return loss

        return objective

    def _overlap(self, name: str) -> Callable[[nn.Module], Tensor]:
        state = pl.state_dict(self.model, name)
        earlier = {key: A.detach() for key, A in state.items() if key.endswith(".A")}
        paths = {}
        for key in earlier:
            module, tensor = key.removesuffix(".A").rsplit(".", 1)
            paths[key] = f"{module}.parametrizations.{tensor}.0.factors.{self.names[-1]}.A"
        return orthogonal(earlier, paths)

    @torch.no_grad()
    def answer(self, inputs: Tensor, tasks: Sequence[Task], number: int) -> Tensor:
        """Return predicted classes, int64 (n,), for images of task `number`."""
        task_given = self.settings.sequence.scenario == "task"
        if self.combine == "routed":
            logits = self._routed(inputs, tasks, number if task_given else None)
        elif self.combine == "merged" and self.names:
            share = dict.fromkeys(self.names, 1 / len(self.names))
            with pl.using(self.model, **share):
                logits = logits_of(self.model, inputs)
        else:
            logits = logits_of(self.model, inputs)
        if task_given:
            logits = mask_or_shift_logits(logits, tasks[number].classes, torch.inf)
        return logits.argmax(1)

    def _routed(self, inputs: Tensor, tasks: Sequence[Task], given: int | None) -> Tensor:
        """Return logits, (n, 10), by the given task's adapter or by each image's most confident.

        The confidence of a stage is its largest softmax probability among the classes of its task.
        Stage 0 is the base.
        """
        count = len(self.names) + 1
        if given is not None:
            return self._logits(given if given < count else 0, inputs)
        stage_logits, confidences = [], []
        for number in range(count):
            logits = self._logits(number, inputs)
            # A stage may only predict classes of its task.
            stage_logits.append(mask_or_shift_logits(logits, tasks[number].classes, torch.inf))
            p = logits.softmax(1)[:, list(tasks[number].classes)]
            confidences.append(p.max(1).values)  # (n,)
        best = torch.stack(confidences).argmax(0)  # (stages, n) → (n,)
        return torch.stack(stage_logits)[best, torch.arange(len(inputs), device=inputs.device)]

    def _logits(self, stage: int, inputs: Tensor) -> Tensor:
        """Return the logits, (n, 10), of the base (stage 0) or with the adapter of a stage."""
        if not self.names:  # before the first adapter is attached
            return logits_of(self.model, inputs)
        with pl.using(self.model, *self.names[stage - 1 : stage] if stage else ()):
            return logits_of(self.model, inputs)


@dataclass(frozen=True)
class TaskContext:
    """The settings, run, tasks and base weights that all stages of a run share."""

    settings: TaskSettings
    run: RunDirectory
    tasks: list[Task]
    base: dict[str, Tensor]

    def model(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            model = DigitNet(self.settings.network.hidden, "relu")
        model.load_state_dict(self.base)
        return model.to(self.tasks[0].test[0].device).eval()


def accuracies(learner: Learner, tasks: Sequence[Task], count: int | None = None) -> list[float]:
    """Return the accuracy on each task, or on each of the first `count` tasks."""
    return [
        float((learner.answer(task.test[0], tasks, number) == task.test[1]).float().mean())
        for number, task in enumerate(tasks[:count])
    ]


def learn(combine: str, seed: int, context: TaskContext) -> None:
    """Learn all tasks in order. Row: "learned", with the matrix and the first task's curve.

    The matrix a has one row per stage and one column per task, (T, T): a(i, j) is the accuracy on
    task j after stage i. Row 0 is the base, pre-trained on task 0. For T = 3:

                      task 0    task 1    task 2
        base          a(0, 0)   a(0, 1)   a(0, 2)
        stage 1       a(1, 0)   a(1, 1)   a(1, 2)
        stage 2       a(2, 0)   a(2, 1)   a(2, 2)

    The diagonal is the accuracy on a task just learned. Below it, a(i, j) - a(j, j) shows how much
    of task j was lost (negative) by stage i. Above it are tasks that were not learned yet.
    """
    settings, tasks = context.settings, context.tasks
    learner = Learner(settings, context.model(), combine)
    generator = torch.Generator().manual_seed(seed)
    matrix, curve = [accuracies(learner, tasks)], Curve()  # row 0: the base
    for number in range(1, len(tasks)):
        learn_stage(learner, tasks, number, generator, curve, f"{combine} {seed}")
        matrix.append(accuracies(learner, tasks))  # row `number`, (T,)
    firsts = [matrix[0][0], *curve.values["first"]]
    context.run.record(
        {
            "stage": "learned",
            "method": combine,
            "base_seed": settings.seed,
            "seed": seed,
            "tasks": [task.name for task in tasks],
            "matrix": matrix,
            **all_metrics(matrix),
            "WC-ACC of the first": worst_case_accuracy(matrix[-1][-1], [firsts]),
            "stability gap of the first": stability_gap(firsts),
            "way": {"steps": [0, *curve.steps], "first": firsts},
        }
    )


def learn_stage(
    learner: Learner,
    tasks: Sequence[Task],
    number: int,
    generator: torch.Generator,
    curve: Curve,
    label: str,
) -> None:
    """Learn the task of a stage, and add the accuracies on the first task during it to `curve`."""
    task, training = tasks[number], learner.settings.finetuning
    parameters = learner.begin(generator)
    order = seeded_order(len(task.train[1]), training.steps * training.batch, generator)
    batches = Batches(task.train, order, training.batch)
    before = (number - 1) * training.steps

    def look(step: int, model: nn.Module, loss: Tensor) -> None:
        curve(before + step, {"first": accuracies(learner, tasks, 1)[0]})

    optimizer = torch.optim.Adam(parameters, training.lr, fused=True)
    hooks, objective = [every(max(1, training.steps // 20), look)], learner.objective(task)
    with cpu_threads(learner.settings.place.threads):
        label = f"{label}, {task.name}"
        train(learner.model, batches, objective, optimizer, label=label, hooks=hooks)


def task_stages(settings: TaskSettings) -> Iterator[Stage[TaskContext]]:
    """Yield the stages of a run: one per method and adapter seed."""
    for combine in COMBINE:
        for seed in range(settings.seeds):
            key = {"method": combine, "seed": seed}
            yield Stage(key, ("learned",), partial(learn, combine, seed))


def run_tasks(settings: TaskSettings, say: Callable[[str], None] = print) -> RunDirectory:
    """Learn a sequence of tasks with every method; return the run."""
    device = resolve_device(settings.place.device)
    data = load_data(settings.dataset.data, settings.dataset.data_dir)
    environment = {"study": settings.STUDY, **describe(device, data)}
    run = RunDirectory.start(
        Path(settings.folder), result_settings(settings), environment, RESULT_KEYS
    )
    say(f"run      {run.folder}, on {device}")
    announce(data, say)

    def prepared() -> TaskContext:
        tasks = stream(settings, data.train.to(device), data.test.to(device))
        return TaskContext(settings, run, tasks, _pretrained(settings, tasks[0]))

    run_stages(run, task_stages(settings), prepared, say)
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
