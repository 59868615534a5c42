"""Folding adapters into the stored weights, and taking them out again by swapping buffers.

Subtracting a merged update is inexact: in bfloat16 every sixth weight changes after one cycle
(https://github.com/huggingface/trl/issues/6688). So the original bits are kept aside while an
adapter is merged, and come back by a swap.
"""

import copy
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..errors import StateError
from ..layers import host
from ..layers.install import check_tied, check_ties, check_whole, remove
from ..layers.statistics import release
from ..site.factors import Blocks, Factors
from ..site.find import Site, before, below, first_sites, once_each, sites, stacks, stored, through
from ..site.names import check_unmerged, names_of, select
from ..site.place import Place
from ..site.stack import Stack

# The elements of a weight that are computed at a time: 2 MiB of float32.
_BLOCK = 2**19


class _Fold(NamedTuple):
    """What a merge is about to write at a site."""

    site: Site
    names: list[str]
    tensors: list[Tensor]


@torch.no_grad()
def merge(model: nn.Module, *names: str) -> None:
    """Fold adapters into the stored weights: the outputs stay, and cost what the base costs.

    The model's own `state_dict` has the merged weights then; `base_state_dict` has the base's.

    Args:
        model: a module with adapters.
        names: the adapters; where none is named, all that are switched on.

    Raises:
        AdapterNameError: no adapter of that name.
        StateError: an adapter is merged already or switched off, there is nothing to merge, or
            another parametrization below the adapter cannot hold the merged weight
            (spectral_norm), or a tensor is sharded or no longer tied. The model is then as it was.
    """
    folds = _plan(model, names)
    for site, its_names, tensors in folds:
        stack, parameters = site.stack, stored(site.plist)
        original = stack.stored or tuple(tensor.data for tensor in parameters)
        _write(parameters, tensors, stack, original)
        stack.set(stack.active, (*stack.merged, *its_names))


@torch.no_grad()
def unmerge(model: nn.Module) -> None:
    """Take every merged adapter out again: the stored weights get their original bits back.

    The adapters are as before the merge, switched on. Where nothing is merged, nothing happens.

    Raises:
        StateError: a tensor is sharded, or was written to since the merge, by an optimizer or
            load_state_dict, which unmerging would lose. The model is then as it was.
    """
    here = [site for site in first_sites(model) if site.stack.merged]
    check_whole(here)
    for site in here:
        if getattr(site.module, "max_norm", None) is not None:
            continue  # such an embedding writes to its weight whenever it is read
        # Of a deep copy, whose parameters are others, nothing is known.
        if any(
            written() is parameter and parameter._version != version
            for parameter in stored(site.plist)
            for written, version in site.stack.written
        ):
            raise StateError(
                f"{site.path!r} was written to since the merge, and unmerging would lose that; "
                "bake keeps it"
            )
    for site in here:
        _write(stored(site.plist), site.stack.stored, site.stack, ())
        site.stack.set(site.stack.active, ())


@contextmanager
def merged(model: nn.Module, *names: str) -> Iterator[None]:
    """Merge inside, as `merge` does; afterwards the adapters that it merged are out again."""
    already = [stack for stack in stacks(model) if stack.merged]
    if already:
        raise StateError(f"adapter {already[0].merged[0]!r} is merged already; unmerge first")
    merge(model, *names)
    try:
        yield
    finally:
        unmerge(model)


def bake(model: nn.Module) -> None:
    """Merge all adapters for good and remove every trace of them, the original bits included.

    Raises, beside what `merge` raises:
        StateError: an adapter is switched off, and would be lost: enable or detach it first; or
            it is tied to a tensor outside of `model`.
    """
    here = stacks(model)
    check_ties(sites(model))
    for stack in here:
        for name in stack.factors:
            if name not in stack.active:
                raise StateError(
                    f"adapter {name!r} is switched off and would be lost; enable it, or detach it"
                )
    if any(stack.live for stack in here):
        merge(model)
    names = set(names_of(model))
    check_whole(sites(model))
    for stack in here:
        stack.stored = stack.written = ()
        stack.set(stack.active, ())
    remove(model, sites(model), names)
    host.unfreeze_base(model, None)
    release(model, None)
    host.forget(model)


def _plan(model: nn.Module, names: tuple[str, ...]) -> list[_Fold]:
    """Return what to write where, everything checked, nothing written."""
    chosen = {id(stack): its_names for stack, its_names in select(model, names)}
    folds = []
    here = sites(model)
    first = once_each(here)
    _check_tied(here)
    check_tied(model, [Place(site.path, "", site.module, site.tensor) for site in first])
    check_whole(here)
    for site in first:
        its_names = chosen.get(id(site.stack), [])
        if not names:
            its_names = list(site.stack.live)
        if site.stack.route is not None:
            raise StateError("cannot merge inside of routed(): every row would get the adapter")
        _check(site.stack, its_names)
        _check_order(site, its_names)
        if its_names:
            folds.append(_Fold(site, its_names, _folded(site, its_names)))
    if not folds:
        listed = ", ".join(map(repr, names_of(model)))
        raise StateError(
            f"nothing to merge: of the adapters here ({listed}) each is merged already or "
            "switched off; unmerge or enable first"
            if listed
            else "nothing to merge: no adapter is attached here"
        )
    return folds


