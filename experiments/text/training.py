"""Fine-tuning of a text classifier: batches, loss, learning rate and time."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..harness.loggers import Curve, EarlyStopping, curve
from ..harness.parallel import blocks_of, spread
from ..harness.rundir import Row
from ..harness.train import Hook, Objective, every, learning_rate, train
from .context import TextContext
from .models import rate_of
from .retention import retention_of
from .tokens import by_length

WARMUP = 0.06  # share of the steps in which the learning rate rises


def fine_tune(context: TextContext, model: nn.Module, method: str, seed: int) -> Row:
    """Train the parameters that require gradients, and return the training's keys of a row.

    Afterwards the parameters have their values at the best validation accuracy. With several
    processes and `--parallel fsdp`, the model is sharded in place.
    """
    settings, batches = context.settings, TextBatches(context, seed)
    spread_model = spread(model, settings.place.parallel, context.group, blocks_of(model))
    trained = [p for p in model.parameters() if p.requires_grad]
    clock, validation = _Clock(context.device), Curve()
    # Patience 0 means no early stopping: the training has fewer evaluations than batches + 1.
    patience = settings.finetuning.patience or len(batches) + 1
    early = EarlyStopping(_validation(context, clock, validation), trained, patience)
    with clock.measured():
        losses = _train(context, spread_model, trained, batches, early, method, seed)
    if not early.best:  # the training ended before the first evaluation
        early(len(losses), model)
    early.restore()
    return {
        "trainable": sum(p.numel() for p in trained),
        "steps": len(losses),
        "best_step": early.best,
        "validation_accuracy": early.highest,
        "validation_curve": validation.values["validation"],
        "seconds": clock.seconds,
        "peak_bytes": clock.peak_bytes,
        **curve(losses),
    }


def _validation(
    context: TextContext, clock: "_Clock", curve: Curve
) -> Callable[[nn.Module], float]:
    """Return a function that computes the validation accuracy of a model with the clock stopped.

    The function adds each value to `curve`.
    """

    def accuracy(model: nn.Module) -> float:
        with clock.stopped():
            value = context.accuracy(model, "validation")
        curve(len(curve.steps) + 1, {"validation": value})
        return value

    return accuracy


def _train(
    context: TextContext,
    model: nn.Module,
    trained: list[nn.Parameter],
    batches: "TextBatches",
    early: EarlyStopping,
    method: str,
    seed: int,
) -> Tensor:
    """Train, and return the loss of each step, float32 (steps,), the mean over the processes."""
    training, on_gpu = context.settings.finetuning, context.device.type == "cuda"
    rate = rate_of(context.settings, method)
    optimizer = torch.optim.AdamW(
        trained, lr=rate, weight_decay=training.weight_decay, fused=on_gpu
    )
    hooks: list[Hook] = [every(max(1, batches.steps_of_epoch // training.evaluations), early)]
    if training.schedule == "linear":
        rates = linear(rate, len(batches) // training.accumulate)
        hooks.insert(0, learning_rate(optimizer, rates))
    # Dropout draws from the global generators, and each process needs different masks.
    with torch.random.fork_rng([context.device] if on_gpu else []):
        torch.manual_seed(seed * context.group.size + context.group.rank)
        losses = train(
            model,
            batches,
            objective_of(context, method, seed),
            optimizer,
            label=f"{method} {seed}",
            hooks=hooks,
            accumulate=training.accumulate,
            autocast=context.dtype,
        )
    # Each process has the weighted loss of its share. The mean over processes is the loss of the
    # whole batch; see TextBatches.
    return context.group.total(losses.to(context.device)).cpu() / context.group.size


class TextBatches:
    """This process's share of each batch, as tuples (ids, mask, labels, weight).

    A batch is split into `accumulate` parts, and the processes share each part. A batch with fewer
    rows than parts is skipped. Shares can differ in size, and DDP averages the gradients over
    processes, so plain means would give the rows of smaller shares more influence. For 9 rows on
    two processes:

        process                0            1
        rows                   5            4
        without weight         1/2 · 1/5    1/2 · 1/4     of each row's loss
        weight                 2 · 5/9      2 · 4/9
        with weight            1/9          1/9

    The weight is processes · (rows of this process) / (rows of the batch). It
    counts the rows of all parts, because `train` averages the parts of a step by their rows.
    """

    def __init__(self, context: TextContext, seed: int) -> None:
        settings = context.settings.finetuning
        self.context, self.parts = context, settings.accumulate
        generator = torch.Generator().manual_seed(seed)
        lengths = context.tokens["train"].lengths
        epochs = []
        for _ in range(settings.epochs):
            order = torch.randperm(len(lengths), generator=generator)
            if settings.by_length:
                batches = by_length(lengths, order, settings.batch, generator)
            else:
                batches = list(order.split(settings.batch))
            epochs.append([rows for rows in batches if len(rows) >= self.parts])
        self.steps_of_epoch = len(epochs[0])
        self.rows = [rows for batches in epochs for rows in batches]

    def __len__(self) -> int:
        return len(self.rows) * self.parts

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        tokens, group = self.context.tokens["train"], self.context.group
        for rows in self.rows:
            shares = [group.share(part) for part in rows.tensor_split(self.parts)]
            weight = group.size * sum(len(mine) for mine, _ in shares) / len(rows)
            for mine, counts in shares:
                batch = tokens.batch(mine)
                factor = weight if counts else 0.0
                yield (*batch, torch.full((), factor, device=batch[0].device))


def cross_entropy(
    model: nn.Module, ids: Tensor, mask: Tensor, labels: Tensor, weight: Tensor
) -> Tensor:
    """Return the mean cross-entropy of a classifier's logits times `weight`, in nats."""
    logits = model(input_ids=ids, attention_mask=mask).logits
    return F.cross_entropy(logits.float(), labels) * weight


def objective_of(context: TextContext, method: str, seed: int) -> Objective:
    """Return the loss of a method; the joint methods add that of the second data set."""
    if not method.startswith("joint"):
        return cross_entropy
    second = retention_of(context).loss(context.settings.finetuning.batch, seed)

    def both(model: nn.Module, *batch: Tensor) -> Tensor:
        return cross_entropy(model, *batch) + second(model)

    return both


def linear(peak: float, steps: int) -> Callable[[int], float]:
    """Return a schedule that rises linearly to `peak`, then falls linearly.

    It rises in the first WARMUP of the steps, and would reach zero one step after the last.

    >>> [round(linear(1.0, 50)(step), 3) for step in (1, 3, 4, 27, 50)]
    [0.333, 1.0, 1.0, 0.511, 0.021]
    """
    warmup = max(1, round(WARMUP * steps))

    def of(step: int) -> float:
        if step <= warmup:
            return peak * step / warmup
        return peak * (steps - step + 1) / max(1, steps - warmup)

    return of


class _Clock:
    """The time of training without evaluations, in seconds, and the GPU's peak memory, in bytes."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds, self.began = device, 0.0, 0.0
        self.peak_bytes: int | None = None

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Measure the time and the peak memory of the `with` block."""
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)
        self._start()
        yield
        self._stop()
        if on_gpu:
            self.peak_bytes = torch.cuda.max_memory_allocated(self.device)

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Exclude the time of the `with` block."""
        self._stop()
        yield
        self._start()

    def _start(self) -> None:
        self._wait()
        self.began = time.perf_counter()

    def _stop(self) -> None:
        self._wait()
        self.seconds += time.perf_counter() - self.began

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
