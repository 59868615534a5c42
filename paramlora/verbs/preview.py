"""The summary of an `attach` that is only planned, and the tensors that it leaves out."""

import dataclasses
from collections.abc import Iterator

import torch

from ..kinds.spec import Spec
from ..layers.statistics import is_held, with_statistics
from ..site.find import Site, parametrization_lists
from ..site.place import Place
from ..site.survey import Part, Survey
from ..stack.block import split
from ..stack.factors import Factors
from ..stack.stack import Stack
from ..targets.targets import Resolved
from .summary import SiteSummary, Skipped, Summary, report, row, skip


def left_out(survey: Survey, resolved: Resolved, freeze: bool) -> Iterator[Skipped]:
    """Yield the tensors that do not get the adapter, in model order."""
    taken = {id(place.stored) for place, _ in resolved.found}
    for place in survey.places:
        if id(place.stored) not in taken:
            _, reason = resolved.left_out.get(place.path, (place, "matching no target"))
            yield skip(place, reason, place.stored.requires_grad and not freeze)
    for place, reason in resolved.left_out.values():
        if id(place.stored) in taken:
            yield skip(place, reason, place.stored.requires_grad and not freeze)


def preview(
    survey: Survey,
    resolved: Resolved,
    name: str,
    activate: str,
    freeze: bool,
    hold_statistics: bool,
) -> Summary:
    """Return the summary that a model would have after `attach`; the model is not changed."""
    now, order = _switched(report(survey), activate, freeze), _order(survey)
    rows = [(order[r.site if r.site in order else split(r.site)[0]], r) for r in now.sites]
    with torch.random.fork_rng(devices=[]):
        for place, spec in resolved.found:
            tied = tuple(other.path for other in survey.holders[id(place.stored)])
            new = dataclasses.replace(_new(place, spec, name, tied), active=activate != "no")
            rows.append((order[tied[0]], new))
    sites = tuple(row for _, row in sorted(rows, key=lambda pair: pair[0]))
    trained = sum(row.parameters for row in sites if row.adapter == name)
    others = survey.factors if not freeze or activate == "no" else []
    still = [*others, *(() if freeze else survey.base_parameters)]
    trained += sum(p.numel() for p in still if p.requires_grad)
    norms = with_statistics(survey.modules)
    held = tuple(path for path, module in norms if hold_statistics or is_held(module))
    moving = tuple(path for path, _ in norms if path not in held)
    active = (*now.active, *(() if activate == "no" else (name,)))
    return dataclasses.replace(
        now, sites=sites, trainable=trained, held=held, moving=moving, active=active
    )


def _switched(now: Summary, activate: str, freeze: bool) -> Summary:
    """Return the summary of a model whose adapters another one is about to switch off or freeze."""
    only, frozen = activate == "only", freeze and activate != "no"
    rows = [
        dataclasses.replace(r, active=r.active and not only, trainable=r.trainable and not frozen)
        for r in now.sites
    ]
    active, off = ((), now.active) if only else (now.active, ())
    return dataclasses.replace(now, sites=tuple(rows), active=active, switched_off=off)


def _new(place: Place, spec: Spec, name: str, tied: tuple[str, ...]) -> SiteSummary:
    """Return the row of a new adapter, from factors on the meta device; `tied` has its paths."""
    factors = Factors(spec, spec.create(place.value.detach().to("meta")), place.block)
    stack = Stack()
    stack.tied = tied if len(tied) > 1 else ()
    site = Site(tied[0], place.module, place.tensor, stack)
    return row(Part(f"{tied[0]}{place.block or ''}", name, site, factors), seen=False)


def _order(survey: Survey) -> dict[str, int]:
    """Return each tensor's position in a summary: within a module, parametrized ones first."""
    index = {id(module): i for i, (_, module) in enumerate(survey.modules)}

    def position(place: Place) -> tuple[int, bool]:
        return index[id(place.module)], place.tensor not in parametrization_lists(place.module)

    return {place.path: i for i, place in enumerate(sorted(survey.places, key=position))}
