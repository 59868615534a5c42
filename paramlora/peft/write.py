"""Make the content of a PEFT folder from an adapter, or raise an error with the reason."""

import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from math import sqrt
from typing import NamedTuple

from torch import Tensor, nn

from ..errors import TargetError
from ..kinds.delta import Delta
from ..kinds.dora import DoRA
from ..kinds.lora import LoRA
from ..kinds.spec import LowRank, Spec
from ..layers.install import check_whole
from ..site.find import Site, base_weight, is_conv1d
from ..site.survey import Survey
from ..stack.factors import Blocks, Factors
from .config_file import Content, Targets, as_list, config_content
from .layout import Part, cannot_store, norms, peft_key
from .modules import PeftView
from .other_kinds import other_content, other_kind
from .parameters import check_raw, with_parameters
from .whole import bias_setting, saved_tensors, split


class _Update(NamedTuple):
    """A low-rank update of one tensor, and the objects for writing it in PEFT's format."""

    part: Part
    factors: Factors
    weight: Tensor  # the base's W
    term: LowRank  # A: (r, in), B: (out, r)

    @property
    def rank(self) -> int:
        """The rank R that PEFT counts: r·g in a grouped convolution."""
        return self.term.A.shape[-2] * self.part.groups


def folder_content(model: nn.Module, name: str | None) -> Content:
    """Return the settings of an adapter, and its tensors by keys without PEFT's prefix.

    Args:
        model: a module with adapters.
        name: the adapter; by default the only one.

    Raises:
        AdapterNameError: there is no adapter of this name; or none is named, and there are several.
        StateError: a tensor is sharded.
        TargetError: PEFT cannot express the adapter; the message names the tensor.
    """
    seen = PeftView(Survey(model))
    name = seen.survey.one(name)
    here = seen.survey.sites_of(name)
    check_whole(here)
    _check_sites(here, name, seen)
    layers = {part.site: part for parts in seen.parts.values() for part in parts}
    peft_type = other_kind(here, name)
    if peft_type is not None:
        return other_content(here, name, layers, peft_type)
    full = {site.path: site for site in here if _is_full(site, name)}
    low_rank = [site for site in here if site.path not in full]
    raw = {site.path for site in low_rank} - layers.keys()
    parts, depths = with_parameters(seen, layers.values(), raw)
    updates = _updates(low_rank, name, parts)
    rslora = _uses_rslora(updates)
    targets = _targets(updates, rslora)
    adapted = [part for part in parts if part.target in targets]
    check_raw(raw, adapted, seen)
    wrapped = Counter(part.owner_path for part in adapted)
    biases, modules = split(list(full))
    config = config_content(
        targets,
        target_parameters=sorted(raw),
        modules_to_save=modules,
        use_rslora=rslora,
        use_dora=_uses_dora(updates),
        lora_dropout=_dropout(updates),
        # It does not affect PEFT's results, but PEFT warns if it does not fit the modules.
        fan_in_fan_out=all(is_conv1d(part.module) for part in adapted),
        # PEFT to 0.21.2 fails at "lora_only" beside target_parameters.
        bias=bias_setting(biases, () if raw else wrapped),
    )
    config["target_modules"] = as_list(config["target_modules"], targets, seen.paths)
    # The tensors with this adapter alone: W + λ·D.
    values = {
        path: site.stack[name](base_weight(site.plist, site.stack)).detach()
        for path, site in full.items()
    }
    return config, {
        **_factors(updates, adapted, targets),
        **{peft_key(path, wrapped): values[path] for path in biases},
        **{peft_key(k, depths): t for k, t in saved_tensors(seen, config, targets, values).items()},
    }


def _check_sites(here: Iterable[Site], name: str, seen: PeftView) -> None:
    """Raise a TargetError if PEFT cannot adapt the same tensor, because PEFT wraps modules."""
    for site in here:
        if site.path in seen.tied:
            tied = " and ".join(seen.tied[site.path])
            raise cannot_store(site.path, f"it is tied to {tied}, and PEFT adapts only one of them")
        if isinstance(site.stack[name], Blocks):
            raise cannot_store(site.path, "it adapts blocks of the tensor")
        if list(site.plist)[-1] is not site.stack:
            raise cannot_store(site.path, "another parametrization comes after the adapter")


def _is_full(site: Site, name: str) -> bool:
    """Return whether an adapter is a Delta at a site, which PEFT saves as a whole tensor."""
    if not isinstance(site.stack.parts(name)[0].spec, Delta):
        return False
    if len(site.plist) > 1:
        raise cannot_store(site.path, "it is parametrized, so that PEFT's model does not store it")
    return True


def _updates(here: list[Site], name: str, parts: list[Part]) -> list[_Update]:
    if not here:
        raise TargetError(
            f"adapter {name!r} has no low-rank update, and a PEFT folder needs at least one"
        )
    by_site = {part.site: part for part in parts}
    updates = []
    for site in here:
        part = by_site[site.path]
        (factors,) = site.stack.parts(name)
        term = _term(factors, part)
        reason = _refusal(part, factors.spec, term)
        if term is None or reason is not None:
            raise cannot_store(site.path, reason or "")
        updates.append(_Update(part, factors, base_weight(site.plist, site.stack), term))
    return updates


