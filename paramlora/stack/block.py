"""Blocks: rectangular parts of a tensor that are adapted separately.

    W'[b] = f(W[b])        the rest of W' is bit-for-bit W

A block is written as a trailing index, `[:, :768]` or `[3]`: for each leading dimension a slice
without a step, or an integer, which removes the dimension as it does in Python.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kinds.spec import LowRank

Part = int | slice
_TRAILING = re.compile(r"(?s)(.+)\[([^\[\]]*)\]")
_INTEGER = r"\s*(-?\d+)\s*"
_PART = re.compile(f"{_INTEGER}|(?:{_INTEGER}|\\s*):(?:{_INTEGER}|\\s*)")


def split(target: str) -> tuple[str, tuple[Part, ...] | None]:
    """Split a target into a glob and its trailing index, or None if it has no index.

    A bracket that is not an index belongs to the glob: `fc[ab]`.

    Raises:
        ValueError: a trailing `[...]` contains a colon but is not an index of integers and slices.

    >>> split("*.c_attn.weight[:, :768]")
    ('*.c_attn.weight', (slice(None, None, None), slice(None, 768, None)))
    >>> split("*.fc[ab]")
    ('*.fc[ab]', None)
    """
    trailing = _TRAILING.fullmatch(target)
    if trailing is None:
        return target, None
    found = [_PART.fullmatch(text) for text in trailing[2].split(",")]
    parts = [_part(match) for match in found if match]
    if len(parts) == len(found):
        return trailing[1], tuple(parts)
    if ":" in trailing[2]:
        raise ValueError(
            f"[{trailing[2]}] is not a block: give an integer or a slice without a step for each "
            "leading dimension, such as [:, :768]"
        )
    return target, None


def _part(match: re.Match[str]) -> Part:
    integer, start, stop = (None if text is None else int(text) for text in match.groups())
    return slice(start, stop) if integer is None else integer


@dataclass(frozen=True)
class Block:
    """A rectangular part of a tensor: a range or an index in each leading dimension.

    Two blocks are equal if they are the same part of tensors of the same shape. The string form is
    the shortest index that describes the block.

    Attributes:
        index: for each leading dimension (start, stop), or an integer.
        shape: the shape of the whole tensor.

    >>> str(Block.of((slice(0, 4), slice(-3, None)), (8, 6)))
    '[:4, 3:]'
    """

    index: tuple[int | tuple[int, int], ...]
    shape: tuple[int, ...]

    @staticmethod
    def of(index: Sequence[Part], shape: Sequence[int]) -> "Block | None":
        """Return the block that an index selects in a tensor of this shape; None for all of it.

        Raises:
            ValueError: the index has more dimensions than the tensor, reaches outside of it
                (bounds are not clamped), or selects no element.
        """
        if len(index) > len(shape):
            raise ValueError(f"it has {len(shape)} dimensions, the index {len(index)}")
        parts = [_inside(part, shape[dim], dim) for dim, part in enumerate(index)]
        while parts and parts[-1] == (0, shape[len(parts) - 1]):
            parts.pop()
        return Block(tuple(parts), tuple(shape)) if parts else None

    def __str__(self) -> str:
        texts = []
        for part, size in zip(self.index, self.shape, strict=False):
            if isinstance(part, int):
                texts.append(str(part))
            else:
                start, stop = part
                texts.append(f"{start or ''}:{'' if stop == size else stop}")
        return f"[{', '.join(texts)}]"

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """The range (start, stop) in each dimension."""
        parts = [*self.index, *((0, size) for size in self.shape[len(self.index) :])]
        return [(part, part + 1) if isinstance(part, int) else part for part in parts]

    def overlaps(self, other: "Block") -> bool:
        """Return whether two blocks of one tensor have an element in common."""
        pairs = zip(self.ranges, other.ranges, strict=True)
        return all(a < d and c < b for (a, b), (c, d) in pairs)

    def cut(self, weight: Tensor) -> Tensor:
        """Return a view of the block in a tensor."""
        return weight[tuple(part if isinstance(part, int) else slice(*part) for part in self.index)]

    def put(self, weight: Tensor, value: Tensor) -> Tensor:
        """Return a copy of a tensor with `value` in the block."""
        return _put(weight, self.index, value, 0)

    def widen(self, term: LowRank) -> LowRank | None:
        """Return a low-rank update of the block as one of the whole matrix (out, in).

        A is padded by zero columns and B by zero rows outside of the block. Returns None if the
        block or the tensor is not a matrix.
        """
        if len(self.shape) != 2 or any(isinstance(part, int) for part in self.index):
            return None
        (top, bottom), (left, right) = self.ranges
        rows, columns = self.shape
        A, B = term.A, term.B
        if (left, right) != (0, columns):
            A = F.pad(A, (left, columns - right))  # (r, in)
        if (top, bottom) != (0, rows):
            B = F.pad(B, (0, 0, top, rows - bottom))  # (out, r)
        return LowRank(A, B, term.scale)


def _inside(part: Part, size: int, dim: int) -> int | tuple[int, int]:
    """Check a part of a dimension, and return it with bounds counted from the start."""
    if isinstance(part, int):
        place = part + size if part < 0 else part
        if not 0 <= place < size:
            raise ValueError(f"{part} is outside of dimension {dim}, which has size {size}")
        return place
    start, stop = (
        default if bound is None else bound + size if bound < 0 else bound
        for bound, default in ((part.start, 0), (part.stop, size))
    )
    text = f"{'' if part.start is None else part.start}:{'' if part.stop is None else part.stop}"
    if not (0 <= start <= size and 0 <= stop <= size):
        raise ValueError(f"{text} reaches outside of dimension {dim}, which has size {size}")
    if start >= stop:
        raise ValueError(f"{text} takes nothing of dimension {dim}, which has size {size}")
    return start, stop


def _put(weight: Tensor, index: Sequence[int | tuple[int, int]], value: Tensor, dim: int) -> Tensor:
    # By scattering, because torch.func cannot write in place to a tensor that is not mapped over.
    first, *rest = index
    if isinstance(first, int):
        if rest:
            value = _put(weight.select(dim, first), rest, value, dim)
        return torch.select_scatter(weight, value, dim, first)
    start, stop = first
    if rest:
        value = _put(weight.narrow(dim, start, stop - start), rest, value, dim + 1)
    if stop - start == weight.shape[dim]:
        return value
    return torch.slice_scatter(weight, value, dim, start, stop)
