"""Attaching adapters to a model, detaching them, and which of their factors are trained."""

import dataclasses
from collections.abc import Mapping

import torch
from torch import nn

from ..kinds.spec import Spec
from ..layers import host
from ..layers.install import (
    Planned,
    check_name,
    check_tied,
    check_ties,
    check_whole,
    install,
    remove,
)
from ..layers.statistics import hold, release
from ..site.factors import Factors
from ..site.find import sites
from ..site.names import check_unmerged, names_of, select
from ..site.storage import settle
from .preview import left_out, preview
from .summary import Summary, report
from .targets import Target, Targets, resolve


def attach(
    model: nn.Module,
    spec: Spec | Mapping[Target, Spec],
    targets: Targets | None = None,
    *,
    name: str = "default",
    exclude: Targets = (),
    freeze: bool = True,
    generator: torch.Generator | None = None,
    hold_statistics: bool = False,
    dry_run: bool = False,
) -> Summary:
    """Attach an adapter to every tensor that matches, switched on, its outputs those of the base.

    Args:
        model: any module; it keeps its classes, its code and its stored weights.
        spec: what to learn, such as `LoRA(rank=4)`, or a mapping from target to spec, of which
            the first that matches a tensor, or blocks of it, counts.
        targets: a module type (its `weight`; `nn.Linear` where nothing is given), a glob over
            dotted paths of modules (their `weight`) or tensors, a callable
            `(path, module) -> bool`, or a list of those. `*` crosses dots, and `*.fc1` also means
            an `fc1` at the top. A glob may end with an index, `*.c_attn.weight[:, :768]`: that
            block alone is adapted, with factors of its own, and one adapter may have several that
            do not overlap.
        name: the adapter's name; any that the model does not have yet.
        exclude: what to leave out, in the same forms.
        freeze: stop the base's parameters from requiring a gradient; `detach` gives back the
            flags that were there.
        generator: where the factors' random numbers come from; without one, torch's global CPU
            generator. The same seed gives the same factors whatever the model's device.
        hold_statistics: keep BatchNorm and its like in eval mode until this adapter is detached,
            so that their running statistics stay as they are; see `hold_statistics`.
        dry_run: change nothing, draw nothing, and print what the model would be.

    Returns:
        The model's summary; its `skipped` has the tensors without this adapter, each with the
        reason.

    Raises:
        TargetError: a target matches nothing, or a tensor that cannot be adapted (integer or
            packed, lazy, too few dimensions), or that does not have the block; or blocks overlap.
            The model is then as it was.
        AdapterNameError: the name is taken, or cannot be one.
        StateError: a tensor is tied, and has adapters on one side only.
        TypeError: a spec is no instance of one, or a target none of the forms above.

    >>> import paramlora as pl
    >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> pl.attach(model, pl.LoRA(rank=2), targets="0", name="digits").trainable
    14
    """
    check_name(model, name)
    resolved = resolve(model, spec, targets, exclude)
    check_tied(model, [place for place, _ in resolved.found])
    skipped = tuple(left_out(model, resolved, freeze))
    if dry_run:
        expected = preview(model, resolved, name, freeze, hold_statistics)
        found = dataclasses.replace(expected, skipped=skipped, dry_run=True)
        print(found)
        return found
    planned = [
        Planned(place, Factors(spec, spec.create(place.value.detach(), generator), place.block))
        for place, spec in resolved.found
    ]
    install(model, planned, name, freeze)
    if hold_statistics:
        hold(model, name)
    return dataclasses.replace(report(model, fresh=name), skipped=skipped)


def detach(model: nn.Module, *names: str) -> None:
    """Take adapters away, all where none is named: the exact inverse of `attach`.

    A module that has no adapter left is what it was: class, parameters with their identity, order,
    bits and requires_grad, hooks. On a part of a model it gives back that part's flags only.

    Raises:
        AdapterNameError: no adapter of that name.
        StateError: an adapter is merged, tied to a tensor outside of `model`, or sharded.
    """
    check_unmerged(select(model, names), "detach")
    here = sites(model)
    check_ties(here)
    check_whole(here)
    remove(model, here, set(names or names_of(model)))
    if not names:
        # Also what was frozen for an adapter that a part of the model lost before.
        host.unfreeze_base(model, None)
        release(model, None)
        host.forget(model)


def freeze(model: nn.Module, *names: str) -> None:
    """Stop the factors of the adapters from requiring a gradient; nothing else changes."""
    for parameter in parameters(model, *names):
        parameter.requires_grad_(False)


def unfreeze(model: nn.Module, *names: str) -> None:
    """Let the factors of the adapters require a gradient; nothing else changes."""
    for parameter in parameters(model, *names):
        parameter.requires_grad_(True)


def parameters(model: nn.Module, *names: str) -> list[nn.Parameter]:
    """Return the factors of the adapters, all where none is named, for an optimizer.

    Raises:
        AdapterNameError: no adapter of that name.
    """
    settle(model)
    return [
        parameter
        for stack, its_names in select(model, names)
        for name in its_names
        for parameter in stack[name].parameters()
    ]
