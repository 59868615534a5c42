"""Modules that wrap a whole module and pass its forward on: DataParallel, DDP, torch.compile.

    wrapper                          the key of its child
    nn.DataParallel, DDP             module
    torch.compile(model)             _orig_mod
    CheckpointWrapper                _checkpoint_wrapped_module

A wrapper puts that key into every path, so `fc.weight` becomes `_orig_mod.fc.weight`. The verbs act
on the module inside, and paths and files have its names.
"""

import os
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from .errors import StateError, some
from .private_torch import WRAPPED


def check_model(model: Any) -> nn.Module:
    """Return a model, or raise a TypeError if it is not one."""
    if isinstance(model, nn.Module):
        return model
    found = f"a {type(model).__name__}"
    if isinstance(model, str | os.PathLike):
        found = repr(os.fspath(model))  # the repr of a state dict would fill the screen
    raise TypeError(
        "the model, an nn.Module, comes first, as in attach(model, spec, targets), "
        f"save(model, path, name) and enable(model, name); got {found} in its place"
    )


def inner(module: nn.Module) -> nn.Module:
    """Return the module inside of wrappers; the module itself if it is not one."""
    while (wrapped := _wrapped(module)) is not None:
        module = wrapped
    return module


def without_wrappers(path: str) -> str:
    """Return a path or key without the keys of wrappers.

    >>> without_wrappers("fc._orig_mod.weight")
    'fc.weight'
    """
    return ".".join(part for part in path.split(".") if part not in WRAPPED)


def named_modules(
    model: nn.Module, path: str = "", above: tuple[nn.Module, ...] = ()
) -> Iterator[tuple[str, nn.Module]]:
    """Yield (path, module) for each module, also under its further paths, without wrappers.

    Args:
        model: the module to begin with.
        path: its path.
        above: the modules that lead to it. A module that leads back to one of them ends there.
    """
    model = inner(model)
    if any(model is module for module in above):
        return
    yield path, model
    for key, child in model._modules.items():
        if child is not None:
            yield from named_modules(child, f"{path}.{key}" if path else key, (*above, model))


def check_not_synchronized(model: nn.Module) -> None:
    """Raise a StateError if DDP wraps a model, because new factors would stay unsynchronised."""
    while (wrapped := _wrapped(model)) is not None:
        if isinstance(model, DistributedDataParallel):
            raise StateError(
                "DistributedDataParallel synchronises the parameters that a model has when it is "
                "wrapped, so the gradients of new factors would differ between processes; add the "
                "adapter to the model inside (ddp.module) first, and wrap it then"
            )
        model = wrapped


def check_not_peft(modules: Iterable[tuple[str, nn.Module]]) -> None:
    """Raise a StateError if layers of a model are PEFT's, because ours would adapt its factors."""
    theirs = [path for path, one in modules if type(one).__module__.startswith("peft.tuners.")]
    if theirs:
        raise StateError(
            f"the model has adapters of PEFT, at {some(theirs)}; call this on the plain base: load "
            "it anew and load_peft the adapter, or take what merge_and_unload() of PEFT returns"
        )


def _wrapped(module: nn.Module) -> nn.Module | None:
    """Return the module that a wrapper holds; None if `module` is not a wrapper."""
    if isinstance(module, DataParallel | DistributedDataParallel):
        return module.module
    children = module._modules
    if len(children) == 1:
        for key in WRAPPED:
            if key in children:
                return children[key]
    return None
