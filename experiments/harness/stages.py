"""A study as a list of stages, each made once: what a run that was stopped goes on with."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from tqdm import tqdm

from .rundir import RunDirectory

Context = TypeVar("Context")


@dataclass(frozen=True)
class Stage(Generic[Context]):
    """A part of a study that is made as a whole.

    Args:
        key: the values that all of its rows have, such as method and seed.
        rows: the rows that it leaves, by their value of "stage".
        make: makes them, from whatever the stages of the study share.
    """

    key: Mapping[str, Any]
    rows: tuple[str, ...]
    make: Callable[[Context], None]

    def done(self, run: RunDirectory) -> bool:
        """Whether all of its rows are there."""
        return all(run.has(stage=row, **self.key) for row in self.rows)


def run_stages(
    run: RunDirectory,
    stages: Iterable[Stage[Context]],
    prepare: Callable[[], Context],
    say: Callable[[str], None],
) -> None:
    """Make the stages whose rows are not all there, in order.

    Args:
        run: where the rows are.
        stages: all of the study's.
        prepare: makes what the stages share; not called where none is left.
        say: gets a line on what is left.
    """
    left = [stage for stage in stages if not stage.done(run)]
    if run.rows:
        say(f"resumed  {len(run.rows)} rows are there, {len(left)} stages are left")
    if left:
        context = prepare()
        for stage in tqdm(left, desc="stages", unit="stage", leave=False, disable=None):
            stage.make(context)
