"""The `digits` command, and the options of `report` for digit runs."""

import argparse
from pathlib import Path
from typing import Any

from ..harness.options import Commands, add_command, add_option, add_options, presets_help
from ..harness.settings import StudyError, options
from .settings import PRESETS, DigitSettings


def add_commands(commands: Commands) -> None:
    """Add the study's command to those of `python -m experiments`."""
    digits = add_command(
        commands,
        "digits",
        help="pre-train on digits, fine-tune on some of them, measure forgetting, and report",
        description="Run the digit study. Brackets show the value of preset blog.",
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
    """Run the digit study with a preset and changed options, and report; return the exit status."""
    # Imported here because torch and paramlora import slowly and --help does not need them.
    from .shared import settings_and_data
    from .study import run_digits

    settings, data = settings_and_data(str(given.pop("preset", "")), **given)
    return report([run_digits(settings, data=data).folder])


def add_report_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the page on an adapter to `report`."""
    page = parser.add_argument_group("Digit study")
    page.add_argument(
        "--explain",
        action="store_true",
        default=argparse.SUPPRESS,
        help="write only explain.html, a page on the effect of one adapter of the run",
    )
    page.add_argument(
        "--seed",
        type=int,
        default=argparse.SUPPRESS,
        metavar="N",
        help="the seed of the adapter on the page [the first]",
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
    """Write the report of each run and print its table, or write the page on an adapter.

    Return 1 if a check failed, else 0.

    Args:
        folders: the folders of the runs.
        explain: write the page on an adapter instead of the report.
        seed: the seed of that adapter; the first by default.
        bases: the folder of trained bases, if it has moved since the run.
        data_dir: the folder of the data set, if it has moved since the run.

    Raises:
        StudyError: a folder has no run, or its run has no fine-tuned network yet.
    """
    places = {"seed": seed, "bases": bases, "data_dir": data_dir}
    given: dict[str, Any] = {key: value for key, value in places.items() if value is not None}
    if given and not explain:
        raise StudyError(f"--{next(iter(given)).replace('_', '-')} is used with --explain")
    return max([explain_run(f, **given) if explain else report_one(f) for f in folders])


def report_one(folder: Path) -> int:
    """Write a run's report and figures, and print its table; return the exit status."""
    from .report.report import failed, terminal, write_report

    finished = write_report(folder)
    print(terminal(finished))
    print(f"report   {folder / 'report.html'}: open it in a browser, and move the strength λ")
    print(f"next     python -m experiments report {folder} --explain, a page on one adapter")
    return 1 if failed(finished) else 0


def explain_run(folder: Path, seed: int | None = None, **places: object) -> int:
    """Write the page on the effect of a run's adapter; return the exit status."""
    from .report.explain import explain

    print(f"page     {explain(folder, seed, **places)}")
    return 0
