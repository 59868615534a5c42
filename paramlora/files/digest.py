"""Hash named tensors."""

import ctypes
import hashlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from ..site.quantized import is_wrapper
from ..stack.storage import whole

_ODD = 0x1E3779B97F4A7C15  # any large odd number


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
    for part in _dense(tensor):
        part = part.cpu()
        size = part.numel() * part.element_size()
        if size:
            # By address: `part.numpy()` needs numpy and does not support bfloat16.
            total.update((ctypes.c_char * size).from_address(part.data_ptr()))


def _dense(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the contiguous tensors that hold the values of a tensor."""
    tensor = whole(tensor.detach())
    if is_wrapper(tensor):  # its own memory is empty
        for name in tensor.__tensor_flatten__()[0]:  # type: ignore[attr-defined]
            yield from _dense(getattr(tensor, name))
        return
    if tensor.is_quantized:  # a view of its bytes would end the process
        tensor = tensor.int_repr()
    dense = tensor if tensor.layout is torch.strided else tensor.to_dense()
    yield dense.resolve_conj().resolve_neg().contiguous()


def checksum(tensor: Tensor) -> str:
    """Return the dtype of a tensor and 16 hexadecimal digits that depend on shape and values.

    Each 64 bits are mixed and multiplied by an odd factor of their column, and added on their
    device over rows and columns of 1024 of them. The digest is that of the sums, so that checking a
    base is not slower than reading it. Any changed or exchanged values change a sum, unless someone
    has looked for values that do not.
    """
    total = hashlib.sha256(f"{tuple(tensor.shape)}".encode())
    for part in _dense(tensor):
        data = part.flatten().view(torch.uint8)
        if data.data_ptr() % 8 or data.storage_offset() % 8:
            data = data.clone()
        end = len(data) - len(data) % 8192
        factors = torch.arange(1, 2048, 2, device=data.device) * _ODD
        for words in data[:end].view(torch.int64).view(-1, 1024).split(4096):
            # A sum loses the highest bits, such as signs, unless they are in lower ones too.
            mixed = (words >> 32).bitwise_xor_(words).mul_(factors)
            _update(total, mixed.sum(0))
            _update(total, mixed.sum(1))
        _update(total, data[end:])
    return f"{str(tensor.dtype).removeprefix('torch.')} {total.hexdigest()[:16]}"
