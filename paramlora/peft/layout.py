"""Where and in what shape PEFT keeps the factors of a tensor, by the type of its module.

    Linear, MultiheadAttention     ΔW = s · B A           A: (r, in), B: (out, r)
    Conv1d, Conv2d, Conv3d         the same, viewed as W  A: (r, in, k, …), B: (out, r, 1, …)
    Embedding, Conv1D              ΔW = s · (B A)ᵀ        for W: (num, dim) or (in, out)

Conv1D is transformers' own Linear with a transposed weight. Here ΔW is always s · B A, for W as it
is stored, so the last two swap A and B.

Note [grouped convolutions]
    PEFT's A is no grouped convolution: (r, in, k, …), each of its hidden channels sees all inputs;
    B is one, (out, r/g, 1, …). Ours is an update of the stored weight, (out, in/g, k, …), where all
    g groups share A. In PEFT's form that is one of rank r·g: the rows of A for group j are ours at
    that group's inputs and zero elsewhere, and B is ours as it is. What PEFT itself trains there
    mixes groups, which no grouped weight can hold, and is refused.
"""

import re
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..errors import TargetError
from ..kinds.spec import factor_dtype
from ..site.find import dotted, is_swapped

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Part(NamedTuple):
    """One of our sites as PEFT has it: at which module, and under which keys."""

    module_path: str
    module: nn.Module
    tensor: str
    below: str = ""

    @property
    def site(self) -> str:
        return dotted(self.module_path, self.tensor)

    @property
    def A(self) -> str:
        return dotted(self.module_path, self.below, "lora_" + self._ending("A"))

    @property
    def B(self) -> str:
        return dotted(self.module_path, self.below, "lora_" + self._ending("B"))

    @property
    def magnitude(self) -> str:
        return dotted(self.module_path, self.below, "lora_magnitude_vector")

    @property
    def dim(self) -> int:
        """The dimension of the weight that a DoRA's magnitudes lie along: that of the outputs."""
        return int(self.swapped)

    @property
    def wrapped(self) -> str:
        """The path of the module that PEFT wraps for this site."""
        return self.site.rpartition(".")[0] if self.below else self.module_path

    @property
    def groups(self) -> int:
        return self.module.groups if isinstance(self.module, CONVS) else 1

    @property
    def swapped(self) -> bool:
        return is_swapped(self.module)

    def shapes(self, weight: Tensor, rank: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of PEFT's A and B, by key, at a rank as PEFT counts it."""
        out, *rest = reversed(weight.shape) if self.swapped else weight.shape
        kernel = rest[1:]
        return {
            self.A: (rank, rest[0] * self.groups, *kernel),
            self.B: (out, rank // self.groups, *(1 for _ in kernel)),
        }

    def magnitude_shape(self, weight: Tensor) -> tuple[int, ...]:
        if isinstance(self.module, CONVS):
            return (1, weight.shape[0], *(1 for _ in weight.shape[2:]))
        return (weight.shape[self.dim],)

    def to_peft(self, weight: Tensor, A: Tensor, B: Tensor) -> dict[str, Tensor]:
        """Return PEFT's tensors, by key, for the update B A, A: (r, in), B: (out, r)."""
        rank = A.shape[0] * self.groups
        if self.swapped:
            A, B = B.T, A.T
        elif self.groups > 1:
            A = _spread(A, self.groups, weight.shape[1])
        shapes = self.shapes(weight, rank)
        return {key: factor.reshape(shapes[key]) for key, factor in ((self.A, A), (self.B, B))}

    def from_peft(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return our A and B of the same update, None where it mixes a convolution's groups."""
        A, B = A.flatten(1), B.flatten(1)
        if self.swapped:
            return B.T, A.T
        return (A, B) if self.groups == 1 else _gathered(A, B, self.groups)

    def refusal(self, use_dora: bool = False) -> str | None:
        """Return why PEFT computes something else at this module than its weight's update."""
        module = self.module
        if use_dora and (isinstance(module, nn.MultiheadAttention) or self.groups > 1):
            return "PEFT has no DoRA for a MultiheadAttention or a grouped convolution"
        if isinstance(module, nn.MultiheadAttention) and not module._qkv_same_embed_dim:
            return "PEFT needs queries, keys and values of one size in a MultiheadAttention"
        if isinstance(module, CONVS) and _is_dilated(module):
            return "PEFT leaves out the dilation of a convolution"
        if isinstance(module, CONVS) and module.padding_mode != "zeros":
            return f"PEFT pads with zeros, not by padding_mode={module.padding_mode!r}"
        if isinstance(module, nn.Embedding) and module.max_norm is not None:
            return "PEFT renormalises the factors of an Embedding that has max_norm"
        return None

    def _ending(self, letter: str) -> str:
        embedding = isinstance(self.module, nn.Embedding)
        return f"embedding_{letter}" if embedding else f"{letter}.weight"


def _is_dilated(module: nn.Module) -> bool:
    pairs = zip(module.dilation, module.kernel_size, strict=True)  # type: ignore[arg-type]
    return any(dilation > 1 and size > 1 for dilation, size in pairs)


def _spread(A: Tensor, groups: int, channels: int) -> Tensor:
    """Return A for each group at that group's inputs: (r, c·k) to (g·r, g·c·k)."""
    spread = A.new_zeros(groups, A.shape[0], groups, channels, A.shape[1] // channels)
    for group in range(groups):
        spread[group, :, group] = A.view(A.shape[0], channels, -1)
    return spread.flatten(2).flatten(0, 1)


def _gathered(A: Tensor, B: Tensor, groups: int) -> tuple[Tensor, Tensor] | None:
    """Return the factors of a grouped weight's update, from PEFT's A: (R, g·c·k), B: (out, R/g).

    Their rank is R/g where all groups share A, as in what `_spread` gives, and R otherwise.
    """
    blocks = A.view(groups, A.shape[0] // groups, groups, -1)
    own = torch.stack([blocks[group, :, group] for group in range(groups)])
    if blocks.count_nonzero() != own.count_nonzero():
        return None
    if all(torch.equal(block, own[0]) for block in own):
        return own[0], B
    return own.flatten(0, 1), torch.block_diag(*B.chunk(groups))


def norms(weight: Tensor, dim: int) -> Tensor:
    """Return the norm of a weight for each index of a dimension, in the dtype of factors."""
    others = [i for i in range(weight.dim()) if i != dim]
    return torch.linalg.vector_norm(weight.detach(), dim=others, dtype=factor_dtype(weight))


FACTOR = re.compile(r"(^|.*\.)lora_(A\.weight|B\.weight|B\.bias|embedding_[AB]|magnitude_vector)")


def refuse(path: str, reason: str) -> TargetError:
    return TargetError(
        f"a folder of PEFT's cannot hold the adapter at {path!r}: {reason}; detach it from there, "
        "or use paramlora.save"
    )
