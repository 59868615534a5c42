"""Building W' once for each forward of a module, and in the weight's own dtype."""

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor


def no_autocast(weight: Tensor) -> AbstractContextManager[Any]:
    """Return a context that disables autocast: W' is built in the weight's dtype."""
    device = weight.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


class _Built(threading.local):
    """The tensors that stacks have built inside the innermost `build_once` of this thread."""

    tensors: dict[object, Tensor] | None = None


BUILT = _Built()


@contextmanager
def build_once() -> Iterator[None]:
    """Let each stack build W' once inside the block, which is the forward of one module.

    `parametrize.cached` is no alternative: all threads would share the tensors that one thread has
    built, perhaps under no_grad, for as long as any thread is inside.
    """
    outer, BUILT.tensors = BUILT.tensors, {}
    try:
        yield
    finally:
        BUILT.tensors = outer
