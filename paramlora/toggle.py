"""Switching adapters on and off, and setting their strength; requires_grad is never touched."""

import difflib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from .adapters import Strength, is_finite
from .errors import AdapterNameError, StateError
from .factors import Blocks, Factors
from .stack import Stack, in_order, stacks


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
    _check_unmerged(here, names, "scale")
    for stack in here:
        for name, factors in stack.named.items():
            if not names or name in names:
                factors.set_strength(factor)


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
        _check_names(here, wanted)
        _check_unmerged(here, (), "toggle")
        _switch(here, lambda own, on: wanted)
        for stack in here if scales else ():
            for name in scales.keys() & stack.named.keys():
                stack[name].set_strength(scales[name])
        yield


def names_of(model: nn.Module) -> list[str]:
    """Return the names of the adapters of a model, in attaching order."""
    return _names_in(stacks(model))


def _names_in(here: Iterable[Stack]) -> list[str]:
    first: dict[str, int] = {}
    for stack in here:
        for name, number in stack.numbers.items():
            first[name] = min(number, first.get(name, number))
    return sorted(first, key=first.__getitem__)


def select(model: nn.Module, names: Sequence[str]) -> list[tuple[Stack, list[str]]]:
    """Return each stack with those of the named adapters that it holds, all where none is named.

    Raises:
        AdapterNameError: no adapter of that name.
    """
    here = stacks(model)
    _check_names(here, names)
    found = []
    for stack in here:
        chosen = [name for name in stack.named if not names or name in names]
        if chosen:
            found.append((stack, chosen))
    return found


def check_unmerged(chosen: list[tuple[Stack, list[str]]], verb: str) -> None:
    """Raise a StateError where one of the chosen adapters is merged."""
    for stack, its_names in chosen:
        for name in its_names:
            if name in stack.merged:
                raise StateError(
                    f"cannot {verb} adapter {name!r} while it is merged; unmerge first"
                )


def _enable(here: Sequence[Stack], names: Sequence[str]) -> None:
    _check_unmerged(here, names, "enable")
    _switch(here, lambda own, on: {*on, *(names or own)})


def _disable(here: Sequence[Stack], names: Sequence[str]) -> None:
    _check_unmerged(here, names, "disable")
    _switch(here, lambda own, on: {*on}.difference(names or own))


def _check_unmerged(here: Sequence[Stack], names: Sequence[str], verb: str) -> None:
    """Raise where a named adapter, any where none is named, is not there or is merged."""
    _check_names(here, names)
    for stack in here:
        if stack.merged:
            check_unmerged([(stack, [*(names or stack.named)])], verb)


def _switch(
    here: Iterable[Stack], wanted: Callable[[Sequence[str], Sequence[str]], Collection[str]]
) -> None:
    """Set which adapters are active: `wanted(names, active)` for those of a stack.

    Stacks in the same state are worked out once: a model may have hundreds.
    """
    states: dict[Any, tuple[tuple[str, ...], tuple[str, ...]]] = {}
    for stack in here:
        # Past nn.Module's own setters, which take longer than all the rest.
        state = vars(stack)
        key = names, active, merged = tuple(stack.named), state["active"], state["merged"]
        found = states.get(key)
        if found is None:
            found = states[key] = in_order(names, wanted(names, active), merged)
        state["active"], state["live"] = found


def _check_names(here: Sequence[Stack], names: Iterable[str]) -> None:
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"adapter names are separate arguments, each a string, got {name!r}")
        if not any(name in stack.named for stack in here):
            known = _names_in(here)
            listed = ", ".join(map(repr, known)) or "none"
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise AdapterNameError(f"no adapter {name!r} here; attached are: {listed}{hint}")


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
    before = [(stack, stack.active, {**stack.named}, _strengths(stack.named)) for stack in here]
    try:
        yield here
    finally:
        for stack, active, named, strengths in before:
            # By identity: what is attached inside may have the name of what was detached.
            same = stack.named == named and not stack.merged
            if same:
                vars(stack).update(active=active, live=active)
            for (name, factors), strength in zip(named.items(), strengths, strict=True):
                if same or (stack.named.get(name) is factors and name not in stack.merged):
                    _set_strength(factors, strength)
                    if (name in active) is not (name in stack.active):
                        stack.set({*stack.active} ^ {name}, stack.merged)


def _strengths(named: Mapping[str, Factors | Blocks]) -> list[Any]:
    # Past properties and nn.Module's own lookups: a large model has thousands of these.
    return [
        factors.strengths if isinstance(factors, Blocks) else factors.__dict__["strength"]
        for factors in named.values()
    ]


def _set_strength(factors: Factors | Blocks, strength: Any) -> None:
    if isinstance(factors, Blocks):
        factors.set_strengths(strength)
    else:
        factors.__dict__["strength"] = strength