def _term(factors: Factors, part: Part) -> LowRank | None:
    """Return the low-rank update that PEFT stores as A and B, or None without such an update."""
    spec = factors.spec
    if isinstance(spec, DoRA):
        # The update before the rescaling; the magnitudes are stored separately.
        return LowRank(factors.tensors["A"], factors.tensors["B"], factors.scale)
    if not part.as_matrices.get("batch_dims"):
        return factors.low_rank()
    if not isinstance(spec, LoRA) or spec.batch_dims != 1:
        return None
    return replace(spec, batch_dims=0).low_rank(factors.tensors, factors.strength)


def _refusal(part: Part, spec: Spec, term: LowRank | None) -> str | None:
    """Return why PEFT's LoRA cannot have an update, or None if it can."""
    kind = type(spec).__name__
    if kind in ("OFT", "HiRA", "MiSS"):
        return f"a folder with {kind} has that kind at all sites and no others"
    if term is None and part.as_matrices and kind == "LoRA":
        return "PEFT adapts each matrix of such a parameter by itself, as LoRA(batch_dims=1) does"
    if term is None:
        return f"{kind} is not a low-rank update of it"
    if isinstance(spec, DoRA) and spec.dim != part.output_dim:
        return (
            f"PEFT has the magnitudes of a DoRA along dimension {part.output_dim} there, not "
            f"{spec.dim}"
        )
    return part.refusal(isinstance(spec, DoRA))


def _uses_dora(updates: list[_Update]) -> bool:
    """Return whether an adapter is a DoRA at all sites. Raise if it is one at some sites only."""
    found = {update.part.site: isinstance(update.factors.spec, DoRA) for update in updates}
    if len(set(found.values())) > 1:
        path = next(path for path, is_dora in found.items() if is_dora)
        raise cannot_store(path, "it is a DoRA, which PEFT needs at all sites or at none")
    return all(found.values())


def _uses_rslora(updates: list[_Update]) -> bool:
    """Return whether all updates have the scale alpha/√r. Otherwise PEFT's alpha/r is used."""
    specs = [update.factors.spec for update in updates]
    return all(isinstance(spec, LoRA | DoRA) and spec.rank_stabilized for spec in specs)


def _dropout(updates: list[_Update]) -> float:
    """Return the dropout of all updates. PEFT has one for all modules, without effect in some."""
    acts = [update for update in updates if not isinstance(update.part.module, nn.Embedding)]
    found = {update.factors.spec.dropout for update in acts or updates}
    if len(found) == 1:
        return found.pop()
    warnings.warn(
        f"PEFT has one lora_dropout for all modules, and these have {sorted(found)}; it is left "
        "out of the folder, which matters only if PEFT trains the adapter further",
        UserWarning,
        stacklevel=4,
    )
    return 0.0


def _targets(updates: list[_Update], rslora: bool) -> Targets:
    """Return PEFT's rank and alpha of each module."""
    targets: Targets = {}
    for update in updates:
        found = (update.rank, _alpha(update, rslora))
        if targets.setdefault(update.part.target, found) != found:
            raise cannot_store(
                update.part.site, "PEFT has one rank and one scale for both projections"
            )
    return targets


def _alpha(update: _Update, rslora: bool) -> float:
    """Return the alpha with which PEFT's scale, alpha/R or alpha/√R, is λ·s.

    The usual case starts from the alpha that the user wrote, because a division and a product need
    not cancel: 1 / 49 * 49 is 0.9999999999999999. With R = r·g,

        s = alpha/r   gives  λ·s·R = λ·alpha·g
        s = alpha/√r  gives  λ·s·R = λ·alpha·g·√r,  and with rslora  λ·s·√R = λ·alpha·√g
    """
    spec, rank = update.factors.spec, update.rank
    if not isinstance(spec, LoRA | DoRA) or spec.rank != update.term.A.shape[-2]:
        return float(update.term.scale) * (sqrt(rank) if rslora else rank)
    alpha = (spec.rank if spec.alpha is None else spec.alpha) * float(update.factors.strength)
    if rslora:
        return alpha * sqrt(update.part.groups)
    return alpha * update.part.groups * (sqrt(spec.rank) if spec.rank_stabilized else 1)


def _factors(updates: list[_Update], adapted: list[Part], targets: Targets) -> dict[str, Tensor]:
    """Return PEFT's A and B, and the magnitudes of a DoRA, by key.

    PEFT adapts both projections of a MultiheadAttention, and refuses a folder that has the factors
    of only one. So a projection that the adapter does not update has zeros.
    """
    by_site = {update.part.site: update for update in updates}
    tensors: dict[str, Tensor] = {}
    for part in adapted:
        if part.site not in by_site:
            weight, (rank, _) = part.place.value, targets[part.target]
            shapes = part.shapes(weight, rank)
            tensors |= {key: weight.new_zeros(shape) for key, shape in shapes.items()}
            continue
        _, factors, weight, term = by_site[part.site]
        tensors |= part.to_peft(weight, term.A, term.B)
        if isinstance(factors.spec, DoRA):
            d = factors.get_parameter("d")
            # ‖W‖ + λ·d, the norm for each output
            magnitude = norms(weight.to(d.dtype), part.output_dim) + float(factors.strength) * d
            tensors[part.magnitude_key] = magnitude.view(part.magnitude_shape(weight))
    return tensors
