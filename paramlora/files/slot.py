"""Copy the update of a file into an attached LoRA of the same rank or a higher one.

    s·λ · B A = s' · [c·B, 0] [A; 0]          c = s·λ / s'

s and λ are the scale and the strength in the file, s' is the scale of the attached LoRA, the slot.
Only the values of its factors change. Their shapes and the slot's settings and strength stay, so a
compiled model or a CUDA graph remains valid.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..errors import CheckpointError, StateError, some
from ..kinds.lora import LoRA
from ..layers.install import PlannedSite
from ..site.names import check_unmerged
from ..site.survey import Survey
from ..stack.factors import Factors
from ..stack.storage import fill, settle
from .safetensors_file import FilePath
from .state import check_writable, factors_of


@torch.no_grad()
def swap(survey: Survey, planned: list[PlannedSite], name: str, path: FilePath) -> None:
    """Copy the updates of a file into the slot `name`, with zeros at sites that it lacks.

    Raises:
        AdapterNameError: there is no adapter of that name.
        CheckpointError: the file has a site that the slot lacks, a higher rank, or an update that
            is not low-rank.
        StateError: the slot is merged, on the meta device, or not a LoRA whose values can change.
    """
    here = survey.sites_of(name)
    check_unmerged([site.stack for site in here], [name], "load")
    slots = factors_of(here, name)
    new = {plan.place.path: plan.factors for plan in planned}
    absent = [site for site in new if site not in slots]
    if absent:
        raise CheckpointError(
            f"{path} adapts {some(absent)}, and the slot {name!r} does not; attach a slot that "
            "adapts the tensors of all files"
        )
    values = {site: _padded(site, slot, new.get(site), path) for site, slot in slots.items()}
    settle(survey.model)
    check_writable(here, name)
    for site, slot in slots.items():
        for key, tensor in slot.tensors.items():
            fill(tensor, values[site][key])


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
