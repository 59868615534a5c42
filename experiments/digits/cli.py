"""The command of the digit study: `digits`, and the page that `report --explain` makes."""

import argparse
from pathlib import Path
from typing import Any

from ..harness.options import Commands, add_command, add_option, add_options, presets_help
from ..harness.settings import StudyError, options
from .settings import PRESETS, DigitSettings, preset


def add_commands(commands: Commands) -> None:
    """Add the study's command to those of `python -m experiments`."""
    digits = add_command(
        commands,
        "digits",
        help="pre-train on digits, fine-tune on some, switch off and on, and report",
        description="The digit study. The value of preset blog is in brackets.",
        epilog=presets_help(PRESETS, "blog"),
        examples=(
            "--seeds 2",
            "--preset relu --rank 8 --digits 4 9",
            "--data digits --margin inf --look 20 --out runs/masked",
        ),
    )
    add_options(digits, DigitSettings)
    digits.set_defaults(command=run)


def run(**given: object) -> int:
    """Run the digit study with the options given on top of a preset."""
    # Imported here, as torch and paramlora take their time and --help needs neither.
    from .study import run_digits

    settings = preset(str(given.pop("preset", "blog")), **given)
    return report([run_digits(settings).folder])


def add_report_options(parser: argparse.ArgumentParser) -> None:
    """Add the page on an adapter to what `report` can make."""
    page = parser.add_argument_group("Digit study")
    page.add_argument(
        "--explain",
        action="store_true",
        default=argparse.SUPPRESS,
        help="write only explain.html, the page on what an adapter of the run did",
    )
    page.add_argument(
        "--seed", type=int, default=argparse.SUPPRESS, metavar="N", help="the adapter's [0]"
    )
    for name in ("bases", "data_dir"):
        add_option(page, options(DigitSettings)[name])


def report(
    folders: list[Path],
    explain: bool = False,
    seed: int | None = None,
    bases: str | None = None,
    data_dir: str | None = None,
) -> int:
    """Write the report of each run and show its table, or with `explain` the page on an adapter.

    Return 1 if a check failed, else 0.

    Raises:
        StudyError: no run is in a folder, or none that has a fine-tuned network yet.
    """
    places = {"seed": seed, "bases": bases, "data_dir": data_dir}
    given: dict[str, Any] = {key: value for key, value in places.items() if value is not None}
    if given and not explain:
        raise StudyError(f"--{next(iter(given)).replace('_', '-')} is used with --explain")
    return max([explain_run(f, **given) if explain else report_one(f) for f in folders])


def report_one(folder: Path) -> int:
    """Write a run's report and figures, and show its table."""
    from .report.report import failed, terminal, write_report

    finished = write_report(folder)
    print(terminal(finished))
    print(f"report   {folder / 'report.md'}")
    return 1 if failed(finished) else 0


def explain_run(folder: Path, seed: int = 0, **places: object) -> int:
    """Write the page on what a run's adapter did."""
    from .report.explain import explain

    print(f"page     {explain(folder, seed, **places)}")
    return 0
