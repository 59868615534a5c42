"""Settings of a study: small frozen dataclasses, one for each part of it.

A study's settings derive from `Settings`, and each part of them from `SettingsGroup`. An option is
a field written with `option(default, help)`; the help names the unit. Option names are unique
within a study, so an option name identifies a setting: on the command line (`options.py`), after
`--vary` (`grid.py`), in `replace`, in presets and in settings.json.
"""

import dataclasses
import difflib
import errno
import hashlib
import itertools
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

import torch

LONGEST = 120  # characters of a folder's name; file systems take 255 bytes
Kind = TypeVar("Kind", bound="Settings")
GroupKind = TypeVar("GroupKind", bound="SettingsGroup")


class StudyError(ValueError):
    """A request cannot be carried out. The message says which, why, and how to fix it."""


def disk_problem(error: OSError) -> str | None:
    """Return an error of the disk in words, with what to do; None for errors of other kinds."""
    where = error.filename or "the folder of the run"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return (
            f"the disk has no space left for {where}: free some, and run the same command again. "
            "It goes on from the rows that are recorded"
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return (
            f"{where} cannot be read or written ({error.strerror}): change its permissions, or "
            "name another folder with --out"
        )
    if error.filename and not isinstance(error, ConnectionError | TimeoutError):
        return f"{where} cannot be read or written: {error.strerror}"
    return None


@dataclass(frozen=True)
class Check:
    """A condition on the value of an option, and its wording after "must be"."""

    allowed: str
    holds: Callable[[Any], object]


ANY = Check("any value", lambda value: True)
COUNT = Check("a whole number of at least 1", lambda value: value >= 1)
NATURAL = Check("a whole number of at least 0", lambda value: value >= 0)
NOT_NEGATIVE = Check("a number of at least 0", lambda value: value >= 0)
POSITIVE = Check("a finite number above 0", lambda value: 0 < value < math.inf)
FINITE = Check("a finite number", math.isfinite)
SHARE = Check("a number from 0 to 1", lambda value: 0 <= value <= 1)
DEVICE = Check("auto or a device that torch knows", lambda value: is_device(value))


def option(
    default: Any,
    help: str,
    check: Check = ANY,
    *,
    choices: tuple[str, ...] = (),
    affects_results: bool = True,
) -> Any:
    """Return a dataclass field that is also a command-line option.

    Args:
        default: the value when the option is not given; it sets the option's type.
        help: the meaning of the option, with the unit.
        check: the condition on the value.
        choices: the allowed values, if they can be listed.
        affects_results: False if results do not depend on the option, such as a folder.
    """
    check = Check(" or ".join(choices), choices.__contains__) if choices else check
    about = {"help": help, "check": check, "choices": choices, "affects_results": affects_results}
    return field(default=default, metadata=about)


@dataclass(frozen=True)
class SettingsGroup:
    """Settings that belong together. The first line of a group's docstring is its title in --help.

    Each value must have the type of its default and pass the check of its option.

    Raises:
        StudyError: a value is not allowed. The message names the option, the value and the
            condition.
    """

    def __post_init__(self) -> None:
        for name, entry in own_options(type(self)).items():
            value, check, kind = getattr(self, name), entry.metadata["check"], type(entry.default)
            right = type(value) in ((int, float) if kind is float else (kind,))
            self.require(name, right, f"of type {kind.__name__}")
            self.require(name, check.holds(value), check.allowed)

    def require(self, name: str, holds: object, allowed: str) -> None:
        """Raise a StudyError about the option `name` unless `holds`."""
        if not holds:
            flag = "--" + name.replace("_", "-")
            raise StudyError(f"{flag} must be {allowed}, got {listed(values(self)[name])!r}")


@dataclass(frozen=True)
class PlaceSettings(SettingsGroup):
    """Device and folders. A study derives its own group if it has further options."""

    device: str = option(
        "auto", "torch device, such as cpu or cuda:1; auto: a GPU if available, else cpu", DEVICE
    )
    out: str = option(
        "",
        "folder of the run; default: runs/STUDY-PRESET and the changed settings",
        affects_results=False,
    )


@dataclass(frozen=True)
class Settings(SettingsGroup):
    """All settings of a study: options, and groups of options.

    A study derives a frozen dataclass from this class and validates conditions across groups in
    `__post_init__`. It sets `STUDY`, the study's name, and `PRESETS`, the changed options of each
    preset by option name. It has the options `preset` and `out`.
    """

    STUDY: ClassVar[str] = ""
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {}

    @classmethod
    def of_preset(cls: type[Kind], name: str, **changes: Any) -> Kind:
        """Return the settings of a preset, with `changes` by option name."""
        return replace(cls(), **{"preset": name, **cls.PRESETS.get(name, {}), **changes})

    @property
    def folder(self) -> str:
        """The run's folder: `out` if given, else named after the changes to the preset.

        A name longer than LONGEST characters is shortened and ends with a digest of the full name.
        """
        given = values(self)
        if given["out"]:
            return given["out"]
        parts = [f"{self.STUDY}-{given['preset']}"]
        usual = flattened(result_settings(self.of_preset(given["preset"])))
        for name, value in flattened(result_settings(self)).items():
            if value != usual[name]:
                parts.append(re.sub(r"[^\w.,-]+", "_", f"{name}={listed(value)}"))
        name = "-".join(parts)
        if len(name) > LONGEST:
            digest = hashlib.sha256(name.encode()).hexdigest()[:12]
            name = f"{name[: LONGEST - 13]}-{digest}"
        return f"runs/{name}"


def own_options(kind: type[SettingsGroup]) -> dict[str, dataclasses.Field]:
    """Return the options of a settings class by name, without those of its groups."""
    fields = dataclasses.fields(kind)
    return {entry.name: entry for entry in fields if "help" in entry.metadata}


def groups(kind: type[SettingsGroup]) -> dict[str, type[SettingsGroup]]:
    """Return the groups of a settings class by the name of their field."""
    defaults = {entry.name: entry.default for entry in dataclasses.fields(kind)}
    return {name: type(d) for name, d in defaults.items() if isinstance(d, SettingsGroup)}


def options(kind: type[SettingsGroup]) -> dict[str, dataclasses.Field]:
    """Return the options of a settings class by name, those of its groups included."""
    inner = [options(group) for group in groups(kind).values()]
    return dict(itertools.chain(own_options(kind).items(), *(found.items() for found in inner)))


def values(settings: SettingsGroup) -> dict[str, Any]:
    """Return the value of each option by name, those of groups included."""
    found: dict[str, Any] = {}
    for entry in dataclasses.fields(settings):
        value = getattr(settings, entry.name)
        found |= values(value) if isinstance(value, SettingsGroup) else {entry.name: value}
    return found


def replace(settings: Kind, **changes: Any) -> Kind:
    """Return a copy of the settings with changed values, given by option name in any group.

    Raises:
        StudyError: a name is unknown, or a value is not allowed.
    """
    known = options(type(settings))
    for name in changes:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(known)}"
            raise StudyError(f"there is no setting {name!r}; {hint}")
    return _replaced(settings, changes)


