"""A study as a list of stages, so that an interrupted run resumes at the first incomplete stage.

Note [Stages and resuming]

A fine-tuning records several rows: "off", "on", "merged" and "unmerged". A run can be interrupted
between any two of them. If a stage counted as complete once its first row exists, a run interrupted
after "on" would never get its last two rows. Each stage therefore lists the rows that it records,
and it is complete only if all of them exist:

    rows on disk       off, on              (interrupted before "merged")
    stage run again    off, on:             compared with the recorded rows
                       merged, unmerged:    appended

An incomplete stage is run again from its start, because the state in between (a half-trained
adapter) is not on disk. `RunDirectory.record` compares the repeated rows with the recorded ones. It
raises if they differ, which happens if the code or the machine has changed, so that one run never
mixes rows of two versions. A stage must draw all its random numbers from its own seed. Otherwise
its rows would depend on the stages that ran before it in the same process.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from .adapters import adapter_path, unusable
from .progress import progress
from .rundir import RunDirectory

Context = TypeVar("Context")


@dataclass(frozen=True)
class Stage(Generic[Context]):
    """A part of a study that is run as a whole.

    Args:
        key: the values that all rows of the stage share, such as method and seed.
        rows: the "stage" value of each row that the stage records.
        adapter: the name of the adapter that the stage saves, without ".safetensors"; "" if none.
        make: runs the stage, given the context that the stages of the study share.
    """

    key: Mapping[str, Any]
    rows: tuple[str, ...]
    make: Callable[[Context], None]
    adapter: str = ""

    def evaluated(self, run: RunDirectory) -> bool:
        """Return whether the run has all rows of the stage."""
        return all(run.has(stage=row, **self.key) for row in self.rows)

    def missing(self, run: RunDirectory) -> str:
        """Return why the adapter of the stage cannot be used, or "" if it can."""
        return unusable(adapter_path(run.folder, self.adapter)) if self.adapter else ""


def run_stages(
    run: RunDirectory,
    stages: Iterable[Stage[Context]],
    prepare: Callable[[], Context],
    say: Callable[[str], None],
) -> None:
    """Run the incomplete stages in order. See Note [Stages and resuming].

    Args:
        run: the run's directory, with the rows recorded so far.
        stages: all stages of the study.
        prepare: returns the context that the stages share, such as data and base. It is not called
            if all stages are complete, so a finished run needs neither.
        say: called with a line of progress if the run is resumed.
    """
    remaining = []
    for stage in stages:
        why = stage.missing(run) if (evaluated := stage.evaluated(run)) else ""
        if why:
            say(f"again    {why}: it is trained again")
        if why or not evaluated:
            remaining.append(stage)
    if run.rows:
        say(f"resumed  {len(run.rows)} rows recorded, {len(remaining)} stages remaining")
    if remaining:
        context = prepare()
        for stage in progress(remaining, len(remaining), "stages", "stage"):
            stage.make(context)
