"""What attaching would make of a model, and what it leaves out; nothing is changed here."""

import dataclasses
from collections.abc import Iterator

import torch
from torch import nn

from ..kinds.spec import Spec
from ..layers.statistics import is_held, with_statistics
from ..site.block import split
from ..site.factors import Factors
from ..site.find import first_sites, lists, walk
from ..site.place import Place, holders, places
from ..site.stack import Stack
from .summary import SiteSummary, Skipped, Summary, row, skip, summary
from .targets import Resolved


def left_out(model: nn.Module, resolved: Resolved, freeze: bool) -> Iterator[Skipped]:
    """Yield what does not get the adapter, in model order, and whether it is trained then."""
    taken = {id(place.stored) for place, _ in resolved.found}
    for place in places(model):
        if id(place.stored) not in taken:
            _, reason = resolved.left_out.get(place.path, (place, "matching no target"))
            yield skip(place, reason, place.stored.requires_grad and not freeze)
    for place, reason in resolved.left_out.values():
        if id(place.stored) in taken:
            yield skip(place, reason, place.stored.requires_grad and not freeze)


def preview(
    model: nn.Module, resolved: Resolved, name: str, freeze: bool, hold_statistics: bool
) -> Summary:
    """Return the summary of what `attach` would make of a model."""
    now, order = summary(model), _order(model)
    rows = [(order[r.site if r.site in order else split(r.site)[0]], r) for r in now.sites]
    known = holders(model)
    with torch.random.fork_rng(devices=[]):
        for place, spec in resolved.found:
            tied = tuple(other.path for other in known[id(place.stored)])
            rows.append((order[tied[0]], _new(place, spec, name, tied)))
    sites = tuple(row for _, row in sorted(rows, key=lambda pair: pair[0]))
    factors = {id(p) for site in first_sites(model) for p in site.stack.parameters()}
    trained = sum(row.parameters for row in sites if row.adapter == name)
    for p in model.parameters():
        if p.requires_grad and (id(p) in factors or not freeze):
            trained += p.numel()
    norms = with_statistics(model)
    held = tuple(path for path, module in norms if hold_statistics or is_held(module))
    moving = tuple(path for path, _ in norms if path not in held)
    return dataclasses.replace(now, sites=sites, trainable=trained, held=held, moving=moving)


def _new(place: Place, spec: Spec, name: str, tied: tuple[str, ...]) -> SiteSummary:
    """Return the row of a new adapter, from factors without values; `tied` has all its paths."""
    factors = Factors(spec, spec.create(place.value.detach().to("meta")), place.block)
    stack = Stack()
    stack.tied = tied if len(tied) > 1 else ()
    return row(f"{tied[0]}{place.block or ''}", name, factors, stack, place.whole, seen=False)


def _order(model: nn.Module) -> dict[str, int]:
    """Return where each tensor comes in a summary: within a module, parametrized ones first."""
    modules = {id(module): i for i, (_, module) in enumerate(walk(model))}
    tensors = [(modules[id(p.module)], p.tensor not in lists(p.module), p) for p in places(model)]
    tensors.sort(key=lambda entry: entry[:2])
    return {place.path: i for i, (*_, place) in enumerate(tensors)}
