"""Comparing a given state dict with an expected one, and hashing tensors."""

import ctypes
import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
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


def compare(state: Mapping[str, Any], expected: Mapping[str, Any], what: str) -> None:
    """Raise a CheckpointError where keys or shapes differ; every difference is listed."""
    missing = [key for key in expected if key not in state]
    unexpected = [key for key in state if key not in expected]
    wrong = [
        f"{key}: expected {tuple(tensor.shape)}, found {found}"
        for key, tensor in expected.items()
        if key in state
        and isinstance(tensor, Tensor)
        and (found := shown(state[key], tensor)) != tuple(tensor.shape)
    ]
    problems = [f"missing {', '.join(missing)}"] if missing else []
    problems += [f"unexpected {', '.join(unexpected)}"] if unexpected else []
    problems += wrong
    if problems:
        raise CheckpointError(f"{what} does not fit: {'; '.join(problems)}")


def shown(value: Any, expected: Tensor) -> tuple[int, ...] | str:
    """Return a value's shape, or what it is where it is no tensor to copy from."""
    if not isinstance(value, Tensor):
        return f"no tensor but {type(value).__name__}"
    if value.is_meta and not expected.is_meta:
        return "a tensor on the meta device, which has no data"
    return tuple(value.shape)


def _update(digest: "hashlib._Hash", tensor: Tensor) -> None:
    """Feed a tensor's bytes in row-major order, without numpy and without a copy on the CPU."""
    tensor = whole(tensor.detach())
    if tensor.layout is not torch.strided:
        tensor = tensor.to_dense()
    tensor = tensor.contiguous().cpu()
    size = tensor.numel() * tensor.element_size()
    if size:
        digest.update((ctypes.c_char * size).from_address(tensor.data_ptr()))
