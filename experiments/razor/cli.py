"""The `razor` command: forgetting against the divergence from the base."""

from pathlib import Path

from ..harness.options import Commands, add_command, add_options, presets_help
from ..harness.rundir import RunDirectory
from ..harness.settings import StudyError
from .settings import RazorSettings


def add_commands(commands: Commands) -> None:
    """Add the `razor` command to `python -m experiments`."""
    razor = add_command(
        commands,
        "razor",
        group="studies",
        help="forgetting against the divergence from the base, supervised and by rewards",
        description="Fine-tune on the parity of digits by supervised and by reinforcement "
        "learning, with all weights and with LoRA, and compare the forgetting of garments with the "
        "divergence from the base. Brackets show the values of the preset parity.",
        epilog=presets_help(RazorSettings.PRESETS, "parity"),
        examples=(
            "--preset small",
            "--seeds 10 --together 10 --device cuda",
            "--arms weights,lora-8-biases,full-layer1,lora-8-layer1 --out runs/razor-controls",
        ),
    )
    add_options(razor, RazorSettings)
    razor.set_defaults(command=run)


def run(**given: object) -> int:
    """Run the study, and print its tables."""
    # Imported here because torch and paramlora load slowly and --help needs neither.
    from .study import run_razor

    settings = RazorSettings.of_preset(str(given.pop("preset", "parity")), **given)
    return report([run_razor(settings).folder])


def report(folders: list[Path]) -> int:
    """Write the report and the figure of each run, and print its tables.

    Raises:
        StudyError: a folder has no run, or its run has no rows yet.
    """
    from .report import write_razor_report

    for folder in folders:
        if not RunDirectory.read(folder).rows:
            raise StudyError(f"the run in {folder} has no rows yet: continue it first")
        print(write_razor_report(folder))
    return 0
