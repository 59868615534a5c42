"""The forwards of an adapted Embedding and EmbeddingBag."""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..compute.rescaled import rescaled_rows
from ..kinds.spec import LowRank, add_update
from ..routing import rows
from ..routing.row_groups import by_group
from ..stack.built import no_autocast
from .linear import alone


@functools.wraps(nn.Embedding.forward)
def embedding_forward(self: nn.Embedding, input: Tensor) -> Tensor:
    weight = update = rescaled = None
    # max_norm needs the row norms of W', scale_grad_by_freq a gradient of whole rows of W'.
    site = None if self.max_norm is not None or self.scale_grad_by_freq else alone(self)
    if site is not None:
        weight, stack = site
        with no_autocast(weight):
            state = stack.state()
            if state.route is not None:
                update = rows.embedding(input, stack, state, self.padding_idx)
            else:
                terms = stack.low_rank(state)
                if terms is None:
                    rescaled = stack.rescaled(weight, state)
                    terms = [rescaled.update] if rescaled and rescaled.update else []
                update = _looked_up(input, terms, self.padding_idx)
    if update is None and rescaled is None:
        if rows.route_of(self) is not None:
            return by_group(self, (input,), {})
        weight = self.weight
    output = F.embedding(
        input,
        weight,  # type: ignore[arg-type]
        self.padding_idx,
        self.max_norm,
        self.norm_type,
        self.scale_grad_by_freq,
        self.sparse and weight.is_leaf,  # type: ignore[union-attr]
    )
    if update is not None:
        if self.padding_idx is not None:
            # torch gives the padding row no gradient; through A it would get one here.
            padding = (input == self.padding_idx).unsqueeze(-1)
            update = torch.where(padding, update.detach(), update)
        output = add_update(output, update)
    if rescaled is not None:
        output = rescaled_rows(output, input, rescaled, self.padding_idx)
    return output


def _looked_up(input: Tensor, terms: list[LowRank], padding_idx: int | None) -> Tensor | None:
    """Return the sum of the updates of the looked-up rows, (…, dim); None without a term.

    An Embedding's weight is (num, dim), so B is (num, r) and A (r, dim). The gradients of the
    factors are dense even if `sparse` is set for W. They are small, because B has only r columns,
    and one optimizer can then train A and B.
    """
    parts = [scale * (F.embedding(input, B, padding_idx) @ A) for A, B, scale in terms]  # (…, dim)
    return sum(parts[1:], parts[0]) if parts else None


@functools.wraps(nn.EmbeddingBag.forward)
def embedding_bag_forward(
    self: nn.EmbeddingBag,
    input: Tensor,
    offsets: Tensor | None = None,
    per_sample_weights: Tensor | None = None,
) -> Tensor:
    if rows.route_of(self) is not None:
        kwargs = {"offsets": offsets, "per_sample_weights": per_sample_weights}
        return by_group(self, (input,), kwargs)
    weight = self.weight
    return F.embedding_bag(
        input,
        weight,
        offsets,
        self.max_norm,
        self.norm_type,
        self.scale_grad_by_freq,
        self.mode,
        # A sparse gradient of W' cannot be propagated to the factors.
        self.sparse and weight.is_leaf,
        per_sample_weights,
        self.include_last_offset,
        self.padding_idx,
    )
