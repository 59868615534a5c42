"""From an adapter to what a folder of PEFT's says, or why PEFT cannot say it."""

from collections.abc import Iterable, Mapping
from math import sqrt
from typing import Any

from torch import Tensor, nn

from ..errors import TargetError
from ..kinds.delta import Delta
from ..kinds.dora import DoRA
from ..kinds.lora import LoRA
from ..kinds.spec import LowRank
from ..site.factors import Blocks, Factors
from ..site.find import Site, below, is_conv1d
from ..site.names import sites_of
from ..site.place import places
from .config_file import Targets, written
from .layout import Part, norms, refuse
from .modules import parts, shared
from .write_full import full_key, saved, split


def exported(model: nn.Module, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the settings and the tensors, by keys without PEFT's prefix, of an adapter.

    Raises:
        TargetError: what PEFT cannot say, by the tensor's path.
    """
    here = {site.path: site for site in sites_of(model, name)}
    _check_sites(model, here.values(), name)
    full = {path: site for path, site in here.items() if _is_full(site, name)}
    low = {path: site for path, site in here.items() if path not in full}
    by_module = parts(model)
    targets, tensors, settings = _low_rank(model, by_module, low, name)
    values = {path: _value(site, name) for path, site in full.items()}
    biases, modules = split(full)
    wrapped = {part.wrapped for path in targets for part in by_module[path]}
    tensors |= {full_key(path, wrapped): values[path] for path in biases}
    if biases:
        only = all(path.removesuffix(".bias") in wrapped for path in biases)
        settings["bias"] = "lora_only" if only else "all"
    config = written(targets, modules_to_save=modules, **settings)
    return config, tensors | saved(model, config, targets, values)


def _check_sites(model: nn.Module, here: Iterable[Site], name: str) -> None:
    """Raise a TargetError where PEFT, which wraps modules, does not get to a tensor as we do."""
    others = shared(model)
    for site in here:
        if site.path in others:
            also = " and ".join(others[site.path])
            raise refuse(site.path, f"it is {also} as well, PEFT adapts one alone")
        if isinstance(site.stack[name], Blocks):
            raise refuse(site.path, "it is one of blocks of the tensor")
        if list(site.plist)[-1] is not site.stack:
            raise refuse(site.path, "another parametrization is on top of the adapter")


def _is_full(site: Site, name: str) -> bool:
    if not isinstance(site.stack.parts(name)[0].spec, Delta):
        return False
    if len(site.plist) > 1:
        raise refuse(site.path, "it is parametrized, so there is no such tensor in PEFT's model")
    return True


def _value(site: Site, name: str) -> Tensor:
    return site.stack[name](below(site.plist, site.stack)).detach()


def _low_rank(
    model: nn.Module, by_module: Mapping[str, list[Part]], low: Mapping[str, Site], name: str
) -> tuple[Targets, dict[str, Tensor], dict[str, Any]]:
    """Return PEFT's rank and alpha by module, its tensors, and what else its settings say."""
    if not low:
        raise TargetError(f"adapter {name!r} has no low-rank update, and PEFT's LoRA needs one")
    by_site = {part.site: part for its_parts in by_module.values() for part in its_parts}
    specs = [site.stack.parts(name)[0].spec for site in low.values()]
    rslora = all(isinstance(spec, LoRA | DoRA) and spec.rank_stabilized for spec in specs)
    targets: Targets = {}
    tensors: dict[str, Tensor] = {}
    for path, site in low.items():
        part, update = _expressible(by_site.get(path), site, name)
        (factors,), weight = site.stack.parts(name), below(site.plist, site.stack)
        tensors |= part.to_peft(weight, update.A, update.B)
        if isinstance(factors.spec, DoRA):
            tensors |= _magnitude(part, weight, factors)
        rank = update.A.shape[0] * part.groups
        setting = (rank, _alpha(factors, update, rank, rslora))
        if targets.setdefault(part.module_path, setting) != setting:
            raise refuse(path, "PEFT has one rank and one scale for both projections there")
    adapted = [part for path in targets for part in by_module[path]]
    for part in adapted:
        if part.site not in low:  # PEFT adapts both projections of a MultiheadAttention
            # Past a parametrization of another adapter's.
            weight = next(place.value for place in places(model) if place.path == part.site)
            rank, _ = targets[part.module_path]
            shapes = part.shapes(weight, rank)
            tensors |= {key: weight.new_zeros(shape) for key, shape in shapes.items()}
    transposed = all(is_conv1d(part.module) for part in adapted)
    dora = _is_dora(low, name)
    settings = {"use_rslora": rslora, "use_dora": dora, "fan_in_fan_out": transposed}
    return targets, tensors, settings


def _is_dora(low: Mapping[str, Site], name: str) -> bool:
    """Return whether an adapter is a DoRA at all its sites; one that is at some is refused."""
    found = {path: isinstance(site.stack.parts(name)[0].spec, DoRA) for path, site in low.items()}
    if len(set(found.values())) > 1:
        path = next(path for path, dora in found.items() if dora)
        raise refuse(path, "it is a DoRA, and PEFT has those at all sites or at none")
    return all(found.values())


def _magnitude(part: Part, weight: Tensor, factors: Factors) -> dict[str, Tensor]:
    """Return a DoRA's magnitudes, ‖W‖ + λ·d, by key."""
    d = factors.get_parameter("d")
    magnitude = norms(weight.to(d.dtype), part.dim) + float(factors.strength) * d
    return {part.magnitude: magnitude.view(part.magnitude_shape(weight))}


def _expressible(part: Part | None, site: Site, name: str) -> tuple[Part, LowRank]:
    (factors,) = site.stack.parts(name)
    spec, update = factors.spec, factors.low_rank()
    if isinstance(spec, DoRA):
        update = LowRank(factors.tensors["A"], factors.tensors["B"], factors.scale)
    if part is None:
        raise refuse(
            site.path,
            "PEFT adapts the weights of Linear, Conv1d, Conv2d, Conv3d, Embedding and Conv1D below "
            "the model itself, and the projections of MultiheadAttention",
        )
    reason = part.refusal(isinstance(spec, DoRA))
    if update is None:
        reason = f"{type(spec).__name__} is no low-rank update of it"
    if isinstance(spec, DoRA) and spec.dim != part.dim:
        reason = f"PEFT has a DoRA's magnitudes along dimension {part.dim} there, not {spec.dim}"
    if reason is not None or update is None:
        raise refuse(site.path, str(reason))
    return part, update


def _alpha(factors: Factors, update: LowRank, rank: int, rslora: bool) -> float:
    """Return the alpha that gives the update its scale at PEFT's rank, strength included."""
    spec = factors.spec
    if not isinstance(spec, LoRA | DoRA) or spec.rank != update.A.shape[0]:
        return float(update.scale) * (sqrt(rank) if rslora else rank)
    # From the alpha that the user wrote: alpha/r times r need not be alpha.
    alpha = (spec.rank if spec.alpha is None else spec.alpha) * float(factors.strength)
    growth = rank // spec.rank
    if rslora:
        return alpha * sqrt(growth)
    return alpha * growth * (sqrt(spec.rank) if spec.rank_stabilized else 1)
