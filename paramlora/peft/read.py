"""From what a folder of PEFT's says to the factors that a model gets, everything checked."""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, nearest
from ..files.compare import compare
from ..files.plan import check_site, planned_site
from ..kinds.dora import DoRA
from ..kinds.lora import LoRA
from ..kinds.spec import factor_dtype
from ..layers.install import Planned
from ..site.find import walk
from ..site.place import Place, places
from .config import Config
from .layout import FACTOR, Part, norms
from .modules import is_linear, names, parts, shared
from .read_full import full


def planned(
    model: nn.Module, config: Config, state: Mapping[str, Tensor], path: Path
) -> list[Planned]:
    """Return what a folder wants to attach, in the model's order.

    Args:
        state: the folder's tensors, by keys without PEFT's prefix.
        path: the folder, for messages.

    Raises:
        CheckpointError: something does not fit the model, or PEFT would compute something else.
    """
    for key, tensor in state.items():
        if not tensor.is_floating_point() and FACTOR.fullmatch(key):
            raise CheckpointError(f"{path} is damaged: {key} has dtype {tensor.dtype}")
    try:
        config = resolved(model, config)
        found = _low_rank(model, config, state, path) + full(model, config, state, path)
    except re.error as error:
        raise CheckpointError(f"{path} has a setting that is no regular expression: {error}") from (
            error
        )
    order = {place.path: i for i, place in enumerate(places(model))}
    _check_sides(model, [plan.place for plan in found], path)
    return sorted(found, key=lambda plan: order[plan.place.path])


def resolved(model: nn.Module, config: Config) -> Config:
    """Return the settings with "all-linear" spelt out: every linear layer but the output's."""
    modules = config.target_modules
    if not isinstance(modules, str) or modules.lower() != "all-linear":
        return config
    outputs = getattr(model, "get_output_embeddings", lambda: None)()
    linear = [path for path, module in walk(model) if is_linear(module) and module is not outputs]
    # By regular expression: a list would match the ends of other names as well.
    expression = "|".join(re.escape(path) for path in linear if path)
    return dataclasses.replace(config, target_modules=expression)


def _low_rank(
    model: nn.Module, config: Config, state: Mapping[str, Tensor], path: Path
) -> list[Planned]:
    """Return the planned low-rank updates."""
    adaptable, everywhere = parts(model), names(model)
    here = {place.path: place for place in places(model)}
    targets = [name for name in everywhere if config.targets(name)]
    if not targets:
        wanted = config.target_modules
        first = wanted if isinstance(wanted, str) else next(iter(wanted), "")
        raise CheckpointError(
            f"{path} belongs to another model: no module here is meant by target_modules "
            f"{wanted!r}{nearest(first, everywhere)}"
        )
    absent = [name for name in targets if name not in adaptable]
    if absent:
        raise CheckpointError(
            f"{path} does not fit this model: its target_modules mean {', '.join(absent[:3])}, "
            "which PEFT cannot adapt with any effect"
        )
    expected: dict[str, Tensor] = {}
    for part in (part for name in targets for part in adaptable[name]):
        _check_part(part, here, config, path)
        weight = here[part.site].value
        shapes = part.shapes(weight, config.rank(part.module_path))
        if config.use_dora:
            shapes[part.magnitude] = part.magnitude_shape(weight)
        expected |= {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    factors = {key: tensor for key, tensor in state.items() if FACTOR.fullmatch(key)}
    compare(factors, expected, str(path))
    return [
        _factors(part, config, state, here[part.site], path)
        for name in targets
        for part in adaptable[name]
        # What fills the place of a projection that has no adapter, and can never train.
        if len(adaptable[name]) == 1 or state[part.A].any() or state[part.B].any()
    ]


def _check_part(part: Part, here: Mapping[str, Place], config: Config, path: Path) -> None:
    reason, rank = part.refusal(config.use_dora), config.rank(part.module_path)
    if part.site not in here:
        reason = f"it has no parameter {part.tensor!r}"
    elif config.init != "kaiming" and (config.use_dora or not isinstance(part.module, nn.Linear)):
        reason = f"its start, {config.init!r}, is carried out for LoRA of a Linear alone"
    elif rank % part.groups:
        reason = f"its {part.groups} groups do not divide the rank, {rank}"
    if reason is not None:
        raise CheckpointError(f"{path} adapts {part.module_path!r}, and {reason}")


def _factors(
    part: Part, config: Config, state: Mapping[str, Tensor], place: Place, path: Path
) -> Planned:
    pair = part.from_peft(state[part.A], state[part.B])
    if pair is None:
        raise CheckpointError(
            f"{path} has an update at {part.module_path!r} that mixes the groups of the "
            "convolution, as PEFT trains it; no weight of a grouped convolution can hold it"
        )
    rank, alpha = config.rank(part.module_path), config.alpha(part.module_path)
    ours = pair[0].shape[0]
    if ours != rank:  # so that alpha/r, or alpha/√r, stays what it is
        alpha *= (ours / rank) ** 0.5 if config.use_rslora else ours / rank
    tensors = dict(zip("AB", pair, strict=True))
    weight = place.value.detach()
    if not config.use_dora:
        lora = _lora(ours, alpha, config, part, path)
        check_site(place, lora, path)
        # What PEFT takes out of the base when it loads is computed from that, as at the start.
        start = lora.create(weight) if lora.constants else {}
        return planned_site(place, lora, start | tensors, path)
    magnitude = state[part.magnitude].flatten().to(weight.device, factor_dtype(weight))
    tensors["d"] = magnitude - norms(weight, part.dim)
    spec = DoRA(ours, alpha, rank_stabilized=config.use_rslora, dim=part.dim)
    return planned_site(place, spec, tensors, path)


def _lora(rank: int, alpha: float, config: Config, part: Part, path: Path) -> LoRA:
    try:
        return LoRA(rank, alpha, init=config.init, rank_stabilized=config.use_rslora)
    except ValueError as error:
        raise CheckpointError(f"{path} adapts {part.module_path!r}, and {error}") from error


def _check_sides(model: nn.Module, chosen: Iterable[Place], path: Path) -> None:
    """Raise a CheckpointError where PEFT adapts one of several places that share a tensor."""
    others = shared(model)
    for place in chosen:
        if place.path in others:
            raise CheckpointError(
                f"{path} adapts {place.path!r}, which is {' and '.join(others[place.path])} as "
                "well; PEFT adapts one of them alone, and here they stay one"
            )
