"""The objective, batches and hooks of a fine-tuning with the remedies in the settings.

Without remedies the fine-tuning is bit-for-bit the plain one. Replayed images are drawn from a
separate generator. Drawing them from the adapter's generator would change the order of the tuned
images and the initial A, so that runs with and without replay could not be compared in pairs.

Note [Stacked seeds]

Sweeps train many seeds at once. `factors` are then stacked, A: (seeds, r, in) and B: (seeds, out,
r). torch.func.vmap calls the objective once for all seeds, and inside it sees A: (r, in) and B:
(out, r). The code in this folder must work for both forms:

- Penalties read A and W' from the model inside the call. A tensor read before training would be
  that of a single seed.
- Projection and averaging act on the stacked tensors directly, along the last dimensions.
- Adam is elementwise, so a single Adam over the stack makes the same steps, up to rounding, as one
  Adam per seed.
- Early stopping is not possible, because it ends the seeds at different steps.
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

FISHER_IMAGES = 200  # the most images to estimate the Fisher information from
LOOK_EVERY = 10  # steps between evaluations on the validation images


@dataclass
class Recipe:
    """The arguments of `train` for one adapter, and the calls to make after training."""

    objective: Objective
    batches: "Batches | Joined"
    hooks: list[Hook]
    optimizer: torch.optim.Optimizer
    restore: list[Callable[[], None]] = field(default_factory=list)

    def finish(self) -> None:
        """Replace the last parameters by the averaged or the best ones."""
        for call in self.restore:
            call()


def draw_batches(
    context: StudyContext, plain: Batches, old: Tensor, generator: torch.Generator
) -> Batches | Joined:
    """Return the batches of a fine-tuning: images and labels, with z⁰ and old images if needed.

    Args:
        context: the data and the settings.
        plain: the batches without remedies.
        old: the rows of the replayed images, from `memory`, int64 (n,).
        generator: the generator of the order in which old images are replayed.
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
    """Return z⁰ of training images, (n, classes), computed with the base."""
    return logits_of(context.model(), context.inputs[rows])


def objective_of(
    settings: DigitSettings, tuned: Sequence[int], penalty: Penalty | None
) -> Objective:
    """Return the objective of the settings, in nats:

        CE(shifted z, y) + β · distillation + μ · kept mass + CE(z, y of replayed images) + penalty

    Each term except the penalty is a mean over its images. The objective takes a batch of
    `draw_batches`. A margin of ∞ with the replay of all digits is ER-ACE (see
    `losses.mask_or_shift_logits`).

    Args:
        settings: the remedies.
        tuned: the classes C.
        penalty: a function of the model that is added to the loss, or None.
    """
    remedies = settings.remedies
    if not (remedies.margin or remedies.distill or remedies.mass or remedies.replay or penalty):
        return cross_entropy

    def objective(model: nn.Module, inputs: Tensor, labels: Tensor, *more: Tensor) -> Tensor:
        rest, count = list(more), len(labels)
        teacher = rest.pop(0) if remedies.distill or remedies.mass else None
        old_inputs, old_labels = rest if remedies.replay else (inputs[:0], labels[:0])
        # One pass over new and old images: (batch, 784) and (batch, 784) -> (2 · batch, classes).
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
    """Return the EWC penalty with the Fisher information of these images, or None if it is off."""
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
    """Return the fine-tuning of one adapter with the remedies in the settings.

    Args:
        context: the data, the base and the settings.
        model: the base with the adapter attached.
        factors: the adapter's factors by parameter name; they may be stacked, see Note [Stacked
            seeds].
        plain: the batches of the plain fine-tuning.
        seed: the adapter seed, which determines the replayed images.
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
    """Add the hooks of schedule, null space, averaging and early stopping, in this order.

    The order matters: the average and the best parameters must be those after the projection.
    """
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
    """Return the logits of the predictions: those with the adapter on, or routed by the settings.

    Args:
        context: the settings, and z⁰ of the test images.
        on: z of the test images, (n, classes).
        seed: the adapter seed, which determines the old images that a gate is trained on.
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
    """A hook that averages parameters over all steps after step `start`.

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
        """Set the parameters to their means, if any step was averaged."""
        for mean, parameter in zip(self.means, self.parameters, strict=True):
            if self.count:
                parameter.copy_(mean)
