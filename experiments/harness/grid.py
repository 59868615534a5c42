"""Grids of settings, in the syntax of --vary."""

from collections.abc import Mapping, Sequence
from typing import Any

from .settings import Settings, StudyError, options

Grid = Mapping[str, Sequence[Any]]


def parse_grid(given: Sequence[str], kind: type[Settings]) -> dict[str, list[Any]]:
    """Return the grid of words such as `rank=1,2,4` and `digits=2,3;9`.

    Commas separate values. Semicolons separate values that contain commas themselves. Each value is
    converted to the type of its setting.

    Args:
        given: the words after --vary.
        kind: the settings class whose options are varied.

    Raises:
        StudyError: a word is not SETTING=VALUES, a setting is unknown, or a value has a wrong type.

    >>> import dataclasses
    >>> from experiments.harness.settings import option
    >>> @dataclasses.dataclass(frozen=True)
    ... class Example(Settings):
    ...     rank: int = option(2, "rank r")
    ...     hidden: tuple[int, ...] = option((256, 128), "units of each hidden layer")
    ...     selection: bool = option(False, "use the validation images")
    >>> parse_grid(["rank=1,2", "hidden=24,16;8", "selection=yes"], Example)
    {'rank': [1, 2], 'hidden': [(24, 16), (8,)], 'selection': [True]}
    """
    defaults = {name: entry.default for name, entry in options(kind).items()}
    grid = {}
    for word in given:
        name, sign, text = word.partition("=")
        name = name.replace("-", "_")
        if not sign or name not in defaults:
            raise StudyError(f"--vary takes SETTING=VALUES such as rank=1,2,4, got {word!r}")
        is_list = isinstance(defaults[name], tuple) or "," in str(defaults[name])
        values = text.split(";" if is_list or ";" in text else ",")
        try:
            grid[name] = [_typed(defaults[name], value) for value in values]
        except ValueError as error:
            raise StudyError(f"--vary {word}: {error}") from None
    return grid


def check_grid(grid: Grid, settings: Settings) -> None:
    """Check that a grid varies only settings that affect results, which a folder does not.

    Raises:
        StudyError: a name in the grid is not such a setting.
    """
    entries = options(type(settings))
    known = [name for name, entry in entries.items() if entry.metadata["affects_results"]]
    for name in grid:
        if name not in known:
            raise StudyError(
                f"--vary {name} is not a setting; there are {', '.join(sorted(known))}"
            )


def _typed(default: Any, text: str) -> Any:
    """Return the value of a text, converted to the type of the default."""
    if isinstance(default, bool):
        return text.lower() in ("1", "yes", "true")
    if isinstance(default, tuple):
        return tuple(int(part) for part in text.split(","))
    return type(default)(text)
