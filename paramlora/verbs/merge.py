"""Fold adapters into the stored weights, and restore the original weights.

Subtracting a merged update is inexact: in bfloat16 every sixth weight changes after one cycle
(https://github.com/huggingface/trl/issues/6688). Therefore the original tensors are kept while an
adapter is merged, and unmerging swaps them back.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..errors import StateError
from ..layers.install import check_attached, check_tied, check_ties, check_whole, remove
from ..site.find import Site, base_weight, stacks_in, stored_tensors
from ..site.marks import mark
from ..site.names import (
    check_names,
    check_no_other_block,
    check_not_routed,
    check_unmerged,
    out_of_order,
)
from ..site.place import Place
from ..site.survey import Survey
from ..stack.factors import trainable
from ..stack.overlay import may_be_on
from ..stack.stack import Stack
from ..stack.storage import Written
from .fold import folded


def merge(model: nn.Module, *names: str) -> None:
    """Fold adapters into the stored weights, so that a forward costs no more than the base's.

    The outputs stay the same up to rounding. While adapters are merged, the model's
    own `state_dict` contains the merged weights, and `base_state_dict` contains the base's.

    A backward through a merged adapter raises if its factors require a gradient, because they would
    get none. In grad mode that takes some memory; `freeze` the adapter to avoid it.

    Args:
        model: a module with adapters.
        names: the adapters; by default all that are switched on.

    Raises:
        AdapterNameError: there is no adapter of that name.
        StateError: there are no adapters, or none is left to merge. Or an adapter is merged
            already or switched off; or another parametrization below the adapter cannot store the
            merged weight (spectral_norm); or a layer is quantized; or a tensor is sharded, or not
            tied any more. The model is unchanged.

    >>> import paramlora as pl
    >>> model = nn.Linear(4, 3)
    >>> weight = model.weight.detach().clone()
    >>> _ = pl.attach(model, pl.LoRA(rank=2))
    >>> pl.merge(model)
    >>> pl.unmerge(model)
    >>> torch.equal(model.weight, weight)
    True
    """
    _merge(Survey(model), names)


@torch.no_grad()
def _merge(survey: Survey, names: tuple[str, ...]) -> None:
    for site, chosen, tensors in _plan(survey, names):
        stack, parameters = site.stack, stored_tensors(site.plist)
        original = stack.stored or tuple(tensor.data for tensor in parameters)
        _write(parameters, tensors, stack, original)
        stack.fold(chosen)
    mark(survey.sites)


def unmerge(model: nn.Module) -> None:
    """Unmerge all merged adapters, and restore the original bits of the stored weights.

    The adapters are switched on, as before the merge. If nothing is merged, nothing happens.

    Raises:
        StateError: there are no adapters. Or a tensor is sharded, or was written to since the
            merge, by an optimizer or by load_state_dict, and unmerging would lose that. The model
            is unchanged.

    >>> import paramlora as pl
    >>> model = nn.Linear(4, 3)
    >>> _ = pl.attach(model, pl.LoRA(rank=2))
    >>> pl.merge(model)
    >>> pl.unmerge(model)
    >>> pl.summary(model).sites[0].merged
    False
    """
    survey = Survey(model)
    check_names(survey.stacks, ())
    _unmerge(survey)


@torch.no_grad()
def _unmerge(survey: Survey) -> None:
    sites = [site for site in survey.first_sites if site.stack.merged]
    check_no_other_block([site.stack for site in sites], "unmerge")
    check_whole(sites)
    for site in sites:
        if getattr(site.module, "max_norm", None) is not None:
            continue  # such an embedding writes to its weight whenever it is read
        pairs = zip(site.stack.written, stored_tensors(site.plist), strict=True)
        if not all(written.is_in(parameter) for written, parameter in pairs):
            raise StateError(
                f"{site.path!r} was written to since the merge, and unmerging would lose that; "
                "bake keeps it"
            )
    for site in sites:
        _write(stored_tensors(site.plist), site.stack.stored, site.stack, ())
        site.stack.unfold()
    mark(survey.sites)


@contextmanager
def merged(model: nn.Module, *names: str) -> Iterator[None]:
    """Merge inside the block, as `merge` does; unmerge after it.

    Raises, besides what `merge` raises:
        StateError: an adapter is merged already.

    >>> import paramlora as pl
    >>> model = nn.Linear(4, 3)
    >>> _ = pl.attach(model, pl.LoRA(rank=2))
    >>> with pl.merged(model):
    ...     pl.summary(model).sites[0].merged
    True
    """
    check_unmerged(stacks_in(model), (), "merge")
    merge(model, *names)
    try:
        yield
    finally:
        # Not by `unmerge`: inside the block all adapters may have been baked or detached.
        _unmerge(Survey(model))


def bake(model: nn.Module) -> None:
    """Merge all adapters for good, and remove them together with the original weights.

    Raises, besides what `merge` raises:
        StateError: an adapter is switched off and would be lost: enable or detach it first. Or it
            is tied to a tensor outside of `model`.

    >>> import paramlora as pl
    >>> model = nn.Linear(4, 3)
    >>> _ = pl.attach(model, pl.LoRA(rank=2, init="gaussian"))
    >>> pl.bake(model)
    >>> type(model) is nn.Linear
    True
    """
    survey = Survey(model)
    check_attached(survey)
    check_ties(survey.sites)
    for stack in survey.stacks:
        for name in stack.factors:
            if name not in stack.seen().active:
                raise StateError(
                    f"adapter {name!r} is switched off and would be lost; enable it, or detach it"
                )
    check_no_other_block(survey.stacks, "bake")
    if any(stack.seen().live for stack in survey.stacks):
        _merge(survey, ())
    check_whole(survey.sites)
    for stack in survey.stacks:
        stack.stored = stack.written = ()
        stack.set(stack.active, ())
    remove(survey)


def _plan(survey: Survey, names: tuple[str, ...]) -> list[tuple[Site, list[str], list[Tensor]]]:
    """Check everything, and return each site with its adapters and the tensors to write there."""
    chosen = {id(site.stack): held for site, held in survey.select(names)}
    folds = []
    check_no_other_block(survey.stacks, "merge")
    _check_still_tied(survey.sites)
    check_tied(survey, [Place(s.path, "", s.module, s.tensor) for s in survey.first_sites])
    check_whole(survey.sites)
    check_not_routed(survey.stacks, "merge")
    for site in survey.first_sites:
        here = chosen.get(id(site.stack), []) if names else list(site.stack.seen().live)
        if here:
            check_unmerged([site.stack], here, "merge")
            _check_on(site.stack, here)
            _check_order(site, here)
            order = [name for name in site.stack.named if name in (*here, *site.stack.merged)]
            W, strengths = base_weight(site.plist, site.stack), site.stack.seen().strengths
            folds.append((site, here, folded(site, W, order, strengths or {})))
    if not folds:
        listed = ", ".join(map(repr, survey.names))
        raise StateError(
            f"nothing to merge: of the adapters here ({listed}) each is merged already or "
            "switched off; unmerge or enable first"
        )
    return folds


def _check_still_tied(sites: list[Site]) -> None:
    """Raise a StateError if sites share an adapter but no longer share the tensor."""
    first: dict[int, Site] = {}
    for site in sites:
        other = first.setdefault(id(site.stack), site)
        if stored_tensors(site.plist)[0] is not stored_tensors(other.plist)[0]:
            raise StateError(
                f"cannot merge: {site.path!r} and {other.path!r} were tied when their adapter was "
                "attached, and are not any more (to_empty unties, for one); detach, tie them again "
                "and attach"
            )


def _check_on(stack: Stack, names: list[str]) -> None:
    for name in names:
        if name not in stack.seen().active:
            raise StateError(
                f"adapter {name!r} is switched off, so merging it would change what the model "
                "computes; enable it first"
            )


def _check_order(site: Site, names: list[str]) -> None:
    """Raise a StateError if merging would change the order in which adapters act.

    A merged adapter acts first, because it is in the stored weight. With IA3 `a` attached before
    Delta `b`, W' = l ⊙ W + D; with `b` alone merged it would be l ⊙ (W + D).
    """
    # A block may have switched an adapter off that is on again when it ends.
    on = [name for name in site.stack.named if may_be_on(site.stack, name)]
    for earlier, later in out_of_order(site.stack, on, (*names, *site.stack.merged)):
        raise StateError(
            f"cannot merge {later!r} at {site.path!r} while {earlier!r}, which was attached before "
            "it, is not: one of them depends on the tensor that it is applied to, so their order "
            f"counts; merge {earlier!r} as well, or switch it off"
        )


def _write(
    parameters: Sequence[Tensor],
    tensors: Sequence[Tensor],
    stack: Stack,
    original: tuple[Tensor, ...],
) -> None:
    """Replace the data of parameters; `original` are the tensors to keep for unmerging."""
    for parameter, tensor in zip(parameters, tensors, strict=True):
        parameter.data = trainable(tensor)
        # A backward that still needs the old weight must raise an error. Assigning `.data` alone
        # would not cause it.
        torch.autograd.graph.increment_version(parameter)
    written = tuple(map(Written, parameters)) if original else ()
    vars(stack).update(stored=original, written=written)
