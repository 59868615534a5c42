"""Attach the adapter of a file, or copy its values into the attached adapter."""

import warnings

import torch

from ..errors import AdapterNameError, CheckpointError, some
from ..layers.install import PlannedSite, check_name
from ..site.names import check_unmerged
from ..site.survey import Survey
from ..stack.factors import Factors
from ..stack.storage import check_real
from ..verbs.add import Activate, add, check_activate, switch
from ..verbs.summary import Summary, report
from .safetensors_file import FilePath
from .slot import slot_values
from .state import write


def attach_or_refresh(
    survey: Survey,
    planned: list[PlannedSite],
    name: str,
    path: FilePath,
    activate: Activate | None,
    finite: bool,
    into: str | None = None,
) -> Summary:
    """Attach the planned factors, or copy their values into an attached adapter of that name.

    Args:
        survey: a survey of the model.
        planned: the factors of a file, each with its place in the model, checked.
        name: the adapter's name in the model.
        path: the file or folder, for messages.
        activate: as in `attach`. None means "only" for the first adapter, "no" for another one, and
            no change for an attached one.
        finite: whether to refuse values that are not finite, instead of a warning.
        into: the attached adapter to copy the updates into (see slot.py), instead of `name`.
    """
    for plan in planned:
        check_real(plan.place.path, plan.place.stored)
    _check_finite(planned, path, finite)
    name = name if into is None else into
    if into is None and name not in survey.names:
        check_name(survey, name)
        return add(survey, planned, name, activate or ("no" if survey.names else "only"))
    if activate is not None:
        check_activate(survey, name, activate)
    _copy(survey, planned, name, path, slot=into is not None)
    return report(survey.again()) if activate is None else switch(survey, name, activate)


def _check_finite(planned: list[PlannedSite], path: FilePath, refuse: bool) -> None:
    """Raise a CheckpointError if factors have NaN or infinite values, or warn of them."""
    wrong = [
        f"{plan.place.path}.{key}"
        for plan in planned
        for key, tensor in plan.factors.tensors.items()
        if not tensor.isfinite().all()
    ]
    if not wrong:
        return
    said = f"{path} has NaN or infinite values in {some(wrong)}"
    if refuse:
        raise CheckpointError(f"{said}; pass finite=False to load them nevertheless")
    warnings.warn(said, UserWarning, stacklevel=4)


@torch.no_grad()
def _copy(
    survey: Survey, planned: list[PlannedSite], name: str, path: FilePath, slot: bool
) -> None:
    """Copy values into a slot; or values and specs, if sites, kinds and shapes are the same."""
    parts = survey.parts([name])
    check_unmerged([part.site.stack for part in parts], [name], "load")
    attached = {part.path: part.factors for part in parts}
    new = {plan.place.path: plan.factors for plan in planned}
    if slot:
        write(survey.model, parts, slot_values(attached, new, name, path))
        return
    if _signatures(new) != _signatures(attached):
        raise AdapterNameError(
            f"adapter {name!r} is attached already, and its sites, kinds or ranks differ from "
            f"those in {path} ({', '.join(new)}); pass another name=, or detach it first"
        )
    values = {f"{site}.{key}": t for site, f in new.items() for key, t in f.tensors.items()}
    write(survey.model, parts, values)
    for where, _, site, factors in parts:
        factors.spec = new[where].spec
        factors.set_strength(new[where].strength)
        site.stack.set(site.stack.active, site.stack.merged)


def _signatures(by_path: dict[str, Factors]) -> dict[str, object]:
    """Return the kind and the shapes of the factors by path. If equal, values can be copied."""
    return {
        path: (type(factors.spec), {key: tensor.shape for key, tensor in factors.tensors.items()})
        for path, factors in by_path.items()
    }
