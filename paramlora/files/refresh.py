"""Attach the adapter of a file, or copy its values into the attached adapter.

Note [slots]
    A slot is an attached LoRA that takes the update of a file of the same rank or a lower one:

        s·λ · B A = s' · [c·B, 0] [A; 0]          c = s·λ / s'

    s and λ are the scale and the strength in the file, s' is the scale of the slot. Only the values
    of its factors change. Their shapes and the slot's settings and strength stay, so a compiled
    model or a CUDA graph remains valid.
"""

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..errors import AdapterNameError, CheckpointError, StateError, some
from ..kinds.lora import LoRA
from ..layers.install import PlannedSite, check_name
from ..site.names import check_unmerged
from ..site.survey import Survey
from ..stack.factors import Factors
from ..stack.storage import check_real
from ..verbs.add import Activate, add, check_activate, switch
from ..verbs.summary import Summary, report
from .safetensors_file import FilePath
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
        into: the attached adapter to copy the updates into (see Note [slots]), instead of `name`.
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
        write(survey.model, parts, _slot_values(attached, new, name, path))
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


def _slot_values(
    slots: Mapping[str, Factors], new: Mapping[str, Factors], name: str, path: FilePath
) -> dict[str, Tensor]:
    """Return the values for the slot `name` by `<site>.<factor>`, zeros at sites that a file lacks.

    Args:
        slots: the factors of the slot, by site.
        new: the factors of the file, by site.
        name: the slot.
        path: the file, for messages.

    Raises:
        CheckpointError: the file has a site that the slot lacks, a higher rank, or an update that
            is not low-rank.
        StateError: the slot is not a LoRA whose values can change.
    """
    absent = [site for site in new if site not in slots]
    if absent:
        raise CheckpointError(
            f"{path} adapts {some(absent)}, and the slot {name!r} does not; attach a slot that "
            "adapts the tensors of all files"
        )
    return {
        f"{site}.{key}": value
        for site, slot in slots.items()
        for key, value in _padded(site, slot, new.get(site), path).items()
    }


def _padded(site: str, slot: Factors, new: Factors | None, path: FilePath) -> dict[str, Tensor]:
    """Return the values for a slot's factors: an update in the slot's rank, or zeros for None."""
    spec = slot.spec
    if not isinstance(spec, LoRA) or spec.constants or spec.batch_dims or not spec.scaling:
        raise StateError(
            f"cannot load into {site!r}, which has {spec!r}; a slot is a LoRA without batch_dims, "
            "with an init that is independent of the weight, and with an alpha other than 0"
        )
    if new is None:
        return {key: torch.zeros(tensor.shape) for key, tensor in slot.tensors.items()}
    update = new.spec.low_rank(new.tensors, new.strength)
    if update is None:
        raise CheckpointError(f"{path} has {new.spec!r} at {site!r}, which no LoRA can express")
    A, B, scale = update.transposed() if spec.transposed else update
    room = spec.rank - A.shape[0]
    if room < 0:
        raise CheckpointError(
            f"{path} has rank {A.shape[0]} at {site!r}, and the slot has rank {spec.rank}; attach "
            f"a slot of rank {A.shape[0]} or more"
        )
    return {"A": pad(A, (0, 0, 0, room)), "B": pad(B * (scale / spec.scaling), (0, room))}
