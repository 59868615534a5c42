"""Reading and writing `adapter_config.json`."""

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .config import Config

# Settings without an effect on what a trained adapter computes. Dropout acts in training only, and
# is no part of an adapter here; `fan_in_fan_out` is decided by the type of the module, as in PEFT.
_IDLE = {
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "eva_config",
    "fan_in_fan_out",
    "inference_mode",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
}


# What A and B were at the start. Others change the stored base when PEFT loads: two of them by what
# can be computed from the base alone, and is here.
_PLAIN = ("gaussian", "orthogonal", "eva")


_FROM_BASE = ("pissa", "olora")


# Settings that go with a list of target_modules.
_OF_LISTS = {"layers_to_transform", "layers_pattern"}


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    # JSON has NaN and Infinity in Python, and whole numbers that no float can hold.
    return isinstance(value, int | float) and type(value) is not bool and abs(value) < 1e308


def _is_rank(value: Any) -> bool:
    return _is_whole(value) and 1 <= value < 2**31  # above that a shape overflows


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _is_pattern(of: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(of(number) for number in value.values())


_TEXTS = ("a string or a list of strings", lambda v: isinstance(v, str) or _is_names(v))


_CHECKS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "r": ("a whole number of at least 1", _is_rank),
    "lora_alpha": ("a finite number", _is_number),
    "target_modules": _TEXTS,
    "exclude_modules": _TEXTS,
    "layers_to_transform": (
        "a whole number or a list of them",
        lambda v: _is_whole(v) or (isinstance(v, list) and all(map(_is_whole, v))),
    ),
    "layers_pattern": _TEXTS,
    "rank_pattern": ("whole numbers by name", _is_pattern(_is_rank)),
    "alpha_pattern": ("finite numbers by name", _is_pattern(_is_number)),
    "use_rslora": ("true or false", lambda v: isinstance(v, bool)),
    "use_dora": ("true or false", lambda v: isinstance(v, bool)),
    "bias": ("'none', 'all' or 'lora_only'", lambda v: v in ("none", "all", "lora_only")),
    "modules_to_save": ("a list of strings", _is_names),
}


def read(path: Path) -> Config:
    """Return what an `adapter_config.json` says.

    Raises:
        CheckpointError: it is damaged, of another method than LoRA, or has a setting that is not
            carried out here.
    """
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: it is no JSON ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{path} is damaged: it must hold settings by name, found {content!s:.50}"
        )
    if content.get("peft_type") != "LORA":
        raise CheckpointError(
            f"{path} has peft_type {content.get('peft_type')!r}; only 'LORA' is read here"
        )
    _refuse_others(path, content)
    settings = {key: content[key] for key in _CHECKS if content.get(key) is not None}
    for key, value in settings.items():
        wanted, fits = _CHECKS[key]
        if not fits(value):
            raise CheckpointError(f"{path} is damaged: {key!r} must be {wanted}, found {value!r}")
    if "target_modules" not in settings:
        raise CheckpointError(f"{path} names no target_modules; write them there")
    if isinstance(settings["target_modules"], str) and settings.keys() & _OF_LISTS:
        raise CheckpointError(
            f"{path} is damaged: target_modules is a string, which goes without "
            f"{' and '.join(sorted(settings.keys() & _OF_LISTS))}"
        )
    init = content.get("init_lora_weights")
    return Config(**settings, init=init if init in _FROM_BASE else "kaiming")


def written(targets: Mapping[str, tuple[int, float]], **settings: Any) -> dict[str, Any]:
    """Return the fewest settings that give each module its rank and alpha, by path.

    Older versions of PEFT refuse what they do not know, so what is off is left out.
    """
    r, alpha = Counter(targets.values()).most_common(1)[0][0]
    ranks = {_anchored(path): rank for path, (rank, _) in targets.items() if rank != r}
    alphas = {_anchored(path): _short(a) for path, (_, a) in targets.items() if a != alpha}
    content = {
        "peft_type": "LORA",
        "r": r,
        "lora_alpha": _short(alpha),
        "target_modules": "|".join(re.escape(path) for path in targets),
        "inference_mode": True,
    }
    more = {"rank_pattern": ranks, "alpha_pattern": alphas, **settings}
    return content | {key: value for key, value in more.items() if value}


def _refuse_others(path: Path, content: dict[str, Any]) -> None:
    init = content.get("init_lora_weights")
    switched = init is None or isinstance(init, bool)
    if not switched and init not in (*_PLAIN, *_FROM_BASE):
        raise CheckpointError(
            f"{path} has init_lora_weights {init!r}, which changes the base where it is loaded; "
            "save it from PEFT as a plain LoRA, by path_initial_model_for_weight_conversion="
        )
    known = {*_IDLE, *_CHECKS, "init_lora_weights"}
    others = [key for key, value in content.items() if key not in known and value]
    if others:
        raise CheckpointError(
            f"{path} has settings that are not carried out here: "
            f"{', '.join(f'{key}={content[key]!r}' for key in sorted(others))}"
        )


def _anchored(path: str) -> str:
    return "^" + re.escape(path)


def _short(number: float) -> float:
    """Return a whole number as an int: so PEFT writes an alpha."""
    return int(number) if number == int(number) else number


Targets = dict[str, tuple[int, float]]
