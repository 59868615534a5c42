"""The command line: `python -m experiments digits [options]`, or `… report DIR`."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from .digits.settings import PRESETS, DigitSettings, preset
from .harness.settings import StudyError, add_options, deciding, presets_of
from .tasks.streams import TaskSettings
from .text.settings import TextSettings


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
    sweep = commands.add_parser(
        "sweep",
        help="the digit study over a grid of settings, seeds and bases, in parallel",
        description="Every combination of the values of --vary, on --base-seeds bases, with as "
        "many adapter seeds as --seeds says. A sweep that was stopped goes on from its rows.",
    )
    add_options(sweep, DigitSettings)
    sweep.add_argument(
        "--vary", action="append", default=[], metavar="SETTING=V,V", help="such as rank=1,2,4"
    )
    _add_pool(sweep)
    sweep.set_defaults(command=run_grid)
    ranks = commands.add_parser(
        "ranks", help="draw accuracy against rank, from sweeps that varied the rank"
    )
    ranks.add_argument("folders", type=Path, nargs="+", metavar="DIR", help="a sweep's folder")
    ranks.add_argument(
        "--out", type=Path, default=Path("ranks.png"), metavar="PNG", help="[ranks.png]"
    )
    ranks.set_defaults(command=draw_ranks)
    remedies = commands.add_parser(
        "remedies",
        help="choose each remedy's settings on validation images, measure them on the test images",
    )
    add_options(remedies, DigitSettings)
    remedies.add_argument(
        "--floor",
        type=float,
        nargs=2,
        default=(0.0, 0.0),
        metavar=("TUNED", "OTHER"),
        help="what tuned and other digits must gain for a candidate to be chosen, points [0 0]",
    )
    remedies.add_argument(
        "--selection-bases", type=int, default=0, metavar="N", help="0: as many as --base-seeds [0]"
    )
    _add_pool(remedies)
    remedies.set_defaults(command=run_selection)
    tasks = commands.add_parser(
        "tasks", help="learn a sequence of tasks, an adapter a stage, and draw the accuracy matrix"
    )
    add_options(tasks, TaskSettings)
    tasks.set_defaults(command=run_sequence)
    text = commands.add_parser(
        "text",
        help="fine-tune a transformers checkpoint on texts, by several methods, and report",
        description="The text study. In brackets: the value that preset distilbert-imdb has.",
        epilog=presets_of(TextSettings.PRESETS, "distilbert-imdb"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_options(text, TextSettings)
    text.add_argument(
        "--vary",
        action="append",
        default=[],
        metavar="SETTING=V,V",
        help="run a sweep over these settings, such as rank=4,8; lists apart by semicolons",
    )
    text.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="runs of a sweep at a time [1]"
    )
    text.set_defaults(command=run_text_study)
    report = commands.add_parser("report", help="make report and figures of a run again")
    report.add_argument("folder", type=Path, metavar="DIR", help="the run's folder")
    report.set_defaults(command=make_report)
    explained = commands.add_parser("explain", help="show what an adapter of a run did")
    explained.add_argument("folder", type=Path, metavar="DIR", help="the run's folder")
    explained.add_argument("--seed", type=int, default=0, metavar="N", help="the adapter's [0]")
    for name in ("bases", "data_dir"):
        entry = DigitSettings.__dataclass_fields__[name]
        flag = "--" + name.replace("_", "-")
        explained.add_argument(flag, default=entry.default, help=entry.metadata["help"])
    explained.set_defaults(command=explain_run)
    return top


def run(**given: object) -> int:
    """Run the digit study with the options given on top of a preset."""
    # Imported here, as torch and paramlora take their time and --help needs neither.
    from .digits.study import run_digits

    settings = preset(str(given.pop("preset", "blog")), **given)
    return make_report(run_digits(settings).folder)


def run_grid(vary: list[str], base_seeds: int, jobs: int, **given: object) -> int:
    """Run a sweep, write its report, and show its table."""
    from .harness.grid import parse_grid
    from .sweeps.report import table, write_sweep_report
    from .sweeps.sweep import cells, run_sweep

    settings = preset(str(given.pop("preset", "blog")), **given)
    grid = parse_grid(vary, DigitSettings)
    folder = Path(settings.out or "-".join(["runs/sweep", settings.preset, *sorted(grid)]))
    asked = deciding(settings) | {"vary": sorted(vary), "base_seeds": base_seeds}
    run = run_sweep(list(cells(settings, grid, base_seeds)), folder, asked, jobs)
    write_sweep_report(run)
    print(table(run).text())
    print(f"report   {folder / 'sweep.md'}")
    return 0


def draw_ranks(folders: list[Path], out: Path) -> int:
    """Draw sweeps over ranks side by side."""
    from .sweeps.ranks import write_rank_figure

    write_rank_figure(folders, out)
    print(f"figure   {out}")
    return 0


def run_selection(
    floor: tuple[float, float], selection_bases: int, base_seeds: int, jobs: int, **given: object
) -> int:
    """Choose and measure the remedies, and show the table."""
    from .sweeps.select import run_remedies

    settings = preset(str(given.pop("preset", "blog")), **given)
    folder = Path(settings.out or f"runs/remedies-{settings.preset}")
    run_remedies(
        settings,
        folder,
        base_seeds=base_seeds,
        selection_bases=selection_bases,
        floor=floor,
        jobs=jobs,
    )
    print((folder / "remedies.md").read_text())
    return 0


def run_sequence(**given: object) -> int:
    """Learn a sequence of tasks, and show the table of metrics."""
    from .tasks.report import table, write_task_report
    from .tasks.tasks import run_tasks

    settings = TaskSettings.of_preset(str(given.pop("preset", "split")), **given)
    run = write_task_report(run_tasks(settings).folder)
    print(table(run).text())
    print(f"report   {run.folder / 'tasks.md'}")
    return 0


def explain_run(folder: Path, seed: int, bases: str, data_dir: str) -> int:
    """Write the page on what a run's adapter did."""
    from .digits.report.explain import explain

    print(f"page     {explain(folder, seed, bases=bases, data_dir=data_dir)}")
    return 0