def _check_tied(here: list[Site]) -> None:
    """Raise a StateError where sites share an adapter and no more the tensor that it was for."""
    first: dict[int, Site] = {}
    for site in here:
        other = first.setdefault(id(site.stack), site)
        if stored(site.plist)[0] is not stored(other.plist)[0]:
            raise StateError(
                f"cannot merge: {site.path!r} and {other.path!r} were tied when their adapter was "
                "attached, and are not any more (to_empty unties, for one); detach, tie them again "
                "and attach"
            )


def _check(stack: Stack, names: list[str]) -> None:
    check_unmerged([(stack, names)], "merge")
    for name in names:
        if name not in stack.active:
            raise StateError(
                f"adapter {name!r} is switched off, so merging it would change what the model "
                "computes; enable it first"
            )


def _check_order(site: Site, names: list[str]) -> None:
    """Raise where merging would let an adapter act before one that now acts before it."""
    stack = site.stack
    for later in names:
        for earlier in stack.named:
            if earlier == later:
                break
            if earlier in stack.live and earlier not in names:
                specs = [part.spec for name in (earlier, later) for part in stack.parts(name)]
                if not all(spec.additive for spec in specs):
                    raise StateError(
                        f"cannot merge {later!r} at {site.path!r} while {earlier!r}, which was "
                        "attached before it, is not: one of them depends on what it is applied to, "
                        f"so their order counts; merge {earlier!r} as well, or switch it off"
                    )


def _folded(site: Site, names: list[str]) -> list[Tensor]:
    """Return the tensors to store so that the base gives what the named adapters now make of it."""
    stack, plist = site.stack, site.plist
    W = value = below(plist, stack)
    for name in stack.named:
        if name in names or name in stack.merged:
            value = _applied(stack[name], value)
    # A tensor of its own, in the stored one's strides (channels_last, say): neither is sure.
    own = value.untyped_storage().data_ptr() != W.untyped_storage().data_ptr()
    if not own or value.stride() != W.stride():
        value = torch.empty_like(W).copy_(value)
    below_it = before(plist, stack)
    return _inverted(site, value, below_it) if below_it else [value]


def _applied(factors: Factors | Blocks, W: Tensor) -> Tensor:
    """Return W' as one adapter makes it, half precision on a CPU by blocks of rows.

    It is computed in float32 there, and what a block takes stays in the cache: for 4096 x 4096 a
    quarter of the time.
    """
    term = None
    if W.is_cpu and W.dim() == 2 and isinstance(factors, Factors) and factors.block is None:
        term = factors.low_rank()
    if term is None or term.A.dtype == W.dtype or isinstance(term.scale, Tensor):
        return factors(W)
    value, rows = torch.empty_like(W), max(1, _BLOCK // max(1, W.shape[1]))
    for w, b, out in zip(W.split(rows), term.B.split(rows), value.split(rows), strict=True):
        out.copy_(w.to(b.dtype).addmm_(b, term.A, alpha=term.scale))
    return value


def _inverted(site: Site, value: Tensor, before: list[nn.Module]) -> list[Tensor]:
    """Return what the parametrizations before the stack have to store to give `value`."""
    parts: Tensor | list[Tensor] = value
    try:
        # On copies: an inverse may note where it started, as that of `orthogonal` does.
        for parametrization in reversed(copy.deepcopy(before)):
            parts = parametrization.right_inverse(parts)  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        parts = []
    tensors = [parts] if isinstance(parts, Tensor) else list(parts)
    if len(tensors) == len(stored(site.plist)):
        again = through(before, tensors)
        bound = 16 * torch.finfo(value.dtype).eps
        if torch.allclose(again, value, rtol=bound, atol=bound * float(value.abs().max())):
            return tensors
    kinds = ", ".join(type(p).__name__ for p in before)
    raise StateError(
        f"cannot merge at {site.path!r}: {kinds} below the adapter cannot store the merged weight; "
        "remove it first, or leave the adapter unmerged"
    )


def _write(
    parameters: Sequence[Tensor],
    tensors: Sequence[Tensor],
    stack: Stack,
    original: tuple[Tensor, ...],
) -> None:
    """Let parameters have other tensors, and the stack note it; `original`: what to keep aside."""
    for parameter, tensor in zip(parameters, tensors, strict=True):
        parameter.data = tensor
        # A backward that still needs the old weight must notice; `.data` alone does not tell it.
        torch.autograd.graph.increment_version(parameter)
    written = tuple((weakref.ref(p), p._version) for p in parameters) if original else ()
    vars(stack).update(stored=original, written=written)
