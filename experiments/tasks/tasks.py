"""Sequences of tasks: one adapter a stage on one base, and the accuracy matrix that comes of it.

How the stages' adapters are used together:

    one        a single adapter goes on training: what forgets
    stacked    a new adapter a stage beside the earlier ones, which stay on and are frozen
    merged     an adapter a stage on the base alone; all on, each at strength 1/k, the mean update
               (Ilharco et al. 2023, "Editing models with task arithmetic", arXiv 2212.04089)
    routed     as merged, but one answers: the task's own where the task is told, else the surest

Scenarios: in `task` the task of an image is told and only its classes count; in `class` it is not
(van de Ven et al. 2022, "Three types of incremental learning"). Rotated and permuted tasks have the
same classes, so that only the route differs.
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
from ..digits.data import describe, load_data
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
    """A base with an adapter a stage, and the way in which they answer together."""

    def __init__(self, settings: TaskSettings, model: nn.Module, combine: str) -> None:
        self.settings, self.model, self.combine = settings, model, combine
        self.names: list[str] = []

    def begin(self, generator: torch.Generator) -> list[nn.Parameter]:
        """Start a stage; return the parameters that train."""
        if self.combine != "one" or not self.names:
            self.names.append(f"stage{len(self.names) + 1}")
            spec = pl.LoRA(self.settings.adapter.rank, self.settings.adapter.alpha)
            pl.attach(self.model, spec, nn.Linear, name=self.names[-1], generator=generator)
            if self.names[:-1]:
                pl.freeze(self.model, *self.names[:-1])
        if self.combine in ("merged", "routed"):
            pl.disable(self.model)
            pl.enable(self.model, self.names[-1])
        return pl.parameters(self.model, self.names[-1])

    def objective(self, task: Task) -> Objective:
        """Return the loss of a stage, with the remedies that the settings ask for."""
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
    def answer(self, inputs: Tensor, tasks: Sequence[Task], of: int) -> Tensor:
        """Return the answers to images of task `of`, int64 (n,), after the stages so far."""
        told = self.settings.sequence.scenario == "task"
        if self.combine == "routed":
            logits = self._routed(inputs, tasks, of if told else None)
        elif self.combine == "merged" and self.names:
            share = dict.fromkeys(self.names, 1 / len(self.names))
            with pl.using(self.model, **share):
                logits = logits_of(self.model, inputs)
        else:
            logits = logits_of(self.model, inputs)
        if told:
            logits = mask_or_shift_logits(logits, tasks[of].classes, torch.inf)
        return logits.argmax(1)

    def _routed(self, inputs: Tensor, tasks: Sequence[Task], of: int | None) -> Tensor:
        """Return the logits of the told task's adapter, or those of the surest.

        How sure the model of a stage is: the largest softmax probability of a class of its task.
        """
        count = len(self.names) + 1
        if of is not None:
            with pl.using(self.model, *([self.names[of - 1]] if 0 < of < count else [])):
                return logits_of(self.model, inputs)
        found, sure = [], []
        for number in range(count):
            with pl.using(self.model, *([self.names[number - 1]] if number else [])):
                logits = logits_of(self.model, inputs)
            # Each answers for its own task's classes only.
            found.append(mask_or_shift_logits(logits, tasks[number].classes, torch.inf))
            p = logits.softmax(1)[:, list(tasks[number].classes)]
            sure.append(p.max(1).values)
        best = torch.stack(sure).argmax(0)
        return torch.stack(found)[best, torch.arange(len(inputs), device=inputs.device)]


@dataclass(frozen=True)
class TaskContext:
    """What the stages of a run share."""

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
    """Return the accuracy on each task, or on the first `count`."""
    return [
        float((learner.answer(task.test[0], tasks, number) == task.test[1]).float().mean())
        for number, task in enumerate(tasks[:count])
    ]


def learn(combine: str, seed: int, context: TaskContext) -> None:
    """Learn all tasks in order. Row: "learned", with the matrix and the first task's curve."""
    settings, tasks = context.settings, context.tasks
    learner = Learner(settings, context.model(), combine)
    generator = torch.Generator().manual_seed(seed)
    matrix, curve = [accuracies(learner, tasks)], Curve()
    for number in range(1, len(tasks)):
        learn_stage(learner, tasks, number, generator, curve, f"{combine} {seed}")
        matrix.append(accuracies(learner, tasks))
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
    """Learn the task of a stage; add the accuracies on the first task meanwhile to the curve."""
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
    """Yield what a run consists of."""
    for combine in COMBINE:
        for seed in range(settings.seeds):
            key = {"method": combine, "seed": seed}
            yield Stage(key, ("learned",), partial(learn, combine, seed))


def run_tasks(settings: TaskSettings, say: Callable[[str], None] = print) -> RunDirectory:
    """Run all methods of using adapters together over a sequence of tasks; return the run."""
    device = resolve_device(settings.place.device)
    data = load_data(settings.dataset.data, settings.dataset.data_dir)
    environment = {"study": settings.STUDY, **describe(device, data)}
    run = RunDirectory.start(
        Path(settings.folder), result_settings(settings), environment, RESULT_KEYS
    )
    say(f"run      {run.folder}, on {device}; data {data.name}: {data.why}")

    def prepared() -> TaskContext:
        tasks = stream(settings, data.train.to(device), data.test.to(device))
        return TaskContext(settings, run, tasks, _pretrained(settings, tasks[0]))

    run_stages(run, task_stages(settings), prepared, say)
    return run


def _pretrained(settings: TaskSettings, task: Task) -> dict[str, Tensor]:
    """Return the weights of a network trained on the first task; the global generator is left."""
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
