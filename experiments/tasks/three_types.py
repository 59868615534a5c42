"""The experiments of van de Ven and Tolias on three types of incremental learning, with adapters.

    none     each context trains all weights
    ewc, si  as none, with a penalty on the change of weights that matter to earlier contexts
    lwf      as none, and distils the model before the context on the context's images
    er       as none, with stored images of earlier contexts in each batch
    joint    each context trains all weights on the images of all contexts so far ("offline")
    one      after the first context, one adapter trains in all contexts
    routed   each context after the first has its own adapter on the weights after the first; with
             the task given it answers, otherwise the most confident context does
    o-lora   adapters are added up, with a penalty on the overlap of their A (arXiv 2310.14152)
    inflora  adapters are added up, with a fixed A orthogonal to earlier inputs (arXiv 2404.00228)

methods.py and adapters.py have the methods, regularizers.py the formulas, contexts.py the data. The
first context is learned once for all methods, because it is the same for all of them: all weights
with the cross-entropy. Methods without adapters continue from its weights and from the state of
its Adam. The adapters are on these weights, each with a new Adam.
"""

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn

from ..analysis.task_metrics import all_metrics, stability_gap, worst_case_accuracy
from ..digits.data import Split
from ..digits.model import DigitNet
from ..harness.rundir import RunDirectory
from ..harness.stages import Stage
from ..harness.train import cpu_threads, every, train
from .adapters import Adapters, InfLoRA, OLoRA, Routed
from .contexts import Contexts, Draws
from .methods import ER, EWC, SI, Joint, LwF, Method
from .regularizers import PathIntegral
from .settings import TaskSettings

WATCHED = 1000  # test images of each earlier context that are evaluated during a context
LOOKS = 20  # evaluations during a context

KINDS: dict[str, type[Method]] = {
    "none": Method,
    "joint": Joint,
    "ewc": EWC,
    "si": SI,
    "lwf": LwF,
    "er": ER,
    "one": Adapters,
    "routed": Routed,
    "o-lora": OLoRA,
    "inflora": InfLoRA,
}


@dataclass(frozen=True)
class First:
    """The state after the first context: weights, Adam's state, SI's importance."""

    weights: dict[str, Tensor]
    adam: dict[str, Any]
    importance: list[Tensor]


@dataclass
class ThreeTypes:
    """The settings, run and data of all stages, and the first contexts of one seed by scenario."""

    settings: TaskSettings
    run: RunDirectory
    splits: tuple[Split, Split]
    made: dict[tuple[int, str], tuple[Contexts, First]] = field(default_factory=dict)

    def world(self, scenario: str, seed: int) -> tuple[Contexts, First]:
        """Return the contexts of a seed in a scenario, and the state after the first one."""
        if (seed, scenario) not in self.made:
            for other in [key for key in self.made if key[0] != seed]:
                del self.made[other]
            contexts = Contexts(self.settings, scenario, seed, self.splits)
            self.made[seed, scenario] = contexts, self._first(contexts, seed)
        return self.made[seed, scenario]

    def network(self, contexts: Contexts, seed: int) -> nn.Module:
        """Return a new network, with the initial weights of a seed."""
        images = contexts.train.images
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = DigitNet(
                self.settings.network.hidden,
                "relu",
                inputs=images.shape[1],
                outputs=contexts.outputs,
            )
        return model.to(images.device)

    def _first(self, contexts: Contexts, seed: int) -> First:
        model, rate = self.network(contexts, seed), self.settings.finetuning.full_lr
        method = Method(self.settings, contexts, model, seed)
        optimizer = torch.optim.Adam(model.parameters(), rate, fused=True)
        integral = PathIntegral(list(model.parameters()), optimizer)
        learn_context(method, optimizer, 0, [], f"seed {seed}, first context, {contexts.scenario}")
        return First(model.state_dict(), optimizer.state_dict(), integral.importance())


@torch.no_grad()
def accuracy(method: Method, context: int, learned: int, count: int | None = None) -> float:
    """Return the accuracy on the test images of a context, after `learned` contexts."""
    batch = method.contexts.examples(method.contexts.test, context, count)
    found = method.logits(batch.inputs, batch.owners, learned).argmax(1)
    return float((found == batch.units).float().mean())


def learn_context(
    method: Method,
    optimizer: torch.optim.Optimizer,
    context: int,
    curves: list[list[float]],
    label: str,
) -> None:
    """Train on a context, and extend the curve of each earlier one."""
    training = method.settings.finetuning
    draws = Draws(
        method.contexts,
        method.pool(context),
        training.steps,
        training.batch,
        method.generator(context),
    )

    def look(step: int, model: nn.Module, loss: Tensor) -> None:
        for number, curve in enumerate(curves):
            curve.append(accuracy(method, number, context + 1, WATCHED))

    hooks = [every(max(1, training.steps // LOOKS), look)]
    with cpu_threads(method.settings.place.threads):
        train(method.model, draws, method.objective(context), optimizer, label=label, hooks=hooks)


def learn(name: str, scenario: str, seed: int, world: ThreeTypes) -> None:
    """Learn all contexts by a method. Row: "learned", with the matrix and the metrics.

    The matrix a has a row for each context, after it was learned, and a column for each context.
    """
    contexts, first = world.world(scenario, seed)
    model = world.network(contexts, seed)
    model.load_state_dict(first.weights)
    method = KINDS[name](world.settings, contexts, model, seed)
    rates, label = world.settings.finetuning, f"{name}, {scenario}, {seed}"
    optimizer = torch.optim.Adam(model.parameters(), rates.full_lr, fused=True)
    optimizer.load_state_dict(deepcopy(first.adam))
    if isinstance(method, SI):
        method.start(first.importance)
    matrix = [[accuracy(method, k, 1) for k in range(contexts.count)]]
    curves = [[accuracy(method, 0, 1, WATCHED)]]
    method.end(0)
    for context in range(1, contexts.count):
        parameters = method.begin(context)
        if parameters is not None:
            optimizer = torch.optim.Adam(parameters, rates.lr, fused=True)
        method.follow(optimizer)
        learn_context(method, optimizer, context, curves, label)
        matrix.append([accuracy(method, k, context + 1) for k in range(contexts.count)])
        curves.append([accuracy(method, context, context + 1, WATCHED)])
        if context < contexts.count - 1:
            method.end(context)
    world.run.record(
        {
            "stage": "learned",
            "scenario": scenario,
            "method": name,
            "seed": seed,
            "tasks": contexts.names,
            "matrix": matrix,
            **all_metrics(matrix),
            "WC-ACC": worst_case_accuracy(matrix[-1][-1], curves[:-1]),
            "stability gap": mean(map(stability_gap, curves[:-1])),
            "first": curves[0],
        }
    )


def three_types_stages(settings: TaskSettings) -> Iterator[Stage[ThreeTypes]]:
    """Yield the stages of a run: one per seed, method and scenario."""
    for seed in range(settings.seed, settings.seed + settings.seeds):
        for name in settings.chosen_methods:
            for scenario in settings.sequence.scenarios:
                key = {"scenario": scenario, "method": name, "seed": seed}
                yield Stage(key, ("learned",), partial(learn, name, scenario, seed))
