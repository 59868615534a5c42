"""The `sweep` command, and the options of `report` for sweeps."""

import argparse
from pathlib import Path
from typing import Any

from ..digits.settings import PRESETS, DigitSettings
from ..harness.grid import parse_grid
from ..harness.options import Commands, add_command, add_options
from ..harness.rundir import RunDirectory
from ..harness.settings import StudyError, result_settings

REMEDIES = "remedies"  # `--preset remedies-relu` selects remedies on the preset relu
FRONT = "front"  # `--preset front-relu` compares LoRA with full fine-tuning on it
KINDS = "kinds"  # `--preset kinds-relu` compares the kinds of adapters on it
INTRUDERS = "intruders"  # `--preset intruders-relu` counts intruder dimensions on it
EPILOG = f"""presets {", ".join(f"{REMEDIES}-{name}" for name in PRESETS)}:
  Compare the remedies against forgetting on one of the study's presets, instead of a grid. The
  settings of each remedy are chosen on validation images and then measured on the test images.
presets {", ".join(f"{FRONT}-{name}" for name in PRESETS)}:
  Compare what LoRA of several ranks, full fine-tuning and joint training learn and forget, over
  learning rates.
presets {", ".join(f"{INTRUDERS}-{name}" for name in PRESETS)}:
  Count the intruder dimensions of LoRA and full fine-tuning over learning rates, and scale them.
presets {", ".join(f"{KINDS}-{name}" for name in PRESETS)}:
  Compare the kinds of adapters, each with a learning rate chosen on validation images."""


def add_commands(commands: Commands) -> None:
    """Add the `sweep` command to `python -m experiments`."""
    sweep = add_command(
        commands,
        "sweep",
        group="grids of settings",
        help="run the digit study over a grid of settings, seeds and bases, in parallel",
        description="Train every combination of the values of --vary on --base-seeds bases, each "
        "with --seeds adapter seeds. A stopped sweep continues from its rows.",
        epilog=EPILOG,
        examples=(
            '--vary "digits=2,3;9" --vary init=gaussian,kaiming --out runs/digits-and-inits',
            "--preset remedies-relu --seeds 5 --base-seeds 5 --jobs 2",
            "--preset front-relu --seeds 5 --base-seeds 5",
        ),
    )
    grid = sweep.add_argument_group("Sweep")
    grid.add_argument(
        "--vary", action="append", default=[], metavar="SETTING=V,V", help="such as rank=1,2,4"
    )
    grid.add_argument(
        "--base-seeds",
        type=int,
        default=1,
        metavar="N",
        help="number of bases, counted from --seed [1]",
    )
    grid.add_argument("--jobs", type=int, default=1, metavar="N", help="parallel processes [1]")
    _add_remedy_options(sweep)
    add_options(sweep, DigitSettings)
    sweep.set_defaults(command=run)


def _add_remedy_options(sweep: argparse.ArgumentParser) -> None:
    remedies = sweep.add_argument_group(f"Selection of remedies, with --preset {REMEDIES}-...")
    remedies.add_argument(
        "--selection-bases",
        type=int,
        default=argparse.SUPPRESS,
        metavar="N",
        help="number of further bases, on which the settings are chosen [2]",
    )


def run(vary: list[str], base_seeds: int, jobs: int, **given: object) -> int:
    """Run a sweep, or the comparison that a preset names, and print its table."""
    # Imported here because torch and paramlora load slowly and --help needs neither.
    from ..digits.shared import settings_and_data

    name = str(given.pop("preset", ""))
    remedy_options = {key: given.pop(key) for key in ("selection_bases",) if key in given}
    kind, _, preset = name.partition("-")
    if kind in (REMEDIES, FRONT, INTRUDERS, KINDS):
        if vary:
            raise StudyError(f"--vary cannot be used with --preset {name}, which has its own grid")
        if preset not in ("", *PRESETS):
            known = ", ".join(f"{kind}-{known}" for known in PRESETS)
            raise StudyError(f"--preset must be one of {known}, got {name!r}")
        settings, _ = settings_and_data(preset, **given)
        if kind == REMEDIES:
            return run_selection(kind, settings, base_seeds=base_seeds, jobs=jobs, **remedy_options)
    for key in remedy_options:
        flag = "--" + key.replace("_", "-")
        raise StudyError(f"{flag} can only be used with a remedies preset, such as {REMEDIES}-relu")
    if kind == KINDS:
        return run_selection(kind, settings, base_seeds=base_seeds, jobs=jobs)
    if kind in (FRONT, INTRUDERS):
        return run_rates(kind, settings, base_seeds, jobs)
    return run_grid(settings_and_data(name, **given)[0], vary, base_seeds, jobs)


