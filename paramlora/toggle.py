"""Switching adapters on and off, and setting their strength; requires_grad is never touched."""

import difflib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from .adapters import Strength, is_finite
from .errors import AdapterNameError, StateError
from .stack import Factors, Stack, stacks


def enable(model: nn.Module, *names: str) -> None:
    """Switch adapters on, all where none is named: they contribute to every read of a tensor.

    Acts on the adapters of `model`, which may be a part of a larger one: `enable(net.fc1)`.

    Raises:
        AdapterNameError: no adapter of that name.
        StateError: an adapter is merged.
    """
    for stack, its_names in _select_unmerged(model, names, "enable"):
        stack.set((*stack.active, *its_names), stack.merged)


def disable(model: nn.Module, *names: str) -> None:
    """Switch adapters off, all where none is named; with all off, the outputs are the base's bits.

    Raises:
        AdapterNameError: no adapter of that name.
        StateError: an adapter is merged.
    """
    for stack, its_names in _select_unmerged(model, names, "disable"):
        stack.set([name for name in stack.active if name not in its_names], stack.merged)


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
    for stack, its_names in _select_unmerged(model, names, "scale"):
        for name in its_names:
            stack[name].set_strength(factor)


@contextmanager
def enabled(model: nn.Module, *names: str) -> Iterator[None]:
    """Switch adapters on inside, as `enable` does; afterwards all is as it was."""
    with _restored(model):
        enable(model, *names)
        yield


@contextmanager
def disabled(model: nn.Module, *names: str) -> Iterator[None]:
    """Switch adapters off inside, as `disable` does; afterwards all is as it was."""
    with _restored(model):
        disable(model, *names)
        yield


@contextmanager
def using(model: nn.Module, /, *names: str, **scales: Strength) -> Iterator[None]:
    """Let exactly these adapters contribute inside; afterwards all is as it was.

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
    _check_names(model, wanted)
    with _restored(model):
        for stack, _ in _select_unmerged(model, (), "toggle"):
            stack.set(wanted, stack.merged)
            for name in scales.keys() & stack.factors.keys():
                stack[name].set_strength(scales[name])
        yield


def names_of(model: nn.Module) -> list[str]:
    """Return the names of the adapters of a model, in attaching order."""
    return list(dict.fromkeys(name for stack in stacks(model) for name in stack.factors))


def select(model: nn.Module, names: Sequence[str]) -> list[tuple[Stack, list[str]]]:
    """Return each stack with those of the named adapters that it holds, all where none is named.

    Raises:
        AdapterNameError: no adapter of that name.
    """
    _check_names(model, names)
    found = []
    for stack in stacks(model):
        chosen = [name for name in stack.factors if not names or name in names]
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


def _select_unmerged(
    model: nn.Module, names: Sequence[str], verb: str
) -> list[tuple[Stack, list[str]]]:
    chosen = select(model, names)
    check_unmerged(chosen, verb)
    return chosen


def _check_names(model: nn.Module, names: Iterable[str]) -> None:
    wanted = list(names)
    known = names_of(model) if wanted else []
    for name in wanted:
        if not isinstance(name, str):
            raise TypeError(f"adapter names are separate arguments, each a string, got {name!r}")
        if name not in known:
            listed = ", ".join(map(repr, known)) or "none"
            close = difflib.get_close_matches(str(name), known, n=1)
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
def _restored(model: nn.Module) -> Iterator[None]:
    """Put back afterwards which adapters are active, and their strengths.

    What is attached inside stays as it is then, and so does what is merged then, its strength
    included: that is the one which the stored weight has.
    """
    before = [(stack, stack.active, _strengths(stack)) for stack in stacks(model)]
    try:
        yield
    finally:
        for stack, active, held in before:
            now = set(stack.active)
            for name in held.keys() & set(stack.factors):
                # By identity: what is attached inside may have the name of what was detached.
                same = stack.parts(name) == [factors for factors, _ in held[name]]
                if same and name not in stack.merged:
                    for factors, strength in held[name]:
                        factors.set_strength(strength)
                    (now.add if name in active else now.discard)(name)
            stack.set(now, stack.merged)


def _strengths(stack: Stack) -> dict[str, list[tuple[Factors, Strength]]]:
    return {name: [(f, f.strength) for f in stack.parts(name)] for name in stack.factors}
