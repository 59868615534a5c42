"""Adapters per row: each row of a batch is computed with an adapter of its own, or with none.

    y_i = x_i (W + s_e · B_e A_e)ᵀ + b        e = ids[i]; x_i W ᵀ + b where that is −1

    stacked     y = x Wᵀ + b + (M ∘ (x Aᵀ)) Bᵀ      A = [A₁; …; A_E], B = [s₁B₁ … s_E B_E]
    sorted      the rows of an adapter side by side, each adapter with its own

M is 1 where a column of x Aᵀ belongs to the row's adapter, else 0. `stacks_well` chooses. Layers
that are not factored, and other modules, run once for each adapter on its rows.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..compute.modes import native_for
from ..kinds.spec import LowRank
from ..site.find import lists, stack_of
from ..site.stack import Stack

# Floating-point operations that take as long as what sorting costs for each adapter: four launches
# of 10 µs each, at 400 TFLOP/s on a GPU, and four of 10 µs at 50 GFLOP/s on a CPU.
_WORTH_A_GROUP = {"cpu": 2e6, "cuda": 1.6e10}


def stacks_well(n: int, k: int, m: int, ranks: Sequence[int], device: str) -> bool:
    """Return whether to compute all adapters for all rows and mask, rather than sort the rows.

    Stacking is three products whatever the number of adapters, of which only the own one's share
    is used; sorting does no more than is needed, and takes four launches for each adapter.

    Args:
        n: rows, with all positions in them.
        k: the layer's inputs.
        m: its outputs.
        ranks: of the adapters that rows ask for.
        device: "cpu", or "cuda" for any accelerator.
    """
    wasted = 2 * n * (k + m) * (sum(ranks) - sum(ranks) / max(len(ranks), 1))
    return wasted <= len(ranks) * _WORTH_A_GROUP[device]


class Route:
    """Which rows get which adapter.

    Args:
        ids: int64 (n,), the index of each row's adapter in `names`, −1 for none.
        names: the adapters.
        paths: those of the sites, by the id of their stack, for messages.
    """

    def __init__(self, ids: Tensor, names: Sequence[str], paths: dict[int, str]) -> None:
        self.ids, self.names, self.paths = ids, tuple(names), paths
        order = ids.cpu().argsort(stable=True)
        present, counts = ids.cpu().unique(return_counts=True)
        self.groups = list(zip(present.tolist(), order.split(counts.tolist()), strict=True))
        self.order, self.back = order, order.argsort()
        self._moved: dict[Any, Tensor] = {}
        self._rows: dict[tuple[int, ...], tuple[Tensor, list[int]]] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copy of a model that is made inside is not routed: it has left the block."""

    def on(self, name: str, device: torch.device) -> Tensor:
        """Return `ids`, `order` or `back` on a device."""
        # A tensor made in inference mode could not be kept for a backward.
        key = name, device, _inferring()
        if key not in self._moved:
            self._moved[key] = getattr(self, name).to(device)
        return self._moved[key]

    def check(self, rows: int, stack: Stack) -> None:
        if rows != len(self.ids):
            raise ValueError(
                f"ids route {len(self.ids)} rows, and the input of {self.paths[id(stack)]!r} has "
                f"{rows} in its batch dimension; call the model on a batch of that many rows"
            )

    def terms(self, stack: Stack) -> list[tuple[int, LowRank]] | None:
        """Return the updates that rows ask for, with their ids, None if one is not factored."""
        found = []
        for index, _ in self.groups:
            if index >= 0 and self.names[index] in stack.factors:
                term = stack[self.names[index]].low_rank()
                if term is None:
                    return None
                found.append((index, term))
        return found

    def rows_of(self, indices: Sequence[int]) -> tuple[Tensor, list[int]]:
        """Return the rows of these adapters side by side, int64, and how many each has."""
        key = tuple(indices)
        if key not in self._rows:
            groups = dict(self.groups)
            mine = [groups[index] for index in key]
            self._rows[key] = torch.cat(mine), [len(rows) for rows in mine]
        return self._rows[key]

    def mask(self, terms: Sequence[tuple[int, LowRank]], like: Tensor) -> Tensor:
        """Return bool (n, 1, …, R): where M is 0, the column being another adapter's.

        To be filled and not multiplied with: another adapter's infinity is none of the row's.
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
    """Return the route by which a host module is to be computed, None where there is none."""
    # In plain loops: every dense host asks, and torch 2.6 compiles no others.
    for stack in read_by(module):
        if stack.route is not None:
            return stack.route
    return None


def linear(
    x: Tensor, W: Tensor, b: Tensor | None, stack: Stack, *, transposed: bool = False
) -> Tensor | None:
    """Return the output of a Linear, (n, …, m), None where an adapter is not factored.

    x: (n, …, k), W: (m, k), b: (m,) or None. `transposed`: what is stored, and the stack's, is Wᵀ.
    """
    route = stack.route
    terms = route.terms(stack)
    if terms is None:
        return None
    route.check(len(x) if x.dim() > 1 else -1, stack)
    if not terms:
        return F.linear(x, W, b)
    if transposed:
        terms = [(index, term.transposed()) for index, term in terms]
    built = native_for(x, W, b, terms)
    if built is not None:
        order, counts = route.rows_of([index for index, _ in terms])
        As, Bs, scales = zip(*(term for _, term in terms), strict=True)
        return built.routed(x, W, b, order, counts, As, Bs, scales)
    y = F.linear(x, W, b)
    m, k = W.shape
    ranks = [len(term.A) for _, term in terms]
    if stacks_well(x.numel() // max(k, 1), k, m, ranks, "cpu" if x.is_cpu else "cuda"):
        A = torch.cat([term.A for _, term in terms]).to(x.dtype)
        B = torch.cat([_scaled(term) for _, term in terms], dim=1).to(x.dtype)
        h = F.linear(x, A)
        h = h.masked_fill(route.mask(terms, h), 0.0)
        return torch.addmm(y, h, B.t()) if x.dim() == 2 else y + F.linear(h, B)
    by_index = dict(terms)
    parts = x.index_select(0, route.on("order", x.device)).split([len(r) for _, r in route.groups])
    updates = [
        _update(part, by_index.get(index), y)
        for (index, _), part in zip(route.groups, parts, strict=True)
    ]
    return y + torch.cat(updates).index_select(0, route.on("back", x.device))


def embedding(input: Tensor, stack: Stack, padding_idx: int | None) -> Tensor | None:
    """Return what is added to the output of an Embedding, (n, …, dim), None if not factored."""
    route = stack.route
    terms = route.terms(stack)
    if not terms:
        return None
    route.check(len(input) if input.dim() else -1, stack)
    rows = [F.embedding(input, _scaled(term), padding_idx) for _, term in terms]
    h = torch.cat(rows, dim=-1)
    return h.masked_fill(route.mask(terms, h), 0.0) @ torch.cat([term.A for _, term in terms])


def by_group(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return a module's output, computed once for each adapter on its rows."""
    stack = next(stack for stack in read_by(module) if stack.route is not None)
    route = stack.route
    bound = inspect.signature(type(module).forward).bind(module, *args, **kwargs)
    inputs, outputs = _dimensions(module, bound.arguments, stack)
    for name, dim in inputs.items():
        for tensor in _tensors_in(bound.arguments.get(name)):
            route.check(tensor.shape[dim], stack)
    found = []
    for index, rows in route.groups:
        taken = dict(bound.arguments)
        for name, dim in inputs.items():
            if taken.get(name) is not None:
                taken[name] = _mapped(taken[name], _select(dim, rows))
        with _only(module, None if index < 0 else route.names[index]):
            found.append(type(module).forward(**taken))
    return _joined(found, outputs, route)


