"""The whole tensors for a PEFT folder: trained biases and `modules_to_save`, from `Delta`s."""

from collections.abc import Collection, Mapping
from dataclasses import fields
from typing import Any

from torch import Tensor

from ..files.base import base_state_dict
from .config import Config
from .config_file import Targets
from .layout import cannot_store
from .modules import PeftView


def split(full: list[str]) -> tuple[list[str], list[str]]:
    """Return the biases to save by themselves, and the modules to save whole.

    Biases in modules that are saved whole are not in the first list.

    >>> split(["fc.bias", "norm.weight", "norm.bias"])
    (['fc.bias'], ['norm'])
    """
    owners = {path: path.rpartition(".")[0] for path in full}
    whole = [owner for path, owner in owners.items() if path.rpartition(".")[2] != "bias"]
    modules = list(dict.fromkeys(whole))
    if "" in modules:
        path = next(path for path, owner in owners.items() if not owner)
        raise cannot_store(
            path, "PEFT saves whole submodules, and the model itself has this tensor"
        )
    inside = tuple(f"{module}." for module in modules)
    return [path for path in full if not path.startswith(inside)], modules


def bias_setting(biases: list[str], layers: Collection[str]) -> str | None:
    """Return PEFT's setting `bias` for the trained biases, or None without trained biases."""
    if not biases:
        return None
    only_adapted = all(path.removesuffix(".bias") in layers for path in biases)
    return "lora_only" if only_adapted else "all"


def saved_tensors(
    seen: PeftView,
    content: Mapping[str, Any],
    targets: Targets,
    values: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Return the tensors of the modules that `modules_to_save` selects.

    PEFT's rules can select more modules than intended: "fc" also selects `last_fc`. So the rules
    are applied to the settings before they are written. All modules that they select are saved, as
    PEFT does, and they must not select a target.

    Args:
        seen: the model as PEFT sees it.
        content: the settings to be written.
        targets: the modules with low-rank updates.
        values: the tensors that the adapter has changed as a whole, by path.
    """
    known = {field.name for field in fields(Config)}
    config = Config(**{key: value for key, value in content.items() if key in known})
    saved = [name for name in seen.paths if config.is_saved(name)]
    if not saved:
        return {}
    _check_saved(saved, config, targets)
    base, inside = base_state_dict(seen.modules[""]), tuple(f"{name}." for name in saved)
    tensors = {key: values.get(key, base[key]) for key in base if key.startswith(inside)}
    for key in tensors:
        if key in seen.tied:
            raise cannot_store(key, f"it is tied to {' and '.join(seen.tied[key])}")
    return tensors


def _check_saved(saved: list[str], config: Config, targets: Targets) -> None:
    """Raise a TargetError if PEFT would not adapt a target, or would save a module twice."""
    inside = tuple(f"{name}." for name in saved)
    for target in targets:
        raw = target in config.target_parameters
        # Of a raw parameter PEFT wraps the module, and finds no modules_to_save inside of it.
        wrapped = target.rpartition(".")[0] if raw else target
        contains = any(name.startswith(f"{wrapped}.") for name in saved)
        excluded = not raw and not config.targets(target)
        if excluded or f"{target}.".startswith(inside) or contains:
            raise cannot_store(
                target, f"PEFT does not adapt modules_to_save, here {config.modules_to_save}"
            )
    nested = [name for name in saved if name.startswith(inside)]
    if nested:
        raise cannot_store(
            nested[0], "PEFT would save it twice, by itself and in a module around it"
        )
