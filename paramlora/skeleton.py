"""A model with the tensors that an adapter's file adapts, and no others, to load the file into.

The values of its tensors are not set, so nothing that depends on them may be computed.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from .errors import CheckpointError, some
from .files.metadata import read_whole
from .files.safetensors_file import read_tensors
from .peft.config_file import parse_config, read_config
from .peft.disk import CONFIG, TENSORS, check_files

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_PEFT = "base_model.model."
_KEY = re.compile(r"(.+)\.lora_(embedding_)?([AB])(?:\.weight)?")
# A weight's module, as the name of its class, and its shape.
_Shapes = dict[str, tuple[str, tuple[int, ...]]]


def skeleton(path: Path, component: str = "") -> nn.Module:
    """Return a model for the adapter in a file of `save`, or in a folder of `save_peft`.

    If a component of a pipeline is named, the file is one of diffusers.

    A matrix that is called "weight" becomes that of a Linear, a larger tensor that of a
    convolution. Files do not tell a Linear from transformers' Conv1D.

    Raises:
        OSError: the file cannot be read.
        CheckpointError: it is damaged, or a model is needed to load it.
    """
    if component:
        shapes = _of_factors(path, f"{component}.", read_tensors(path)[0])
    else:
        shapes = _in_folder(path) if path.is_dir() else _in_file(path)
    root = nn.Module()
    for tensor, (_, shape) in shapes.items():
        *modules, name = tensor.split(".")
        owner, prefix = root, ""
        for module in modules:
            prefix += f"{module}."
            if module not in owner._modules:
                owner.add_module(module, _layer(*shapes.get(f"{prefix}weight", ("", ()))))
            owner = owner.get_submodule(module)
        if owner._parameters.get(name) is None:  # a Linear without a bias has None
            owner.register_parameter(name, nn.Parameter(torch.empty(shape)))
    return root


def _layer(kind: str, shape: tuple[int, ...]) -> nn.Module:
    """Return a layer with a weight of this shape, whose memory is not touched."""
    with torch.device("meta"):
        if kind == "Embedding":
            layer: nn.Module = nn.Embedding(shape[0], shape[1])
        elif len(shape) == 2:
            layer = nn.Linear(shape[1], shape[0], bias=False)
        elif 3 <= len(shape) <= 5:
            layer = _CONVOLUTIONS[len(shape) - 3](shape[1], shape[0], shape[2:], bias=False)  # type: ignore[arg-type]
        else:
            layer = nn.Module()
    return layer.to_empty(device="cpu")


def _in_file(path: Path) -> _Shapes:
    """Return the tensors that a file of `save` adapts."""
    sites = read_whole(path)[1]["sites"]
    return {site.partition("[")[0]: ("", tuple(entry["shape"])) for site, entry in sites.items()}


def _in_folder(path: Path) -> _Shapes:
    """Return the tensors that a PEFT folder of plain LoRA adapts."""
    check_files(path)
    content = parse_config((path / CONFIG).read_bytes(), path / CONFIG)
    config = read_config(path / CONFIG, content)
    of_base = config.use_dora or config.modules_to_save or config.target_parameters
    of_kind = content["peft_type"] != "LORA" or config.init != "kaiming"
    if of_base or of_kind or content.get("fan_in_fan_out"):
        raise CheckpointError(f"{path} needs its base, because of its settings: pass --model")
    return _of_factors(path, _PEFT, read_tensors(path / TENSORS)[0])


def _of_factors(path: Path, prefix: str, tensors: Mapping[str, Tensor]) -> _Shapes:
    """Return the tensors that pairs of A and B adapt, by their keys after a prefix."""
    own = {key[len(prefix) :]: t for key, t in tensors.items() if key.startswith(prefix)}
    others = [key for key, t in own.items() if not _KEY.fullmatch(key) or t.dim() < 2]
    others += [key for key in own if ".base_layer." in key]
    how = "pass --model" if prefix == _PEFT else "load it in Python, by load_diffusers"
    if not own:
        raise CheckpointError(f"{path} has no key that begins with {prefix!r}: {how}")
    if others:
        raise CheckpointError(f"{path} needs its base, because of {some(others)}: {how}")
    shapes: _Shapes = {}
    for key, A in own.items():
        match = _KEY.fullmatch(key)
        if match and match[3] == "A":
            B = own.get(key[: match.start(3)] + "B" + key[match.end(3) :], A)
            kind = "Embedding" if match[2] else ""
            shape = (A.shape[1], len(B)) if kind else (len(B), *A.shape[1:])
            shapes[f"{match[1]}.weight"] = kind, shape
    return shapes
