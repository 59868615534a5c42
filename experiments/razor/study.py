"""The study: pre-train the bases, fine-tune them on parity by all methods, and record checkpoints.

Rows, one per base and one per fine-tuning:

    base    parity and fashion: the base's accuracies on the test images of both tasks
    tuned   the arm as `cell`, and lists with a value for each checkpoint: the same accuracies;
            kl = E_x Σ_c π₀ log(π₀ / π) on MNIST's test images, in nats; kl_fashion, the same on
            Fashion-MNIST's; sizes, ‖W' - W‖ / ‖W‖ of each layer

A value that is not finite is recorded as null.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from ..digits.data import Data
from ..harness.batches import seeded_order
from ..harness.environment import RESULT_KEYS, commit, machine, resolve_device
from ..harness.progress import progress
from ..harness.rundir import Row, RunDirectory
from ..harness.settings import result_settings
from ..harness.stages import Stage, run_stages
from ..harness.train import cpu_threads
from .bases import pretrained
from .data import Examples, ParityData, load_both, parity_data
from .settings import Arm, RazorSettings
from .stacked import Stack, Weights, network
from .targets import Draw, weights

DIGITS = {"parity": 4, "fashion": 4}  # significant digits in rows; of other figures, 3
CHUNK = 1000  # images that are evaluated at once


@dataclass
class RazorContext:
    """What all stages share: settings, run, data, and the bases made so far."""

    settings: RazorSettings
    run: RunDirectory
    data: ParityData
    bases: dict[int, Weights] = field(default_factory=dict)

    def base(self, seed: int) -> Weights:
        """Return the weights of a base, and record its accuracies."""
        if seed not in self.bases:
            self.bases[seed] = pretrained(self.settings, self.data, seed)
            self.run.record(self._accuracies(seed))
        return self.bases[seed]

    def _accuracies(self, seed: int) -> Row:
        model = network(self.settings.network.hidden).to(self.data.digits.labels.device)
        found = {}
        for name, test in (("parity", self.data.digits_test), ("fashion", self.data.garments_test)):
            with torch.no_grad():
                answers = functional_call(model, dict(self.bases[seed]), (test.inputs,)).argmax(-1)
            found[name] = float(correct(name, answers, test.labels).float().mean())
        return {"stage": "base", "base_seed": seed, **found}


def correct(task: str, answers: Tensor, labels: Tensor) -> Tensor:
    """Return whether predicted classes, (…, n), are right: in parity, or as garments."""
    return answers % 2 == labels % 2 if task == "parity" else answers == labels


def draws(
    settings: RazorSettings, data: ParityData, seeds: list[int]
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield inputs, labels and uniform numbers of each step, one batch for each base.

    A base's fine-tunings all get the same. They depend on the base's seed only.
    """
    training, device = settings.finetuning, data.digits.labels.device
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    size, count = training.batch, len(data.digits.labels)
    total = training.epochs * (count // size) * size
    orders = [seeded_order(count, total, generator).split(size) for generator in generators]
    for rows in zip(*orders, strict=True):
        chosen = torch.stack(rows).to(device)
        uniform = [torch.rand(size, training.samples, generator=g) for g in generators]
        yield (
            data.digits.inputs[chosen],
            data.digits.labels[chosen],
            torch.stack(uniform).to(device),
        )


def looks(settings: RazorSettings, images: int) -> list[int]:
    """Return the steps after which checkpoints are evaluated."""
    training = settings.finetuning
    count, steps = training.epochs * training.checkpoints, images // training.batch
    return [round(training.epochs * steps * (k + 1) / count) for k in range(count)]


def fine_tune(arm: Arm, seeds: list[int], context: RazorContext) -> None:
    """Fine-tune some bases by all methods and rates at once, and record the checkpoints."""
    settings, data = context.settings, context.data
    training, rates = settings.finetuning, settings.finetuning.rates_of(arm)
    bases = [context.base(seed) for seed in seeds]
    stack = Stack(
        arm, bases, settings.network.hidden, rates, len(settings.methods), training.alpha, seeds
    )
    tests = [Test(stack, "parity", data.digits_test), Test(stack, "fashion", data.garments_test)]
    when, seen = looks(settings, len(data.digits.labels)), list[dict[str, Tensor]]()
    source = progress(draws(settings, data, seeds), when[-1], arm.name, "step")
    with cpu_threads(settings.place.threads):
        for step, (inputs, labels, uniform) in enumerate(source, start=1):
            draw = Draw(inputs, labels, uniform, stack.base_logits(inputs))
            stack.step(losses(settings.methods, stack.logits(inputs), draw))
            if step in when:
                seen.append(measured(stack, tests))
    context.run.record_all(tuned_rows(arm, seeds, settings, when, seen))


def losses(methods: list[str], logits: Tensor, draw: Draw) -> Tensor:
    """Return the loss of each training, (rates, bases, methods); see targets.py."""
    scores = logits.log_softmax(-1)  # (rates, bases, methods, n, 10)
    found = []
    for number, method in enumerate(methods):
        w = weights(method, logits[:, :, number], draw)
        found.append(-(w * scores[:, :, number]).sum(-1).mean(-1))
    return torch.stack(found, -1)


class Test:
    """The test images of a task, with the bases' log-probabilities of them."""

    __test__ = False  # not a test of pytest

    def __init__(self, stack: Stack, task: str, examples: Examples) -> None:
        self.task, self.stack = task, stack
        self.parts = list(
            zip(examples.inputs.split(CHUNK), examples.labels.split(CHUNK), strict=True)
        )
        self.base = [stack.base_logits(inputs).log_softmax(-1) for inputs, _ in self.parts]
        self.count = len(examples.labels)

    @torch.no_grad()
    def measured(self) -> tuple[Tensor, Tensor]:
        """Return each training's KL to its base and accuracy, both (rates, bases, methods)."""
        totals = []
        for (inputs, labels), base in zip(self.parts, self.base, strict=True):
            logits = self.stack.logits(inputs)  # (rates, bases, methods, n, 10)
            known = base.unsqueeze(1)  # (bases, 1, n, 10)
            divergence = (known.exp() * (known - logits.log_softmax(-1))).sum((-2, -1))
            right = correct(self.task, logits.argmax(-1), labels).sum(-1)
            totals.append(torch.stack([divergence, right.to(divergence.dtype)]))
        divergence, right = torch.stack(totals).sum(0) / self.count
        return divergence, right


def measured(stack: Stack, tests: list[Test]) -> dict[str, Tensor]:
    """Return the figures of a checkpoint by name, each (rates, bases, methods, …)."""
    found = {"sizes": stack.relative_sizes()}
    for test in tests:
        name = "kl" if test.task == "parity" else f"kl_{test.task}"
        found[name], found[test.task] = test.measured()
    return found


def tuned_rows(
    arm: Arm,
    seeds: list[int],
    settings: RazorSettings,
    steps: list[int],
    seen: list[dict[str, Tensor]],
) -> Iterator[Row]:
    """Yield the row of each training of a stack, with the figures of its checkpoints."""
    stacked = {name: torch.stack([one[name] for one in seen]).cpu() for name in seen[0]}
    for s, seed in enumerate(seeds):
        for m, method in enumerate(settings.methods):
            for r, rate in enumerate(settings.finetuning.rates_of(arm)):
                row = {"stage": "tuned", "cell": arm.name, "method": method, "base_seed": seed}
                row |= {"rate": rate, "steps": steps}
                for name, values in stacked.items():
                    row[name] = rounded(values[:, r, s, m].tolist(), DIGITS.get(name, 3))
                yield row


def rounded(value: Any, digits: int) -> Any:
    """Return numbers in nested lists with so many significant digits, or None if not finite."""
    if isinstance(value, list):
        return [rounded(one, digits) for one in value]
    return float(f"{value:.{digits}g}") if math.isfinite(value) else None


def stages(settings: RazorSettings) -> Iterator[Stage[RazorContext]]:
    """Yield the stages: an arm, and as many bases as train together.

    A stage records its rows at once. The last of them tells that it is done.
    """
    seeds, size = list(settings.base_seeds), settings.place.together
    for group in (seeds[i : i + size] for i in range(0, len(seeds), size)):
        for arm in settings.arms:
            rate = settings.finetuning.rates_of(arm)[-1]
            last = {"method": settings.methods[-1], "rate": rate, "base_seed": group[-1]}
            yield Stage({"cell": arm.name, **last}, ("tuned",), partial(fine_tune, arm, group))


def run_razor(settings: RazorSettings, say: Callable[[str], None] = print) -> RunDirectory:
    """Run the study, or continue it; return the run."""
    device = resolve_device(settings.place.device)
    digits, garments = load_both(settings.dataset)
    environment = {"study": settings.STUDY, **described(device, digits, garments)}
    folder, asked = Path(settings.folder), result_settings(settings)
    with RunDirectory.start(folder, asked, environment, RESULT_KEYS) as run:
        say(f"run      {run.folder}, on {device}")
        for data in (digits, garments):
            say(f"data     {data.name}: {data.why}")

        def prepared() -> RazorContext:
            return RazorContext(settings, run, parity_data(digits, garments, device))

        run_stages(run, stages(settings), prepared, say)
    return run


def described(device: torch.device, digits: Data, garments: Data) -> Row:
    """Return the content of environment.json."""
    return {
        **machine(device),
        "data": f"{digits.name}, {garments.name}",
        "data_why": f"{digits.why}; {garments.why}",
        "data_credit": "; ".join(filter(None, [digits.credit, garments.credit])),
        "data_digest": f"{digits.digest} {garments.digest}",
        "commit": commit(),
    }
