"""Attaching adapters to a model, detaching them, and choosing which factors are trained."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from ..kinds.spec import Spec
from ..layers.install import (
    PlannedSite,
    check_attached,
    check_name,
    check_tied,
    check_ties,
    check_whole,
    install,
    remove,
    remove_all,
)
from ..layers.statistics import hold
from ..site.factors import Factors
from ..site.names import check_factors, check_names, check_unmerged
from ..site.storage import settle
from ..site.survey import Survey
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
    """Attach an adapter to every tensor that matches; it is on, and the outputs stay the same.

    Args:
        model: any module; it keeps its code, its module paths and its stored weights.
        spec: what to learn, such as `LoRA(rank=4)`, or a mapping from target to spec. In a
            mapping, the first target that matches a tensor, or a block of it, decides.
        targets: a module type (its `weight`), a glob over dotted paths of modules (their `weight`)
            or tensors, a callable `(path, module) -> bool`, or a list of those. The default is
            `nn.Linear`. `*` crosses dots, and `*.fc1` also matches an `fc1` at the top. A glob may
            end with an index, as in `*.c_attn.weight[:, :768]`: only that block is adapted, with
            factors of its own. One adapter may have several blocks that do not overlap.
        name: the adapter's name; the model must not have an adapter of that name yet.
        exclude: tensors to leave out, in the same forms.
        freeze: stop the base's parameters from requiring a gradient; `detach` restores the flags.
        generator: the source of the factors' random numbers; by default torch's global CPU
            generator. The same seed gives the same factors on every device.
        hold_statistics: keep BatchNorm and similar layers in evaluation mode until this adapter is
            detached, so that their running statistics do not move; see `hold_statistics`.
        dry_run: change nothing and draw nothing; print the summary that the model would have.

    Returns:
        The model's summary. Its `skipped` lists the tensors without this adapter, with the reason.

    Raises:
        TargetError: a target matches nothing; or a tensor that cannot be adapted (integer or
            packed, lazy, too few dimensions) or has no such block; or blocks overlap. The model is
            unchanged.
        AdapterNameError: the name is taken, or is not a valid name.
        StateError: a tensor is tied, and only one side of the tie has adapters.
        TypeError: a spec is not an instance of one, or a target has none of the forms above.

    >>> import paramlora as pl
    >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> pl.attach(model, pl.LoRA(rank=2), targets="0", name="digits").trainable
    14
    """
    survey = Survey(model)
    check_name(survey, name)
    resolved = resolve(survey, spec, targets, exclude)
    check_tied(survey, [place for place, _ in resolved.found])
    skipped = tuple(left_out(survey, resolved, freeze))
    if dry_run:
        expected = preview(survey, resolved, name, freeze, hold_statistics)
        expected = dataclasses.replace(expected, skipped=skipped, dry_run=True)
        print(expected)
        return expected
    with _random_state_kept_on_failure(generator):
        planned = [
            PlannedSite(
                place, Factors(spec, spec.create(place.value.detach(), generator), place.block)
            )
            for place, spec in resolved.found
        ]
    install(survey, planned, name, freeze)
    if hold_statistics:
        hold(survey.modules, name)
    return dataclasses.replace(report(survey.again(), fresh=name), skipped=skipped)


def detach(model: nn.Module, *names: str) -> None:
    """Take adapters away, by default all of them: the exact inverse of `attach`.

    A module without an adapter left is what it was before: class, parameters with their identity,
    order, bits and requires_grad, and hooks. Called on a part of a model, it restores the flags of
    that part only.

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
    if names:
        remove(survey, set(names))
    else:
        remove_all(survey)


def freeze(model: nn.Module, *names: str) -> None:
    """Stop the factors of adapters, by default all, from requiring a gradient; change no more.

    Raises:
        AdapterNameError: there is no adapter of that name.
        StateError: there are no adapters.
    """
    for parameter in _factors(model, names):
        parameter.requires_grad_(False)


def unfreeze(model: nn.Module, *names: str) -> None:
    """Let the factors of adapters, by default all, require a gradient; change no more.

    Raises:
        AdapterNameError: there is no adapter of that name.
        StateError: there are no adapters.
    """
    for parameter in _factors(model, names):
        parameter.requires_grad_(True)


def parameters(model: nn.Module, *names: str) -> list[nn.Parameter]:
    """Return the factors of adapters, by default all, for an optimizer.

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
def _random_state_kept_on_failure(generator: torch.Generator | None) -> Iterator[None]:
    """Give torch's CPU generator and `generator` their states back if the block raises."""
    generators = [torch.default_generator, *([] if generator is None else [generator])]
    states = [one.get_state() for one in generators]
    try:
        yield
    except BaseException:
        for one, state in zip(generators, states, strict=True):
            one.set_state(state)
        raise


def _factors(model: nn.Module, names: Sequence[str]) -> list[nn.Parameter]:
    settle(model)
    return [
        parameter
        for site, chosen in Survey(model).select(names)
        for name in chosen
        for parameter in site.stack[name].parameters()
    ]
