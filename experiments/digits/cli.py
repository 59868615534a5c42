"""The commands of the digit study: `digits` and `explain`."""

from pathlib import Path

from ..harness.options import Commands, add_command, add_options, presets_help
from ..harness.settings import options
from .settings import PRESETS, DigitSettings, preset


def add_commands(commands: Commands) -> None:
    """Add the study's commands to those of `python -m experiments`."""
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
    explained = commands.add_parser("explain", help="show what an adapter of a run did")
    explained.add_argument("folder", type=Path, metavar="DIR", help="the run's folder")
    explained.add_argument("--seed", type=int, default=0, metavar="N", help="the adapter's [0]")
    for name in ("bases", "data_dir"):
        entry = options(DigitSettings)[name]
        flag = "--" + name.replace("_", "-")
        explained.add_argument(flag, default=entry.default, help=entry.metadata["help"])
    explained.set_defaults(command=explain_run)


def run(**given: object) -> int:
    """Run the digit study with the options given on top of a preset."""
    # Imported here, as torch and paramlora take their time and --help needs neither.
    from .study import run_digits

    settings = preset(str(given.pop("preset", "blog")), **given)
    return report(run_digits(settings).folder)


def report(folder: Path) -> int:
    """Write a run's report and figures, and show its table."""
    from .report.report import failed, terminal, write_report

    finished = write_report(folder)
    print(terminal(finished))
    print(f"report   {folder / 'report.md'}")
    return 1 if failed(finished) else 0


def explain_run(folder: Path, seed: int, bases: str, data_dir: str) -> int:
    """Write the page on what a run's adapter did."""
    from .report.explain import explain

    print(f"page     {explain(folder, seed, bases=bases, data_dir=data_dir)}")
    return 0
