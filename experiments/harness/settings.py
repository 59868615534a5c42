"""Settings that are command-line options too: what the settings of every study are made of.

A study's settings are a frozen dataclass derived from `Settings`, each field written with
`option(default, help)`: the help names the unit, and the option's name and type follow from the
field's. A new setting is one line there.
"""

import argparse
import dataclasses
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeAlias, TypeVar

import torch

LONGEST = 120  # characters of a folder's name; file systems take 255 bytes
Kind = TypeVar("Kind", bound="Settings")
# What `add_subparsers` returns, to which each study adds its commands.
Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


class StudyError(ValueError):
    """Something a user asked for cannot be done; the message says what, why, and what can."""


def option(default: Any, help: str, *, choices: tuple[str, ...] = (), place: bool = False) -> Any:
    """Return a dataclass field that is a command-line option too.

    `place` marks a field that only says where things lie or how they are made: no result depends
    on it.
    """
    return field(default=default, metadata={"help": help, "choices": choices, "place": place})


@dataclass(frozen=True)
class Settings:
    """What all settings check: each value is of its default's type, and one of its choices.

    A study derives a frozen dataclass from it, with a `__post_init__` that calls this one and then
    `require` for what is special to it, and sets `STUDY`, its name, and `PRESETS`: by name, what
    differs from the defaults. It has the fields `preset` and `out`.

    Raises:
        StudyError: a value that is not allowed, naming the option, the value and what is allowed.
    """

    STUDY: ClassVar[str] = ""
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {}

    def __post_init__(self) -> None:
        for entry in dataclasses.fields(self):
            value, choices = getattr(self, entry.name), entry.metadata["choices"]
            kind = type(entry.default)
            right = type(value) in ((int, float) if kind is float else (kind,))
            self.require(entry.name, right, f"of type {kind.__name__}")
            self.require(entry.name, not choices or value in choices, " or ".join(choices))

    def require(self, name: str, holds: object, allowed: str) -> None:
        """Raise a StudyError on the field `name` unless `holds`; `allowed` says what may be."""
        if not holds:
            flag = "--" + name.replace("_", "-")
            raise StudyError(f"{flag} must be {allowed}, got {listed(getattr(self, name))!r}")

    @property
    def folder(self) -> str:
        """The run's folder: `out`, or one named after the preset and whatever differs from it.

        A name that file systems would not take is cut, and ends with a digest of the whole.
        """
        given: dict[str, Any] = vars(self)
        if given["out"]:
            return given["out"]
        parts = [f"{self.STUDY}-{given['preset']}"]
        usual = deciding(self.of_preset(given["preset"]))
        for name, value in deciding(self).items():
            if value != usual[name]:
                parts.append(re.sub(r"[^\w.,-]+", "_", f"{name}={listed(value)}"))
        name = "-".join(parts)
        if len(name) > LONGEST:
            digest = hashlib.sha256(name.encode()).hexdigest()[:12]
            name = f"{name[: LONGEST - 13]}-{digest}"
        return f"runs/{name}"

    @classmethod
    def of_preset(cls: type[Kind], name: str, **changes: Any) -> Kind:
        """Return the settings of a preset, with `changes` to its fields."""
        return cls(**{"preset": name, **cls.PRESETS.get(name, {}), **changes})


def deciding(settings: Settings) -> dict[str, Any]:
    """Return the settings that a result can depend on, in the types that JSON has."""
    return {
        entry.name: _plain(getattr(settings, entry.name))
        for entry in dataclasses.fields(settings)
        if not entry.metadata["place"]
    }


def add_options(parser: argparse.ArgumentParser, kind: type) -> None:
    """Give `parser` an option for each field of the settings class `kind`.

    Options that are not given are absent from what it parses, so that a preset can fill them in.
    """
    for entry in dataclasses.fields(kind):
        flag, default = "--" + entry.name.replace("_", "-"), entry.default
        choices = entry.metadata["choices"]
        shown = f" [{listed(default)}]" if default != "" else ""
        common: dict[str, Any] = {
            "dest": entry.name,
            "default": argparse.SUPPRESS,
            "help": (entry.metadata["help"] + shown).replace("%", "%%"),
        }
        if isinstance(default, bool):
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, **common)
        else:
            reader: Any = type(default)
            word = {int: "N", float: "X"}.get(reader, entry.name.upper())
            word = f"{{{','.join(choices)}}}" if choices else word
            whole = isinstance(default, tuple)
            if whole or "," in str(default):
                common |= {"action": _Listed, "nargs": "+", "whole": whole}
            else:
                common["type"] = reader
            parser.add_argument(flag, metavar=word, **common)


def listed(value: Any) -> str:
    """Return a setting as it is typed: 256,128 for a tuple or a list."""
    return ",".join(map(str, value)) if isinstance(value, tuple | list) else str(value)


def is_device(name: str) -> bool:
    """Whether a setting is "auto" or names a kind of device that torch knows."""
    try:
        return name == "auto" or torch.device(name) is not None
    except RuntimeError:
        return False


class _Listed(argparse.Action):
    """Takes a list with commas, with spaces or with both; as whole numbers where `whole`."""

    def __init__(self, *args: Any, whole: bool, **more: Any) -> None:
        super().__init__(*args, **more)
        self.whole = whole

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        parts = [part for part in ",".join(values).split(",") if part]
        try:
            given = tuple(map(int, parts)) if self.whole else ",".join(parts)
        except ValueError as error:
            raise argparse.ArgumentError(self, str(error)) from None
        setattr(namespace, self.dest, given)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def presets_of(presets: Mapping[str, Mapping[str, Any]], usual: str) -> str:
    """Return what each preset of a study sets otherwise than its usual one."""
    lines = [f"presets other than {usual}:"]
    for name, values in presets.items():
        if values:
            pairs = ", ".join(f"{key} {listed(value)}" for key, value in values.items())
            lines.append(f"  {name}: {pairs}")
    return "\n".join(lines)
