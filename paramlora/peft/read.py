"""Check the content of a PEFT folder, and plan its factors at the places of a model.

Nothing here changes the model. `files/refresh.py` changes it after the whole plan is made.
"""

import dataclasses
import re
import warnings
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, nearest, some
from ..files.plan import check_dtypes, check_site, plan_site
from ..files.state import compare
from ..kinds.dora import DoRA
from ..kinds.lora import LoRA
from ..kinds.spec import factor_dtype
from ..layers.install import PlannedSite
from ..site.find import is_linear
from ..site.place import dropout_refusal
from .config import Config
from .layout import Part, is_factor, norms
from .modules import PeftView
from .parameters import Parameter, conflicts, parameters, selected, with_parameters
from .whole import Folder, plan_full


def plan_folder(folder: Folder) -> list[PlannedSite]:
    """Return the factors that a folder of LoRA has for a model.

    Raises:
        CheckpointError: the folder does not fit the model, or PEFT would compute something else.
        re.error: a setting is not a valid regular expression.
    """
    check_dtypes({key: t for key, t in folder.state.items() if is_factor(key)}, folder.path)
    planned = [*_plan_low_rank(folder), *plan_full(folder)]
    check_untied(planned, folder)
    _warn_of_dropout(planned, folder.config)
    return planned


def resolve_all_linear(seen: PeftView, config: Config) -> Config:
    """Return the settings with "all-linear" replaced by the paths of the linear layers.

    The output layer of a transformers model is not one of them, as in PEFT.
    """
    modules = config.target_modules
    if not isinstance(modules, str) or modules.lower() != "all-linear":
        return config
    output = getattr(seen.modules[""], "get_output_embeddings", lambda: None)()
    linear = [path for path in seen.paths if is_linear(seen.modules[path])]
    paths = [path for path in linear if seen.modules[path] is not output]
    # A regular expression, because a list would also select other paths that end with these.
    expression = "|".join(re.escape(path) for path in paths)
    return dataclasses.replace(config, target_modules=expression)


