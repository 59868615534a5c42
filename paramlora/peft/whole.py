"""The whole tensors in a PEFT folder: trained biases and `modules_to_save`, here `Delta`s.

A folder that is read can also have tensors that PEFT did not train, such as the buffers of a module
to save, or embeddings. These must be equal to the base's.
"""

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..files.base import base_state_dict
from ..files.plan import check_dtypes, check_site, plan_site
from ..files.state import compare
from ..kinds.delta import Delta
from ..kinds.spec import factor_dtype
from ..layers.install import PlannedSite
from ..site.place import Place
from ..stack.storage import check_real
from .config import Config
from .config_file import Targets, read_config
from .disk import CONFIG
from .layout import cannot_store, is_factor
from .modules import PeftView

# The names that PEFT's wrappers insert between the path of a module and its tensors' names.
_WRAPPERS = re.compile(r"(^|\.)(base_layer|modules_to_save|original_module)(?=\.)")


class Folder(NamedTuple):
    """The content of a PEFT folder, and the model that it is read for.

    Args:
        path: the folder, for messages.
        content: the content of its `adapter_config.json`.
        config: the settings in it.
        state: its tensors, by keys without PEFT's prefix.
        seen: the model as PEFT sees it.
    """

    path: Path
    content: Mapping[str, Any]
    config: Config
    state: Mapping[str, Tensor]
    seen: PeftView


def plan_full(folder: Folder) -> list[PlannedSite]:
    """Return a `Delta` for each tensor that PEFT trained whole."""
    path, config, here = folder.path, folder.config, folder.seen.places
    whole = {key: tensor for key, tensor in folder.state.items() if not is_factor(key)}
    if not whole and not config.modules_to_save:
        return []
    base = base_state_dict(folder.seen.modules[""])
    original = {key: _original_key(key, base) for key in whole}
    _check_complete(folder, base, set(original.values()))
    expected = {key: base[of] for key, of in original.items() if of in base}
    compare(whole, expected, str(path))
    trained: dict[str, Tensor] = {}
    for key, of in original.items():
        check_real(of, base[of])
        if of in here and _is_trained(key, of, config):
            if of in trained and not torch.equal(trained[of], whole[key]):
                raise CheckpointError(f"{path} is damaged: it has two different values for {of!r}")
            trained[of] = whole[key]
        elif not torch.equal(base[of], whole[key].to(base[of])):
            raise CheckpointError(
                f"{path} has values at {key} that differ from the model's; only parameters that "
                "PEFT trains by bias= or modules_to_save= are loaded"
            )
    check_dtypes(trained, path)
    return [_plan_delta(here[of], tensor, path) for of, tensor in trained.items()]


def _original_key(key: str, base: Mapping[str, Any]) -> str:
    """Return the base's key for PEFT's key: the key without the names of wrappers.

    >>> _original_key("head.modules_to_save.weight", {})
    'head.weight'
    """
    return key if key in base else _WRAPPERS.sub("", key).removeprefix(".")


def _check_complete(folder: Folder, base: Mapping[str, Any], found: set[str]) -> None:
    """Raise a CheckpointError if a module of `modules_to_save` lacks a tensor in the folder."""
    inside = tuple(f"{name}." for name in folder.seen.paths if folder.config.is_saved(name))
    missing = [key for key in base if key.startswith(inside) and key not in found]
    if missing:
        raise CheckpointError(
            f"{folder.path} does not fit: modules_to_save is {folder.config.modules_to_save}, but "
            f"{', '.join(missing)} is missing"
        )


def _is_trained(key: str, original: str, config: Config) -> bool:
    """Return whether PEFT trained the tensor of a key, as a bias or in a module to save."""
    # For a module to save, PEFT's wrapper also keeps the base's module, as `original_module`.
    if "original_module" in key.split("."):
        return False
    parts = original.split(".")
    above = (".".join(parts[:i]) for i in range(1, len(parts)))
    return (config.bias != "none" and parts[-1] == "bias") or any(map(config.is_saved, above))


def _plan_delta(place: Place, tensor: Tensor, path: Path) -> PlannedSite:
    """Return the plan of a Delta that changes the base's tensor to the given one."""
    base, spec = place.value.detach(), Delta()
    check_site(place, spec, path)
    dtype = factor_dtype(base)
    return plan_site(place, spec, {"D": tensor.to(base.device, dtype) - base.to(dtype)})


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
    config = read_config(Path(CONFIG), content)
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