def _replaced(settings: GroupKind, changes: Mapping[str, Any]) -> GroupKind:
    new: dict[str, Any] = {}
    for entry in dataclasses.fields(settings):
        value = getattr(settings, entry.name)
        if isinstance(value, SettingsGroup):
            new[entry.name] = _replaced(value, changes)
        elif entry.name in changes:
            new[entry.name] = changes[entry.name]
    return dataclasses.replace(settings, **new)


def result_settings(settings: SettingsGroup) -> dict[str, Any]:
    """Return the settings that determine results, nested in groups, as JSON types."""
    found: dict[str, Any] = {}
    for entry in dataclasses.fields(settings):
        value = getattr(settings, entry.name)
        if isinstance(value, SettingsGroup):
            found[entry.name] = result_settings(value)
        elif entry.metadata["affects_results"]:
            found[entry.name] = list(value) if isinstance(value, tuple) else value
    return found


def flattened(nested: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested settings as a flat dictionary by option name.

    >>> flattened({"seed": 0, "adapter": {"rank": 2, "alpha": 1.0}})
    {'seed': 0, 'rank': 2, 'alpha': 1.0}
    """
    found: dict[str, Any] = {}
    for name, value in nested.items():
        found |= flattened(value) if isinstance(value, Mapping) else {name: value}
    return found


def listed(value: Any) -> str:
    """Return a setting in command-line syntax, such as 256,128 for a tuple or a list."""
    return ",".join(map(str, value)) if isinstance(value, tuple | list) else str(value)


def is_device(name: str) -> bool:
    """Return whether a name is "auto" or a valid torch device."""
    try:
        return name == "auto" or torch.device(name) is not None
    except RuntimeError:
        return False
