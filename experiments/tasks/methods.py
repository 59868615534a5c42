"""The methods of the recipe three-types that train all weights. three_types.py describes them."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..analysis.evaluate import logits_of
from .contexts import Contexts, Draws
from .regularizers import PathIntegral, Quadratic, fisher, lwf, replayed, stored_rows
from .settings import EWC_LAMBDA, SI_C, TaskSettings


class Method:
    """A method that trains all weights; this class is `none`, and the base of the others."""

    def __init__(
        self, settings: TaskSettings, contexts: Contexts, model: nn.Module, seed: int
    ) -> None:
        self.settings, self.contexts, self.model, self.seed = settings, contexts, model, seed

    def generator(self, context: int, use: int = 0) -> torch.Generator:
        """Return a generator that depends on the seed, the context and the use."""
        return torch.Generator().manual_seed((self.seed * 1000 + context) * 10 + use)

    def pool(self, context: int) -> tuple[Tensor, Tensor]:
        """Return the rows and contexts that a context draws its batches from."""
        return self.contexts.pool([context])

    def begin(self, context: int) -> list[nn.Parameter] | None:
        """Prepare a context; return its parameters if they have changed."""
        return None

    def follow(self, optimizer: torch.optim.Optimizer) -> None:
        """Watch the steps of a context's optimizer."""

    def end(self, context: int) -> None:
        """Finish a context, the first included."""

    def objective(self, context: int) -> Callable[..., Tensor]:
        """Return the loss of a batch of a context."""

        def loss(
            model: nn.Module, x: Tensor, units: Tensor, owners: Tensor, rows: Tensor
        ) -> Tensor:
            logits = model(x)
            masked = self.contexts.masked(logits, owners, context)
            return F.cross_entropy(masked, units) + self.penalty(logits, rows, context)

        return loss

    def penalty(self, logits: Tensor, rows: Tensor, context: int) -> Tensor | float:
        """Return what is added to the cross-entropy of a batch."""
        return 0.0

    def logits(self, inputs: Tensor, owners: Tensor, learned: int) -> Tensor:
        """Return logits, (n, units), after `learned` contexts; inactive units have -∞."""
        return self.contexts.masked(logits_of(self.model, inputs), owners, learned - 1)


class Joint(Method):
    """Training on the images of all contexts so far."""

    def pool(self, context: int) -> tuple[Tensor, Tensor]:
        return self.contexts.pool(range(context + 1))


class EWC(Method):
    """Elastic weight consolidation."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        authors = EWC_LAMBDA[self.settings.sequence.stream][self.contexts.scenario]
        self.weight, self.sum = self.settings.continual.ewc_lambda or authors, Quadratic()

    def end(self, context: int) -> None:
        inputs = self.contexts.examples(self.contexts.train, context).inputs
        found = fisher(self.model, inputs, self.contexts.active[context])
        self.sum.add(found, [p.detach().clone() for p in self.model.parameters()])

    def penalty(self, logits: Tensor, rows: Tensor, context: int) -> Tensor:
        return self.weight / 2 * self.sum(list(self.model.parameters()))


class SI(Method):
    """Synaptic intelligence."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        authors = SI_C[self.settings.sequence.stream][self.contexts.scenario]
        self.weight = self.settings.continual.si_c or authors
        self.integral: PathIntegral | None = None

    def start(self, importance: list[Tensor]) -> None:
        """Take over the importance after the first context."""
        self.omega = [part.clone() for part in importance]
        self.anchor = [p.detach().clone() for p in self.model.parameters()]

    def follow(self, optimizer: torch.optim.Optimizer) -> None:
        self.integral = PathIntegral(list(self.model.parameters()), optimizer)

    def end(self, context: int) -> None:
        if self.integral is not None:  # after the first context `start` has it
            for total, part in zip(self.omega, self.integral.importance(), strict=True):
                total += part
            self.anchor = [p.detach().clone() for p in self.model.parameters()]

    def penalty(self, logits: Tensor, rows: Tensor, context: int) -> Tensor:
        parts = zip(self.omega, self.anchor, self.model.parameters(), strict=True)
        return self.weight * torch.stack([(o * (p - a) ** 2).sum() for o, a, p in parts]).sum()


class LwF(Method):
    """Learning without forgetting."""

    @torch.no_grad()
    def begin(self, context: int) -> None:
        side, rows = self.contexts.train, self.contexts.train.members[context]
        self.teacher = side.images.new_zeros(len(side.labels), self.contexts.outputs)
        for part in rows.split(5000):
            batch = self.contexts.batch(side, part, torch.full_like(part, context))
            self.teacher[part] = self.model(batch.inputs)
        scenario, active = self.contexts.scenario, self.contexts.active
        groups = [units.nonzero().squeeze(1) for units in active[: context + 1]]
        self.groups = groups[:-1] if scenario == "task" else groups[-1:]
        self.weight = self.settings.continual.lwf_weight
        if scenario == "domain":
            # The authors sum over the earlier contexts, which all have the same units.
            self.weight *= context
        elif scenario == "class" and self.contexts.masks:
            # In their first code the new units have a target of 0, the mean is over the units of
            # all k contexts so far, and the distillation weighs k - 1 times the cross-entropy.
            self.teacher[:, ~active[context - 1]] = -torch.inf
            self.weight *= context / (context + 1)

    def penalty(self, logits: Tensor, rows: Tensor, context: int) -> Tensor:
        temperature = self.settings.continual.temperature
        return self.weight * lwf(logits, self.teacher[rows], self.groups, temperature)


class ER(Method):
    """Experience replay of stored images."""

    memory: tuple[Tensor, Tensor] | None = None

    def end(self, context: int) -> None:
        side = self.contexts.train
        generator, each = self.generator(context, 1), self.settings.continual.replay
        rows = stored_rows(side.members[context], side.labels, each, generator)
        new = rows, torch.full_like(rows, context)
        if self.memory is not None:
            new = torch.cat([self.memory[0], new[0]]), torch.cat([self.memory[1], new[1]])
        self.memory = new

    def objective(self, context: int) -> Callable[..., Tensor]:
        assert self.memory is not None
        training = self.settings.finetuning
        stored = iter(
            Draws(
                self.contexts,
                self.memory,
                training.steps,
                training.batch,
                self.generator(context, 2),
            )
        )

        def loss(
            model: nn.Module, x: Tensor, units: Tensor, owners: Tensor, rows: Tensor
        ) -> Tensor:
            old_x, old_units, old_owners, _ = next(stored)
            logits = model(torch.cat([x, old_x]))
            masked = self.contexts.masked(logits, torch.cat([owners, old_owners]), context)
            now, old = masked.split([len(x), len(old_x)])
            current, earlier = F.cross_entropy(now, units), F.cross_entropy(old, old_units)
            return replayed(current, earlier, context + 1)

        return loss
