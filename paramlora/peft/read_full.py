"""Biases and whole modules of a PEFT folder."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..files.base import base_state_dict
from ..files.compare import compare
from ..files.plan import planned_site
from ..kinds.delta import Delta
from ..kinds.spec import factor_dtype
from ..layers.install import Planned
from ..site.place import Place, places
from ..site.storage import check_real
from .config import Config
from .layout import FACTOR
from .modules import names


def full(
    model: nn.Module, config: Config, state: Mapping[str, Tensor], path: Path
) -> list[Planned]:
    """Return the planned full updates: of trained biases and of modules_to_save.

    What else the folder holds of the base (PEFT adds embeddings, on occasion) has to be the base's.
    """
    base: dict[str, Any] = base_state_dict(model)
    here = {place.path: place for place in places(model)}
    whole = {key: tensor for key, tensor in state.items() if not FACTOR.fullmatch(key)}
    origin = {key: _own_path(key, base) for key in whole}
    _check_retrained(model, config, base, set(origin.values()), path)
    expected = {key: base[of] for key, of in origin.items() if of in base}
    compare(whole, expected, str(path))
    found: dict[str, Tensor] = {}
    for key, of in origin.items():
        check_real(of, base[of])
        trained = of in here and "original_module" not in key.split(".")
        if trained and _is_trained(config, of):
            if of in found and not torch.equal(found[of], whole[key]):
                raise CheckpointError(f"{path} is damaged: it has two different values of {of!r}")
            found[of] = whole[key]
        elif not torch.equal(base[of], whole[key].to(base[of])):
            raise CheckpointError(
                f"{path} has other values at {key} than the model; only parameters that PEFT "
                "trains by bias= or modules_to_save= are taken over"
            )
    return [_difference(here[of], tensor, path) for of, tensor in found.items()]


def _is_trained(config: Config, tensor: str) -> bool:
    """Return whether a tensor's path is one that PEFT trains as a whole."""
    parts = tensor.split(".")
    above = (".".join(parts[:i]) for i in range(1, len(parts)))
    return (config.bias != "none" and parts[-1] == "bias") or any(map(config.replaces, above))


def _difference(place: Place, tensor: Tensor, path: Path) -> Planned:
    base = place.value.detach()
    dtype = factor_dtype(base)
    update = tensor.to(base.device, dtype) - base.to(dtype)
    return planned_site(place, Delta(), {"D": update}, path)


def _own_path(key: str, base: Mapping[str, Any]) -> str:
    """Return the key of the base that a key with PEFT's wrappers in it stands for."""
    return key if key in base else _WRAPPERS.sub("", key).removeprefix(".")


def _check_retrained(
    model: nn.Module, config: Config, base: Mapping[str, Any], found: set[str], path: Path
) -> None:
    """Raise a CheckpointError where a tensor of a module that PEFT trained whole is not there."""
    inside = tuple(f"{name}." for name in names(model) if config.replaces(name))
    missing = [key for key in base if key.startswith(inside) and key not in found]
    if inside and missing:
        raise CheckpointError(
            f"{path} does not fit: modules_to_save is {config.modules_to_save}, and "
            f"{', '.join(missing)} is not there"
        )


# What PEFT puts between a module and its own tensors.
_WRAPPERS = re.compile(r"(^|\.)(base_layer|modules_to_save|original_module)(?=\.)")
