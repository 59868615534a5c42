"""Attach adapters to a model, detach them, and freeze or unfreeze their factors."""

import dataclasses
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NoReturn, TypeVar

import torch
from torch import nn

from ..kinds.arguments import check_attach_arguments
from ..kinds.spec import Spec
from ..layers.install import (
    PlannedSite,
    check_attached,
    check_name,
    check_tied,
    check_ties,
    check_whole,
    keep_frozen,
    remove,
)
from ..layers.registered import claim as claim  # what torch registered, from now on
from ..layers.statistics import hold
from ..site.names import check_factors, check_names, check_unmerged
from ..site.survey import Survey
from ..stack.factors import Factors
from ..stack.storage import settle
from ..targets.targets import Target, Targets, resolve
from .add import Activate, add, check_activate, left_out, undone
from .summary import Summary

# A mapping's keys have any one of these types, or several.
AnyTarget = TypeVar("AnyTarget", bound=Target)


def attach(
    model: nn.Module,
    spec: Spec | Mapping[AnyTarget, Spec],
    targets: Targets | None = None,
    *,
    name: str = "default",
    activate: Activate = "only",
    exclude: Targets = (),
    freeze: bool = True,
    generator: torch.Generator | None = None,
    hold_statistics: bool = False,
    dry_run: bool = False,
    **others: NoReturn,
) -> Summary:
    """Attach an adapter to every tensor that matches.

    The new adapter computes nothing until it is trained. By default it is the only active one
    afterwards, so the outputs are the base's, and training starts from there.

    Args:
        model: any module; it keeps its code, its module paths and its stored weights.
        spec: what to learn, such as `LoRA(rank=4)`, or a mapping from target to spec. In a
            mapping, the first target that matches a tensor, or a block of it, decides.
        targets: what to adapt, in one of these forms, or a list of them.

            - A name, `"q_proj"`: each module or tensor whose path is the name, or ends with a dot
              and the name.
            - A glob over dotted paths, `"encoder.*.bias"`. `*` crosses dots, and `*.fc1` also
              matches an `fc1` at the top. With a low-rank spec, a glob skips vectors.
            - A name or a glob with an index, `"*.c_attn.weight[:, :768]"`: that block alone, with
              factors of its own. One adapter may have several blocks that do not overlap.
            - A module type, or a callable `(path, module) -> bool`.
            - `"all-linear"`, the default: all linear layers (transformers' Conv1D and quantized
              ones included), except those that share their weight with an embedding and a model's
              output embeddings.

            A module means its `weight`. For `Delta`, it means all parameters of it and of the
            modules inside it.
        name: the adapter's name; the model must not have an adapter of that name yet.
        activate: which adapters are active afterwards.

            - "only": the new one alone. Others stay attached, switched off.
            - "also": the new one and those that are active now. It is trained on top of them.
            - "no": those that are active now. The new one is attached switched off, and the others
              stay trained, as several adapters that `routed` trains together must be.
        exclude: what to leave out, in the same forms; a module means all parameters in it.
        freeze: stop the base's parameters from requiring a gradient, and unless `activate` is "no"
            also the factors of other adapters; `detach` restores the flags.
        generator: the source of the factors' random numbers; by default torch's global CPU
            generator. The same seed gives the same factors on every device.
        hold_statistics: keep BatchNorm and similar layers in evaluation mode until this adapter is
            detached, so that their running statistics do not move; see `hold_statistics`.
        dry_run: change nothing and draw nothing; print the summary that the model would have. As
            in a real call, no other thread may run the model meanwhile.
        others: no other argument exists; one of another library raises TypeError with ours.

    Returns:
        The model's summary. Its `skipped` lists the tensors without this adapter, with the reason,
        and its `switched_off` the adapters that this call switched off.

    Warns:
        UserWarning: an adapter was switched off that shares no tensor with the new one, such as one
            that adapts the biases. "also" keeps it on.

    Raises:
        TargetError: a target matches no tensor; a tensor cannot be adapted (integer, lazy, too
            few dimensions, quantized and the kind needs its values) or does not have the block; or
            blocks overlap. The model is unchanged.
        AdapterNameError: the name is taken, or is not a valid name.
        StateError: a tensor is tied, and only one side of the tie has adapters; or `activate` is
            "only" and another adapter is merged.
        ValueError: `activate` is not one of the above.
        TypeError: a spec is not a `Spec` instance, or a target has none of the forms above.

    >>> import paramlora as pl
    >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> pl.attach(model, pl.LoRA(rank=2), targets="0", name="digits").trainable
    14
    """
    check_attach_arguments(inspect.signature(attach).parameters, others)
    survey = Survey(model)
    check_name(survey, name)
    check_activate(survey, name, activate)
    resolved = resolve(survey, spec, targets, exclude)
    check_tied(survey, [place for place, _ in resolved.found])
    skipped = tuple(left_out(survey, resolved, freeze))
    kept = _random_state_kept(generator, on_success=dry_run)
    with kept, undone(survey, name, on_success=dry_run):
        planned = []
        for place, spec in resolved.found:
            weight = place.value.detach()
            tensors = spec.create(weight.to("meta") if dry_run else weight, generator)
            planned.append(PlannedSite(place, Factors(spec, tensors, place.block)))
        if hold_statistics:
            hold(survey.modules, name)
        added = add(survey, planned, name, activate, freeze)
    added = dataclasses.replace(added, skipped=skipped, dry_run=dry_run)
    if dry_run:
        print(added)
    return added


