"""The checks of `audit`, on the gradients of one step."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from ..kinds.spec import factor_dtype
from ..layers.host import froze_base
from ..site.find import base_weight, dotted
from ..site.quantized import UnreadWeight
from ..site.survey import Part, Survey

# The share of the elements of an update that merging has to round away to be reported.
_MOST = 0.5


@dataclass(frozen=True)
class Finding:
    """One fault at one site.

    Attributes:
        kind: "gradient", "update", "base", "rounding", "statistics" or "optimizer".
        site: the path of the tensor, or of the module whose buffers are meant.
        name: the adapter; "" for the base.
        message: what is wrong, and what to do.

    >>> import paramlora as pl
    >>> model = nn.Sequential(nn.Linear(4, 3))
    >>> _ = pl.attach(model, pl.LoRA(rank=2))
    >>> model[0].bias.requires_grad_(True)[:0]
    tensor([], grad_fn=<SliceBackward0>)
    >>> [(one.kind, one.site) for one in pl.audit(model, torch.randn(8, 4))]
    [('base', '0.bias')]
    """

    kind: str
    site: str
    name: str
    message: str


class AuditedPart(Part):
    """The factors of one adapter at one tensor or block, with the states that the checks read."""

    @property
    def active(self) -> bool:
        return self.name in self.site.stack.seen().active

    @property
    def merged(self) -> bool:
        return self.name in self.site.stack.merged

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        return {key: p for key, p in self.factors.named_parameters() if p.requires_grad}


@dataclass
class Step:
    """A model, and what one step on it has shown.

    Attributes:
        survey: the model.
        gradients: by the id of the parameter.
        written: the path, module and name of each floating tensor that the forward wrote to.
    """

    survey: Survey
    gradients: dict[int, Tensor]
    written: list[tuple[str, nn.Module, str]]

    @cached_property
    def parts(self) -> list[AuditedPart]:
        return [AuditedPart(*part) for part in self.survey.parts()]

    def zero(self, part: AuditedPart) -> bool:
        """Return whether every trained factor has a gradient, and all are zero."""
        found = [self.gradients.get(id(p)) for p in part.trained.values()]
        return all(gradient is not None and not gradient.any() for gradient in found)


def check_adapters(step: Step) -> Iterator[Finding]:
    """Yield what is wrong with the gradients and the updates of adapters."""
    nothing_trains = not any(part.active and part.trained for part in step.parts)
    for part in step.parts:
        if part.active or part.merged:
            found = list(_check_update(step, part))
            yield from found
            yield from _check_gradient(step, part, [one.kind for one in found])
        elif part.trained and nothing_trains:
            message = "its factors are to be trained, but it is switched off; enable it"
            yield Finding("gradient", part.path, part.name, message)


def _check_update(step: Step, part: AuditedPart) -> Iterator[Finding]:
    weight = base_weight(part.site.plist, part.site.stack).detach()
    if isinstance(weight, UnreadWeight):
        weight = torch.zeros(weight.shape, device=weight.device)
    strength = part.factors.at(part.site.stack.seen().strengths.get(part.name))  # type: ignore[union-attr]
    with torch.no_grad():
        wide = weight.to(factor_dtype(weight))
        update = part.factors(wide, strength) - wide
    if not update.any():
        # A new adapter has a zero update too, but a gradient.
        if not part.trained or step.zero(part):
            at = f" (its strength is {float(strength):g})" if float(strength) == 0 else ""
            learns = ", and so is its gradient" if part.trained else ""
            message = f"its update is exactly zero{at}{learns}; it changes nothing"
            yield Finding("update", part.path, part.name, message)
    elif weight.dtype != wide.dtype:
        changed = update != 0
        gone = changed & ((wide + update).to(weight.dtype) == weight)
        if int(gone.sum()) >= _MOST * int(changed.sum()):
            dtype = str(weight.dtype).removeprefix("torch.")
            message = (
                f"merging rounds away most of its update, because the base is in {dtype}; leave it "
                "unmerged, or convert the base to float32 first"
            )
            yield Finding("rounding", part.path, part.name, message)


def _check_gradient(step: Step, part: AuditedPart, known: list[str]) -> Iterator[Finding]:
    trained = part.trained
    found = {key: step.gradients.get(id(p)) for key, p in trained.items()}
    without = [key for key, gradient in found.items() if gradient is None]
    infinite = [key for key, g in found.items() if g is not None and not g.isfinite().all()]
    message = ""
    if part.merged and trained:
        message = "it is merged, so its factors get no gradient; unmerge it, or freeze it"
    elif without and len(without) == len(trained):
        message = "its factors get no gradient from this batch"
    elif without:
        message = f"no gradient from this batch in {', '.join(without)}"
    elif infinite:
        message = f"the gradient is not finite in {', '.join(infinite)}"
    elif trained and step.zero(part) and "update" not in known:
        message = "the gradient from this batch is zero"
    if message:
        yield Finding("gradient", part.path, part.name, message)


def check_base(step: Step, optimizer: torch.optim.Optimizer | None) -> Iterator[Finding]:
    """Yield the parameters and buffers of a frozen base that move."""
    if froze_base(step.survey):
        for place in step.survey.places:
            if place.stored.requires_grad and id(place.stored) in step.gradients:
                message = (
                    "it is trained, although attach froze the base. No adapter's file contains "
                    "it. Freeze it, or attach a Delta to it"
                )
                yield Finding("base", place.path, "", message)
    held = _held(optimizer)
    for place in step.survey.places:
        stored = place.stored
        if id(stored) in held and not stored.requires_grad and stored.grad is not None:
            message = (
                "it is frozen, but has a gradient from before, with which the optimizer moves it; "
                "set .grad to None"
            )
            yield Finding("base", place.path, "", message)
    yield from _check_statistics(step)


def _check_statistics(step: Step) -> Iterator[Finding]:
    if all(p.requires_grad for p in step.survey.base_parameters):
        return
    trained = {id(place.module) for place in step.survey.places if place.stored.requires_grad}
    names: dict[str, list[str]] = {}
    for path, module, name in step.written:
        if name in module._buffers and id(module) not in trained:
            names.setdefault(path, []).append(name)
        elif name not in module._buffers:
            message = "the forward renormalises it (max_norm), so the base moves"
            yield Finding("base", dotted(path, name), "", message)
    for path, written in names.items():
        message = (
            f"the forward writes to {', '.join(written)}, which belong to the frozen base; pass "
            "hold_statistics=True to attach, or put the module in evaluation mode"
        )
        yield Finding("statistics", path, "", message)


def check_optimizer(step: Step, optimizer: torch.optim.Optimizer) -> Iterator[Finding]:
    """Yield the active adapters whose trained factors the optimizer does not hold."""
    held = _held(optimizer)
    for part in step.parts:
        missing = [key for key, p in part.trained.items() if id(p) not in held]
        if missing and part.active:
            message = (
                f"the optimizer does not hold {', '.join(missing)}; make it after attach, from "
                "parameters(model)"
            )
            yield Finding("optimizer", part.path, part.name, message)


def _held(optimizer: torch.optim.Optimizer | None) -> set[int]:
    groups = [] if optimizer is None else optimizer.param_groups
    return {id(p) for group in groups for p in group["params"]}
