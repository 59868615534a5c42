"""The command line `python -m benchmarks`: find the subcommand and run it.

    python -m benchmarks --help             # lists the subcommands
    python -m benchmarks layers --help      # options and examples of one of them

A subcommand is a module with the functions `add_options(parser)` and `run(options)` and the text
EXAMPLES, which ends its `--help`. To add one, write the module and add a line to COMMANDS.
"""

import argparse
import importlib
import sys
from types import ModuleType

COMMANDS = {
    "layers": "training step and inference of adapted layers",
    "routed": "a batch whose rows use different adapters",
    "equivalence": "the same training with paramlora and PEFT: losses, time",
    "host-time": "clock, host and GPU time of a step, by operation",
    "verbs": "switching, scaling and merging on 224 layers",
    "big-model": "training steps and verbs at a billion parameters",
    "quantized": "training steps on a quantized base",
    "scaling": "training on several GPUs, compared with one",
    "study-speed": "the digit study, compared with a plain script",
    "text-methods": "fine-tuning methods on text: accuracy, time, memory",
    "tables": "make the tables of the documents from the rows in docs/data",
    "figure": "draw the overheads that `layers` measured",
}


def main(arguments: list[str] | None = None) -> int:
    """Run a subcommand and return the exit status."""
    given = sys.argv[1:] if arguments is None else arguments
    # Only the chosen subcommand is imported, so each needs only its own packages.
    chosen = {name: module_of(name) for name in given[:1] if name in COMMANDS}
    options = parser_with(chosen).parse_args(given)
    return chosen[options.command].run(options) or 0


def module_of(command: str) -> ModuleType:
    """Return the module of a subcommand."""
    return importlib.import_module(f"benchmarks.{command.replace('-', '_')}")


def parser_with(modules: dict[str, ModuleType]) -> argparse.ArgumentParser:
    """Return a parser that lists all subcommands and has the options of those in `modules`."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure paramlora beside other libraries.",
        epilog="`python -m benchmarks COMMAND --help` shows options and examples.",
        formatter_class=HelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, line in COMMANDS.items():
        command = commands.add_parser(name, help=line, formatter_class=HelpFormatter)
        if name in modules:
            command.description = modules[name].__doc__
            command.epilog = modules[name].EXAMPLES
            modules[name].add_options(command)
    return parser


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of descriptions and shows the defaults of options."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=22)
        # argparse does not count the indent of subcommands, and would wrap after long names.
        self._action_max_length = 4 + max(map(len, COMMANDS))

    def _get_help_string(self, action: argparse.Action) -> str | None:
        default = action.default
        if default in (None, argparse.SUPPRESS, []) or isinstance(default, bool):
            return action.help
        values = default if isinstance(default, list) else [default]
        return f"{action.help} (default: {' '.join(map(str, values))})"


if __name__ == "__main__":
    sys.exit(main())
