"""The modules of a model as PEFT sees them."""

from torch import nn

from ..site.find import is_conv1d, walk
from .layout import CONVS, Part


def parts(model: nn.Module) -> dict[str, list[Part]]:
    """Return the sites of a model that PEFT can adapt too, by the path of the module there."""
    found: dict[str, list[Part]] = {}
    for path, module in walk(model):
        # PEFT cannot replace the model itself, and what it puts at an out_proj is never used.
        parent = model.get_submodule(path.rpartition(".")[0]) if path else None
        if path and not isinstance(parent, nn.MultiheadAttention):
            found[path] = _parts_of(path, module)
    return {path: its_parts for path, its_parts in found.items() if its_parts}


def _parts_of(path: str, module: nn.Module) -> list[Part]:
    if isinstance(module, nn.MultiheadAttention):
        return [
            Part(path, module, "in_proj_weight"),
            Part(path, module, "out_proj.weight", "base_layer.out_proj"),
        ]
    if isinstance(module, (nn.Linear, nn.Embedding, *CONVS)) or is_conv1d(module):
        return [Part(path, module, "weight")]
    return []


def is_linear(module: nn.Module) -> bool:
    """Return whether PEFT's "all-linear" means a module."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def shared(model: nn.Module) -> dict[str, list[str]]:
    """Return the tensors that a model has at several paths, by each path with its others."""
    paths: dict[int, list[str]] = {}
    for path, parameter in model.named_parameters(remove_duplicate=False):
        paths.setdefault(id(parameter), []).append(_plain(path))
    return {
        path: [other for other in same if other != path]
        for same in paths.values()
        for path in same
        if len(same) > 1
    }


def _plain(path: str) -> str:
    """Return a parameter's path without the list of parametrizations that stores it."""
    return path.replace("parametrizations.", "").removesuffix(".original")


def names(model: nn.Module) -> list[str]:
    """Return the paths of the modules that PEFT would see."""
    return [path for path, _ in walk(model) if path and "parametrizations" not in path.split(".")]
