"""The methods of learning a sequence of tasks on one base.

    one        a single adapter trains in all stages
    stacked    each stage adds an adapter; the earlier adapters stay on, frozen
    merged     each stage trains an adapter alone on the base; at the end all k adapters are on,
               each at strength 1/k
               (Ilharco et al. 2023, "Editing models with task arithmetic", arXiv 2212.04089)
    routed     trained as merged; the adapter of the given task answers, or the most confident one
    full       no adapter: each stage trains all weights; the usual baseline for forgetting
    joint-lora as `one`, but each stage draws its images from all tasks so far
    joint      as `full`, but each stage draws its images from all tasks so far

The joint methods need the images of all earlier tasks, which the others do not. They show what
can be learned in the same number of steps if nothing has to be forgotten.

Scenarios (van de Ven et al. 2022, "Three types of incremental learning"): in `task`, the task of
each test image is given and only its classes count. In the others it is not given. `class` is that
of split tasks, which have different classes, and `domain` that of rotated and permuted tasks, which
have the same ones.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

import paramlora as pl

from ..analysis.evaluate import logits_of
from ..digits.remedies.losses import mask_or_shift_logits
from ..digits.remedies.penalties import orthogonal
from ..harness.batches import seeded_order
from ..harness.train import Objective
from .settings import FULL, TaskSettings
from .streams import Task


class Learner:
    """A base with the adapters of its stages, or all its weights, and a method of `METHODS`."""

    def __init__(self, settings: TaskSettings, model: nn.Module, combine: str) -> None:
        self.settings, self.model, self.combine = settings, model, combine
        self.names: list[str] = []

    def begin(self, generator: torch.Generator) -> list[nn.Parameter]:
        """Start a stage; return its trainable parameters."""
        if self.combine in FULL:
            return list(self.model.parameters())
        if self.combine not in ("one", "joint-lora") or not self.names:
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

    @property
    def rate(self) -> float:
        """The learning rate of the stages."""
        training = self.settings.finetuning
        return training.full_lr if self.combine in FULL else training.lr

    def task_of_stage(
        self, tasks: Sequence[Task], number: int, generator: torch.Generator
    ) -> tuple[Task, Tensor]:
        """Return the task that a stage trains on, and the order in which it draws its images."""
        training = self.settings.finetuning
        count = training.steps * training.batch
        if self.combine.startswith("joint"):
            joint = drawn_jointly(tasks[: number + 1], count, generator)
            return joint, torch.arange(count)
        return tasks[number], seeded_order(len(tasks[number].train[1]), count, generator)

    def objective(self, task: Task) -> Objective:
        """Return the loss of a stage, with the remedies in the settings."""
        settings, earlier = self.settings, self.names[:-1]
        penalties = [self.overlap(name) for name in earlier] if settings.remedies.orthogonal else []

        def objective(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
            logits = mask_or_shift_logits(model(inputs), task.classes, settings.remedies.margin)
            loss = nn.functional.cross_entropy(logits, labels)
            for penalty in penalties:
                loss = loss + settings.remedies.orthogonal * penalty(model)
            return loss

        return objective

    def overlap(self, name: str) -> Callable[[nn.Module], Tensor]:
        """Return O-LoRA's penalty on the overlap of the last adapter with an earlier one."""
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


def drawn_jointly(tasks: Sequence[Task], count: int, generator: torch.Generator) -> Task:
    """Return a task of `count` training images, drawn in random order from those of all `tasks`.

    Only the drawn images are copied, because all images of all tasks take gigabytes.
    """
    sizes = torch.tensor([len(task.train[1]) for task in tasks])
    starts = sizes.cumsum(0) - sizes
    order = seeded_order(int(sizes.sum()), count, generator)  # numbers of images over all tasks
    owner = torch.searchsorted(starts, order, right=True) - 1
    first = tasks[0].train
    images, labels = first[0].new_empty(count, *first[0].shape[1:]), first[1].new_empty(count)
    for number, task in enumerate(tasks):
        places = (owner == number).nonzero().squeeze(1)
        rows = (order[places] - starts[number]).to(labels.device)
        images[places.to(labels.device)] = task.train[0][rows]
        labels[places.to(labels.device)] = task.train[1][rows]
    classes = sorted({label for task in tasks for label in task.classes})
    return Task("all so far", tuple(classes), (images, labels), tasks[-1].test)
