"""The training loop of all studies, with its hooks and schedules."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from .progress import progress

Objective = Callable[..., Tensor]
# Called with the number of steps so far, the model and the step's loss. Returning True ends the
# training.
Hook = Callable[[int, nn.Module, Tensor], "bool | None"]


def train(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, ...]],
    objective: Objective,
    optimizer: Optimizer,
    *,
    label: str = "training",
    hooks: Sequence[Hook] = (),
    accumulate: int = 1,
    clip: float | None = None,
    autocast: torch.dtype | None = None,
) -> Tensor:
    """Train on each batch once, and return the loss of each step, float32 (steps,), on the CPU.

    Args:
        model: trained in place, and left in training mode.
        batches: tuples of tensors on the model's device, with one example per row.
        objective: `(model, *batch) -> loss`, such as `cross_entropy`. Penalties are part of it.
        optimizer: the optimizer of the trained parameters.
        label: the title of the progress bar.
        hooks: called in order after every step with the number of steps so far, the model and the
            step's loss, a scalar on the device. Training ends after a step at which a hook returns
            True. Use `every` to call a hook less often.
        accumulate: number of batches per step. Their gradients are added, weighted by the number of
            examples, which equals one step on a single large batch.
        clip: the maximum norm of all gradients together. Larger gradients are scaled down (Pascanu
            et al. 2013, arXiv 1211.5063).
        autocast: the dtype that torch.autocast uses for the objective. With float16 the loss is
            scaled (Micikevicius et al. 2018, arXiv 1710.03740).
    """
    device = next(model.parameters()).device.type
    scaler = torch.amp.GradScaler(device) if autocast == torch.float16 else None
    context: Callable[[], AbstractContextManager] = nullcontext
    if autocast is not None:
        context = partial(torch.autocast, device, dtype=autocast)
    losses: list[Tensor] = []
    model.train()
    for group in _groups(batches, accumulate, label):
        losses.append(_backward(model, objective, group, context, scaler))
        _update(model, optimizer, clip, scaler)
        stop = [hook(len(losses), model, losses[-1]) for hook in hooks]
        if any(stop):
            break
    return torch.stack(losses).float().cpu()


def _groups(
    batches: Iterable[tuple[Tensor, ...]], size: int, label: str
) -> Iterable[list[tuple[Tensor, ...]]]:
    """Yield the batches of each step and show progress; the last step may have fewer batches."""
    source = iter(batches)
    groups = iter(lambda: list(islice(source, size)), [])
    steps = -(-len(batches) // size) if isinstance(batches, Sized) else None
    return progress(groups, steps, label, "step")


def _backward(
    model: nn.Module,
    objective: Objective,
    group: list[tuple[Tensor, ...]],
    context: Callable[[], AbstractContextManager],
    scaler: torch.amp.GradScaler | None,
) -> Tensor:
    """Accumulate the gradients of a step's batches, weighted by rows, and return the loss."""
    rows, total = sum(len(batch[0]) for batch in group), None
    for batch in group:
        with context():
            loss = objective(model, *batch)
        if len(group) > 1:
            loss = loss * (len(batch[0]) / rows)
        (loss if scaler is None else scaler.scale(loss)).backward()
        total = loss.detach() if total is None else total + loss.detach()
    assert total is not None
    return total


def _update(
    model: nn.Module,
    optimizer: Optimizer,
    clip: float | None,
    scaler: torch.amp.GradScaler | None,
) -> None:
    """Clip the gradients if requested, make the optimizer's step, and reset the gradients."""
    if clip is not None:
        if scaler is not None:
            scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), clip)
    if scaler is None:
        optimizer.step()
    else:
        scaler.step(optimizer)
        scaler.update()
    optimizer.zero_grad()


def every(steps: int, hook: Hook) -> Hook:
    """Return a hook that calls `hook` at steps `steps`, 2·`steps`, 3·`steps`, …."""
    return lambda step, model, loss: hook(step, model, loss) if step % steps == 0 else None


def learning_rate(optimizer: Optimizer, of: Callable[[int], float]) -> Hook:
    """Set the learning rate of the first step, and return a hook that sets it for the next ones.

    Args:
        optimizer: all parameter groups get the same learning rate.
        of: maps the number of a step, counted from 1, to the learning rate of that step.
    """

    def assign(rate: float) -> None:
        for group in optimizer.param_groups:
            group["lr"] = rate

    def hook(step: int, model: nn.Module, loss: Tensor) -> None:
        assign(of(step + 1))

    assign(of(1))
    return hook


def cosine(peak: float, steps: int, warmup: int = 0) -> Callable[[int], float]:
    """Return a learning-rate schedule with linear warmup and cosine decay to zero.

    Source: Loshchilov and Hutter 2017, "SGDR", arXiv 1608.03983, without restarts.

    Args:
        peak: the highest learning rate.
        steps: number of steps in total.
        warmup: number of steps over which the rate rises to `peak`.

    >>> [round(cosine(1.0, 6, warmup=2)(step), 3) for step in range(1, 7)]
    [0.5, 1.0, 1.0, 0.854, 0.5, 0.146]
    """

    def of(step: int) -> float:
        if step <= warmup:
            return peak * step / warmup
        return peak * (1 + math.cos(math.pi * (step - 1 - warmup) / max(1, steps - warmup))) / 2

    return of


def cross_entropy(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross-entropy of the model's logits, in nats."""
    return F.cross_entropy(model(inputs), labels)


@contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    """Set torch's number of CPU threads within the `with` block.

    One thread is fastest on small batches. If other processes share the cores, several threads wait
    for each other and are slower by an order of magnitude.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
