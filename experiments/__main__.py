"""The command line: `python -m experiments digits [options]`, or `... report DIR`."""

import argparse
import importlib
import inspect
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from .harness.options import Command, add_command, grouped
from .harness.rundir import RunDirectory
from .harness.settings import StudyError, disk_problem

# Runs of older versions did not record their study. In such runs, one of these settings identifies
# the study. Runs without them are digit runs.
OLD_RUNS = {"base_seeds": "sweeps", "stream": "tasks"}

EXAMPLES = """examples:
  python -m experiments digits --seeds 2
  python -m experiments sweep --vary rank=1,2,4 --jobs 2
  python -m experiments report runs/digits-blog --explain"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return 0, 1 if a check failed, or 2 if the request cannot be carried out."""
    options = vars(parser().parse_args(arguments))
    command = options.pop("command")
    try:
        return command(**options)
    except StudyError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if (problem := disk_problem(error)) is None:
            raise
        print(f"error: {problem}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; run the same command again to continue", file=sys.stderr)
        return 130


def studies() -> dict[str, ModuleType]:
    """Return each study's command-line module, by the name of its folder.

    A study is a folder with a file cli.py that defines `add_commands(commands)` and
    `report(folders)`. If its report takes options, `add_report_options(parser)` adds them.
    """
    here = Path(__file__).parent
    names = sorted(path.parent.name for path in here.glob("*/cli.py"))
    return {name: importlib.import_module(f"{__package__}.{name}.cli") for name in names}


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    top = argparse.ArgumentParser(
        prog="python -m experiments",
        usage="python -m experiments COMMAND [options]",
        description="Run a study, or write the report of a run again. COMMAND --help has options.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = top.add_subparsers(
        required=True,
        metavar="COMMAND",
        prog="python -m experiments",
        parser_class=Command,
        help=argparse.SUPPRESS,
    )
    known = studies().values()
    for study in known:
        study.add_commands(commands)
    report_parser = add_command(
        commands,
        "report",
        group="reports",
        help="write the reports and figures of runs again, or draw further figures and pages",
        description="Write the reports and figures of runs again from their rows, without "
        "training. Options of one study cannot be used with runs of another.",
        examples=(
            "runs/digits-blog",
            "runs/digits-blog --explain --seed 3",
            "runs/sweep-blog-rank runs/sweep-relu-rank --figure ranks --out ranks.png",
        ),
    )
    report_parser.add_argument(
        "folders", type=Path, nargs="+", metavar="DIR", help="a run's folder"
    )
    report_parser.set_defaults(command=report)
    for study in known:
        if hasattr(study, "add_report_options"):
            study.add_report_options(report_parser)
    top.epilog = f"{grouped(commands.choices)}\n\n{EXAMPLES}"
    return top


def report(folders: list[Path], **options: object) -> int:
    """Write the reports and figures of runs with their studies' functions, and print the tables.

    Raises:
        StudyError: If a folder has no run, its study is unknown, or the study lacks an option.
    """
    by_study: dict[str, list[Path]] = {}
    for folder in folders:
        by_study.setdefault(study_of(folder), []).append(folder)
    known = studies()
    for name in by_study:
        for option in options.keys() - inspect.signature(known[name].report).parameters.keys():
            flag = "--" + option.replace("_", "-")
            raise StudyError(f"{flag} is not an option for the report of a run of study {name!r}")
    return max([known[name].report(runs, **options) for name, runs in by_study.items()])


def study_of(folder: Path) -> str:
    """Return the name of the study of the run in a folder."""
    run, known = RunDirectory.read(folder), studies()
    old = next((study for key, study in OLD_RUNS.items() if key in run.settings), "digits")
    name = run.environment.get("study", old)
    if name not in known:
        raise StudyError(
            f"the run in {folder} is of study {name!r}; known studies: {', '.join(known)}"
        )
    return name


if __name__ == "__main__":
    if isinstance(sys.stdout, io.TextIOWrapper):  # on Windows, a pipe may lack the letter λ
        sys.stdout.reconfigure(errors="replace")
    sys.exit(main())
