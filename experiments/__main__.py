"""The command line: `python -m experiments digits [options]`, or `… report DIR`."""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .options import StudyError, add_options, listed
from .settings import PRESETS, DigitSettings, preset
from .text_settings import TextSettings


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
    text = commands.add_parser(
        "text",
        help="fine-tune a transformers checkpoint on texts, by several methods, and report",
        description="The text study. In brackets: the value that preset distilbert-imdb has.",
        epilog=_presets_of(TextSettings.PRESETS, "distilbert-imdb"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_options(text, TextSettings)
    text.set_defaults(command=run_text_study)
    report = commands.add_parser("report", help="make report and figures of a run again")
    report.add_argument("folder", type=Path, metavar="DIR", help="the run's folder")
    report.set_defaults(command=make_report)
    return top


def run(**given: object) -> int:
    """Run the digit study with the options given on top of a preset."""
    from .study import run_digits  # torch and paramlora take their time; --help needs neither

    settings = preset(str(given.pop("preset", "blog")), **given)
    return make_report(run_digits(settings).folder)


def run_text_study(**given: object) -> int:
    """Run the text study with the options given on top of a preset."""
    from .text import run_text

    settings = TextSettings.of_preset(str(given.pop("preset", "distilbert-imdb")), **given)
    run = run_text(settings)
    # Under torchrun, one process writes.
    return make_report(run.folder) if int(os.environ.get("RANK", "0")) == 0 else 0


def make_report(folder: Path) -> int:
    """Write a run's report and figures, and show its table."""
    from .rundir import RunDirectory

    if RunDirectory.read(folder).environment.get("study") == TextSettings.STUDY:
        from . import text_report

        done = text_report.write_text_report(folder)
        print(text_report.terminal(done))
        print(f"report   {folder / 'report.md'}")
        return 1 if text_report.failed(done) else 0
    from .report import failed, terminal, write_report

    finished = write_report(folder)
    print(terminal(finished))
    print(f"report   {folder / 'report.md'}")
    return 1 if failed(finished) else 0


def _presets() -> str:
    """Return what each preset sets otherwise than blog."""
    return _presets_of(PRESETS, "blog")


def _presets_of(presets: Mapping[str, Mapping[str, Any]], usual: str) -> str:
    """Return what each preset of a study sets otherwise than its usual one."""
    lines = [f"presets other than {usual}:"]
    for name, values in presets.items():
        if values:
            pairs = ", ".join(f"{key} {listed(value)}" for key, value in values.items())
            lines.append(f"  {name}: {pairs}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
