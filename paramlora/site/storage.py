"""Tensors that FSDP (`torch.distributed.fsdp.fully_shard`) has split over processes.

A sharded tensor is read whole by all processes together, and written by each in its part. What
FSDP has gathered for a forward is a copy, and what is written into that is lost: it is put back
before anything is handed out or written to.
"""

import sys
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import StateError


def check_real(path: str, tensor: Any) -> None:
    """Raise a StateError where a tensor is on the meta device, and holds no values."""
    if isinstance(tensor, Tensor) and tensor.is_meta:
        raise StateError(
            f"{path!r} is on the meta device and holds no values: materialise the model first, by "
            "to_empty(device=...), then load_base_state_dict, then load"
        )


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor in one piece: one that FSDP has sharded is gathered, by all processes."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def is_sharded(module: nn.Module, tensor: Tensor) -> bool:
    """Return whether a module's tensor is in parts, or the gathered copy of one that is."""
    return hasattr(tensor, "full_tensor") or vars(module).get("_is_fsdp_managed_module", False)


def settle(model: nn.Module) -> None:
    """Let FSDP put back what it has gathered in the modules of a model."""
    # Who has not imported it has sharded nothing, and need not wait for a walk.
    kind: Any = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    if kind is not None:
        for module in model.modules():
            if isinstance(module, kind):
                module.reshard()


def check_settled(module: nn.Module, tensor: Tensor, path: str) -> None:
    """Raise a StateError where a tensor is a gathered copy, which a write would be lost in."""
    if is_sharded(module, tensor) and not hasattr(tensor, "full_tensor"):
        raise StateError(
            f"{path!r} is gathered by a module that is sharded over processes and holds it; call "
            "this on that module, or on the whole model"
        )


@torch.no_grad()
def fill(tensor: Tensor, value: Tensor) -> None:
    """Copy a whole tensor into one that may be sharded, by all processes."""
    tensor.copy_(in_parts(value, tensor))


def in_parts(value: Tensor, like: Tensor) -> Tensor:
    """Return a whole tensor in the parts that `like` has; one that is in parts as it is."""
    if not hasattr(like, "full_tensor") or hasattr(value, "full_tensor"):
        return value
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)
    whole = value.to(like.device, like.dtype)
    return distribute_tensor(whole, like.device_mesh, like.placements)


def writes_files(tensors: list[Tensor]) -> bool:
    """Return whether this process is the one that writes what all of them gathered."""
    if not any(hasattr(tensor, "full_tensor") for tensor in tensors):
        return True
    return torch.distributed.get_rank() == 0
