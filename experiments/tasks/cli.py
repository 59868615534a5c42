"""The `tasks` command: learn sequences of tasks."""

from pathlib import Path

from ..harness.options import Commands, add_command, add_options, presets_help
from ..harness.rundir import RunDirectory
from ..harness.settings import StudyError
from .settings import TaskSettings


def add_commands(commands: Commands) -> None:
    """Add the `tasks` command to `python -m experiments`."""
    tasks = add_command(
        commands,
        "tasks",
        help="learn a sequence of tasks by adapters, in full and jointly; the accuracy matrix",
        description="Learn a sequence of tasks. The presets split-mnist and permuted-mnist are the "
        "experiments of van de Ven and Tolias. Brackets show the values of the preset split.",
        epilog=presets_help(TaskSettings.PRESETS, "split"),
        examples=(
            "--preset split-mnist --seeds 5 --device cuda",
            "--preset rotated --methods one,full,joint --full-lr 1e-3",
            "--data digits --steps 50 --orthogonal 0.1 --out runs/tasks-small",
        ),
    )
    add_options(tasks, TaskSettings)
    tasks.set_defaults(command=run_sequence)


def run_sequence(**given: object) -> int:
    """Learn a sequence of tasks, and print the table of metrics."""
    # Imported here because torch and paramlora load slowly and --help needs neither.
    from .tasks import run_tasks

    settings = TaskSettings.of_preset(str(given.pop("preset", "split")), **given)
    return report([run_tasks(settings).folder])


def report(folders: list[Path]) -> int:
    """Write the report and the figures of each run, and print its table of metrics.

    Raises:
        StudyError: If a folder has no run, or its run has no rows yet.
    """
    from .published import accuracy_table, metrics_table, write_published_report
    from .report import REFERENCE, differences, methods_in, table, write_task_report

    for folder in folders:
        there = RunDirectory.read(folder)
        if not there.rows:
            raise StudyError(f"the run in {folder} has no rows yet: continue it first")
        if there.settings.get("recipe") == "three-types":
            run = write_published_report(folder)
            print(f"{accuracy_table(run).text()}\n\n{metrics_table(run).text()}")
            print(f"report   {run.folder / 'tasks.md'}")
            continue
        run = write_task_report(folder)
        print(table(run).text())
        if REFERENCE in methods_in(run):
            print(f"\n{differences(run).text()}")
        print(f"report   {run.folder / 'tasks.html'}: open it in a browser")
        print(f"next     open {run.folder / 'accuracy-matrix.png'}: what each stage kept")
    return 0
