"""The commands of sweeps over the digit study: `sweep`, `ranks` and `remedies`."""

import argparse
from pathlib import Path

from ..digits.settings import DigitSettings, preset
from ..harness.grid import parse_grid
from ..harness.options import Commands, add_command, add_options
from ..harness.rundir import RunDirectory
from ..harness.settings import StudyError, result_settings


def add_commands(commands: Commands) -> None:
    """Add the commands to those of `python -m experiments`."""
    sweep = add_command(
        commands,
        "sweep",
        help="the digit study over a grid of settings, seeds and bases, in parallel",
        examples=(
            "--vary rank=1,2,4 --vary strength=0,0.5,1",
            "--preset relu --base-seeds 5 --jobs 2 --vary margin=2,4,inf",
            '--vary "digits=2,3;9" --vary init=gaussian,kaiming --out runs/digits-and-inits',
        ),
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


def _add_pool(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--base-seeds", type=int, default=1, metavar="N", help="bases, from --seed on [1]"
    )
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes at a time [1]")


def run_grid(vary: list[str], base_seeds: int, jobs: int, **given: object) -> int:
    """Run a sweep, write its report, and show its table."""
    # Imported here, as torch and paramlora take their time and --help needs neither.
    from .sweep import cells, run_sweep

    settings = preset(str(given.pop("preset", "blog")), **given)
    grid = parse_grid(vary, DigitSettings)
    folder = Path(settings.place.out or "-".join(["runs/sweep", settings.preset, *sorted(grid)]))
    asked = result_settings(settings) | {"vary": sorted(vary), "base_seeds": base_seeds}
    run_sweep(list(cells(settings, grid, base_seeds)), folder, asked, jobs)
    return report(folder)


def report(folder: Path) -> int:
    """Write a sweep's report and figures, and show its table.

    Raises:
        StudyError: no sweep is there, or none that has a row yet.
    """
    from .report import table, write_sweep_report

    run = RunDirectory.read(folder)
    if not run.rows:
        raise StudyError(f"the sweep in {folder} has no rows yet: go on with it first")
    write_sweep_report(run)
    print(table(run).text())
    print(f"report   {folder / 'sweep.md'}")
    return 0


def draw_ranks(folders: list[Path], out: Path) -> int:
    """Draw sweeps over ranks side by side."""
    from .ranks import write_rank_figure

    write_rank_figure(folders, out)
    print(f"figure   {out}")
    return 0


def run_selection(
    floor: tuple[float, float], selection_bases: int, base_seeds: int, jobs: int, **given: object
) -> int:
    """Choose and measure the remedies, and show the table."""
    from .select import run_remedies

    settings = preset(str(given.pop("preset", "blog")), **given)
    folder = Path(settings.place.out or f"runs/remedies-{settings.preset}")
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
