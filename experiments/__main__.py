"""The command line: `python -m experiments digits [options]`, or `… report DIR`."""

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from .harness.rundir import RunDirectory
from .harness.settings import StudyError

OLD_RUNS = "digits"  # runs that were begun before all studies recorded their name


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command, and return the exit status: 0, 1 for a failed proof, 2 for a bad request."""
    options = vars(parser().parse_args(arguments))
    command = options.pop("command")
    try:
        return command(**options)
    except StudyError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130


def studies() -> dict[str, ModuleType]:
    """Return the command lines of the studies by the name of their folder.

    A study is a folder with a file cli.py, which has `add_commands(commands)` and `report(folder)`.
    """
    here = Path(__file__).parent
    names = sorted(path.parent.name for path in here.glob("*/cli.py"))
    return {name: importlib.import_module(f"{__package__}.{name}.cli") for name in names}


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    top = argparse.ArgumentParser(prog="python -m experiments", description=__doc__)
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    for study in studies().values():
        study.add_commands(commands)
    again = commands.add_parser("report", help="make report and figures of a run again")
    again.add_argument("folder", type=Path, metavar="DIR", help="the run's folder")
    again.set_defaults(command=report)
    return top


def report(folder: Path) -> int:
    """Write a run's report and figures, as its study does, and show its table.

    Raises:
        StudyError: no run is there, or it is of a study that is not known.
    """
    known = studies()
    name = RunDirectory.read(folder).environment.get("study", OLD_RUNS)
    if name not in known:
        raise StudyError(f"the run in {folder} is of study {name!r}; there are {', '.join(known)}")
    return known[name].report(folder)


if __name__ == "__main__":
    sys.exit(main())