def detach(model: nn.Module, *names: str) -> None:
    """Remove adapters, by default all: the exact inverse of `attach`.

    A module that loses its last adapter is restored: its class, its hooks, and its parameters with
    their identity, order, bits and requires_grad. Called on a part of a model, it restores
    the flags of that part only.

    Args:
        model: a module with adapters.
        names: the adapters; by default all.

    Raises:
        AdapterNameError: there is no adapter of that name.
        StateError: there are no adapters; or one is merged, tied to a tensor outside of `model`,
            or sharded.

    >>> import paramlora as pl
    >>> model = nn.Linear(4, 3)
    >>> _ = pl.attach(model, pl.LoRA(rank=2))
    >>> pl.detach(model)
    >>> type(model) is nn.Linear
    True
    """
    survey = Survey(model)
    check_names(survey.stacks, names) if names else check_attached(survey)
    check_unmerged(survey.stacks, names, "detach")
    check_ties(survey.sites)
    check_whole(survey.sites)
    remove(survey, set(names) or None)


def freeze(model: nn.Module, *names: str) -> None:
    """Freeze the factors of adapters, by default all: they no longer require a gradient.

    Raises:
        AdapterNameError: there is no adapter of that name.
        StateError: there are no adapters.

    >>> import paramlora as pl
    >>> model = nn.Sequential(nn.Linear(4, 3))
    >>> _ = pl.attach(model, pl.LoRA(rank=2))
    >>> pl.freeze(model)
    >>> pl.summary(model).trainable
    0
    """
    settle(model)
    for part in Survey(model).parts(names):
        keep_frozen(part.factors)


def unfreeze(model: nn.Module, *names: str) -> None:
    """Unfreeze the factors of adapters, by default all: they require a gradient.

    Raises:
        AdapterNameError: there is no adapter of that name.
        StateError: there are no adapters.

    >>> import paramlora as pl
    >>> model = nn.Sequential(nn.Linear(4, 3))
    >>> _ = pl.attach(model, pl.LoRA(rank=2), name="a")
    >>> _ = pl.attach(model, pl.LoRA(rank=2), name="b")  # freezes "a"
    >>> pl.unfreeze(model, "a")
    >>> len(pl.parameters(model))
    4
    """
    for parameter in _factors(model, names):
        parameter.requires_grad_(True)


def parameters(model: nn.Module, *names: str) -> list[nn.Parameter]:
    """Return the factors of adapters, by default all and frozen ones too, for an optimizer.

    Raises:
        AdapterNameError: there is no adapter of that name.
        StateError: there are no adapters, or the adapters have no factors to train.

    >>> import paramlora as pl
    >>> model = nn.Linear(4, 3)
    >>> _ = pl.attach(model, pl.LoRA(rank=2))
    >>> [tuple(parameter.shape) for parameter in pl.parameters(model)]
    [(2, 4), (3, 2)]
    """
    found = _factors(model, names)
    check_factors(found)
    return found


@contextmanager
def _random_state_kept(generator: torch.Generator | None, on_success: bool) -> Iterator[None]:
    """Give the generators, torch's own and `generator`, their states back, at least on failure."""
    generators = [torch.default_generator, *([] if generator is None else [generator])]
    states = [one.get_state() for one in generators]
    kept = False
    try:
        yield
        kept = not on_success
    finally:
        if not kept:
            for one, state in zip(generators, states, strict=True):
                one.set_state(state)


def _factors(model: nn.Module, names: Sequence[str]) -> list[nn.Parameter]:
    settle(model)
    return [p for part in Survey(model).parts(names) for p in part.factors.parameters()]
