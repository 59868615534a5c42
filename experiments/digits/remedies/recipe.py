"""A fine-tuning with the settings' remedies, made for the training loop: objective, batches, hooks.

With no remedy it is the plain one, bit for bit. Replayed images come from a generator of their own,
so that adding replay leaves images and A as they were.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...analysis.evaluate import logits_of
from ...harness.batches import Batches, seeded_order
from ...harness.loggers import EarlyStopping
from ...harness.train import Hook, Objective, cosine, cross_entropy, every, learning_rate
from ..context import StudyContext
from ..settings import DigitSettings
from .losses import distillation, kept_mass, mask_or_shift_logits
from .penalties import Penalty, base_weights, elastic, fisher
from .projection import Factors, forbidden, keep_out
from .replay import Joined, memory, memory_generator
from .routes import Gate, grouped, routed

FISHER_IMAGES = 200  # as many as EWC's information is estimated from
LOOK_EVERY = 10  # steps between two looks at the validation images


@dataclass
class Recipe:
    """What `train` needs for one adapter, and what is left to do after it."""

    objective: Objective
    batches: "Batches | Joined"
    hooks: list[Hook]
    optimizer: torch.optim.Optimizer
    restore: list[Callable[[], None]] = field(default_factory=list)

    def finish(self) -> None:
        """Put averaged or best parameters in place of the last ones."""
        for call in self.restore:
            call()


def draw_batches(
    context: StudyContext, plain: Batches, old: Tensor, generator: torch.Generator
) -> Batches | Joined:
    """Return the batches of a fine-tuning: images and labels, z⁰ and old ones where needed.

    Args:
        context: the data.
        plain: the batches without remedies.
        old: the rows of the replayed images, `memory`.
        generator: of the order in which they are replayed.
    """
    settings = context.settings
    tensors = plain.tensors
    if settings.remedies.distill or settings.remedies.mass:
        teacher = torch.zeros(len(context.labels), context.base_logits.shape[1], device=old.device)
        rows = plain.order.unique()
        teacher[rows] = switched_off_logits(context, rows)
        tensors = (*tensors, teacher)
    batches = Batches(tensors, plain.order, plain.size)
    if not settings.remedies.replay:
        return batches
    order = seeded_order(len(old), len(plain.order), generator)
    again = Batches((context.inputs, context.labels), old[order.to(old.device)], plain.size)
    return Joined(batches, again)


def switched_off_logits(context: StudyContext, rows: Tensor) -> Tensor:
    """Return z⁰ of training images. The base is the adapted model switched off, bit for bit."""
    return logits_of(context.model(), context.inputs[rows])


def objective_of(
    settings: DigitSettings, tuned: Sequence[int], penalty: Penalty | None
) -> Objective:
    """Return the loss that the settings ask for, in nats:

        CE(z lowered by m, y) + β · distillation + μ · kept mass + CE of replayed images + penalty

    An infinite m and a replay of all digits is ER-ACE (`losses.mask_or_shift_logits`).

    It is called with a batch of `draw_batches`; every term is a mean over its images.
    """
    remedies = settings.remedies
    if not (remedies.margin or remedies.distill or remedies.mass or remedies.replay or penalty):
        return cross_entropy

    def objective(model: nn.Module, inputs: Tensor, labels: Tensor, *more: Tensor) -> Tensor:
        rest, count = list(more), len(labels)
        teacher = rest.pop(0) if remedies.distill or remedies.mass else None
        old_inputs, old_labels = rest if remedies.replay else (inputs[:0], labels[:0])
        both = model(torch.cat([inputs, old_inputs]) if remedies.replay else inputs)
        logits, old = both[:count], both[count:]
        loss = F.cross_entropy(mask_or_shift_logits(logits, tuned, remedies.margin), labels)
        if teacher is not None and remedies.distill:
            loss = loss + remedies.distill * distillation(logits, teacher, remedies.temperature)
        if teacher is not None and remedies.mass:
            loss = loss + remedies.mass * kept_mass(logits, teacher, tuned)
        if remedies.replay:
            loss = loss + F.cross_entropy(old, old_labels)
        return loss if penalty is None else loss + penalty(model)

    return objective


def penalty_of(context: StudyContext, images: Tensor) -> Penalty | None:
    """Return the penalty of EWC, its Fisher information from these images, or None."""
    weight = context.settings.remedies.ewc
    if not weight:
        return None
    model = context.model()
    paths = [name for name, p in model.named_parameters() if p.dim() == 2]
    information = fisher(model, paths, images, torch.Generator().manual_seed(0))
    plain = elastic(base_weights(model, paths), information)
    return lambda adapted: weight * plain(adapted)


def recipe(
    context: StudyContext, model: nn.Module, factors: Factors, plain: Batches, seed: int
) -> Recipe:
    """Return the fine-tuning of one adapter with the settings' remedies.

    Args:
        context: the data, the base and the settings.
        model: the base with the adapter attached.
        factors: the adapter's, by their names in the model; stacked ones do as well.
        plain: the batches of the plain fine-tuning.
        seed: the adapter seed, for the replayed images.
    """
    settings, generator = context.settings, memory_generator(seed)
    replayed = context.tuned_rows[:0]
    if settings.remedies.replay:
        replayed = memory(context, generator, settings.remedies.replay_of)
    tuned = torch.tensor(context.tuned, device=replayed.device)
    old = replayed[~torch.isin(context.labels[replayed], tuned)]
    seen = old if settings.remedies.replay else context.tuned_rows
    penalty = penalty_of(context, context.inputs[seen[:FISHER_IMAGES]])
    made = Recipe(
        objective_of(settings, context.tuned, penalty),
        draw_batches(context, plain, replayed, generator),
        [],
        torch.optim.Adam(factors.values(), settings.finetuning.lr, fused=True),
    )
    _add_hooks(made, context, model, factors, old)
    return made


def _add_hooks(
    made: Recipe, context: StudyContext, model: nn.Module, factors: Factors, old: Tensor
) -> None:
    """Add the hooks of schedule, null space, average and early stopping, in this order."""
    settings, training = context.settings, context.settings.finetuning
    remedies, parameters = settings.remedies, list(factors.values())
    if remedies.schedule == "cosine":
        made.hooks.append(learning_rate(made.optimizer, cosine(training.lr, training.steps)))
    if remedies.null_space:
        made.hooks.append(keep_out(factors, forbidden(context, old)))
    if remedies.average:
        average = Average(parameters, round(training.steps * (1 - remedies.average)))
        made.hooks.append(average)
        made.restore.append(average.restore)
    if settings.holdout.patience:
        stopping = EarlyStopping(context.validated, parameters, settings.holdout.patience)
        stopping(0, model)
        made.hooks.append(every(LOOK_EVERY, stopping))
        made.restore.append(stopping.restore)


def answers(context: StudyContext, on: Tensor, seed: int) -> Tensor:
    """Return the logits that count: those with the adapter on, or as the settings route them.

    Args:
        context: the settings, and z⁰ of the test images.
        on: z of the test images, (n, classes).
        seed: the adapter seed, whose replayed images a gate learns from.
    """
    route, off = context.settings.remedies.route, context.base_logits
    if route == "base":
        return routed(on, off, context.tuned)
    if route == "soft":
        return grouped(on, off, context.tuned)
    if route == "gate":
        old = memory(context, memory_generator(seed))
        rows = torch.cat([context.tuned_rows[: 10 * len(old)], old])
        is_tuned = torch.isin(context.labels[rows], torch.tensor(context.tuned, device=rows.device))
        return Gate(switched_off_logits(context, rows), is_tuned)(on, off)
    return on


class Average:
    """A hook that averages parameters over the steps after the first `start`.

    Source: Izmailov et al. 2018, "Averaging weights leads to wider optima" (SWA), arXiv 1803.05407.
    """

    def __init__(self, parameters: Sequence[Tensor], start: int) -> None:
        self.parameters, self.start, self.count = list(parameters), start, 0
        self.means = [torch.zeros_like(p, requires_grad=False) for p in self.parameters]

    @torch.no_grad()
    def __call__(self, step: int, model: nn.Module, loss: Tensor) -> None:
        if step > self.start:
            self.count += 1
            for mean, parameter in zip(self.means, self.parameters, strict=True):
                mean += (parameter - mean) / self.count

    @torch.no_grad()
    def restore(self) -> None:
        """Give the parameters their means, if any step was averaged."""
        for mean, parameter in zip(self.means, self.parameters, strict=True):
            if self.count:
                parameter.copy_(mean)
