"""PEFT's `adapter_config.json`: what it says, by PEFT's rules of matching, or why it is refused.

PEFT writes some forty settings. Those that say which tensors are adapted, and how, are in `Config`;
some change nothing once an adapter is trained (`_IDLE`); any other must be off (null, false or
empty), for a setting that is not carried out would give another model without a word.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Config:
    """The settings that are carried out, under PEFT's names and with PEFT's defaults."""

    target_modules: str | list[str]
    r: int = 8
    lora_alpha: float = 8
    exclude_modules: str | list[str] = field(default_factory=list)
    layers_to_transform: int | list[int] | None = None
    layers_pattern: str | list[str] = field(default_factory=list)
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    use_rslora: bool = False
    use_dora: bool = False
    bias: str = "none"
    modules_to_save: list[str] = field(default_factory=list)
    init: str = "kaiming"

    def targets(self, path: str) -> bool:
        """Return whether the module at `path` is adapted, as PEFT's check_target_module_exists."""
        if not path or _named(self.exclude_modules, path) or self.retrains(path):
            return False
        if path in self.target_modules and not isinstance(self.target_modules, str):
            return True
        return _named(self.target_modules, path) and self._is_layer(path)

    def retrains(self, path: str) -> bool:
        """Return whether `modules_to_save` keeps adapters off the module at `path`."""
        return any(re.match(rf"(^|.*\.){name}($|\..*)", path) for name in self.modules_to_save)

    def replaces(self, path: str) -> bool:
        """Return whether `modules_to_save` replaces the module at `path`: by how that ends."""
        return any(path.endswith(name) for name in self.modules_to_save)

    def rank(self, path: str) -> int:
        return _pattern(self.rank_pattern, path, self.r)

    def alpha(self, path: str) -> float:
        return _pattern(self.alpha_pattern, path, self.lora_alpha)

    def _is_layer(self, path: str) -> bool:
        """Return whether the first number in `path` is one of `layers_to_transform`."""
        layers = self.layers_to_transform
        if layers is None or layers == []:
            return True
        patterns = [self.layers_pattern] if isinstance(self.layers_pattern, str) else []
        expressions = [rf"(?:^|.*?\.){name}\.(\d+)\." for name in patterns or self.layers_pattern]
        for expression in expressions or [r".*?\.[^.]*\.(\d+)\."]:
            match = re.match(expression, path)
            if match:
                return int(match[1]) in (layers if isinstance(layers, list) else [layers])
        return False


def _named(names: str | list[str], path: str) -> bool:
    """Return whether a path is meant: by a regular expression as a whole, by a list by its end."""
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    return any(path == name or path.endswith(f".{name}") for name in names)


def _pattern(numbers: Mapping[str, Any], path: str, default: Any) -> Any:
    """Return the number of the first pattern that matches the end of a path."""
    for key, number in numbers.items():
        if re.match(rf"(.*\.)?({key})$", path):
            return number
    return default
