"""Keep running statistics unchanged: freezing parameters does not freeze these buffers.

In training mode BatchNorm normalises by the batch and updates its running mean and variance,
whether or not its parameters are frozen (https://github.com/huggingface/peft/issues/1732). A held
layer stays in evaluation mode: it normalises by its running statistics, in training as
well, and they keep their bits.

Note [held in evaluation mode]
    `model.train()` and `model.eval()` call the method `train` of each module inside. A held layer
    has an `EvalModeLock` as its instance attribute `train`, which keeps the layer in evaluation
    mode and remembers the requested mode. Two other ways do not work: a hook around the
    layer's forward, because compiled graphs do not notice hooks that come and go; and another
    class, because parametrize gives the module a class of its own.
"""

import copy
from collections.abc import Hashable, Iterable, Iterator, Set
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..private_torch import NormWithStatistics
from ..site.survey import Survey

Modules = Iterable[tuple[str, nn.Module]]


class EvalModeLock:
    """Stands in for a held layer's method `train`: see Note [held in evaluation mode].

    Attributes:
        mode: the mode requested last, which is restored after the release.
        holders: names of adapters, and one object for each `hold_statistics` block.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.mode = module.training
        self.holders: set[Hashable] = set()

    def __deepcopy__(self, memo: dict[int, Any]) -> "EvalModeLock":
        copied = copy.copy(self)
        copied.module = copy.deepcopy(self.module, memo)
        # The exit of a block does not release copies made inside it, so a copy drops blocks.
        copied.holders = _adapters(self.holders)
        return copied

    def __call__(self, mode: bool = True) -> nn.Module:
        if not self.holders:
            del vars(self.module)["train"]
            return self.module.train(mode)
        type(self.module).train(self.module, mode)
        self.mode, self.module.training = mode, False
        return self.module


@contextmanager
def hold_statistics(model: nn.Module) -> Iterator[None]:
    """Hold the running statistics of a model's normalisation layers inside the block.

    The layers are BatchNorm of every kind, SyncBatchNorm, and InstanceNorm that tracks statistics.
    They stay in evaluation mode, even after `model.train()`. Afterwards each is in the mode
    requested last. `attach(..., hold_statistics=True)` does the same for as long as its adapter is
    attached.

    Args:
        model: any module.

    >>> model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    >>> with hold_statistics(model):
    ...     _ = model.train()
    ...     model[1].training
    False
    >>> model[1].training
    True
    """
    holder = object()  # one for each block, so that blocks can be nested
    modules = Survey(model).modules
    hold(modules, holder)
    try:
        yield
    finally:
        release(modules, {holder})


def hold(modules: Modules, holder: Hashable) -> None:
    """Hold the statistics of layers on behalf of an adapter, by its name, or of a block."""
    for _, module in with_statistics(modules):
        lock = vars(module).get("train")
        if not isinstance(lock, EvalModeLock):
            lock = EvalModeLock(module)
            module.training = False
            vars(module)["train"] = lock
        lock.holders.add(holder)


def release(modules: Modules, holders: Set[Hashable] | None) -> None:
    """Release the layers held by these holders; None releases all layers held by adapters."""
    for _, module in with_statistics(modules):
        lock = vars(module).get("train")
        if isinstance(lock, EvalModeLock):
            lock.holders -= _adapters(lock.holders) if holders is None else holders
            if not lock.holders:
                del vars(module)["train"]
                module.training = lock.mode


def held_by(modules: Modules) -> list[set[Hashable]]:
    """Return for each held layer the adapters and blocks that hold it."""
    return [vars(module)["train"].holders for _, module in modules if is_held(module)]


def with_statistics(modules: Modules) -> list[tuple[str, nn.Module]]:
    """Return the layers that have running statistics, by path."""
    return [
        (path, module)
        for path, module in modules
        if isinstance(module, NormWithStatistics) and module.running_mean is not None
    ]


def is_held(module: nn.Module) -> bool:
    """Return whether a layer's statistics are held."""
    lock = vars(module).get("train")
    return isinstance(lock, EvalModeLock) and bool(lock.holders)


def _adapters(holders: set[Hashable]) -> set[Hashable]:
    return {holder for holder in holders if isinstance(holder, str)}
