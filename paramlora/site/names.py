"""Which adapters a model has, by name."""

import difflib
from collections.abc import Iterable, Sequence

from torch import nn

from ..errors import AdapterNameError, StateError
from .find import Site, first_sites, stacks
from .stack import Stack


def sites_of(model: nn.Module, name: str) -> list[Site]:
    """Return the sites of one adapter, tied ones once, in the order of `parameters`."""
    wanted = {id(stack) for stack, _ in select(model, [name])}
    return [site for site in first_sites(model) if id(site.stack) in wanted]


def names_of(model: nn.Module) -> list[str]:
    """Return the names of the adapters of a model, in attaching order."""
    return names_in(stacks(model))


def names_in(here: Iterable[Stack]) -> list[str]:
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
    check_names(here, names)
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
                raise merged_error(name, verb)


def merged_error(name: str, verb: str) -> StateError:
    return StateError(f"cannot {verb} adapter {name!r} while it is merged; unmerge first")


def check_names(here: Sequence[Stack], names: Iterable[str]) -> None:
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"adapter names are separate arguments, each a string, got {name!r}")
        if not any(name in stack.names for stack in here):
            known = names_in(here)
            listed = ", ".join(map(repr, known)) or "none"
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise AdapterNameError(f"no adapter {name!r} here; attached are: {listed}{hint}")