def _add_pool(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--base-seeds", type=int, default=1, metavar="N", help="bases, from --seed on [1]"
    )
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes at a time [1]")


def run_text_study(vary: list[str], jobs: int, **given: object) -> int:
    """Run the text study, or a sweep of it, with the options given on top of a preset."""
    from .text.study import run_text

    settings = TextSettings.of_preset(str(given.pop("preset", "distilbert-imdb")), **given)
    if vary:
        from .harness.grid import parse_grid
        from .text.sweep import run_text_sweep

        grid = parse_grid(vary, TextSettings)
        folder = Path(settings.out or "-".join(["runs/sweep-text", settings.preset, *sorted(grid)]))
        print(run_text_sweep(settings, grid, folder, jobs).text())
        print(f"rows     {folder / 'results.csv'}")
        return 0
    run = run_text(settings)
    # Under torchrun, one process writes.
    return make_report(run.folder) if int(os.environ.get("RANK", "0")) == 0 else 0


def make_report(folder: Path) -> int:
    """Write a run's report and figures, and show its table."""
    from .harness.rundir import RunDirectory

    if RunDirectory.read(folder).environment.get("study") == TextSettings.STUDY:
        from .text import report as text_report

        done = text_report.write_text_report(folder)
        print(text_report.terminal(done))
        print(f"report   {folder / 'report.md'}")
        return 1 if text_report.failed(done) else 0
    from .digits.report.report import failed, terminal, write_report

    finished = write_report(folder)
    print(terminal(finished))
    print(f"report   {folder / 'report.md'}")
    return 1 if failed(finished) else 0


def _presets() -> str:
    """Return what each preset sets otherwise than blog."""
    return presets_of(PRESETS, "blog")


if __name__ == "__main__":
    sys.exit(main())
