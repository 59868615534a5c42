"""A model as PEFT sees it: its modules, the tensors that can be adapted, and tied parameters."""

from dataclasses import dataclass

from torch import nn

from ..site.find import dotted
from ..wrappers import named_modules
from .layout import Part, parts_of


@dataclass(frozen=True)
class PeftView:
    """The modules and parameters of a model as PEFT sees them, collected in one traversal.

    Attributes:
        modules: the modules by path, parents first. The model itself is under "". A module with
            several paths is under the first one. Parametrizations are left out.
        parts: the tensors that PEFT can adapt, by the path of the module that PEFT wraps.
        tied: the other paths of each tied parameter, by each of its paths.
    """

    modules: dict[str, nn.Module]
    parts: dict[str, list[Part]]
    tied: dict[str, list[str]]

    @property
    def paths(self) -> list[str]:
        """The paths of the submodules, among which PEFT looks for its targets."""
        return [path for path in self.modules if path]


def view(model: nn.Module) -> PeftView:
    """Return a model as PEFT sees it, with adapters attached or not."""
    modules: dict[str, nn.Module] = {}
    seen: set[nn.Module] = set()
    holders: dict[int, list[str]] = {}
    # With duplicates: a module with two paths has tied parameters.
    for path, module in named_modules(model):
        for name, parameter in module._parameters.items():
            if parameter is not None:
                holders.setdefault(id(parameter), []).append(_plain(dotted(path, name)))
        if module not in seen and "parametrizations" not in path.split("."):
            modules[path] = module
        seen.add(module)
    return PeftView(modules, _parts(modules), _others(holders))


def _parts(modules: dict[str, nn.Module]) -> dict[str, list[Part]]:
    found = {}
    for path, module in modules.items():
        # PEFT cannot wrap the model itself. Wrapping only the `out_proj` of an attention has no
        # effect: the attention reads the weight of `out_proj` and never calls it.
        inside = isinstance(modules.get(path.rpartition(".")[0]), nn.MultiheadAttention)
        parts = [] if not path or inside else parts_of(path, module)
        if parts:
            found[path] = parts
    return found


def _others(holders: dict[int, list[str]]) -> dict[str, list[str]]:
    """Return the other paths of each tied parameter, by each of its paths."""
    return {
        path: [other for other in paths if other != path]
        for paths in holders.values()
        if len(paths) > 1
        for path in paths
    }


def _plain(path: str) -> str:
    """Return the path that a parameter has without adapters.

    >>> _plain("fc.parametrizations.weight.original")
    'fc.weight'
    """
    return path.replace("parametrizations.", "").removesuffix(".original")
