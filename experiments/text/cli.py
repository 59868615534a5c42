"""The command of the text study, `text`; with `--vary` it runs a sweep."""

import os
from pathlib import Path

from ..harness.grid import parse_grid
from ..harness.options import Commands, add_command, add_options, presets_help
from .settings import TextSettings


def add_commands(commands: Commands) -> None:
    """Add the study's command to those of `python -m experiments`."""
    text = add_command(
        commands,
        "text",
        help="fine-tune a transformers checkpoint on texts, by several methods, and report",
        description="The text study. Brackets show the values of preset distilbert-imdb.",
        epilog=presets_help(TextSettings.PRESETS, "distilbert-imdb"),
        examples=(
            "--preset minilm-spam --data-dir data",
            "--data reviews.csv --text-column review --label-column verdict",
            "--preset minilm-imdb --methods lora --vary rank=2,8 --vary lr=0.001,0.002",
        ),
    )
    add_options(text, TextSettings)
    text.add_argument(
        "--vary",
        action="append",
        default=[],
        metavar="SETTING=V,V",
        help="run a sweep over these settings, such as rank=4,8; semicolons separate lists",
    )
    text.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="number of runs of a sweep in parallel [1]"
    )
    text.set_defaults(command=run_text_study)


def run_text_study(vary: list[str], jobs: int, **given: object) -> int:
    """Run the text study, or a sweep of it, with the given options as changes to a preset."""
    # Imported here because torch and paramlora load slowly and --help needs neither.
    from .study import run_text

    settings = TextSettings.of_preset(str(given.pop("preset", "distilbert-imdb")), **given)
    if vary:
        from .sweep import run_text_sweep

        grid = parse_grid(vary, TextSettings)
        folder = Path(
            settings.place.out or "-".join(["runs/sweep-text", settings.preset, *sorted(grid)])
        )
        print(run_text_sweep(settings, grid, folder, jobs).text())
        print(f"rows     {folder / 'results.csv'}")
        return 0
    run = run_text(settings)
    # Under torchrun, only the first process writes the report.
    return report([run.folder]) if int(os.environ.get("RANK", "0")) == 0 else 0


def report(folders: list[Path]) -> int:
    """Write the report of each run and print its table. Return 1 if a check failed, else 0.

    Raises:
        StudyError: a folder has no run, or a run has no fine-tuned model yet.
    """
    from ..report.checks import any_failed
    from .report import checks, terminal, write_text_report

    runs = [write_text_report(folder) for folder in folders]
    for run in runs:
        print(terminal(run))
        print(f"report   {run.folder / 'report.md'}")
    return int(any(any_failed(checks(run)) for run in runs))
