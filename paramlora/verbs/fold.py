"""Computing W' with adapters folded in, as the tensors that a plain model would store."""

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..errors import StateError
from ..kinds.lora import LoRA
from ..kinds.spec import Strength
from ..site.find import Site, apply_parametrizations, preceding, stored_tensors
from ..site.quantized import packed_shape
from ..stack.built import no_autocast
from ..stack.factors import Blocks, Factors
from ..stack.overlay import is_routed

# The number of elements of a weight that are computed at a time: 2 MiB of float32.
_BLOCK = 2**19


def folded(
    site: Site, W: Tensor, names: Sequence[str], strengths: Mapping[str, Strength]
) -> list[Tensor]:
    """Return the tensors to store so that the module computes with adapters folded into `W`.

    Args:
        site: the site; its parametrizations below the stack are inverted.
        W: the weight below the adapters.
        names: the adapters, in the order in which they act.
        strengths: the strengths that open blocks have set, by adapter.

    Raises:
        StateError: a parametrization below the adapters cannot store the result, or the layer is
            quantized.
    """
    if packed_shape(site.plist) is not None:
        raise StateError(
            f"cannot merge at {site.path!r}: its layer is quantized, and rounding W' to a few bits "
            "would lose most of the update. Leave the adapter unmerged; or save it, load it into "
            "the model before it was quantized, or dequantized, and merge it there: see "
            "docs/quantized.md"
        )
    value, own = W, False
    with no_autocast(W):
        for name in names:
            factors = site.stack[name]
            value = _applied(factors, value, strengths.get(name), own)
            # LoRA returns a new tensor. Another kind may return a view of W or of a factor.
            own = isinstance(factors, Factors) and type(factors.spec) is LoRA
    # A kind may return a view of W, or other strides than W has (channels_last).
    shares_storage = value.untyped_storage().data_ptr() == W.untyped_storage().data_ptr()
    if shares_storage or value.stride() != W.stride():
        value = torch.empty_like(W).copy_(value)
    parametrizations = preceding(site.plist, site.stack)
    return _inverted(site, value, parametrizations) if parametrizations else [value]


@torch.no_grad()
def effective(site: Site) -> list[Tensor]:
    """Return the tensors that a plain module would store to compute as this one does now.

    Raises:
        StateError: the model is inside of `routed`; or a parametrization below the adapters cannot
            store the result; or another thread has a block open.
    """
    stack, stored = site.stack, [tensor.detach() for tensor in stored_tensors(site.plist)]
    if is_routed(stack):
        raise StateError(
            f"{site.path!r} has another adapter for each row inside of routed(), and no single "
            "weight; leave the block, or choose one adapter by using()"
        )
    state = stack.state()
    if not state.live:
        return stored
    W = apply_parametrizations(preceding(site.plist, stack), stored)
    return folded(site, W, state.live, state.strengths or {})


def _applied(factors: Factors | Blocks, W: Tensor, strength: Strength | None, own: bool) -> Tensor:
    """Return W' of one adapter, with the bits that reading the tensor gives.

    On a CPU a matrix in half precision is computed in float32, by blocks of rows that fit into the
    cache: 4096 × 4096 takes a quarter of the time. With `own`, W is a new tensor that the result
    may overwrite: merging 16 adapters then makes one tensor, not 16.
    """
    term = None
    if W.is_cpu and W.dim() == 2 and isinstance(factors, Factors) and factors.block is None:
        term = factors.low_rank(strength)
    if term is None or isinstance(term.scale, Tensor):
        return factors(W, strength)
    if term.A.dtype == W.dtype:
        # `LoRA.apply` is this product out of place. Other kinds may round differently.
        in_place = own and type(factors.spec) is LoRA and W.is_contiguous()
        return W.addmm_(term.B, term.A, alpha=term.scale) if in_place else factors(W, strength)
    value = W if own else torch.empty_like(W)
    rows = max(1, _BLOCK // max(1, W.shape[1]))
    for w, b, out in zip(W.split(rows), term.B.split(rows), value.split(rows), strict=True):
        out.copy_(w.to(b.dtype).addmm_(b, term.A, alpha=term.scale))
    return value


def _inverted(site: Site, value: Tensor, before: list[nn.Module]) -> list[Tensor]:
    """Return the tensors from which the parametrizations before the stack compute `value`."""
    parts: Tensor | list[Tensor] = value
    try:
        # On copies, because a right_inverse may change its module; that of `orthogonal` does.
        for parametrization in reversed(copy.deepcopy(before)):
            parts = parametrization.right_inverse(parts)  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        parts = []
    tensors = [parts] if isinstance(parts, Tensor) else list(parts)
    if len(tensors) == len(stored_tensors(site.plist)):
        again = apply_parametrizations(before, tensors)
        bound = 16 * torch.finfo(value.dtype).eps
        if torch.allclose(again, value, rtol=bound, atol=bound * float(value.abs().max())):
            return tensors
    kinds = ", ".join(type(p).__name__ for p in before)
    raise StateError(
        f"cannot merge at {site.path!r}: {kinds} below the adapter cannot store the merged weight; "
        "remove it first, or leave the adapter unmerged"
    )
