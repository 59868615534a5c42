"""The whole tensors in a PEFT folder: trained biases and `modules_to_save`, which become `Delta`s.

A folder can also have tensors that PEFT did not train, such as the buffers of a module to save, or
embeddings. These must be equal to the base's.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..files.base import base_state_dict
from ..files.compare import compare
from ..files.plan import check_dtypes, check_site, plan_site
from ..kinds.delta import Delta
from ..kinds.spec import factor_dtype
from ..layers.install import PlannedSite
from ..site.place import Place
from ..stack.storage import check_real
from .config import Config
from .layout import is_factor
from .modules import PeftView

# The names that PEFT's wrappers insert between the path of a module and its tensors' names.
_WRAPPERS = re.compile(r"(^|\.)(base_layer|modules_to_save|original_module)(?=\.)")


def plan_full(
    model: nn.Module,
    seen: PeftView,
    here: Mapping[str, Place],
    config: Config,
    state: Mapping[str, Tensor],
    path: Path,
) -> list[PlannedSite]:
    """Return a `Delta` for each tensor that PEFT trained whole.

    Args:
        model: the model.
        seen: the model as PEFT sees it.
        here: the places of the model, by path.
        config: the folder's settings.
        state: the folder's tensors, by keys without PEFT's prefix.
        path: the folder, for messages.
    """
    whole = {key: tensor for key, tensor in state.items() if not is_factor(key)}
    if not whole and not config.modules_to_save:
        return []
    base = base_state_dict(model)
    original = {key: _original_key(key, base) for key in whole}
    _check_complete(seen, config, base, set(original.values()), path)
    expected = {key: base[of] for key, of in original.items() if of in base}
    compare(whole, expected, str(path))
    trained: dict[str, Tensor] = {}
    for key, of in original.items():
        check_real(of, base[of])
        if of in here and _is_trained(key, of, config):
            if of in trained and not torch.equal(trained[of], whole[key]):
                raise CheckpointError(f"{path} is damaged: it has two different values for {of!r}")
            trained[of] = whole[key]
        else:
            _check_equal(base[of], whole[key], key, path)
    check_dtypes({of: tensor for of, tensor in trained.items() if of in here}, path)
    return [_plan_delta(here[of], tensor, path) for of, tensor in trained.items()]


def _original_key(key: str, base: Mapping[str, Any]) -> str:
    """Return the base's key for PEFT's key: the key without the names of wrappers.

    >>> _original_key("head.modules_to_save.weight", {})
    'head.weight'
    """
    return key if key in base else _WRAPPERS.sub("", key).removeprefix(".")


def _check_complete(
    seen: PeftView, config: Config, base: Mapping[str, Any], found: set[str], path: Path
) -> None:
    """Raise a CheckpointError if a module of `modules_to_save` lacks a tensor in the folder."""
    inside = tuple(f"{name}." for name in seen.paths if config.is_saved(name))
    missing = [key for key in base if key.startswith(inside) and key not in found]
    if missing:
        raise CheckpointError(
            f"{path} does not fit: modules_to_save is {config.modules_to_save}, but "
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


def _check_equal(base: Tensor, found: Tensor, key: str, path: Path) -> None:
    if not torch.equal(base, found.to(base)):
        raise CheckpointError(
            f"{path} has values at {key} that differ from the model's; only parameters that PEFT "
            "trains by bias= or modules_to_save= are loaded"
        )


def _plan_delta(place: Place, tensor: Tensor, path: Path) -> PlannedSite:
    """Return the plan of a Delta that changes the base's tensor to the given one."""
    base, spec = place.value.detach(), Delta()
    check_site(place, spec, path)
    dtype = factor_dtype(base)
    return plan_site(place, spec, {"D": tensor.to(base.device, dtype) - base.to(dtype)})
