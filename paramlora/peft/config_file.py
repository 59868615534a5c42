"""Read `adapter_config.json` into a `Config`, and make its content for an adapter.

PEFT writes about forty settings. `Config` has those that determine the adapted tensors and
their updates. Some others do not affect a trained adapter (`_NO_EFFECT`). All remaining settings
must be off: null, false or empty. Ignoring one would silently load another model than PEFT's.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import CheckpointError
from .config import Config

# The rank and the alpha of each adapted module or raw parameter, by path.
Targets = dict[str, tuple[int, float]]
# The settings of a folder, and its tensors by keys without PEFT's prefix.
Content = tuple[dict[str, Any], dict[str, Tensor]]

# `fan_in_fan_out` says that weights are stored as (in, out). PEFT corrects it by the type of each
# module, so the type alone decides here.
_NO_EFFECT = {
    *("auto_mapping", "base_model_name_or_path", "fan_in_fan_out", "inference_mode", "peft_type"),
    *("peft_version", "revision", "runtime_config", "task_type"),
}
# The settings of each kind that have no effect on a trained adapter, or that are read elsewhere.
_OF_KIND = {
    "LORA": {"corda_config", "eva_config", "loftq_config", "lora_ga_config", "megatron_core"}
    | {"qalora_group_size", "init_lora_weights"},
    "OFT": {"oft_block_size", "coft", "eps", "use_cayley_neumann", "num_cayley_neumann_terms"}
    | {"init_weights", "module_dropout"},
    "HIRA": {"rank_pattern", "init_weights", "hira_dropout"},
    "MISS": {"mini_r", "miss_dropout"},
}

# The values of `init_lora_weights` besides true and false. With the plain ones PEFT draws A and B
# and leaves the base alone, so they do not matter once an adapter is trained. With all others PEFT
# changes the base when it loads a folder. Two of these changes can be computed from the base.
_PLAIN = ("gaussian", "orthogonal", "eva")
_FROM_BASE = ("pissa", "olora")

# Settings that PEFT allows only beside a list of target_modules, and all that select modules.
_NEED_LIST = {"layers_to_transform", "layers_pattern"}
_SELECT = {"target_modules", "exclude_modules", *_NEED_LIST}


def read_config(path: Path, content: Mapping[str, Any]) -> Config:
    """Return the settings in the content of an `adapter_config.json`.

    Of the kinds besides LoRA, these are the settings that select modules, and the rank.

    Raises:
        CheckpointError: the file is damaged, is for a kind that paramlora does not load, or has a
            setting that paramlora does not support.
    """
    kind = content.get("peft_type")
    if kind not in list(_OF_KIND):
        raise CheckpointError(
            f"{path} has peft_type {kind!r}; only 'LORA', 'OFT', 'HIRA' and 'MISS' can be loaded"
        )
    init = content.get("init_lora_weights")
    if not (init is None or isinstance(init, bool) or init in (*_PLAIN, *_FROM_BASE)):
        raise CheckpointError(
            f"{path} has init_lora_weights {init!r}, with which PEFT changes the base when it "
            "loads; save it from PEFT as a plain LoRA, with "
            "path_initial_model_for_weight_conversion="
        )
    keys = _CHECKS.keys() if kind == "LORA" else _SELECT | {"r"}
    _refuse_others(path, content, {*keys, *_NO_EFFECT, *_OF_KIND[kind]})
    # An OFT has an r of 0, because its settings have the size of a block instead.
    unset = (None, 0) if kind == "OFT" else (None,)
    given = {key: content[key] for key in _CHECKS if key in keys and content.get(key) not in unset}
    settings = _check(path, given)
    return Config(**settings, init=init if init in _FROM_BASE else "kaiming")


def _check(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings with a target_modules, or raise if one has an invalid value."""
    for key, value in settings.items():
        wanted, is_valid = _CHECKS[key]
        if not is_valid(value):
            raise CheckpointError(
                f"{path} is damaged: {key!r} must be {wanted}, found {value!r:.100}"
            )
    if "target_modules" not in settings:
        if not settings.get("target_parameters"):
            raise CheckpointError(f"{path} has no target_modules; add them")
        settings["target_modules"] = []
    need_list = sorted(settings.keys() & _NEED_LIST)
    if isinstance(settings.get("target_modules"), str) and need_list:
        raise CheckpointError(
            f"{path} is damaged: with {' and '.join(need_list)}, target_modules must be a list, "
            "found a string"
        )
    return settings


