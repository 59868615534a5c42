"""The checks of `audit`, on the gradients of one step."""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..kinds.spec import Strength, factor_dtype
from ..layers.host import froze_base
from ..site.find import base_weight, dotted
from ..site.quantized import UnreadWeight
from ..site.survey import Part, Survey
from .summary import gradient_of

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


@dataclass
class Step:
    """A model, and what one step on it has shown.

    Attributes:
        survey: the model.
        gradients: by the id of the parameter.
        written: the path, module and name of each floating tensor that the forward wrote to.
        held: the ids of the parameters that the optimizer holds; None without an optimizer.
    """

    survey: Survey
    gradients: dict[int, Tensor]
    written: list[tuple[str, nn.Module, str]]
    held: set[int] | None


def findings(step: Step) -> Iterator[Finding]:
    """Yield what is wrong with adapters, and then with the base."""
    parts = step.survey.parts()
    nothing_trains = not any(_active(part) and _trained(part) for part in parts)
    for part in parts:
        for kind, message in _faults(step, part, nothing_trains):
            yield Finding(kind, part.path, part.name, message)
    for check in (_moved, _written):
        for kind, path, message in check(step):
            yield Finding(kind, path, "", message)


def _faults(step: Step, part: Part, nothing_trains: bool) -> Iterator[tuple[str, str]]:
    """Yield the kind and the message of each fault of an adapter at one tensor."""
    trained, active, merged = _trained(part), _active(part), part.name in part.site.stack.merged
    gradients = {key: step.gradients.get(id(p)) for key, p in trained.items()}
    if active or merged:
        found = dict(_of_update(part, gradients))
        yield from found.items()
        message = _of_gradients(gradients, merged)
        if message and (merged or "update" not in found):
            yield "gradient", message
    elif gradients and nothing_trains:
        yield "gradient", "its factors are to be trained, but it is switched off; enable it"
    if step.held is not None and active:
        missing = [key for key, p in trained.items() if id(p) not in step.held]
        if missing:
            yield (
                "optimizer",
                f"the optimizer does not hold {', '.join(missing)}; make it after attach, from "
                "parameters(model)",
            )


def _of_update(part: Part, gradients: Mapping[str, Tensor | None]) -> Iterator[tuple[str, str]]:
    weight, update = _update(part)
    if update.any():
        if _is_rounded_away(weight, update):
            dtype = str(weight.dtype).removeprefix("torch.")
            yield (
                "rounding",
                f"merging rounds away most of its update, because the base is in {dtype}; leave it "
                "unmerged, or convert the base to float32 first",
            )
    # A new adapter has a zero update too, but a gradient.
    elif all(gradient is not None and not gradient.any() for gradient in gradients.values()):
        strength = float(_strength(part))
        at = f" (its strength is {strength:g})" if strength == 0 else ""
        learns = ", and so is its gradient" if gradients else ""
        yield "update", f"its update is exactly zero{at}{learns}; it changes nothing"


def _active(part: Part) -> bool:
    return part.name in part.site.stack.seen().active


def _trained(part: Part) -> dict[str, nn.Parameter]:
    return {key: p for key, p in part.factors.named_parameters() if p.requires_grad}


def _strength(part: Part) -> Strength:
    return part.factors.at(part.site.stack.seen().strengths.get(part.name))  # type: ignore[union-attr]


@torch.no_grad()
def _update(part: Part) -> tuple[Tensor, Tensor]:
    """Return the base's weight, and the update of it; of a quantized layer, of zeros."""
    weight = base_weight(part.site.plist, part.site.stack).detach()
    if isinstance(weight, UnreadWeight):
        weight = torch.zeros(weight.shape, device=weight.device)
    wide = weight.to(factor_dtype(weight))
    # Factors in half precision would round the update themselves.
    factors = copy.deepcopy(part.factors).to(wide.dtype)
    return weight, factors(wide, _strength(part)) - wide


def _is_rounded_away(weight: Tensor, update: Tensor) -> bool:
    changed = update != 0
    gone = changed & ((weight + update).to(weight.dtype) == weight)
    return bool(gone.sum() >= _MOST * changed.sum())


def _of_gradients(gradients: Mapping[str, Tensor | None], merged: bool) -> str:
    """Return what is wrong with the gradients of the trained factors, or an empty string."""
    infinite = [key for key, g in gradients.items() if g is not None and not g.isfinite().all()]
    _, note = gradient_of(gradients)
    if merged and gradients:
        return "it is merged, so its factors get no gradient; unmerge it, or freeze it"
    if note:
        return f"{note}, with this batch"
    return f"the gradient is not finite in {', '.join(infinite)}" if infinite else ""


def _moved(step: Step) -> Iterator[tuple[str, str, str]]:
    """Yield the parameters of a frozen base that move: kind, path and message."""
    frozen, held = froze_base(step.survey), step.held or ()
    for place in step.survey.places:
        stored = place.stored
        if frozen and stored.requires_grad and id(stored) in step.gradients:
            message = (
                "it is trained, although attach froze the base. No adapter's file contains it. "
                "Freeze it, or attach a Delta to it"
            )
            yield "base", place.path, message
        if id(stored) in held and not stored.requires_grad and stored.grad is not None:
            message = (
                "it is frozen, but has a gradient from before, with which the optimizer moves it; "
                "set .grad to None"
            )
            yield "base", place.path, message


def _written(step: Step) -> Iterator[tuple[str, str, str]]:
    """Yield the tensors of a frozen base that the forward writes to: kind, path and message."""
    if all(p.requires_grad for p in step.survey.base_parameters):
        return
    trained = {id(place.module) for place in step.survey.places if place.stored.requires_grad}
    names: dict[str, list[str]] = {}
    for path, module, name in step.written:
        if name in module._buffers and id(module) not in trained:
            names.setdefault(path, []).append(name)
        elif name not in module._buffers:
            message = "the forward renormalises it (max_norm), so the base moves"
            yield "base", dotted(path, name), message
    for path, written in names.items():
        message = (
            f"the forward writes to {', '.join(written)}, which belong to the frozen base; pass "
            "hold_statistics=True to attach, or put the module in evaluation mode"
        )
        yield "statistics", path, message
