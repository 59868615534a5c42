"""Hashing tensors."""

import ctypes
import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor

from ..site.storage import whole


def digest(named: Iterable[tuple[str, Tensor]], preface: str = "") -> str:
    """Return the SHA-256 over names, dtypes, shapes and bytes, in the names' order."""
    total = hashlib.sha256(preface.encode())
    for key, tensor in sorted(named, key=lambda item: item[0]):
        if tensor.is_meta:
            raise ValueError(f"{key!r} is on the meta device and has no bytes to digest")
        total.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        _update(total, tensor)
    return total.hexdigest()


def _update(digest: "hashlib._Hash", tensor: Tensor) -> None:
    """Feed a tensor's bytes in row-major order, without numpy and without a copy on the CPU."""
    tensor = whole(tensor.detach())
    if tensor.layout is not torch.strided:
        tensor = tensor.to_dense()
    tensor = tensor.contiguous().cpu()
    size = tensor.numel() * tensor.element_size()
    if size:
        digest.update((ctypes.c_char * size).from_address(tensor.data_ptr()))
