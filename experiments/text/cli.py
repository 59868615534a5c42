"""The command of the text study, `text`; with `--vary` it runs a sweep."""

import math
import os
from pathlib import Path
from typing import Any

from ..harness.grid import parse_grid
from ..harness.options import Commands, add_command, add_options, presets_help
from ..harness.settings import listed
from .settings import KINDS, FrontGrid, TextSettings


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
    front = add_command(
        commands,
        "text-front",
        group="grids of settings",
        help="what LoRA at several ranks and full fine-tuning learn of a text data set, and keep",
        description="Fine-tune at several learning rates and ranks, in full and jointly, and "
        "measure the accuracy on the data set and what is kept of --retention. Brackets show the "
        "values of preset distilbert-imdb.",
        examples=(
            "--preset minilm-imdb --retention spam --pooling mean --data-dir data",
            "--preset minilm-imdb --retention spam --ranks 1,8 --rates 1e-3 --full-rates 1e-4",
            "--preset minilm-imdb --retention spam --pooling mean --kinds lora,dora,oft,full",
        ),
    )
    add_options(front, TextSettings)
    for name, values in vars(FrontGrid()).items():
        what = "ranks of LoRA" if name == "ranks" else "learning rates"
        flag, default = "--" + name.replace("_", "-"), listed(values)
        front.add_argument(flag, default=default, metavar="V,V", help=f"{what} [{default}]")
    front.add_argument("--jobs", type=int, default=1, metavar="N", help="parallel trainings [1]")
    front.add_argument(
        "--minutes",
        type=float,
        default=math.inf,
        metavar="M",
        help="begin no training after so many minutes",
    )
    front.add_argument(
        "--kinds",
        default="",
        metavar="KIND,KIND",
        help="instead, compare these kinds of adapters, each at a rate chosen on the validation "
        f"texts: {', '.join([*KINDS, 'full'])}; ia3=1e-3/1e-2 sets the rates to choose among",
    )
    front.set_defaults(command=run_text_front)


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
        print(
            f"report   {folder / 'sweep.md'}: open it; each combination has its own in {folder}/*"
        )
        return 0
    run = run_text(settings)
    # Under torchrun, only the first process writes the report.
    return report([run.folder]) if int(os.environ.get("RANK", "0")) == 0 else 0


def run_text_front(jobs: int, minutes: float, kinds: str, **given: object) -> int:
    """Train the arms of the front at their rates, or the kinds, and print the tables."""
    from .front import run_front
    from .kinds import parse_kinds, run_kinds

    grid: dict[str, Any] = {
        name: tuple(type(default[0])(v) for v in str(given.pop(name)).split(",") if v)
        for name, default in vars(FrontGrid()).items()
    }
    settings = TextSettings.of_preset(str(given.pop("preset", "distilbert-imdb")), **given)
    folder = Path(settings.place.out or f"runs/text-front-{settings.preset}")
    if kinds:
        run = run_kinds(settings, parse_kinds(kinds), folder, jobs, minutes)
        return report([run.folder])
    return report([run_front(settings, FrontGrid(**grid), folder, jobs, minutes).folder])


def report(folders: list[Path]) -> int:
    """Write the report of each run and print its table. Return 1 if a check failed, else 0.

    Raises:
        StudyError: a folder has no run, or a run has no fine-tuned model yet.
    """
    from ..report.checks import any_failed
    from . import kinds_report
    from .front_report import chosen_table, difference_table, front_table, is_front, write_front
    from .report import checks, terminal, write_text_report

    fronts = [folder for folder in folders if is_front(folder)]
    for folder in fronts:
        run = write_front(folder)
        for table in (front_table(run), chosen_table(run), difference_table(run)):
            print(f"\n{table.text()}")
        print(f"report   {run.folder / 'front.md'}")
        print(f"next     open {run.folder / 'front.png'}: what is learned, against what is kept")
    compared = [folder for folder in folders if kinds_report.is_kinds(folder)]
    for folder in compared:
        run = kinds_report.write_kinds(folder)
        for name in ("rate_table", "chosen_table", "difference_table"):
            print(f"\n{getattr(kinds_report, name)(run).text()}")
        print(f"report   {run.folder / 'kinds.md'}")
    others = [folder for folder in folders if folder not in {*fronts, *compared}]
    runs = [write_text_report(folder) for folder in others]
    for run in runs:
        print(terminal(run))
        print(f"report   {run.folder / 'report.html'}: open it in a browser")
    return int(any(any_failed(checks(run)) for run in runs))
