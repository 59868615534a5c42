"""The keys and shapes of factors in PEFT's format, by the type of the module.

    Linear, MultiheadAttention     ΔW = s · B A           A: (r, in), B: (out, r)
    Conv1d, Conv2d, Conv3d         ΔW = s · B A, like W   A: (r, in, k, …), B: (out, r, 1, …)
    Embedding, Conv1D              ΔW = s · (B A)ᵀ        for W: (num, dim) or (in, out)

Conv1D is transformers' own linear layer with a transposed weight. In paramlora ΔW is s · B A for W
as it is stored, so the last row swaps A and B: (B A)ᵀ = Aᵀ Bᵀ.

Note [grouped convolutions]
    The weight of a convolution with g groups is (out, in/g, k, …): the outputs of group j see the
    inputs of group j only. PEFT's B is grouped as well, (out, R/g, 1, …), but its A is not: each
    hidden channel, a row of A: (R, in, k, …), sees all inputs.

    An update of the stored weight, A: (r, in/g·k), B: (out, r), thus has rank R = r·g in PEFT. With
    g = 2, four inputs, r = 1 and k = 1:

        A = [a b]        PEFT's A = [a b 0 0]   for group 0, which has the inputs 0 and 1
                                    [0 0 a b]   for group 1, which has the inputs 2 and 3

    B stays as it is. `_spread` and `_gathered` convert A. An A that PEFT has trained has no such
    zeros. It mixes groups, which the stored weight cannot express, so loading refuses it.

    DoRA is refused. PEFT to 0.21.2 computes its norms from the product of B: (out/g, R), which is
    B with g rows in one, and A: (R, in·k), in the shape of W. That is not the update.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..errors import TargetError
from ..kinds.spec import factor_dtype
from ..site.find import dotted, is_linear, is_swapped
from ..site.place import Place

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_FACTOR = re.compile(r"(^|.*\.)lora_(A\.weight|B\.weight|B\.bias|embedding_[AB]|magnitude_vector)")


class Part(NamedTuple):
    """One tensor that PEFT can adapt, with its keys and shapes in PEFT's format.

    Most modules have one part, their weight. A MultiheadAttention has two, `in_proj_weight` and
    `out_proj.weight`. For the first PEFT wraps the attention. For the second it wraps `out_proj`
    inside of that wrapper, so that its keys have the `infix` "base_layer.out_proj". `peft_path` is
    the path of PEFT's wrapper in its model, if it is not `module_path`.
    """

    module_path: str
    module: nn.Module
    tensor: str
    infix: str = ""
    peft_path: str = ""

    @property
    def target(self) -> str:
        """The path that PEFT's settings select, and for which they have the rank and the alpha."""
        return self.module_path

    @property
    def site(self) -> str:
        """The path of the tensor in the model."""
        return dotted(self.module_path, self.tensor)

    @property
    def owner_path(self) -> str:
        """The path of the module that has the tensor; for `out_proj.weight` that of `out_proj`."""
        return self.site.rpartition(".")[0]

    @property
    def place(self) -> Place:
        """The tensor as a place in the model."""
        inner, _, name = self.tensor.rpartition(".")
        return Place(self.site, self.owner_path, self.module.get_submodule(inner), name)

    @property
    def magnitude_key(self) -> str:
        return self._key("lora_magnitude_vector")

    @property
    def output_dim(self) -> int:
        """The dimension of the weight's outputs, along which PEFT's DoRA has magnitudes."""
        return int(is_swapped(self.module))

    @property
    def groups(self) -> int:
        return self.module.groups if isinstance(self.module, _CONVS) else 1

    @property
    def as_matrices(self) -> dict[str, int | bool]:
        """The fields of a LoRA that tell how the tensor is viewed as matrices, if not as one."""
        return {}

    def shapes(self, weight: Tensor, rank: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of PEFT's A and B, by key. `rank`: R in Note [grouped convolutions]."""
        out, inputs, *kernel = reversed(weight.shape) if self.output_dim else weight.shape
        return {
            self.key("A"): (rank, inputs * self.groups, *kernel),  # (R, in, k, …)
            self.key("B"): (out, rank // self.groups, *(1 for _ in kernel)),  # (out, R/g, 1, …)
        }

    def magnitude_shape(self, weight: Tensor) -> tuple[int, ...]:
        if isinstance(self.module, _CONVS):
            return (1, weight.shape[0], *(1 for _ in weight.shape[2:]))
        return (weight.shape[self.output_dim],)

    def to_peft(self, weight: Tensor, A: Tensor, B: Tensor) -> dict[str, Tensor]:
        """Return PEFT's tensors, by key, for the update B A, A: (r, in), B: (out, r)."""
        rank = A.shape[0] * self.groups
        if is_swapped(self.module):
            A, B = B.T, A.T
        elif self.groups > 1:
            A = _spread(A, self.groups, channels=weight.shape[1])
        pairs = zip((A, B), self.shapes(weight, rank).items(), strict=True)
        return {key: factor.reshape(shape) for factor, (key, shape) in pairs}

    def from_peft(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return A: (r, in) and B: (out, r) of PEFT's update, or None if it mixes groups."""
        A, B = A.flatten(1), B.flatten(1)
        if is_swapped(self.module):
            return B.T, A.T
        return (A, B) if self.groups == 1 else _gathered(A, B, self.groups)

    def refusal(self, use_dora: bool = False) -> str | None:
        """Return why PEFT cannot compute an update of this tensor, or None if it can."""
        module = self.module
        if use_dora and isinstance(module, nn.MultiheadAttention):
            return "PEFT does not support DoRA on a MultiheadAttention"
        if use_dora and self.groups > 1:
            return (
                "PEFT's DoRA of a grouped convolution divides by the norms of another matrix than "
                "W + s·BA"
            )
        if isinstance(module, nn.MultiheadAttention) and not module._qkv_same_embed_dim:
            return "PEFT needs queries, keys and values of the same size in a MultiheadAttention"
        if isinstance(module, _CONVS) and _is_dilated(module):
            return "PEFT ignores the dilation of a convolution"
        if isinstance(module, _CONVS) and module.padding_mode != "zeros":
            return f"PEFT pads with zeros and ignores padding_mode={module.padding_mode!r}"
        if isinstance(module, nn.Embedding) and module.max_norm is not None:
            return "PEFT renormalises the factors of an Embedding that has max_norm"
        return None

    def key(self, letter: str) -> str:
        """Return the key of PEFT's factor "A" or "B"."""
        embedding = isinstance(self.module, nn.Embedding)
        return self._key(f"lora_embedding_{letter}" if embedding else f"lora_{letter}.weight")

    def _key(self, name: str) -> str:
        return dotted(self.peft_path or self.module_path, self.infix, name)


def parts_of(path: str, module: nn.Module) -> list[Part]:
    """Return the parts of a module; the list is empty if PEFT's LoRA does not adapt its type."""
    if isinstance(module, nn.MultiheadAttention):
        return [
            Part(path, module, "in_proj_weight"),
            Part(path, module, "out_proj.weight", infix="base_layer.out_proj"),
        ]
    if isinstance(module, (nn.Embedding, *_CONVS)) or is_linear(module):
        return [Part(path, module, "weight")]
    return []


def peft_key(path: str, wrapped: Mapping[str, int]) -> str:
    """Return PEFT's key of a tensor of the base, given the number of wrappers around each module.

    >>> peft_key("mha.out_proj.bias", {"mha": 1, "mha.out_proj": 1})
    'mha.base_layer.out_proj.base_layer.bias'
    """
    parts = path.split(".")
    key = []
    for i, part in enumerate(parts, 1):
        key += [part, *["base_layer"] * wrapped.get(".".join(parts[:i]), 0)]
    return ".".join(key)


def is_factor(key: str) -> bool:
    """Return whether a key belongs to a factor; all other keys belong to tensors of the base."""
    return _FACTOR.fullmatch(key) is not None


def cannot_store(path: str, reason: str) -> TargetError:
    """Return the error for an adapter at `path` that PEFT's format cannot store."""
    return TargetError(
        f"a PEFT folder cannot store the adapter at {path!r}: {reason}; detach it from there, or "
        "use paramlora.save"
    )


def norms(weight: Tensor, dim: int) -> Tensor:
    """Return the norm of a weight for each index of a dimension, in the dtype of factors."""
    others = [i for i in range(weight.dim()) if i != dim]
    return torch.linalg.vector_norm(weight.detach(), dim=others, dtype=factor_dtype(weight))


def _is_dilated(module: nn.Module) -> bool:
    pairs = zip(module.dilation, module.kernel_size, strict=True)  # type: ignore[arg-type]
    return any(dilation > 1 and size > 1 for dilation, size in pairs)


def _spread(A: Tensor, groups: int, channels: int) -> Tensor:
    """Return PEFT's A, zero outside of each group's inputs; see Note [grouped convolutions]."""
    spread = A.new_zeros(groups, A.shape[0], groups, channels, A.shape[1] // channels)
    for group in range(groups):
        spread[group, :, group] = A.view(A.shape[0], channels, -1)  # (r, in/g, k)
    return spread.flatten(2).flatten(0, 1)  # (g, r, g, in/g, k) to (g·r, in·k)


def _gathered(A: Tensor, B: Tensor, groups: int) -> tuple[Tensor, Tensor] | None:
    """Return our A and B for PEFT's A: (R, in·k) and B: (out, R/g), or None if A mixes groups.

    The rank is R/g if all groups have the same block of A, as after `_spread`. Otherwise each group
    has its own update B_j A_j of its rows of the weight, and together these have rank R:

        [B_0 A_0]   [B_0  0 ] [A_0]
        [B_1 A_1] = [ 0  B_1] [A_1]
    """
    by_group = A.view(groups, A.shape[0] // groups, groups, -1)  # (g, R/g, g, in/g·k)
    blocks = torch.stack([by_group[group, :, group] for group in range(groups)])  # (g, R/g, in/g·k)
    if by_group.count_nonzero() != blocks.count_nonzero():
        return None
    if all(torch.equal(block, blocks[0]) for block in blocks):
        return blocks[0], B
    return blocks.flatten(0, 1), torch.block_diag(*B.chunk(groups))  # (R, in/g·k), (out, R)
