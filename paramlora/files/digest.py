"""Hash named tensors."""

import ctypes
import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor

from ..site.quantized import is_wrapper
from ..stack.storage import whole


def digest(named: Iterable[tuple[str, Tensor]], preface: str = "") -> str:
    """Return the SHA-256 of named tensors, as 64 hexadecimal digits.

    Each tensor contributes its name, dtype and shape as text, then its bytes. The text marks where
    one tensor ends and the next begins, so that moving bytes between tensors changes the digest.
    The order of `named` has no effect.

    Args:
        named: pairs of a name and a tensor of any dtype, on any device.
        preface: further text to include in the digest.

    Raises:
        ValueError: a tensor is on the meta device.
    """
    total = hashlib.sha256(preface.encode())
    for key, tensor in sorted(named, key=lambda item: item[0]):
        if tensor.is_meta:
            raise ValueError(f"{key!r} is on the meta device and has no bytes to digest")
        total.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        _update(total, tensor)
    return total.hexdigest()


def _update(total: "hashlib._Hash", tensor: Tensor) -> None:
    """Add the bytes of a tensor in row-major order, without a copy if it is dense on the CPU."""
    tensor = whole(tensor.detach())
    if is_wrapper(tensor):  # its own memory is empty
        for name in tensor.__tensor_flatten__()[0]:  # type: ignore[attr-defined]
            _update(total, getattr(tensor, name))
        return
    if tensor.layout is not torch.strided:
        tensor = tensor.to_dense()
    tensor = tensor.contiguous().cpu()
    size = tensor.numel() * tensor.element_size()
    if size:
        # By address: `tensor.numpy()` needs numpy and does not support bfloat16.
        total.update((ctypes.c_char * size).from_address(tensor.data_ptr()))
