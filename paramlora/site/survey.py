"""One pass over a model, and the lists that verbs derive from it."""

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import NamedTuple

from torch import nn

from ..errors import AdapterNameError
from ..stack.factors import Factors
from ..stack.stack import Stack
from ..wrappers import named_modules
from .find import Site, dotted, parametrization_lists, sites_in, walk
from .names import check_names, ordered_names
from .place import Place, places_in

# What is done to the parametrizations of a model before it is surveyed.
_Prepare = Callable[[Iterable[tuple[str, nn.Module]]], None]
_FIRST: list[_Prepare] = []


def before_survey(prepare: _Prepare) -> _Prepare:
    """Register a function of `layers`, which this folder cannot import."""
    _FIRST.append(prepare)
    return prepare


class Part(NamedTuple):
    """The factors of one adapter at one tensor, or at one block of it."""

    path: str
    name: str
    site: Site
    factors: Factors


class Survey:
    """The modules of a model by path, with the places, sites and ties among them.

    A verb makes one survey and passes it on, so it traverses the model once. Each property is
    computed when it is first read and describes the model at that moment; a verb that adds or
    removes adapters continues with `again()`.

    Args:
        model: any module, with or without adapters.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modules: list[tuple[str, nn.Module]] = list(walk(model))
        for prepare in _FIRST:
            prepare(self.modules)

    def again(self) -> "Survey":
        """Return a survey of the same modules that reads places and sites anew.

        Attaching and detaching change which parametrizations the modules have, but not which
        modules the base has, so no second traversal is needed.
        """
        survey = object.__new__(Survey)
        survey.model, survey.modules = self.model, self.modules
        return survey

    @cached_property
    def paths(self) -> dict[int, list[str]]:
        """Every path of each module, by its id; several if the module is shared."""
        found: dict[int, list[str]] = {id(module): [] for _, module in self.modules}
        for path, module in named_modules(self.modules[0][1]):
            if id(module) in found:  # which a stack is not
                found[id(module)].append(path)
        return found

    def paths_of(self, place: Place) -> list[str]:
        """Return every path of a tensor; several if its module is shared."""
        return [dotted(path, place.tensor) for path in self.paths[id(place.module)]]

    @cached_property
    def places(self) -> list[Place]:
        """Every parameter of the base, parametrized ones included, in module order."""
        return places_in(self.modules)

    @cached_property
    def sites(self) -> list[Site]:
        """The adapted tensors in module order; tied tensors are several sites with one stack."""
        return sites_in(self.modules)

    @cached_property
    def first_sites(self) -> list[Site]:
        """The adapted tensors in module order; only the first of several tied tensors."""
        first: dict[int, Site] = {}
        for site in self.sites:
            first.setdefault(id(site.stack), site)
        return list(first.values())

    @cached_property
    def stacks(self) -> list[Stack]:
        """The stacks in module order, each once."""
        return [site.stack for site in self.first_sites]

    @cached_property
    def names(self) -> list[str]:
        """The names of the adapters, in attaching order."""
        return ordered_names(self.stacks)

    @cached_property
    def holders(self) -> dict[int, list[Place]]:
        """The places of each stored parameter, by its id; several if the parameter is tied."""
        found: dict[int, list[Place]] = {}
        for place in self.places:
            found.setdefault(id(place.stored), []).append(place)
        return found

    @cached_property
    def factors(self) -> list[nn.Parameter]:
        """The factors of all adapters that are parameters, each once."""
        return _each_once(p for stack in self.stacks for p in stack.parameters())

    @cached_property
    def base_parameters(self) -> list[nn.Parameter]:
        """The stored parameters of the base, each once, including other parametrizations."""
        modules = [module for _, module in self.modules]
        modules += [plist for module in modules for plist in parametrization_lists(module).values()]
        return _each_once(p for module in modules for p in module._parameters.values())

    def select(self, names: Sequence[str]) -> list[tuple[Site, list[str]]]:
        """Return the first sites with their adapters among `names`; without names, all adapters.

        Raises:
            AdapterNameError: there is no adapter of that name.
        """
        check_names(self.stacks, names)
        held = [
            (site, [name for name in site.stack.named if not names or name in names])
            for site in self.first_sites
        ]
        return [(site, chosen) for site, chosen in held if chosen]

    def parts(self, names: Sequence[str] = ()) -> list[Part]:
        """Return the factors of adapters, by default all, in the order of `select`.

        Raises:
            AdapterNameError: there is no adapter of that name.
        """
        return [
            Part(path, name, site, factors)
            for site, chosen in self.select(names)
            for name in chosen
            for path, factors in site.parts(name).items()
        ]

    def sites_of(self, name: str) -> list[Site]:
        """Return the sites of one adapter in module order; only the first of several tied tensors.

        Raises:
            AdapterNameError: there is no adapter of that name.
        """
        return [site for site, _ in self.select([name])]

    def one(self, name: str | None, by: str = "name") -> str:
        """Return the name of an adapter, for None that of the only adapter.

        `by` is the argument that the caller has for the name.

        Raises:
            AdapterNameError: there is no adapter of that name; or it is None, and there are several
                adapters or none.
        """
        if name is None and not self.names:
            raise AdapterNameError("no adapter is attached here; attach or load one first")
        if name is None and len(self.names) > 1:
            listed = ", ".join(map(repr, self.names))
            raise AdapterNameError(f"there are several adapters: {listed}; say which one, by {by}=")
        name = self.names[0] if name is None else name
        check_names(self.stacks, [name])
        return name


def _each_once(parameters: Iterable[nn.Parameter | None]) -> list[nn.Parameter]:
    return list({id(p): p for p in parameters if p is not None}.values())
