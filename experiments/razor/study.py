"""The study: pre-train the bases, fine-tune them on parity by all methods, and record checkpoints.

Rows, one per base and one per checkpoint of a fine-tuning:

    base    parity and fashion: the base's accuracies on the test images of both tasks
    tuned   the same, and kl = E_x Σ_c π₀ log(π₀ / π) on MNIST's test images, in nats;
            kl_fashion, the same on Fashion-MNIST's; size, ‖W' - W‖ / ‖W‖ of each layer

A value that is not finite is recorded as null.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call
from tqdm import tqdm

from ..digits.data import Data
from ..harness.batches import seeded_order
from ..harness.environment import RESULT_KEYS, commit, machine, resolve_device
from ..harness.rundir import Row, RunDirectory
from ..harness.settings import result_settings
from ..harness.stages import Stage, run_stages
from ..harness.train import cosine, cpu_threads, cross_entropy, learning_rate, train
from .data import Examples, ParityData, load_both, parity_data
from .settings import Arm, RazorSettings
from .stacked import Stack, Weights, network
from .targets import Draw, weights

CHUNK = 1000  # images that are evaluated at once
DECAY = 0.01  # AdamW's weight decay in pre-training


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


def pretrained(settings: RazorSettings, data: ParityData, seed: int) -> Weights:
    """Train a network on some images of both tasks; return its weights."""
    inputs, batches = drawn_images(settings, data, seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = network(settings.network.hidden).to(inputs.device)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=DECAY, fused=True)
    steps = len(batches)
    rate = learning_rate(optimizer, cosine(settings.pretraining.base_lr, steps, steps // 10))

    def objective(model: nn.Module, rows: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(model, inputs[rows], targets)

    with cpu_threads(settings.place.threads):
        label = f"pre-training {seed}"
        train(model, batches, objective, optimizer, label=label, hooks=[rate])
    return {name: p.detach() for name, p in model.named_parameters()}


def drawn_images(
    settings: RazorSettings, data: ParityData, seed: int
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Return the inputs of pre-training, and the rows and labels of each batch.

    An image of a digit has a random digit of the same parity as its label, drawn anew each epoch.
    """
    generator, device = torch.Generator().manual_seed(seed), data.digits.labels.device
    parts, count = (data.digits, data.garments), settings.pretraining.base_images
    rows = [torch.randperm(len(part.labels), generator=generator)[:count] for part in parts]
    pairs = list(zip(parts, rows, strict=True))
    inputs = torch.cat([part.inputs[chosen.to(device)] for part, chosen in pairs])
    labels = torch.cat([part.labels[chosen.to(device)] for part, chosen in pairs]).cpu()
    total = settings.pretraining.base_epochs * len(labels)
    order = seeded_order(len(labels), total, generator)
    same_parity = labels[order] % 2 + 2 * torch.randint(5, order.shape, generator=generator)
    targets = torch.where(order < len(rows[0]), same_parity, labels[order])
    size = settings.finetuning.batch
    batches = zip(order.to(device).split(size), targets.to(device).split(size), strict=True)
    return inputs, list(batches)


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
    when, rows = looks(settings, len(data.digits.labels)), list[Row]()
    source = tqdm(
        draws(settings, data, seeds), arm.name, when[-1], leave=False, unit="step", disable=None
    )
    with cpu_threads(settings.place.threads):
        for step, (inputs, labels, uniform) in enumerate(source, start=1):
            draw = Draw(inputs, labels, uniform, stack.base_logits(inputs))
            stack.step(losses(settings.methods, stack.logits(inputs), draw))
            if step in when:
                rows += checkpoint(stack, tests, arm, seeds, settings, step)
    context.run.record_all(rows)


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


def checkpoint(
    stack: Stack, tests: list[Test], arm: Arm, seeds: list[int], settings: RazorSettings, step: int
) -> list[Row]:
    """Return the rows of all trainings after a step."""
    found: dict[str, Tensor] = {}
    for test in tests:
        name = "kl" if test.task == "parity" else f"kl_{test.task}"
        found[name], found[test.task] = test.measured()
    values = {name: tensor.tolist() for name, tensor in found.items()}
    sizes = {name: tensor.tolist() for name, tensor in stack.relative_sizes().items()}
    rows = []
    for s, seed in enumerate(seeds):
        for m, method in enumerate(settings.methods):
            for r, rate in enumerate(settings.finetuning.rates_of(arm)):
                row = {"stage": "tuned", "arm": arm.name, "method": method, "base_seed": seed}
                row |= {"rate": rate, "step": step}
                row |= {name: rounded(value[r][s][m]) for name, value in values.items()}
                row["size"] = [rounded(size[r][s][m]) for size in sizes.values()]
                rows.append(row)
    return rows


def rounded(value: float) -> float | None:
    """Return a number with four significant digits, or None if it is not finite."""
    return float(f"{value:.4g}") if math.isfinite(value) else None


def stages(settings: RazorSettings, images: int) -> Iterator[Stage[RazorContext]]:
    """Yield the stages: an arm, and as many bases as train together.

    A stage records its rows at once. The last of them tells that it is done.
    """
    seeds, size = list(settings.base_seeds), settings.place.together
    groups = [seeds[i : i + size] for i in range(0, len(seeds), size)]
    for group in groups:
        for arm in settings.arms:
            last = {"method": settings.methods[-1], "rate": settings.finetuning.rates_of(arm)[-1]}
            step = looks(settings, images)[-1]
            key = {"arm": arm.name, "base_seed": group[-1], "step": step, **last}
            yield Stage(key, ("tuned",), partial(fine_tune, arm, group))


def run_razor(settings: RazorSettings, say: Callable[[str], None] = print) -> RunDirectory:
    """Run the study, or continue it; return the run."""
    device = resolve_device(settings.place.device)
    digits, garments = load_both(settings.dataset)
    environment = {"study": settings.STUDY, **described(device, digits, garments)}
    folder = Path(settings.folder)
    run = RunDirectory.start(folder, result_settings(settings), environment, RESULT_KEYS)
    say(f"run      {run.folder}, on {device}")
    for data in (digits, garments):
        say(f"data     {data.name}: {data.why}")

    def prepare() -> RazorContext:
        return RazorContext(settings, run, parity_data(digits, garments, device))

    run_stages(run, stages(settings, len(digits.train.labels)), prepare, say)
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