@contextmanager
def _only(module: nn.Module, name: str | None) -> Iterator[None]:
    """Let one adapter, or none, contribute to a module inside, without a route."""
    stacks = read_by(module)
    before = [(stack.live, stack.route) for stack in stacks]
    for stack in stacks:
        stack.route = None
        stack.live = (name,) if name is not None and name in stack.factors else ()
    try:
        yield
    finally:
        for stack, (live, route) in zip(stacks, before, strict=True):
            stack.live, stack.route = live, route


def read_by(module: nn.Module) -> list[Stack]:
    """Return the stacks at the tensors that a module's own forward reads."""
    plists = list(lists(module).values())
    if isinstance(module, nn.MultiheadAttention):
        plists.extend(lists(module.out_proj).values())
    found = []
    for plist in plists:
        stack = stack_of(plist)
        if stack is not None:
            found.append(stack)
    return found


def _dimensions(module: nn.Module, given: dict[str, Any], stack: Stack) -> tuple[Any, Any]:
    """Return the batch dimensions of a module's arguments, by name, and those of its outputs."""
    if isinstance(module, nn.MultiheadAttention):
        if given["query"].dim() == 3 and (given.get("attn_mask") is None or _is_shared(given)):
            dim = 0 if module.batch_first else 1
            return {"query": dim, "key": dim, "value": dim, "key_padding_mask": 0}, (dim, 0)
    elif isinstance(module, nn.RNNBase):
        if isinstance(given["input"], Tensor) and given["input"].dim() == 3:
            dim = 0 if module.batch_first else 1
            return {"input": dim, "hx": 1}, (dim, (1, 1) if isinstance(module, nn.LSTM) else 1)
    elif isinstance(module, nn.EmbeddingBag):
        if given["input"].dim() == 2:
            return {"input": 0, "per_sample_weights": 0}, 0
    elif isinstance(module, nn.Bilinear):
        return {"input1": 0, "input2": 0}, 0
    else:
        spatial = getattr(module, "kernel_size", None)
        if spatial is None or given["input"].dim() == len(spatial) + 2:
            return {"x" if "x" in given else "input": 0}, 0
    raise ValueError(
        f"cannot route the rows of this call of {stack.route.paths[id(stack)]!r}: give it a batch "
        "as one dense tensor with a batch dimension, and no mask or offsets of each row's own"
    )


