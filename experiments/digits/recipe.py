"""A fine-tuning with the settings' remedies, made for the training loop: objective, batches, hooks.

With no remedy it is the plain one, bit for bit. Replayed images come from a generator of their own,
so that adding replay leaves images and A as they were.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import paramlora as pl

from ..analysis.evaluate import logits_of
from ..harness.batches import Batches, seeded_order
from ..harness.loggers import EarlyStopping
from ..harness.train import Hook, Objective, cosine, cross_entropy, every, learning_rate
from .context import ADAPTER, StudyContext
from .remedies import (
    Average,
    Gate,
    Penalty,
    base_weights,
    distillation,
    elastic,
    fisher,
    grouped,
    kept_mass,
    mask_or_shift_logits,
    principal,
    project_away,
    routed,
)
from .settings import AdapterSettings, DigitSettings

FISHER_IMAGES = 200  # as many as EWC's information is estimated from
LOOK_EVERY = 10  # steps between two looks at the validation images
Factors = Mapping[str, Tensor]


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


class Joined:
    """Several sources of batches side by side: each batch has the tensors of all."""

    def __init__(self, *sources: Batches) -> None:
        self.sources = sources

    def __len__(self) -> int:
        return min(map(len, self.sources))

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        for parts in zip(*self.sources, strict=True):
            yield tuple(tensor for part in parts for tensor in part)


def memory_generator(seed: int) -> torch.Generator:
    """Return the generator that draws an adapter seed's replayed images."""
    return torch.Generator().manual_seed(seed + 2**40)


def memory(context: StudyContext, generator: torch.Generator, digits: str = "old") -> Tensor:
    """Return the rows of the images that are replayed, the same number a digit, int64 (n,).

    Those of the old digits come first, and are the same with and without the tuned ones.
    """
    rows = []
    old = sorted(set(context.labels.unique().tolist()) - set(context.tuned))
    for digit in old + (context.tuned if digits == "all" else []):
        its = (context.labels == digit).nonzero().squeeze(1)
        chosen = torch.randperm(len(its), generator=generator)[: context.settings.remedies.replay]
        rows.append(its[chosen.to(its.device)])
    return torch.cat(rows)


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

    An infinite m and a replay of all digits is ER-ACE (`remedies.mask_or_shift_logits`).

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


def forbidden(context: StudyContext, old: Tensor) -> dict[str, Tensor]:
    """Return the directions that A may not read, (k, in), by the layer's path."""
    settings, model = context.settings, context.model()
    layers = {path: m for path, m in model.named_modules() if isinstance(m, nn.Linear)}
    if settings.remedies.null_space_of == "weights":
        seen = {path: layer.weight.detach() for path, layer in layers.items()}
    else:
        seen = {}
        hooks = [
            layer.register_forward_pre_hook(lambda _, x, path=path: seen.update({path: x[0]}))
            for path, layer in layers.items()
        ]
        logits_of(model, context.inputs[old])
        for hook in hooks:
            hook.remove()
    return {path: principal(rows, settings.remedies.null_space) for path, rows in seen.items()}


def keep_out(factors: Factors, directions: Mapping[str, Tensor]) -> Hook:
    """Return a hook that keeps every A of `factors` out of its layer's directions, from now on."""
    pairs = [
        (factor, directions[name.split(".parametrizations.")[0]])
        for name, factor in factors.items()
        if name.endswith(".A")
    ]

    def hook(step: int, model: nn.Module, loss: Tensor) -> None:
        for factor, its in pairs:
            project_away(factor, its)

    hook(0, nn.Identity(), torch.tensor(0.0))
    return hook


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
    settings, parameters = context.settings, list(factors.values())
    generator = memory_generator(seed)
    rows = (
        memory(context, generator, settings.remedies.replay_of)
        if settings.remedies.replay
        else None
    )
    replayed = context.tuned_rows[:0] if rows is None else rows
    others = ~torch.isin(
        context.labels[replayed], torch.tensor(context.tuned, device=replayed.device)
    )
    old = replayed[others]
    seen = old if settings.remedies.replay else context.tuned_rows
    penalty = penalty_of(context, context.inputs[seen[:FISHER_IMAGES]])
    made = Recipe(
        objective_of(settings, context.tuned, penalty),
        draw_batches(context, plain, replayed, generator),
        [],
        torch.optim.Adam(parameters, settings.finetuning.lr, fused=True),
    )
    if settings.remedies.schedule == "cosine":
        schedule = cosine(settings.finetuning.lr, settings.finetuning.steps)
        made.hooks.append(learning_rate(made.optimizer, schedule))
    if settings.remedies.null_space:
        made.hooks.append(keep_out(factors, forbidden(context, old)))
    if settings.remedies.average:
        average = Average(
            parameters, round(settings.finetuning.steps * (1 - settings.remedies.average))
        )
        made.hooks.append(average)
        made.restore.append(average.restore)
    if settings.holdout.patience:
        stopping = EarlyStopping(context.validated, parameters, settings.holdout.patience)  # type: ignore
        stopping(0, model)
        made.hooks.append(every(LOOK_EVERY, stopping))
        made.restore.append(stopping.restore)
    return made


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


def factors_of(model: nn.Module, name: str = ADAPTER) -> dict[str, nn.Parameter]:
    """Return an adapter's factors by their names among the model's parameters."""
    its = {id(parameter) for parameter in pl.parameters(model, name)}
    return {key: p for key, p in model.named_parameters() if id(p) in its}


def lora_of(settings: AdapterSettings) -> pl.LoRA:
    """Return the adapter that the settings ask for."""
    return pl.LoRA(settings.rank, settings.numerator, init=settings.init)
