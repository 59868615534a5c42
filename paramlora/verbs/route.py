"""`routed`: a separate adapter for each row of a batch."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import AdapterNameError, StateError, nearest
from ..layers.forward import forward_for
from ..routing.rows import Route
from ..site.find import Site
from ..site.names import check_unmerged
from ..site.quantized import packed_tensor
from ..site.survey import Survey
from ..stack.overlay import Change, opened


@contextmanager
def routed(
    model: nn.Module, ids: Tensor | Sequence[int | str | None], *names: str
) -> Iterator[None]:
    """Compute each row of a batch with its own adapter inside the block.

    Only the adapter of a row contributes to it, with its strength, even if it is switched off.
    Inside, `using` gives all rows the same adapters again, and `disabled` removes adapters from
    their rows. Activation checkpointing runs a forward again in
    the backward, so the backward then belongs inside the block as well; or pass `keep_blocks` to
    the checkpoint. Like all blocks, it belongs to the thread or asyncio task that enters it: see
    `using`.

    It works in inference, and in training, where each adapter learns from its rows. It supports
    Linear, Embedding, convolutions, attention and recurrent layers. The rows must lie along
    dimension 0 of their inputs, or along dimension 1 in attention and recurrent layers without
    `batch_first`.

    Args:
        model: a module with adapters.
        ids: for each row the index of its adapter in `names`, or −1 for none: a vector of integers
            (n,), or a list, which may also contain names and None. An input may also have each row
            k times side by side, n·k rows, as `generate` with beams.
        names: the adapters; by default all, in attaching order.

    Raises:
        AdapterNameError: there is no adapter of that name.
        StateError: an adapter of the model is merged, named or not, so all rows would get it; or a
            module's own forward reads the adapted tensor, so all rows would get the same one.
        ValueError: ids is not a vector of integers from −1 to the number of adapters less 1; or,
            in the forward, an input has another number of rows.

    >>> import paramlora as pl
    >>> model = nn.Linear(4, 3)
    >>> _ = pl.attach(model, pl.LoRA(rank=2), "weight", name="spam")
    >>> with pl.routed(model, ["spam", None]):
    ...     model(torch.ones(2, 4)).shape
    torch.Size([2, 3])

    Note [how rows are routed]
        The block gives every stack of a named adapter the same `Route`. Three kinds of code
        then handle it. The forward of a Linear, Conv1D or Embedding asks its stack for the route
        and computes all rows at once (routing/rows.py). Every other layer with an adapted forward
        runs once for each adapter, on the rows of that adapter. And code that reads `layer.weight`
        itself gets a `RoutedTensor`, which knows dtype and shape and raises a StateError if it is
        used for more (routing/routed_tensor.py).

        Attention needs two special cases, both of which a `RoutedTensor` covers. A
        MultiheadAttention whose `out_proj` alone is adapted is not a host itself, so its own
        forward reads `out_proj.weight`. And torch's fused encoder layer reads the weights of its
        modules without calling them; it leaves the fused path by itself.

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
    with opened("routed", changes):
        yield


def _checked_ids(ids: Tensor | Sequence[int | str | None], names: Sequence[str]) -> Tensor:
    """Return ids as a new int64 tensor (n,), or raise a ValueError."""
    if isinstance(ids, list | tuple):
        ids = [_index(given, names) for given in ids]
    given = torch.as_tensor(ids) if len(ids) else torch.empty(0, dtype=torch.int64)
    if given.dim() != 1 or given.is_floating_point() or given.dtype == torch.bool:
        raise ValueError(
            "ids must be a vector of integers, one for each row, or a list of integers, names and "
            f"None; got {given.dtype} of shape {tuple(given.shape)}"
        )
    wrong = given[(given < -1) | (given >= len(names))]
    if len(wrong):
        listed = ", ".join(f"{i} = {name!r}" for i, name in enumerate(names))
        raise ValueError(f"ids may be −1 (none), {listed}; got {int(wrong[0])}")
    return given.to(torch.int64, copy=True)


def _index(given: Any, names: Sequence[str]) -> Any:
    """Return the index of a name, −1 for None, and anything else as it is."""
    if given is None:
        return -1
    if not isinstance(given, str):
        return given
    if given not in names:
        listed = ", ".join(map(repr, names))
        raise AdapterNameError(
            f"ids name the adapter {given!r}, and rows are routed to {listed}"
            f"{nearest(given, names)}"
        )
    return names.index(given)


def _check_hosts(sites: Sequence[Site]) -> None:
    """Raise a StateError if a module reads its tensor in a forward that cannot be split."""
    for site in sites:
        cls = type(site.module).__bases__[0]
        if packed_tensor(site.module) is None and forward_for(cls, alone=False) is None:
            raise StateError(
                f"cannot route {site.path!r}: {cls.__name__} reads it in its own forward, where "
                "all rows get the same tensor; detach that adapter, or name= another for that site"
            )
