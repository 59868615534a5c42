"""The low-rank adapter that is closest to a full fine-tune.

W_tuned − W_base ≈ B A, of rank r, with the least Frobenius norm of what is lost
"""

import torch
from torch import Tensor, nn

from ..errors import StateError, TargetError
from ..kinds.delta import Delta
from ..kinds.lora import LoRA
from ..kinds.spec import Spec, factor_dtype
from ..layers.install import Planned, check_name, check_tied, install
from ..site.factors import Factors
from ..site.place import Place, check, check_shapes
from ..site.survey import Survey, names_of, places
from .combine import decomposed


@torch.no_grad()
def extract(
    model: nn.Module, base: nn.Module, rank: int = 8, *, name: str = "default"
) -> dict[str, float]:
    """Attach to `base` the best adapter of rank `rank` that makes it compute what `model` does.

    That is with this adapter alone: others on `base` that are switched on come on top.

    Each tensor of two or more dimensions that differs gets a `LoRA`, the truncated singular value
    decomposition of the difference (Eckart–Young: none of that rank is closer); any other gets a
    `Delta`, exact but for rounding. It is switched on, as `attach` does it.

    Args:
        model: the base after a full fine-tune; it stays as it is.
        base: the model before, of the same parameters.
        rank: r, at least 1; less where a matrix has fewer rows or columns.
        name: the adapter's name on `base`.

    Returns:
        What is lost, by tensor: ‖ΔW − BA‖ / ‖ΔW‖ in the Frobenius norm, 0 for a `Delta`. A buffer
        that differs cannot be adapted: it is there too, with 1.

    Raises:
        ValueError: a rank below 1.
        AdapterNameError: the name is taken, or cannot be one.
        StateError: `model` has adapters; bake or detach them first.
        TargetError: the models have other parameters, or other shapes, or differ in nothing; a
            tensor that differs cannot be adapted.

    >>> base, tuned = nn.Linear(4, 3), nn.Linear(4, 3)
    >>> lost = extract(tuned, base, rank=3)
    >>> torch.testing.assert_close(base.weight, tuned.weight)
    """
    spec = LoRA(rank)
    if names_of(model):
        raise StateError("the model to extract from has adapters; bake or detach them first")
    check_name(Survey(base), name)
    changes = _changes(model, base)
    lost = dict.fromkeys(_other_buffers(model, base), 1.0)
    planned = []
    for place, change in changes:
        its_spec, tensors, lost[place.path] = _approximated(change, spec)
        check(place, its_spec)
        planned.append(Planned(place, Factors(its_spec, tensors)))
    check_tied(Survey(base), [place for place, _ in changes])
    install(Survey(base), planned, name, freeze=True)
    return lost


def _approximated(change: Tensor, spec: LoRA) -> tuple[Spec, dict[str, Tensor], float]:
    """Return the spec and the factors for a change, and the share of it that is lost."""
    if change.dim() < 2:
        return Delta(), {"D": change}, 0.0
    A, B, values = decomposed(change.flatten(1), spec.rank)
    lost = values[spec.rank :].norm() / values.norm()
    return LoRA(A.shape[0]), {"A": A.contiguous(), "B": B.contiguous()}, float(lost)


def _changes(model: nn.Module, base: nn.Module) -> list[tuple[Place, Tensor]]:
    """Return the places of the base whose tensors differ, tied ones once, with the difference."""
    tuned = {place.path: place for place in places(model)}
    own = {place.path: place for place in places(base)}
    check_shapes([*tuned.values(), *own.values()])
    others = sorted(tuned.keys() ^ own.keys())
    others += [p for p in own.keys() & tuned.keys() if own[p].value.shape != tuned[p].value.shape]
    if others:
        raise TargetError(
            f"the models are no base and its fine-tune: {', '.join(others[:5])} is not in both, or "
            "of two shapes"
        )
    first: dict[int, Place] = {}
    found = []
    for path, place in own.items():
        W = place.value.detach()
        V = tuned[path].value.detach().to(W.device)
        same = first.setdefault(id(place.stored), place)
        if same is not place:
            if not torch.equal(tuned[same.path].value, V):
                raise TargetError(
                    f"{same.path!r} and {path!r} are tied in the base, and differ in the other"
                )
        elif not torch.equal(V, W):
            dtype = factor_dtype(W)
            found.append((place, V.to(dtype) - W.to(dtype)))
    if not found:
        raise TargetError("the models have the same parameters: there is nothing to extract")
    return found


def _other_buffers(model: nn.Module, base: nn.Module) -> list[str]:
    own = dict(base.named_buffers())
    return [
        path
        for path, buffer in model.named_buffers()
        if path in own and not torch.equal(buffer.to(own[path].device), own[path])
    ]
