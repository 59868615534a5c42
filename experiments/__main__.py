"""The command line: `python -m experiments digits [options]`, or `… report DIR`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .options import StudyError, add_options, listed
from .settings import PRESETS, DigitSettings, preset


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


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    top = argparse.ArgumentParser(prog="python -m experiments", description=__doc__)
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    digits = commands.add_parser(
        "digits",
        help="pre-train on digits, fine-tune on some, switch off and on, and report",
        description="The digit study. In brackets: the value that preset blog has.",
        epilog=_presets(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_options(digits, DigitSettings)
    digits.set_defaults(command=run)
    report = commands.add_parser("report", help="make report and figures of a run again")
    report.add_argument("folder", type=Path, metavar="DIR", help="the run's folder")
    report.set_defaults(command=make_report)
    return top


def run(**given: object) -> int:
    """Run the digit study with the options given on top of a preset."""
    from .study import run_digits  # torch and paramlora take their time; --help needs neither

    settings = preset(str(given.pop("preset", "blog")), **given)
    return make_report(run_digits(settings).folder)


def make_report(folder: Path) -> int:
    """Write a run's report and figures, and show its table."""
    from .report import failed, terminal, write_report

    finished = write_report(folder)
    print(terminal(finished))
    print(f"report   {folder / 'report.md'}")
    return 1 if failed(finished) else 0


def _presets() -> str:
    """Return what each preset sets otherwise than blog."""
    lines = ["presets other than blog:"]
    for name, values in PRESETS.items():
        if values:
            pairs = ", ".join(f"{key} {listed(value)}" for key, value in values.items())
            lines.append(f"  {name}: {pairs}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