def _plan_low_rank(folder: Folder) -> list[PlannedSite]:
    config, state, targets = folder.config, folder.state, targets_of(folder)
    expected: dict[str, Tensor] = {}
    for part in targets:
        _check_part(part, folder)
        weight = folder.seen.places[part.site].value
        shapes = part.shapes(weight, config.rank(part.target))
        if config.use_dora:
            shapes[part.magnitude_key] = part.magnitude_shape(weight)
        expected |= {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    compare({key: state[key] for key in state if is_factor(key)}, expected, str(folder.path))
    return [_plan_part(part, folder) for part in targets if not _is_placeholder(part, folder)]


def targets_of(folder: Folder) -> list[Part]:
    """Return the tensors that a folder adapts, in the model's order."""
    path, config, seen = folder.path, folder.config, folder.seen
    targets = [name for name in seen.paths if config.targets(name)]
    raw = selected(seen, config.target_parameters)
    if not targets and not raw:
        what = "module" if config.target_modules else "parameter"
        wanted = config.target_modules or config.target_parameters
        first = wanted if isinstance(wanted, str) else next(iter(wanted), "")
        paths = seen.paths if config.target_modules else [p.site for p in parameters(seen)]
        raise CheckpointError(
            f"{path} belongs to another model: no {what} here matches target_{what}s {wanted!r}"
            f"{nearest(first, paths)}"
        )
    absent = [name for name in targets if name not in seen.parts]
    if absent:
        raise CheckpointError(
            f"{path} does not fit this model: its target_modules match {', '.join(absent[:3])}, "
            "which PEFT cannot adapt, or adapts without effect"
        )
    modules = [part for name in targets for part in seen.parts[name]]
    found, _ = with_parameters(seen, modules, raw)
    for site, reason in conflicts(found):
        raise CheckpointError(f"{path} adapts {site!r}, but {reason}")
    return found


def _check_part(part: Part, folder: Folder) -> None:
    config = folder.config
    reason, rank = part.refusal(config.use_dora), config.rank(part.target)
    if part.site not in folder.seen.places:
        reason = f"it has no parameter {part.tensor!r}"
    elif config.init != "kaiming" and (
        config.use_dora or isinstance(part, Parameter) or not isinstance(part.module, nn.Linear)
    ):
        reason = f"init_lora_weights {config.init!r} is supported for LoRA on a Linear only"
    elif rank % part.groups:
        reason = f"its rank, {rank}, is not a multiple of its {part.groups} groups"
    if reason is not None:
        raise CheckpointError(f"{folder.path} adapts {part.target!r}, but {reason}")


def _is_placeholder(part: Part, folder: Folder) -> bool:
    """Return whether both factors of a projection of a MultiheadAttention are zero.

    PEFT always adapts both projections. If an adapter has only one of them, `save_peft` writes
    zeros for the other. Such factors can never train: with A = 0 and B = 0 both gradients are zero.
    """
    alone, state = len(folder.seen.parts.get(part.target, ())) < 2, folder.state
    return not (alone or state[part.key("A")].any() or state[part.key("B")].any())


def _plan_part(part: Part, folder: Folder) -> PlannedSite:
    place, state = folder.seen.places[part.site], folder.state
    factors = part.from_peft(state[part.key("A")], state[part.key("B")])
    if factors is None:
        raise CheckpointError(
            f"{folder.path} has an update at {part.module_path!r} that mixes the groups of the "
            "convolution; PEFT trains such updates, but the weight of a grouped convolution cannot "
            "express them"
        )
    A, B = factors  # (r, in), (out, r)
    tensors, weight = {"A": A, "B": B}, place.value.detach()
    spec = _spec(part, A.shape[-2], folder)
    check_site(place, spec, folder.path)
    if isinstance(spec, DoRA):
        magnitude = state[part.magnitude_key].flatten().to(weight.device, factor_dtype(weight))
        tensors["d"] = magnitude - norms(weight, part.output_dim)
    elif spec.constants:
        # PEFT subtracts the starting BA from the base. Here A₀ and B₀ are constants.
        tensors = spec.create(weight) | tensors
    return plan_site(place, spec, tensors)


def _warn_of_dropout(planned: Iterable[PlannedSite], config: Config) -> None:
    """Warn of low-rank updates to whose input PEFT applies dropout, and paramlora does not."""
    specs = {plan.place.path: plan.factors.spec for plan in planned}
    without = [path for path, spec in specs.items() if spec.dropout != config.lora_dropout]
    found = [path for path in without if isinstance(specs[path], LoRA | DoRA)]
    if found:
        warnings.warn(
            f"in training PEFT applies lora_dropout={config.lora_dropout} at {some(found)}, where "
            "paramlora has no dropout: there the adapter trains without it",
            UserWarning,
            stacklevel=5,
        )


def _spec(part: Part, rank: int, folder: Folder) -> LoRA | DoRA:
    """Return the spec for an update of this rank, with the scale of PEFT's settings."""
    config = folder.config
    # PEFT may count a higher rank: see Note [grouped convolutions].
    ratio = rank / config.rank(part.target)
    alpha = config.alpha(part.target)
    if ratio != 1:
        alpha *= ratio**0.5 if config.use_rslora else ratio
    if config.use_dora:
        return DoRA(rank, alpha, rank_stabilized=config.use_rslora, dim=part.output_dim)
    dropout = 0.0 if dropout_refusal(folder.seen.places[part.site]) else config.lora_dropout
    try:
        return LoRA(
            rank,
            alpha,
            init=config.init,
            rank_stabilized=config.use_rslora,
            dropout=dropout,
            **part.as_matrices,  # type: ignore[arg-type]
        )
    except ValueError as error:
        raise CheckpointError(f"{folder.path} adapts {part.target!r}, but {error}") from error


def check_untied(planned: Iterable[PlannedSite], folder: Folder) -> None:
    """Raise a CheckpointError if a folder adapts one of several tied tensors."""
    for path in [plan.place.path for plan in planned]:
        if path in folder.seen.tied:
            raise CheckpointError(
                f"{folder.path} adapts {path!r}, which is tied to "
                f"{' and '.join(folder.seen.tied[path])}; PEFT adapts only one of them, and "
                "paramlora always adapts tied tensors together"
            )
