"""Adapters per row: each row of a batch is computed with its own adapter, or without one.

    y_i = x_i (W + s_e·B_e A_e)ᵀ + b        with e = ids[i]; x_i Wᵀ + b if ids[i] = −1

There are three ways to compute the updates of a layer with low-rank adapters:

    batched     y = x Wᵀ + b + (x Aᵀ) Bᵀ            one batched product over the adapters
    stacked     y = x Wᵀ + b + (M ∘ (x Aᵀ)) Bᵀ      A = [A₁; …; A_E], B = [s₁B₁ … s_E B_E]
    sorted      gather the rows of each adapter, multiply by that adapter, scatter back

Batching needs equally many rows for each adapter, side by side, as when several adapters are
trained at once: then x is (E, n / E, k) without a copy, A (E, r, k) and B (E, m, r). Zeros fill up
the factors of smaller ranks. For other batches, M (n, R) is 1 if a column of x Aᵀ belongs to the
row's adapter, and 0 otherwise. For E = 2 adapters of rank 1 and ids = [0, 1, −1],
M = [[1, 0], [0, 1], [0, 0]]. Stacking takes three products for any number of adapters, but only 1/E
of x Aᵀ is used. Sorting computes only what is used, but takes four launches for each adapter.
`stacks_well` chooses. Layers with other adapters, and other modules, run once for each adapter on
its rows (row_groups.py).
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..compute.modes import plain_ops_only
from ..kinds.spec import LowRank
from ..site.find import parametrization_lists, stack_of
from ..stack.overlay import State
from ..stack.stack import Stack
from .routed_tensor import RoutedTensor

# Sorting needs four launches of 10 µs for each adapter. In that time a CPU with 50 GFLOP/s and a
# GPU with 400 TFLOP/s do this many floating-point operations.
_WORTH_A_GROUP = {"cpu": 2e6, "cuda": 1.6e10}


def stacks_well(n: int, k: int, m: int, ranks: Sequence[int], device: str) -> bool:
    """Return whether to compute all adapters for all rows and mask, instead of sorting the rows.

    Args:
        n: the number of rows, times the positions in each.
        k: the layer's inputs.
        m: the layer's outputs.
        ranks: the ranks of the adapters that rows are routed to.
        device: "cpu", or "cuda" for any accelerator.
    """
    wasted = 2 * n * (k + m) * (sum(ranks) - sum(ranks) / max(len(ranks), 1))
    return wasted <= len(ranks) * _WORTH_A_GROUP[device]


class Route:
    """The adapter of each row of a batch.

    Args:
        ids: int64 (n,), the index of each row's adapter in `names`, −1 for none.
        names: the adapters.
        paths: the path of each site by the key of its stack, for messages.

    Attributes:
        groups: for each index that occurs in ids, the rows with it, int64.
        order: int64 (n,), the rows sorted by adapter: `x[order]` has them side by side.
        back: int64 (n,), its inverse: `x[order][back]` is x.
        even: whether each index has equally many rows, side by side, in ascending order.
    """

    def __init__(self, ids: Tensor, names: Sequence[str], paths: dict[str, str]) -> None:
        self.ids, self.names, self.paths = ids, tuple(names), paths
        order = ids.cpu().argsort(stable=True)
        present, counts = ids.cpu().unique(return_counts=True)
        groups = zip(present.tolist(), order.split(counts.tolist()), strict=True)
        # An empty batch is one group without an adapter, so that outputs have their shape.
        self.groups = list(groups) or [(-1, order)]
        self.order, self.back = order, order.argsort()
        self.even = len({*counts.tolist()}) == 1 and torch.equal(order, torch.arange(len(order)))
        self._moved: dict[Any, Tensor] = {}
        self._repeated: dict[int, Route] = {}

    def on(self, name: str, device: torch.device) -> Tensor:
        """Return `ids`, `order` or `back` on a device."""
        # A tensor made in inference mode cannot be saved for a backward, so it has another key.
        key = name, device, _inferring()
        if key not in self._moved:
            self._moved[key] = getattr(self, name).to(device)
        return self._moved[key]

    def repeated(self, rows: int, path: str) -> "Route":
        """Return the route of an input that has each row once, or several times side by side.

        `generate` repeats each row for beams: with 3 beams, the rows of ids [0, 1] become those of
        [0, 0, 0, 1, 1, 1].

        Args:
            rows: the number of rows of the input.
            path: the path of the adapted tensor.

        Raises:
            ValueError: the input has another number of rows.
        """
        times = max(rows, 0) // max(len(self.ids), 1)
        if rows != times * len(self.ids) or (times == 0 and rows != len(self.ids)):
            raise ValueError(
                f"ids route {len(self.ids)} rows, and the input of {path!r} has "
                f"{rows} in its batch dimension; call the model on a batch of that many rows, "
                "or on one that repeats each row consecutively"
            )
        if times <= 1:
            return self
        if times not in self._repeated:
            ids = self.ids.repeat_interleave(times)
            self._repeated[times] = Route(ids, self.names, self.paths)
        return self._repeated[times]

    def terms(self, stack: Stack, state: State) -> list[tuple[int, LowRank]] | None:
        """Return (index, update) of the adapters that rows use; None if one is not factored."""
        found = []
        for index, _ in self.groups:
            if index >= 0 and self.names[index] in state.live:
                alone = State(state.active, (self.names[index],), state.route, state.strengths)
                terms = stack.low_rank(alone)
                if terms is None:
                    return None
                found.append((index, terms[0]))
        return found

    def stand_in(self, stack: Stack, weight: Tensor) -> Tensor:
        """Return what code that reads an adapted tensor gets instead of it."""
        state = stack.state()

        def build(index: int) -> Tensor:
            name = self.names[index]
            return stack.build(weight, state, [name] if index >= 0 and name in state.live else [])

        made = RoutedTensor.like(weight)
        made.route, made.path, made.build = self, self.paths[stack.key], build
        return made

    def mask(self, terms: Sequence[tuple[int, LowRank]], like: Tensor) -> Tensor:
        """Return ¬M, bool (n, 1, …, R): True if the column belongs to another adapter.

        It is for `masked_fill`. Multiplying by M would let another adapter's infinity reach the
        row, as ∞ · 0 = NaN.
        """
        sizes = tuple((index, len(term.A)) for index, term in terms)
        key = sizes, like.device, _inferring()
        if key not in self._moved:
            owners = [index for index, term in terms for _ in range(len(term.A))]
            owner = torch.tensor(owners, device=like.device)
            self._moved[key] = self.on("ids", like.device)[:, None] != owner
        M = self._moved[key]
        return M.view(len(M), *[1] * (like.dim() - 2), -1)


def route_of(module: nn.Module) -> Route | None:
    """Return the route of a host module; None outside of `routed`."""
    # A plain loop, because torch 2.6 does not compile a generator here.
    for stack in read_by(module):
        route = stack.state().route
        if route is not None:
            return route
    return None


def linear(
    x: Tensor,
    W: Tensor,
    b: Tensor | None,
    stack: Stack,
    state: State,
    *,
    transposed: bool = False,
) -> Tensor | None:
    """Return the output of a Linear, (n, …, m); None if an adapter is not factored.

    Args:
        x: (n, …, k).
        W: (m, k).
        b: (m,) or None.
        stack: the routed stack of W, or of Wᵀ if `transposed`.
        state: its state.
        transposed: the stored weight is Wᵀ, (k, m), as in transformers' Conv1D.
    """
    terms = state.route.terms(stack, state)
    if terms is None:
        return None
    if transposed:
        terms = [(index, term.transposed()) for index, term in terms]
    return add_updates(x, F.linear(x, W, b), state.route, stack, terms)


def add_updates(
    x: Tensor, y: Tensor, route: Route, stack: Stack, terms: list[tuple[int, LowRank]]
) -> Tensor:
    """Return y, (n, …, m), with each row's update; it may be written to.

    Args:
        x: (n, …, k).
        y: the output of the base for x.
        route: the route.
        stack: the stack whose updates these are.
        terms: the updates by index, as `Route.terms` returns them.
    """
    route = route.repeated(len(x) if x.dim() > 1 else -1, route.paths[stack.key])
    if not terms:
        return y
    if route.even and len(terms) == len(route.groups) > 1:
        return _batched(x, y, [term for _, term in terms])
    k, m = x.shape[-1], y.shape[-1]
    ranks = [len(term.A) for _, term in terms]
    if stacks_well(x.numel() // max(k, 1), k, m, ranks, "cpu" if x.is_cpu else "cuda"):
        A = torch.cat([term.A for _, term in terms]).to(x.dtype)  # (R, k)
        B = torch.cat([_scaled(term) for _, term in terms], dim=1).to(x.dtype)  # (m, R)
        h = F.linear(x, A)  # (n, …, R)
        h = h.masked_fill(route.mask(terms, h), 0.0)
        return torch.addmm(y, h, B.t()) if x.dim() == 2 else y + F.linear(h, B)
    by_index = dict(terms)
    if x.is_cpu and not torch.is_grad_enabled() and type(y) is Tensor and not plain_ops_only(x):
        # The general code below makes four tensors of the size of x or y. On a CPU the page faults
        # of new memory may take half as long as y itself. The tensors of this loop are only as
        # large as the rows of one adapter. (On a GPU index_add_ is slow in half precision.)
        for index, rows in route.groups:
            if index in by_index:
                part = x.index_select(0, rows)  # (rows of one adapter, …, k)
                y.index_add_(0, rows, _update(part, by_index[index], y))
        return y
    parts = x.index_select(0, route.on("order", x.device)).split([len(r) for _, r in route.groups])
    updates = [
        _update(part, by_index.get(index), y)
        for (index, _), part in zip(route.groups, parts, strict=True)
    ]
    return y + torch.cat(updates).index_select(0, route.on("back", x.device))


def _batched(x: Tensor, y: Tensor, terms: Sequence[LowRank]) -> Tensor:
    """Return y, (n, …, m), with each update added to an equal part of the rows.

    Args:
        x: (n, …, k).
        y: (n, …, m), the output of the base.
        terms: the updates, in the order of their rows.
    """
    # A scale that all share is a number of the product. Others are multiplied into B.
    scale = terms[0].scale
    shared = type(scale) is float and all(
        type(term.scale) is float and term.scale == scale for term in terms
    )
    rank = max(len(term.A) for term in terms)
    A = torch.stack([_padded(term.A, 0, rank) for term in terms]).to(x.dtype)  # (E, r, k)
    B = torch.stack([_padded(t.B if shared else _scaled(t), 1, rank) for t in terms]).to(x.dtype)
    # x Aᵀ is computed as its transpose. autograd then computes dA as (r, k), which MKL does in an
    # eighth of the time that it takes for (k, r).
    h = torch.bmm(A, x.reshape(len(terms), -1, x.shape[-1]).mT)  # (E, r, n / E · …)
    parts = y.reshape(len(terms), -1, y.shape[-1])
    alpha = float(scale) if shared else 1.0
    return torch.baddbmm(parts, h.mT, B.mT, alpha=alpha).view_as(y)


def _padded(factor: Tensor, dim: int, rank: int) -> Tensor:
    """Return a factor with zeros for the missing rows or columns of a larger rank."""
    missing = rank - factor.shape[dim]
    if not missing:
        return factor
    return F.pad(factor, (0, 0, 0, missing) if dim == 0 else (0, missing))


def embedding(input: Tensor, stack: Stack, state: State, padding_idx: int | None) -> Tensor | None:
    """Return the update of an Embedding's output, (n, …, dim); None if no row has one."""
    route = state.route
    terms = route.terms(stack, state)
    if not terms:
        return None
    route = route.repeated(len(input) if input.dim() else -1, route.paths[stack.key])
    rows = [F.embedding(input, _scaled(term), padding_idx) for _, term in terms]
    h = torch.cat(rows, dim=-1)  # (n, …, R)
    return h.masked_fill(route.mask(terms, h), 0.0) @ torch.cat([term.A for _, term in terms])


def read_by(module: nn.Module) -> list[Stack]:
    """Return the stacks at the tensors that a module's own forward reads."""
    plists = list(parametrization_lists(module).values())
    if isinstance(module, nn.MultiheadAttention):
        plists.extend(parametrization_lists(module.out_proj).values())
    found = []
    for plist in plists:
        stack = stack_of(plist)
        if stack is not None:
            found.append(stack)
    return found


def _scaled(term: LowRank) -> Tensor:
    return term.B if type(term.scale) is float and term.scale == 1.0 else term.B * term.scale


def _inferring() -> bool:
    # The compiler cannot trace is_inference_mode_enabled(), and creates its own tensors anyway.
    return not torch.compiler.is_compiling() and torch.is_inference_mode_enabled()


def _update(x: Tensor, term: LowRank | None, y: Tensor) -> Tensor:
    if term is None:
        return y.new_zeros(()).expand(*x.shape[:-1], y.shape[-1])
    return F.linear(F.linear(x, term.A.to(x.dtype)), _scaled(term).to(x.dtype))
