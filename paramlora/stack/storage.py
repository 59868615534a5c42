"""Tensors that FSDP (`torch.distributed.fsdp.fully_shard`) has split over processes.

All processes gather a sharded tensor together to read it, and each writes to its own part. The
tensors that FSDP gathers for a forward are copies, and writes to a copy are lost. So FSDP must drop
the copies (`settle`) before parameters are returned or written to.
"""

import copy
import sys
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import StateError
from ..private_torch import is_fsdp_managed
from ..wrappers import check_model


def check_real(path: str, tensor: Any) -> None:
    """Raise a StateError if a tensor is on the meta device and so holds no values."""
    if isinstance(tensor, Tensor) and tensor.is_meta:
        raise StateError(
            f"{path!r} is on the meta device and holds no values: materialise the model first, by "
            "to_empty(device=...), then load_base_state_dict, then load"
        )


def whole(tensor: Tensor) -> Tensor:
    """Return a whole tensor. A sharded tensor is gathered, which needs all processes."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def is_sharded(module: nn.Module, tensor: Tensor) -> bool:
    """Return whether a module's tensor is sharded, or the gathered copy of a sharded one."""
    return hasattr(tensor, "full_tensor") or is_fsdp_managed(module)


def settle(model: nn.Module) -> None:
    """Make FSDP drop the copies that it has gathered in the modules of a model."""
    check_model(model)
    # If the program has not imported FSDP, nothing is sharded, and no traversal is needed.
    kind: Any = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    if kind is not None:
        for module in model.modules():
            if isinstance(module, kind):
                module.reshard()


def check_settled(module: nn.Module, tensor: Tensor, path: str) -> None:
    """Raise a StateError if a tensor is a gathered copy: a write to it would be lost."""
    if is_sharded(module, tensor) and not hasattr(tensor, "full_tensor"):
        raise StateError(
            f"{path!r} is gathered by a module that is sharded over processes and holds it; call "
            "this on that module, or on the whole model"
        )


@torch.no_grad()
def fill(tensor: Tensor, value: Tensor) -> None:
    """Copy a whole tensor into one that may be sharded; all processes call this."""
    tensor.copy_(in_parts(value, tensor))


def in_parts(value: Tensor, like: Tensor) -> Tensor:
    """Return a whole tensor sharded as `like` is; a sharded one is returned unchanged."""
    if not hasattr(like, "full_tensor") or hasattr(value, "full_tensor"):
        return value
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)
    whole = value.to(like.device, like.dtype)
    return distribute_tensor(whole, like.device_mesh, like.placements)


class Written:
    """What was written to a parameter, to tell later whether something else has written to it.

    A deep copy belongs to the copied parameter.

    Args:
        parameter: a parameter just after the write.
    """

    # The parameter itself and no weak reference, with which torch refuses to swap tensors
    # (torch.__future__.set_swap_module_params_on_conversion).
    def __init__(self, parameter: Tensor) -> None:
        self.parameter = parameter
        self.data = parameter.data
        self.version: int | None = parameter._version

    def is_in(self, parameter: Tensor) -> bool:
        """Return whether a parameter is the one written to, and holds what was written."""
        return (
            parameter is self.parameter
            and parameter._version == self.version
            and parameter.data_ptr() == self.data.data_ptr()
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> "Written":
        copied = Written(copy.deepcopy(self.parameter, memo))
        if not self.is_in(self.parameter):
            copied.version = None
        return copied


def writes_files(tensors: list[Tensor]) -> bool:
    """Return whether this process writes the file. Only the first one writes sharded tensors."""
    if not any(hasattr(tensor, "full_tensor") for tensor in tensors):
        return True
    return torch.distributed.get_rank() == 0
