"""`routed`: an adapter for each row of a batch."""

import functools
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import StateError
from ..layers.forward import forward_for
from ..layers.rows import Route, by_group, read_by, route_of
from ..site.find import Site, lists, once_each, sites
from ..site.names import check_unmerged, names_of, select


@contextmanager
def routed(model: nn.Module, ids: Tensor | Sequence[int], *names: str) -> Iterator[None]:
    """Give each row of a batch an adapter of its own inside; afterwards all is as it was.

    What is switched on does not matter inside, strengths do. Where checkpointing computes a forward
    again in the backward, the backward belongs inside as well. It works in training, where each
    adapter learns from its rows, and in inference, for Linear, Embedding, convolutions, attention
    and recurrent layers; their inputs must have the batch as their batch dimension, the first one
    (the second in attention and recurrent layers without `batch_first`).

    Args:
        model: a module with adapters.
        ids: whole numbers (n,), for each row the index of its adapter in `names`, or −1 for none.
        names: the adapters; none given means all, in attaching order.

    Raises:
        AdapterNameError: no adapter of that name.
        StateError: an adapter is merged, or is at a module whose own code reads its tensor, so
            that all rows get the same.
        ValueError: ids that are no vector of whole numbers from −1 to the number of adapters less
            1, or, in the forward, an input with another number of rows.

    >>> import paramlora as pl
    >>> model = nn.Linear(4, 3)
    >>> _ = pl.attach(model, pl.LoRA(rank=2), "weight", name="spam")
    >>> with pl.routed(model, [0, -1]):
    ...     model(torch.ones(2, 4)).shape
    torch.Size([2, 3])
    """
    chosen = select(model, names)
    check_unmerged([(stack, list(stack.factors)) for stack, _ in chosen], "route to")
    order, here = names or tuple(names_of(model)), sites(model)
    route = Route(_checked(ids, order), order, {id(site.stack): site.path for site in here})
    mine = {id(stack) for stack, _ in chosen}
    _check_hosts([site for site in here if id(site.stack) in mine])
    before = [(stack, stack.route) for stack, _ in chosen]
    others = [(s.stack, s.stack.live) for s in once_each(here) if id(s.stack) not in mine]
    fast = torch.backends.mha.get_fastpath_enabled()
    attentions = [module for module in model.modules() if _reads_routed_output(module, mine)]
    try:
        # torch's fused encoder layer reads the weights of the modules within it.
        torch.backends.mha.set_fastpath_enabled(False)
        for stack, _ in chosen:
            stack.route = route
        for stack, _ in others:
            stack.live = ()
        for module in attentions:
            vars(module)["forward"] = functools.partial(_attention, module)
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for stack, outer in before:
            stack.route = outer
        for stack, live in others:
            stack.live = live
        for module in attentions:
            del vars(module)["forward"]


def _checked(ids: Tensor | Sequence[int], names: Sequence[str]) -> Tensor:
    given = torch.as_tensor(ids)
    if given.dim() != 1 or given.is_floating_point() or given.dtype == torch.bool:
        raise ValueError(
            "ids must be a vector of whole numbers, one for each row, got "
            f"{given.dtype} of shape {tuple(given.shape)}"
        )
    wrong = given[(given < -1) | (given >= len(names))]
    if len(wrong):
        listed = ", ".join(f"{i} = {name!r}" for i, name in enumerate(names))
        raise ValueError(f"ids may be −1 (none), {listed}; got {int(wrong[0])}")
    return given.to(torch.int64, copy=True)


def _check_hosts(here: Sequence[Site]) -> None:
    for site in here:
        cls = type(site.module).__bases__[0]
        if forward_for(cls, alone=False) is None:
            raise StateError(
                f"cannot route {site.path!r}: {cls.__name__} reads it in its own forward, where "
                "all rows get the same tensor; detach that adapter, or name= another for that site"
            )


def _reads_routed_output(module: nn.Module, routed: Collection[int]) -> bool:
    """Return whether a module is an attention that only its output projection makes a host.

    `routed` holds the ids of the stacks that are routed.
    """
    return (
        isinstance(module, nn.MultiheadAttention)
        and not lists(module)
        and "forward" not in vars(module)
        and any(id(stack) in routed for stack in read_by(module))
    )


def _attention(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Run an attention that is no host, in place of its forward: nothing else could split it."""
    if route_of(module) is not None:
        return by_group(module, args, kwargs)
    return type(module).forward(module, *args, **kwargs)
