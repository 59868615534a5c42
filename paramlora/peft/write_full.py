"""Biases and whole modules for a PEFT folder."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from torch import Tensor, nn

from ..files.base import base_state_dict
from ..site.find import Site
from .config import Config
from .config_file import Targets
from .layout import refuse
from .modules import names, shared


def split(full: Mapping[str, Site]) -> tuple[list[str], list[str]]:
    """Return the biases that are trained alone, and the modules to save whole."""
    owners = {path: path.rpartition(".")[0] for path in full}
    modules = list(dict.fromkeys(owner for path, owner in owners.items() if not _is_bias(path)))
    if "" in modules:
        path = next(path for path, owner in owners.items() if not owner)
        raise refuse(path, "PEFT saves whole modules below the model itself")
    inside = tuple(f"{module}." for module in modules)
    return [path for path in full if not path.startswith(inside)], modules


def _is_bias(path: str) -> bool:
    return path.rpartition(".")[2] == "bias"


def full_key(path: str, wrapped: set[str]) -> str:
    """Return PEFT's key of a tensor of the base, whose adapted modules it wraps."""
    parts = path.split(".")
    key = []
    for i, part in enumerate(parts, 1):
        key += [part, "base_layer"] if ".".join(parts[:i]) in wrapped else [part]
    return ".".join(key)


def saved(
    model: nn.Module, config: Mapping[str, Any], targets: Targets, values: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the tensors of all modules that `modules_to_save` replaces by PEFT's rules."""
    known = {field.name for field in fields(Config)}
    rules = Config(**{key: value for key, value in config.items() if key in known})
    replaced = [name for name in names(model) if rules.replaces(name)]
    inside = tuple(f"{name}." for name in replaced)
    for name in targets:
        clash = [one for one in replaced if one.startswith(f"{name}.")]
        if not rules.targets(name) or f"{name}.".startswith(inside) or clash:
            raise refuse(
                name, f"PEFT keeps adapters off modules_to_save, here {rules.modules_to_save}"
            )
    nested = [name for name in replaced if name.startswith(inside)]
    if nested:
        raise refuse(nested[0], "PEFT saves it whole, and a module that it is in")
    base, others = base_state_dict(model), shared(model)
    saved = {key: values.get(key, base[key]) for key in base if inside and key.startswith(inside)}
    for key in saved:
        if key in others:
            raise refuse(key, f"it is {' and '.join(others[key])} as well")
    return saved
