"""Adding an adapter beside others: which are active and which are trained afterwards."""

import dataclasses
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args

from ..errors import StateError
from ..layers.host import frozen_by
from ..layers.install import PlannedSite, install, remove
from ..layers.statistics import held_by
from ..site.names import check_order
from ..site.survey import Survey
from ..targets.targets import Resolved
from .summary import Skipped, Summary, report, skip

# Which adapters are active after one was added: see `attach`.
Activate = Literal["only", "also", "no"]


def check_activate(survey: Survey, name: str, activate: str) -> None:
    """Raise if an adapter cannot be activated in this way."""
    if activate not in get_args(Activate):
        raise ValueError(f'activate must be "only", "also" or "no", got {activate!r}')
    merged = [other for stack in survey.stacks for other in stack.merged if other != name]
    if activate == "only" and merged:
        raise StateError(
            f"cannot make {name!r} the only active adapter while {merged[0]!r} is merged; unmerge "
            'first, or pass activate="also" or "no"'
        )
    if activate == "also":
        check_order(survey.stacks, (name,))


def add(
    survey: Survey,
    planned: list[PlannedSite],
    name: str,
    activate: Activate,
    freeze: bool = True,
) -> Summary:
    """Put new factors at their places, switch adapters as `activate` says, and report.

    An adapter that is attached switched off leaves the others as they are, trained or not.

    Raises:
        ValueError, StateError: as `check_activate`; the model is unchanged.
    """
    check_activate(survey, name, activate)
    before = _active(survey)
    install(survey, planned, name, freeze, others=activate != "no")
    return switch(survey, name, activate, before)


def switch(
    survey: Survey, name: str, activate: Activate, before: Sequence[str] | None = None
) -> Summary:
    """Switch adapters as `activate` says, and report, with a warning if one may be missed.

    Args:
        survey: a survey of the model; tensors may have got adapters since.
        name: the adapter to activate or not.
        activate: which adapters are active afterwards, as in `attach`.
        before: the adapters that were active before the call; by default those that are.
    """
    before = _active(survey) if before is None else before
    survey = survey.again()
    for stack in survey.stacks:
        kept = {*stack.active} - {name} if activate != "only" else set()
        stack.switch(kept if activate == "no" else kept | {name})
    now = report(survey, fresh=name)
    off = tuple(other for other in before if other not in now.active)
    _warn_of_apart(survey, name, off)
    return dataclasses.replace(now, switched_off=off)


@contextmanager
def undone(survey: Survey, name: str, on_success: bool = True) -> Iterator[None]:
    """Undo what the block attaches under a name, if it raises or if `on_success` is True.

    Detaching is the exact inverse. A warning that is turned into an error is raised last.
    """
    active = {stack: stack.active for stack in survey.stacks}
    # Another part of the model may have an adapter of the same name, which has frozen parameters or
    # holds layers here. They are noted under ".", which is no adapter's name, until the end of the
    # block, so that detaching does not release them.
    others: list[set[Any]] = [*frozen_by(survey), *held_by(survey.modules)]
    others = [noted for noted in others if name in noted]
    for noted in others:
        noted ^= {name, "."}
    undo = True
    try:
        yield
        undo = on_success
    finally:
        if undo:
            remove(survey.again(), {name})
        for noted in others:
            noted -= {"."}
            noted |= {name}
        if undo:
            for stack, names in active.items():
                stack.switch(names)


def left_out(survey: Survey, resolved: Resolved, freeze: bool) -> Iterator[Skipped]:
    """Yield the tensors that do not get the adapter, in model order."""
    taken = {id(place.stored) for place, _ in resolved.found}
    bare = [place for place in survey.places if id(place.stored) not in taken]
    rest = {place.path: (place, "matching no target") for place in bare}
    for place, reason in (rest | resolved.left_out).values():
        yield skip(place, reason, place.stored.requires_grad and not freeze)


def _active(survey: Survey) -> list[str]:
    """Return the adapters that are active somewhere, in attaching order."""
    active = {name for stack in survey.stacks for name in stack.active}
    return [name for name in survey.names if name in active]


def _warn_of_apart(survey: Survey, name: str, off: Sequence[str]) -> None:
    """Warn if an adapter that was switched off shares no tensor with the one that is on."""
    shared = {other for stack in survey.stacks if name in stack.named for other in stack.named}
    apart = [repr(other) for other in off if other not in shared]
    if apart:
        warnings.warn(
            f"{name!r} is now the only active adapter; {' and '.join(apart)}, which adapts other "
            f'tensors, was switched off. To use both, pass activate="also", or call '
            f"activate(model, {', '.join([*apart, repr(name)])})",
            UserWarning,
            stacklevel=5,
        )
