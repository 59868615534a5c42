"""The methods of the recipe three-types that train adapters. three_types.py describes them."""

from typing import Any

import torch
from torch import Tensor, nn

import paramlora as pl

from ..analysis.evaluate import logits_of
from .learner import Learner
from .methods import Method
from .regularizers import design, input_energy, protect


class Adapters(Method):
    """One adapter on the weights after the first context; the base of the other methods."""

    combine = "one"

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.learner = Learner(self.settings, self.model, self.combine)

    def begin(self, context: int) -> list[nn.Parameter] | None:
        names = len(self.learner.names)
        parameters = self.learner.begin(self.generator(context, 3))
        return parameters if len(self.learner.names) > names else None


class Routed(Adapters):
    """One adapter per context; the context's own or the most confident one answers."""

    combine = "routed"

    def logits(self, inputs: Tensor, owners: Tensor, learned: int) -> Tensor:
        contexts, given = self.contexts, int(owners[0])
        if contexts.scenario == "task":
            own = self._of(given if given < learned else 0, inputs)
            return contexts.masked(own, owners, learned - 1)
        every_one, confidences = [], []
        for number in range(learned):
            logits = self._of(number, inputs)
            if contexts.scenario == "class":  # a context may only answer its own classes
                own = torch.arange(contexts.outputs, device=logits.device) // contexts.per == number
                logits = logits.masked_fill(~own, -torch.inf)
            every_one.append(logits)
            confidences.append(logits.softmax(1).amax(1))  # (n,)
        best = torch.stack(confidences).argmax(0)
        return torch.stack(every_one)[best, torch.arange(len(inputs), device=best.device)]

    def _of(self, context: int, inputs: Tensor) -> Tensor:
        names = self.learner.names
        if not names:
            return logits_of(self.model, inputs)
        with pl.using(self.model, *names[context - 1 : context] if context else ()):
            return logits_of(self.model, inputs)


class OLoRA(Adapters):
    """Adapters that add up, with O-LoRA's penalty."""

    combine = "stacked"

    def begin(self, context: int) -> list[nn.Parameter] | None:
        parameters = super().begin(context)
        self.overlaps = [self.learner.overlap(name) for name in self.learner.names[:-1]]
        return parameters

    def penalty(self, logits: Tensor, rows: Tensor, context: int) -> Tensor | float:
        found = [overlap(self.model) for overlap in self.overlaps]
        return self.settings.remedies.orthogonal * sum(found)


class InfLoRA(Adapters):
    """Adapters that add up, with A designed from the context's inputs. Only B trains."""

    combine = "stacked"

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        # The modules stay the same objects when adapters are attached.
        self.layers = [m for m in self.model.modules() if isinstance(m, nn.Linear)]
        self.bases = [layer.weight.new_zeros(layer.in_features, 0) for layer in self.layers]

    def _energies(self, context: int) -> list[Tensor]:
        inputs = self.contexts.examples(self.contexts.train, context).inputs
        return input_energy(self.model, self.layers, inputs)

    def begin(self, context: int) -> list[nn.Parameter]:
        energies, rank = self._energies(context), self.settings.adapter.rank
        super().begin(context)
        factors = {key: p for key, p in self.model.named_parameters() if p.requires_grad}
        A = [p for key, p in factors.items() if key.endswith(".A")]
        for p, energy, basis in zip(A, energies, self.bases, strict=True):
            p.requires_grad_(False)
            with torch.no_grad():
                p.copy_(design(energy, basis, rank))
        return [p for key, p in factors.items() if key.endswith(".B")]

    def end(self, context: int) -> None:
        share = self.settings.continual.energy
        pairs = zip(self._energies(context), self.bases, strict=True)
        self.bases = [protect(energy, basis, share) for energy, basis in pairs]