def _is_shared(given: dict[str, Any]) -> bool:
    return given["attn_mask"].dim() == 2


def _select(dim: int, rows: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor.index_select(dim, rows.to(tensor.device))


def _mapped(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, tuple):
        return tuple(_mapped(part, function) for part in value)
    return function(value)


def _tensors_in(value: Any) -> list[Tensor]:
    if isinstance(value, tuple):
        return [tensor for part in value for tensor in _tensors_in(part)]
    return [] if value is None else [value]


def _joined(parts: list[Any], dims: Any, route: Route) -> Any:
    """Return the groups' outputs as one, in the order of the rows."""
    if isinstance(dims, tuple):
        return tuple(_joined([part[i] for part in parts], dim, route) for i, dim in enumerate(dims))
    if parts[0] is None:
        return None
    return torch.cat(parts, dims).index_select(dims, route.on("back", parts[0].device))


def _scaled(term: LowRank) -> Tensor:
    return term.B if type(term.scale) is float and term.scale == 1.0 else term.B * term.scale


def _inferring() -> bool:
    # The compiler cannot be asked, and makes such tensors its own.
    return not torch.compiler.is_compiling() and torch.is_inference_mode_enabled()


def _update(x: Tensor, term: LowRank | None, y: Tensor) -> Tensor:
    if term is None:
        return y.new_zeros(()).expand(*x.shape[:-1], y.shape[-1])
    return F.linear(F.linear(x, term.A.to(x.dtype)), _scaled(term).to(x.dtype))
