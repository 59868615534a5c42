"""Switching adapters on and off, and setting their strength; requires_grad is never touched."""

import itertools
import operator
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ..kinds.spec import Strength, is_finite
from ..site.find import stacks
from ..site.names import check_names, merged_error
from ..site.stack import Stack, in_order


def enable(model: nn.Module, *names: str) -> None:
    """Switch adapters on, all where none is named: they contribute to every read of a tensor.

    Acts on the adapters of `model`, which may be a part of a larger one: `enable(net.fc1)`.

    Raises:
        AdapterNameError: no adapter of that name.
        StateError: an adapter is merged.
    """
    _enable(stacks(model), names)


def disable(model: nn.Module, *names: str) -> None:
    """Switch adapters off, all where none is named; with all off, the outputs are the base's bits.

    Raises:
        AdapterNameError: no adapter of that name.
        StateError: an adapter is merged.
    """
    _disable(stacks(model), names)


def scale(model: nn.Module, factor: Strength, *names: str) -> None:
    """Set the strength λ of adapters, all where none is named: W' = W + λ·ΔW.

    Args:
        model: a module with adapters.
        factor: λ, a finite number or a tensor without dimensions; 1 is the adapter as trained,
            0 the base. It stays until it is set again, and it is saved with the adapter. A tensor
            may change, or require a gradient, without a compiled model being compiled anew.
        names: the adapters.

    Raises:
        ValueError: a factor that is no finite number.
        AdapterNameError: no adapter of that name.
        StateError: an adapter is merged.
    """
    _check_strength(factor)
    here = stacks(model)
    _checked(here, names, "scale")
    for stack in here:
        named = stack.named
        for name in names or named:
            if name in named:
                named[name].set_strength(factor)


@contextmanager
def enabled(model: nn.Module, *names: str) -> Iterator[None]:
    """Switch adapters on inside, as `enable` does; afterwards all is as it was."""
    with _restored(model) as here:
        _enable(here, names)
        yield


@contextmanager
def disabled(model: nn.Module, *names: str) -> Iterator[None]:
    """Switch adapters off inside, as `disable` does; afterwards all is as it was."""
    with _restored(model) as here:
        _disable(here, names)
        yield


@contextmanager
def using(model: nn.Module, /, *names: str, **scales: Strength) -> Iterator[None]:
    """Let exactly these adapters contribute inside; afterwards all is as it was.

    Where checkpointing computes a forward again in the backward, the backward belongs inside as
    well, here and in `enabled` and `disabled`: it would be computed with what is on then.

    Args:
        model: a module with adapters.
        names: adapters at the strength that they have.
        scales: adapters at a strength for the time inside: `using(model, digits=0.5)`.

    Raises:
        ValueError: a strength that is no finite number.
        AdapterNameError: no adapter of that name.
        StateError: an adapter is merged.
    """
    for factor in scales.values():
        _check_strength(factor)
    wanted = {*names, *scales}
    with _restored(model) as here:
        check_names(here, wanted)
        _switch(_checked(here, (), "toggle"), lambda own, on: wanted)
        for stack in here if scales else ():
            for name in scales.keys() & stack.named.keys():
                stack[name].set_strength(scales[name])
        yield


def _enable(here: Sequence[Stack], names: Sequence[str]) -> None:
    states = _checked(here, names, "enable")
    _switch(states, lambda own, on: {*on, *(names or own)})


def _disable(here: Sequence[Stack], names: Sequence[str]) -> None:
    states = _checked(here, names, "disable")
    _switch(states, lambda own, on: {*on}.difference(names or own))


# The dictionaries of stacks, by what is at each: names, active, merged. A model may have hundreds
# of stacks, most of them alike.
_States = dict[tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]], list[dict[str, Any]]]
# Past nn.Module's own getters and setters, which take longer than all the rest.
_DICT, _STATE = operator.attrgetter("__dict__"), operator.itemgetter("names", "active", "merged")
_STRENGTH = operator.attrgetter("strength")


def _checked(here: Sequence[Stack], names: Sequence[str], verb: str) -> _States:
    """Return the states of stacks.

    Raises:
        AdapterNameError: no adapter of a name.
        StateError: one of these adapters, any where none is named, is merged.
    """
    check_names(here, names)
    states: _States = {}
    for key, alike in itertools.groupby(map(_DICT, here), _STATE):
        states.setdefault(key, []).extend(alike)
    for own, _, merged in states:
        for name in names or own:
            if name in merged:
                raise merged_error(name, verb)
    return states


def _switch(
    states: _States, wanted: Callable[[Sequence[str], Sequence[str]], Collection[str]]
) -> None:
    """Set which adapters are active: `wanted(names, active)` for those of a stack."""
    for (names, active, merged), alike in states.items():
        chosen, live = in_order(names, wanted(names, active), merged)
        for state in alike:
            state["active"] = chosen
            state["live"] = live


def _check_strength(factor: Strength) -> None:
    if isinstance(factor, Tensor):
        if factor.dim() != 0 or not factor.is_floating_point():
            raise ValueError(
                "a strength given as a tensor must be floating and without dimensions, got "
                f"{factor.dtype} of shape {tuple(factor.shape)}"
            )
        if not factor.is_meta and not factor.isfinite():
            raise ValueError(f"a strength must be a finite number, got {factor!r}")
    elif not is_finite(factor):
        raise ValueError(f"a strength must be a finite number, got {factor!r}")


@contextmanager
def _restored(model: nn.Module) -> Iterator[list[Stack]]:
    """Yield the stacks; put back afterwards which adapters are active, and their strengths.

    What is attached inside stays as it is then, and so does what is merged then, its strength
    included: that is the one which the stored weight has.
    """
    here = stacks(model)
    before = []
    for stack in here:
        named = {**stack.named}
        strengths = [*map(_STRENGTH, named.values())]
        state = stack.__dict__
        # Inside of `routed` an adapter may be active and not live.
        live = state["active"] if state["merged"] else state["live"]
        before.append((stack, state["active"], live, named, strengths))
    try:
        yield here
    finally:
        for stack, active, live, named, strengths in before:
            state = stack.__dict__
            # By identity: what is attached inside may have the name of what was detached.
            if stack.named == named and not state["merged"]:
                state["active"], state["live"] = active, live
                if any(map(operator.is_not, map(_STRENGTH, named.values()), strengths)):
                    for factors, strength in zip(named.values(), strengths, strict=True):
                        factors.put_strength(strength)
                continue
            for (name, factors), strength in zip(named.items(), strengths, strict=True):
                if stack.named.get(name) is factors and name not in stack.merged:
                    factors.put_strength(strength)
                    if (name in active) is not (name in stack.active):
                        stack.set({*stack.active} ^ {name}, stack.merged)
