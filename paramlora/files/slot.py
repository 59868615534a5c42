"""Copy the update of a file into an attached LoRA of the same rank or a higher one.

    s·λ · B A = s' · [c·B, 0] [A; 0]          c = s·λ / s'

s and λ are the scale and the strength in the file, s' is the scale of the attached LoRA, the slot.
Only the values of its factors change. Their shapes and the slot's settings and strength stay, so a
compiled model or a CUDA graph remains valid.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..errors import CheckpointError, StateError, some
from ..kinds.lora import LoRA
from ..stack.factors import Factors
from .safetensors_file import FilePath


def slot_values(
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
