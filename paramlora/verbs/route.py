"""`routed`: a separate adapter for each row of a batch."""

import functools
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import StateError
from ..layers.forward import forward_for
from ..layers.row_groups import by_group
from ..layers.rows import Route, read_by, route_of
from ..site.find import Site, parametrization_lists
from ..site.names import check_unmerged
from ..site.overlay import Change, opened
from ..site.stack import Stack
from ..site.survey import Survey


@contextmanager
def routed(model: nn.Module, ids: Tensor | Sequence[int], *names: str) -> Iterator[None]:
    """Compute each row of a batch with its own adapter inside the block.

    Only the adapter of a row contributes to it, with its strength, even if it is switched off.
    Activation checkpointing runs a forward again in the backward, so the backward then belongs
    inside the block as well. It works in inference, and in training, where each adapter learns
    from its rows. It supports Linear, Embedding, convolutions, attention and recurrent layers. The
    rows must lie along dimension 0 of their inputs, or along dimension 1 in attention and recurrent
    layers without `batch_first`.

    Args:
        model: a module with adapters.
        ids: integers (n,): for each row the index of its adapter in `names`, or −1 for none. An
            input may also have each row k times side by side, n·k rows, as `generate` with beams.
        names: the adapters; by default all, in attaching order.

    Raises:
        AdapterNameError: there is no adapter of that name.
        StateError: an adapter is merged; or a module's own forward reads the adapted tensor, so
            that all rows would get the same adapter.
        ValueError: ids is not a vector of integers from −1 to the number of adapters less 1; or,
            in the forward, an input has another number of rows.

    >>> import paramlora as pl
    >>> model = nn.Linear(4, 3)
    >>> _ = pl.attach(model, pl.LoRA(rank=2), "weight", name="spam")
    >>> with pl.routed(model, [0, -1]):
    ...     model(torch.ones(2, 4)).shape
    torch.Size([2, 3])

    Note [how rows are routed]
        The block gives every stack of a named adapter the same `Route`. Three kinds of code
        then handle it. The forward of a Linear, Conv1D or Embedding asks its stack for the route
        and computes all rows at once (layers/rows.py). Every other layer with an adapted forward
        runs once for each adapter, on the rows of that adapter. And code that reads `layer.weight`
        itself gets a stand-in, which raises a StateError when it is used for more than its dtype,
        shape or device, because one tensor cannot serve all rows (layers/stand_in.py).

        Attention needs two special cases. A MultiheadAttention whose `out_proj` alone is adapted is
        not a host itself, so its own forward would read `out_proj.weight`; it gets another
        forward inside the block. And torch's fused encoder layer reads the weights of its
        modules without calling them, so that fast path is off inside the block.

        Stacks without a named adapter contribute nothing inside: their `live` is empty.
    """
    survey = Survey(model)
    chosen = {site.stack for site, _ in survey.select(names)}
    check_unmerged(survey.stacks, (), "route to")
    order = names or tuple(survey.names)
    paths = {site.stack.key: site.path for site in survey.sites}
    route = Route(_checked_ids(ids, order), order, paths)
    _check_hosts([site for site in survey.sites if site.stack in chosen])
    changes = {
        stack: Change(
            {number: name in order for name, number in stack.numbers.items()},
            {},
            route if stack in chosen else None,
        )
        for stack in survey.stacks
    }
    attentions = [m for _, m in survey.modules if _reads_routed_output(m, chosen)]
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        for module in attentions:
            vars(module)["forward"] = functools.partial(_attention, module)
        with opened("routed", changes):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module in attentions:
            del vars(module)["forward"]


def _checked_ids(ids: Tensor | Sequence[int], names: Sequence[str]) -> Tensor:
    """Return ids as a new int64 tensor (n,), or raise a ValueError."""
    given = torch.as_tensor(ids)
    if given.dim() != 1 or given.is_floating_point() or given.dtype == torch.bool:
        raise ValueError(
            "ids must be a vector of integers, one for each row, got "
            f"{given.dtype} of shape {tuple(given.shape)}"
        )
    wrong = given[(given < -1) | (given >= len(names))]
    if len(wrong):
        listed = ", ".join(f"{i} = {name!r}" for i, name in enumerate(names))
        raise ValueError(f"ids may be −1 (none), {listed}; got {int(wrong[0])}")
    return given.to(torch.int64, copy=True)


def _check_hosts(sites: Sequence[Site]) -> None:
    """Raise a StateError if a module reads its tensor in a forward that cannot be split."""
    for site in sites:
        cls = type(site.module).__bases__[0]
        if forward_for(cls, alone=False) is None:
            raise StateError(
                f"cannot route {site.path!r}: {cls.__name__} reads it in its own forward, where "
                "all rows get the same tensor; detach that adapter, or name= another for that site"
            )


def _reads_routed_output(module: nn.Module, routed: Collection[Stack]) -> bool:
    """Return whether a module is an attention of which only `out_proj` has a routed stack.

    `routed` are the routed stacks.
    """
    return (
        isinstance(module, nn.MultiheadAttention)
        and not parametrization_lists(module)
        and "forward" not in vars(module)
        and any(stack in routed for stack in read_by(module))
    )


def _attention(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Stand in for the forward of an attention of which only `out_proj` is adapted."""
    if route_of(module) is not None:
        return by_group(module, args, kwargs)
    return type(module).forward(module, *args, **kwargs)
