"""The command line of a study, built from its settings: one argument group per settings group."""

import argparse
import dataclasses
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from .settings import Settings, groups, listed, own_options

WIDTH = 98  # characters per line of text in --help
# The return type of `add_subparsers`. Each study adds its commands to it.
Commands: TypeAlias = "argparse._SubParsersAction[Command]"


class Command(argparse.ArgumentParser):
    """The parser of a command, which `--help` of the whole lists with its summary in its group."""

    group = summary = ""


def add_command(
    commands: Commands,
    name: str,
    *,
    help: str,
    description: str,
    examples: Sequence[str],
    epilog: str = "",
    group: str = "studies",
) -> Command:
    """Add a command to `commands` and return its parser. Its help ends with examples.

    Args:
        commands: the commands of `python -m experiments`.
        name: the command's name.
        help: one line for the list of commands.
        description: the text at the top of the command's help.
        examples: options of example calls, one call per string.
        epilog: text before the examples.
        group: the title under which the command is listed.
    """
    lines = ["examples:", *(f"  python -m experiments {name} {words}" for words in examples)]
    command = commands.add_parser(
        name,
        epilog="\n".join([*([epilog, ""] if epilog else []), *lines]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=textwrap.fill(description, WIDTH),
    )
    command.group, command.summary = group, help
    return command


def grouped(commands: Mapping[str, Command]) -> str:
    """Return the commands by name with their summaries, under the titles of their groups."""
    titles: dict[str, list[str]] = {}
    for name, command in commands.items():
        lines = textwrap.wrap(command.summary, WIDTH - 14)
        pairs = zip([name, *[""] * len(lines)], lines, strict=False)
        titles.setdefault(command.group, []).extend(f"  {a:<12}{b}" for a, b in pairs)
    return "\n\n".join("\n".join([f"{title}:", *lines]) for title, lines in titles.items())


def add_options(parser: argparse.ArgumentParser, kind: type[Settings]) -> None:
    """Add an option to `parser` for each setting of `kind`, grouped like the settings.

    The parsed namespace has only the options that were given, so that a preset sets the others.
    """
    for group in (kind, *groups(kind).values()):
        title = (group.__doc__ or "").splitlines()[0].rstrip(".")
        section = parser.add_argument_group("Study" if group is kind else title)
        for entry in own_options(group).values():
            add_option(section, entry)


def add_option(parser: "argparse._ActionsContainer", entry: dataclasses.Field) -> None:
    """Add the option of one field to a parser or an argument group."""
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
    """An action that parses a list separated by commas, spaces or both.

    The result is a tuple of `item` values, or a comma-separated string if `item` is None.
    """

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
    """Return the help text that lists each preset's changes to the default preset.

    Args:
        presets: the changed options of each preset, by preset name.
        usual: the name of the default preset.
    """
    lines = [f"presets other than {usual}:"]
    for name, changes in presets.items():
        if changes:
            pairs = ", ".join(f"{key} {listed(value)}" for key, value in changes.items())
            lines.append(f"  {name}: {pairs}")
    return "\n".join(lines)
