"""Adapters from PEFT's settings: by PEFT's folders, or for some kinds by specs."""

import copy
import re
import tempfile
from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn
from torch.nn.utils.parametrize import type_before_parametrizations

import paramlora as pl
from paramlora.peft.config import Config

from .expressed import NotExpressed

FOLDERS = {"LORA", "OFT", "HIRA", "MISS"}
SPECS = {"LOHA", "LOKR", "IA3"}
# The settings of these kinds that a spec expresses; others must have their default.
_EXPRESSED = {
    *("peft_type", "base_model_name_or_path", "task_type", "inference_mode", "target_modules"),
    *("exclude_modules", "modules_to_save", "r", "alpha", "decompose_factor", "decompose_both"),
    *("init_weights", "init_ia3_weights", "feedforward_modules", "peft_version", "fan_in_fan_out"),
}


def plain(model: nn.Module) -> nn.Module:
    """Return a copy of a model without its adapters."""
    copied = copy.deepcopy(model)
    if pl.names(copied):
        pl.unmerge(copied)
        pl.detach(copied)
    return copied


def check_expressed(config: Any) -> None:
    """Raise if paramlora has no counterpart of a method of PEFT or of its settings."""
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind not in FOLDERS | SPECS:
        raise NotExpressed(f"the method {kind}")
    if kind in SPECS:
        default = type(config)()
        given = {key for key, value in config.__dict__.items() if value != getattr(default, key)}
        if given - _EXPRESSED:
            raise NotExpressed(f"the settings {sorted(given - _EXPRESSED)} of {kind}")
    if config.peft_type != "LORA" and getattr(config, "modules_to_save", None):
        raise NotExpressed(f"modules_to_save of {kind}")


def from_peft(model: nn.Module, base: nn.Module, config: Any, name: str) -> Any:
    """Attach an adapter with the first values that PEFT gives it; return the settings."""
    wrapped = peft.get_peft_model(base, config, adapter_name=name)
    with tempfile.TemporaryDirectory() as scratch:
        wrapped.save_pretrained(scratch)
        load_folder(model, Path(scratch, *([] if name == "default" else [name])), name)
    return config


def load_folder(model: nn.Module, folder: Any, name: str) -> None:
    """Load a PEFT folder, which may hold values that are not finite."""
    try:
        pl.load_peft(model, folder, name=name, finite=False)
    except pl.CheckpointError as error:
        raise NotExpressed(f"refused: {_general(str(error), str(folder))}") from error


def _general(message: str, folder: str) -> str:
    """Return the part of an error message that does not depend on the case."""
    message = message.replace(folder, "").split("json", 1)[-1].strip()
    if "has settings that" in message:
        return f"the settings {', '.join(re.findall(r'(?<=[:,] )([a-z_]+)=', message))}"
    return re.sub(r"'[^']*'", "…", message)[:100]


def from_spec(model: nn.Module, base: nn.Module, config: Any, name: str) -> Any:
    """Attach a LoHa, LoKr or IA3 from PEFT's settings; draw its factors if PEFT would."""
    paths = _targets(base, config)
    specs: dict[Any, pl.kinds.Spec] = {
        f"{path}.weight": _spec(config, base.get_submodule(path), path) for path in paths
    }
    if config.peft_type == "IA3":
        # One vector of PEFT rescales an output with its bias; here they would be two.
        layers = [base.get_submodule(path) for path in paths if not _feeds(config, path)]
        if any(getattr(layer, "bias", None) is not None for layer in layers):
            raise NotExpressed("one IA3 vector for a weight and its bias")
    pl.attach(model, specs, name=name, activate="only" if not pl.names(model) else "no")
    if not (getattr(config, "init_weights", True) and getattr(config, "init_ia3_weights", True)):
        with torch.no_grad():
            for factor in pl.parameters(model, name):
                factor.normal_() if config.peft_type == "IA3" else factor.normal_(std=0.3)
    return config


def _spec(config: Any, module: nn.Module, path: str) -> pl.kinds.Spec:
    if config.peft_type == "LOHA":
        return pl.LoHa(rank=config.r, alpha=config.alpha)
    if config.peft_type == "LOKR":
        return pl.LoKr(
            rank=config.r,
            alpha=config.alpha,
            factor=config.decompose_factor,
            decompose_both=config.decompose_both,
        )
    return pl.IA3(dim=_dim(module, _feeds(config, path)))


def _dim(module: nn.Module, feeds: bool) -> int:
    turned = type_before_parametrizations(module).__name__ in ("Conv1D", "Embedding")
    return int(feeds != turned)


def _feeds(config: Any, path: str) -> bool:
    given = config.feedforward_modules or []
    return (
        Config(given if isinstance(given, str) else list(given)).targets(path) if given else False
    )


def _targets(base: nn.Module, config: Any) -> list[str]:
    given = config.target_modules
    if given is None:
        raise ValueError("Please specify `target_modules` in `peft_config`")
    selects = Config(
        given if isinstance(given, str) else list(given),
        exclude_modules=list(config.exclude_modules or []),
    ).targets
    return [path for path, _ in base.named_modules() if selects(path)]
