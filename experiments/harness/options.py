"""The command line of a study, made from its settings: an argument group for each group of them."""

import argparse
import dataclasses
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from .settings import Settings, groups, listed, own_options

WIDTH = 98  # characters of a line of text in --help
# What `add_subparsers` returns, to which each study adds its commands.
Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def add_command(
    commands: Commands,
    name: str,
    *,
    help: str,
    description: str,
    examples: Sequence[str],
    epilog: str = "",
) -> argparse.ArgumentParser:
    """Add a command whose help ends with examples of its options, one a line; return its parser."""
    lines = ["examples:", *(f"  python -m experiments {name} {words}" for words in examples)]
    return commands.add_parser(
        name,
        help=help,
        epilog="\n".join([*([epilog, ""] if epilog else []), *lines]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=textwrap.fill(description, WIDTH),
    )


def add_options(parser: argparse.ArgumentParser, kind: type[Settings]) -> None:
    """Give `parser` an option for each setting of `kind`, grouped as the settings are.

    Options that are not given are absent from the parsed ones, so that a preset can fill them in.
    """
    for group in (kind, *groups(kind).values()):
        title = (group.__doc__ or "").splitlines()[0].rstrip(".")
        section = parser.add_argument_group("Study" if group is kind else title)
        for entry in own_options(group).values():
            add_option(section, entry)


def add_option(parser: "argparse._ActionsContainer", entry: dataclasses.Field) -> None:
    """Give a parser, or an argument group, the option of one field."""
    flag, default = "--" + entry.name.replace("_", "-"), entry.default
    choices, shown = entry.metadata["choices"], f" [{listed(default)}]" if default != "" else ""
    common: dict[str, Any] = {
        "dest": entry.name,
        "default": argparse.SUPPRESS,
        "help": (entry.metadata["help"] + shown).replace("%", "%%"),
    }
    if isinstance(default, bool):
        parser.add_argument(flag, action=argparse.BooleanOptionalAction, **common)
        return
    word = {int: "N", float: "X"}.get(type(default), entry.name.upper())
    common["metavar"] = f"{{{','.join(choices)}}}" if choices else word
    if isinstance(default, tuple):
        parser.add_argument(flag, action=_List, nargs="+", item=int, **common)
    elif "," in str(default):
        parser.add_argument(flag, action=_List, nargs="+", **common)
    else:
        parser.add_argument(flag, type=type(default), **common)


class _List(argparse.Action):
    """Take a list with commas, spaces or both, as a tuple of `item`, or as a text with commas."""

    def __init__(self, *args: Any, item: Any = None, **more: Any) -> None:
        super().__init__(*args, **more)
        self.item = item

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        parts = [part for part in ",".join(values).split(",") if part]
        try:
            given = tuple(map(self.item, parts)) if self.item else ",".join(parts)
        except ValueError as error:
            raise argparse.ArgumentError(self, str(error)) from None
        setattr(namespace, self.dest, given)


def presets_help(presets: Mapping[str, Mapping[str, Any]], usual: str) -> str:
    """Return a text on what each preset of a study changes against its usual one."""
    lines = [f"presets other than {usual}:"]
    for name, changes in presets.items():
        if changes:
            pairs = ", ".join(f"{key} {listed(value)}" for key, value in changes.items())
            lines.append(f"  {name}: {pairs}")
    return "\n".join(lines)
