"""PEFT's settings for LoRA, and PEFT's rules for the modules that they select.

The rules differ from setting to setting:

    setting                        an entry selects the path of a module if
    target_modules, a list         the path is equal to it, or ends with "." and the entry
    target_modules, a string       it matches the whole path, as a regular expression
    exclude_modules                the same as for target_modules
    rank_pattern, alpha_pattern    it matches the whole path or a part after a dot up to the end, as
                                   a regular expression; the first such entry counts
    modules_to_save                see `is_saved` and `is_in_saved`
    target_parameters              as a list of target_modules, but with paths of parameters; no
                                   other setting but the patterns concerns them
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .patterns import match


@dataclass(frozen=True)
class Config:
    """The settings that paramlora supports, with PEFT's names and defaults.

    `init` is `init_lora_weights` if the initial A and B depend on the base, else "kaiming".
    """

    target_modules: str | list[str]
    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    exclude_modules: str | list[str] = field(default_factory=list)
    layers_to_transform: int | list[int] | None = None
    layers_pattern: str | list[str] = field(default_factory=list)
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    use_rslora: bool = False
    use_dora: bool = False
    bias: str = "none"
    modules_to_save: list[str] = field(default_factory=list)
    target_parameters: list[str] = field(default_factory=list)
    init: str = "kaiming"

    def targets(self, path: str) -> bool:
        """Return whether PEFT adapts the module at `path`, as its `check_target_module_exists`."""
        if not path or _selects(self.exclude_modules, path) or self.is_in_saved(path):
            return False
        # If a list has the whole path, `layers_to_transform` does not matter.
        if isinstance(self.target_modules, list) and path in self.target_modules:
            return True
        return _selects(self.target_modules, path) and self._is_in_layers(path)

    def is_saved(self, path: str) -> bool:
        """Return whether `modules_to_save` selects the module at `path` itself.

        PEFT compares the end of the path without regard to dots: "head" selects `pre_head` too.
        """
        return any(path.endswith(name) for name in self.modules_to_save)

    def is_in_saved(self, path: str) -> bool:
        """Return whether `modules_to_save` rules out an adapter for the module at `path`.

        Here PEFT treats the name as a regular expression and matches it between dots: "head" rules
        out `head` and `sub.head.dense`, but not `pre_head`.
        """
        names = self.modules_to_save
        return any(match(rf"(^|.*\.){name}($|\..*)", path) is not None for name in names)

    def rank(self, path: str) -> int:
        return _first_match(self.rank_pattern, path, self.r)

    def alpha(self, path: str) -> float:
        return _first_match(self.alpha_pattern, path, self.lora_alpha)

    def _is_in_layers(self, path: str) -> bool:
        """Return whether the first number in `path` is one of `layers_to_transform`.

        With `layers_pattern` it is the first number after one of these names.
        """
        layers = self.layers_to_transform
        if layers is None or layers == []:
            return True
        patterns = [self.layers_pattern] if isinstance(self.layers_pattern, str) else []
        expressions = [rf"(?:^|.*?\.){name}\.(\d+)\." for name in patterns or self.layers_pattern]
        for expression in expressions or [r".*?\.[^.]*\.(\d+)\."]:
            found = match(expression, path)
            if found:
                return int(str(found[0])) in (layers if isinstance(layers, list) else [layers])
        return False


def _selects(names: str | list[str], path: str) -> bool:
    if isinstance(names, str):
        return match(names, path, whole=True) is not None
    return any(path == name or path.endswith(f".{name}") for name in names)


def _first_match(numbers: Mapping[str, Any], path: str, default: Any) -> Any:
    """Return the number of the first pattern that matches the end of a path: `get_pattern_key`."""
    for pattern, number in numbers.items():
        if match(rf"(.*\.)?({pattern})$", path) is not None:
            return number
    return default
