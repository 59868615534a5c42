"""What PEFT's tests use and paramlora has no counterpart of: each raises, with a reason."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

import paramlora as pl


class NotExpressed(Exception):
    """A test uses something of PEFT for which paramlora has no counterpart."""


@contextmanager
def worded(message: str) -> Iterator[None]:
    """Raise a ValueError with PEFT's message if paramlora refuses a call."""
    try:
        yield
    except pl.ParamloraError as error:
        raise ValueError(message) from error


def not_expressed(name: str) -> Callable[..., Any]:
    """Return a function of PEFT that has no counterpart."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise NotExpressed(f"peft's {name}")

    return refuse


class _Inner(type):
    """A class of PEFT's layers, for which paramlora has none: a layer keeps its own."""

    def __instancecheck__(cls, instance: object) -> bool:
        kinds = ("BaseTunerLayer", "LoraLayer")
        factors = dict(instance.named_parameters()) if isinstance(instance, nn.Module) else {}
        # Of the module's own tensors: PEFT's wrappers hold one module each.
        own = [key for key in factors if key.startswith("parametrizations.")]
        if any(cls.__name__ in kinds or key.endswith(".D") for key in own):
            raise NotExpressed(f"the layer class {cls.__name__}")
        return False


def inner_class(name: str) -> type:
    """Return a stand-in for one of PEFT's layer classes; testing for it raises."""
    return _Inner(name, (), {})
