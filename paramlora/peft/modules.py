"""A model as PEFT sees it: its modules, the tensors that can be adapted, and tied parameters."""

from functools import cached_property

from torch import nn

from ..site.place import Place
from ..site.survey import Survey
from .layout import Part, parts_of


class PeftView:
    """The modules and parameters of a model as PEFT sees them, with adapters attached or not.

    Args:
        survey: a survey of the model.

    Attributes:
        modules: the modules by path, parents first. The model itself is under "". A module with
            several paths is under the first one. Parametrizations are left out.
        paths: the paths of the submodules, among which PEFT looks for its targets.
    """

    def __init__(self, survey: Survey) -> None:
        self.survey = survey
        self.modules: dict[str, nn.Module] = {
            path: module
            for path, module in survey.modules
            if "parametrizations" not in path.split(".")
        }
        self.paths = [path for path in self.modules if path]

    @cached_property
    def places(self) -> dict[str, Place]:
        """The places of the model, by path."""
        return {place.path: place for place in self.survey.places}

    @cached_property
    def parts(self) -> dict[str, list[Part]]:
        """The tensors that PEFT can adapt, by the path of the module that PEFT wraps."""
        found = {}
        # PEFT cannot wrap the model itself. Wrapping only the `out_proj` of an attention has no
        # effect: the attention reads the weight of `out_proj` and never calls it.
        for path in self.paths:
            inside = isinstance(self.modules.get(path.rpartition(".")[0]), nn.MultiheadAttention)
            parts = [] if inside else parts_of(path, self.modules[path])
            if parts:
                found[path] = parts
        return found

    @cached_property
    def tied(self) -> dict[str, list[str]]:
        """The other paths of each tied parameter, by each of its paths."""
        found: dict[str, list[str]] = {}
        for places in self.survey.holders.values():
            # A module with two paths has tied parameters.
            paths = [path for place in places for path in self.survey.paths_of(place)]
            if len(paths) > 1:
                found |= {path: [other for other in paths if other != path] for path in paths}
        return found