def run_grid(settings: DigitSettings, vary: list[str], base_seeds: int, jobs: int) -> int:
    """Run a sweep over a grid, write its report, and print its table."""
    from .cells import cells
    from .sweep import run_sweep

    grid = parse_grid(vary, DigitSettings)
    default = "-".join(["runs/sweep", settings.preset, *sorted(grid)])
    folder = Path(settings.place.out or default)
    asked = result_settings(settings) | {"vary": sorted(vary), "base_seeds": base_seeds}
    run_sweep(list(cells(settings, grid, base_seeds)), folder, asked, jobs)
    return report([folder])


def run_rates(kind: str, settings: DigitSettings, base_seeds: int, jobs: int) -> int:
    """Train LoRA and full fine-tuning at all rates for a preset's kind, and print their report."""
    from .front import front_cells
    from .intruders import intruder_cells
    from .sweep import run_sweep

    folder = Path(settings.place.out or f"runs/{kind}-{settings.preset}")
    asked = result_settings(settings) | {kind: True, "base_seeds": base_seeds}
    made = {FRONT: front_cells, INTRUDERS: intruder_cells}[kind](settings, base_seeds)
    run_sweep(list(made), folder, asked, jobs)
    return report([folder])


def run_selection(kind: str, settings: DigitSettings, **options: object) -> int:
    """Select and measure the remedies or the kinds of adapters, and print their report."""
    from .kinds import run_kinds
    from .select import run_remedies

    folder = Path(settings.place.out or f"runs/{kind}-{settings.preset}")
    made: Any = run_kinds if kind == KINDS else run_remedies
    made(settings, folder, **options)
    return report([folder])


def add_report_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `report` that draw one figure of several sweeps."""
    figures = parser.add_argument_group("Sweeps")
    figures.add_argument(
        "--figure",
        choices=["ranks"],
        default=argparse.SUPPRESS,
        help="draw only this figure, with all DIRs side by side; ranks: accuracy against rank",
    )
    figures.add_argument(
        "--out",
        type=Path,
        default=argparse.SUPPRESS,
        metavar="PNG",
        help="file of the figure [FIGURE.png]",
    )


def report(folders: list[Path], figure: str = "", out: Path | None = None) -> int:
    """Write the report of each sweep and print its table, or draw one figure of all sweeps.

    Raises:
        StudyError: If a folder has no sweep, or its sweep has no rows yet.
    """
    if figure:
        from .ranks import write_rank_figure

        path = out or Path(f"{figure}.png")
        write_rank_figure(folders, path)
        print(f"figure   {path}")
    elif out:
        raise StudyError("--out can only be used with --figure")
    else:
        for folder in folders:
            report_one(folder)
    return 0


def report_one(folder: Path) -> None:
    """Write a sweep's report and figures, and print its table."""
    from .front import write_front_report
    from .intruders import write_intruder_report
    from .kinds_report import write_kinds_report
    from .remedies import write_remedies_report
    from .report import table, write_sweep_report

    run = RunDirectory.read(folder)
    if not run.rows:
        raise StudyError(f"the sweep in {folder} has no rows yet: continue it first")
    for key, write, name in (
        ("selection_bases", write_remedies_report, "remedies.md"),
        (FRONT, write_front_report, "front.md"),
        (INTRUDERS, write_intruder_report, "intruders.md"),
        (KINDS, write_kinds_report, "kinds.md"),
    ):
        if key in run.settings:
            write(run)
            print((folder / name).read_text(encoding="utf-8"))
            print(f"report   {folder / name}: open {(folder / name).with_suffix('.png')} beside it")
            return
    write_sweep_report(run)
    print(table(run).text())
    print(f"report   {folder / 'sweep.md'}: open {folder / 'fronts.png'} beside it")