def _refuse_others(path: Path, content: Mapping[str, Any], known: Collection[str]) -> None:
    """Raise a CheckpointError if a setting that is on is not one of `known`."""
    off = {"bias": "none", "init_weights": True}
    others = [k for k, value in content.items() if k not in known and value and off.get(k) != value]
    if others:
        raise CheckpointError(
            f"{path} has settings that paramlora does not support: "
            f"{', '.join(f'{key}={content[key]!r}' for key in sorted(others))}"
        )


def config_content(targets: Targets, **settings: Any) -> dict[str, Any]:
    """Return the fewest settings that give each module or raw parameter its rank and alpha.

    Settings that are off are left out, because older versions of PEFT refuse unknown settings. A
    path must match its own module only, by the rules in `config.py`:

    - `target_modules` is one regular expression. A list with "net.0" would also select `sub.net.0`.
    - Keys of `rank_pattern` and `alpha_pattern` begin with "^". PEFT puts `(.*\\.)?` before a key,
      so that "net\\.0" also matches `sub.net.0`, while "^net\\.0" matches `net.0` alone.

    >>> config_content({"net.0": (4, 8.0), "sub.net.0": (4, 8.0), "fc": (2, 8.0)})["rank_pattern"]
    {'^fc': 2}
    """
    r, alpha = Counter(targets.values()).most_common(1)[0][0]
    ranks = {f"^{re.escape(path)}": rank for path, (rank, _) in targets.items() if rank != r}
    alphas = {f"^{re.escape(path)}": _short(a) for path, (_, a) in targets.items() if a != alpha}
    modules = [path for path in targets if path not in settings.get("target_parameters", ())]
    content = {
        "peft_type": "LORA",
        "r": r,
        "lora_alpha": _short(alpha),
        # Without the entry, PEFT would select modules by the type of the model.
        "target_modules": "|".join(re.escape(path) for path in modules) or [],
        "inference_mode": True,
    }
    optional = {"rank_pattern": ranks, "alpha_pattern": alphas, **settings}
    return content | {key: value for key, value in optional.items() if value}


def as_list(expression: str, targets: Collection[str], paths: Collection[str]) -> str | list[str]:
    """Return `target_modules` as a list if that selects no other modules, else the expression.

    PEFT reads both, but SGLang, for one, refuses expressions.

    >>> as_list(r"h\\.0\\.q|h\\.1\\.q", {"h.0.q", "h.1.q"}, ["h.0.q", "h.0.k", "h.1.q"])
    ['q']
    """
    chosen = {path for path in paths if path in targets}
    for names in ({path.rpartition(".")[2] for path in chosen}, chosen):
        ends = tuple(f".{name}" for name in names)
        if {path for path in paths if path in names or path.endswith(ends)} == chosen:
            return sorted(names)
    return expression


def parse_config(text: str | bytes, path: Path) -> dict[str, Any]:
    """Return the content of an `adapter_config.json`, or raise a CheckpointError if damaged."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: it is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is damaged: it must hold an object, found {content!s:.50}")
    return content


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    # Python's JSON has NaN and Infinity, and integers too large for a float.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e308


def _is_rank(value: Any) -> bool:
    return _is_integer(value) and 1 <= value < 2**31  # above that the size of a shape overflows


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _is_mapping_to(is_valid: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(map(is_valid, value.values()))


# The condition on the settings of each type in `Config`, in words and as a function.
_BY_TYPE: dict[Any, tuple[str, Callable[[Any], bool]]] = {
    int: ("an integer of at least 1", _is_rank),
    float: ("a finite number", _is_number),
    bool: ("true or false", lambda v: isinstance(v, bool)),
    str: ("'none', 'all' or 'lora_only'", lambda v: v in ("none", "all", "lora_only")),
    list[str]: ("a list of strings", _is_names),
    str | list[str]: ("a string or a list of strings", lambda v: type(v) is str or _is_names(v)),
    int | list[int] | None: (
        "an integer or a list of integers",
        lambda v: _is_integer(v) or (isinstance(v, list) and all(map(_is_integer, v))),
    ),
    Mapping[str, int]: ("integers of at least 1 by pattern", _is_mapping_to(_is_rank)),
    Mapping[str, float]: ("finite numbers by pattern", _is_mapping_to(_is_number)),
}
_CHECKS = {field.name: _BY_TYPE[field.type] for field in fields(Config) if field.name != "init"}
_CHECKS["lora_dropout"] = "at least 0 and below 1", lambda v: _is_number(v) and 0 <= v < 1


def _short(number: float) -> float:
    """Return a whole number as an int, as PEFT writes an alpha."""
    return int(number) if float(number).is_integer() else number
