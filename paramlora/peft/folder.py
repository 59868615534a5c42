"""Folders as Hugging Face's PEFT writes and reads them, both ways.

A folder holds `adapter_config.json` and `adapter_model.safetensors`, whose keys are
`base_model.model.`, the path of a module and a suffix. Beside factors it can hold whole tensors:
biases that were trained, and modules that were (`modules_to_save`); here those are `Delta`s. What
PEFT cannot say is refused before anything is written, and what is not carried out here before
anything is attached. Nothing is unpickled.
"""

import json
import os
import shutil
import uuid
import warnings
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save as serialized
from torch import Tensor, nn

from ..errors import CheckpointError
from ..files.refresh import take
from ..files.safetensors_file import read_tensors, write_atomically
from ..layers.install import check_whole
from ..site.names import sites_of
from ..site.place import check_shapes, places
from ..site.storage import check_real
from ..verbs.summary import Summary
from .config_file import read
from .disk import CONFIG, TENSORS, check_files, check_place, swap
from .read import planned
from .write import exported

_PREFIX = "base_model.model."
_OUT_PROJ = ".base_layer.out_proj.lora_B.weight"


def save_peft(model: nn.Module, path: str | os.PathLike[str], name: str = "default") -> None:
    """Save an adapter as a folder that PEFT reads: `PeftModel.from_pretrained(base, path)`.

    Low-rank updates of the weights of Linear, Conv1d, Conv2d, Conv3d, Embedding and transformers'
    Conv1D become PEFT's, and so do those of `in_proj_weight` and `out_proj.weight` of a
    MultiheadAttention; their strength goes into alpha. A `Delta` of a bias is saved by PEFT's
    `bias`; one of any other tensor makes its module one of `modules_to_save`, saved whole.

    The folder appears at once, whole. One that is there is replaced where it has nothing but such
    two files: the old one moves aside, and goes when the new one has its place.

    Warns of an update of `out_proj` in a MultiheadAttention, which PEFT to 0.21.2 adds twice.

    Args:
        model: a module with adapters, the very one that PEFT is to be given without them.
        path: the folder, in one that exists.
        name: the adapter.

    Raises:
        AdapterNameError: no adapter of that name.
        TargetError: the adapter has what PEFT cannot say; the message names the tensor. Nothing is
            written then.
        StateError: a tensor is sharded over processes, or on the meta device without values.
        FileExistsError: the folder has other files, or is none.
        FileNotFoundError: there is no folder to put it in.

    >>> import tempfile
    >>> import paramlora as pl
    >>> model = nn.Sequential(nn.Linear(4, 3))
    >>> _ = pl.attach(model, pl.LoRA(rank=2, alpha=4))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     pl.save_peft(model, f"{folder}/digits")
    ...     pl.load_peft(nn.Sequential(nn.Linear(4, 3)), f"{folder}/digits").sites[0].scale
    2.0
    """
    path = Path(path).resolve()
    check_place(path)
    check_whole(sites_of(model, name))
    config, tensors = exported(model, name)
    for key, tensor in tensors.items():
        check_real(key, tensor)
    # Copies: safetensors refuses tensors that share memory.
    _warn_of_twice(tensors)
    copies = {
        _PREFIX + key: tensor.detach().to("cpu", copy=True).contiguous()
        for key, tensor in tensors.items()
    }
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    beside.mkdir()
    try:
        write_atomically(beside / TENSORS, serialized(copies, {"format": "pt"}))
        write_atomically(beside / CONFIG, json.dumps(config, indent=2).encode())
        swap(beside, path)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def load_peft(model: nn.Module, path: str | os.PathLike[str], *, name: str = "default") -> Summary:
    """Attach the adapter of a folder that PEFT wrote, or refresh the one of that name.

    It is attached as `load` does it: switched on, its factors trained, the base frozen. Biases and
    modules that PEFT trained become `Delta`s. The patterns in a config are run as regular
    expressions, as PEFT does it.

    Warns of an update of `out_proj` in a MultiheadAttention, which PEFT to 0.21.2 adds twice.

    Args:
        model: the base that PEFT was given, its modules under the same paths.
        path: a folder with `adapter_config.json` and `adapter_model.safetensors`.
        name: the adapter's name here.

    Returns:
        The model's summary.

    Raises:
        FileNotFoundError: no such folder, or one of the two files is not in it.
        CheckpointError: a file is damaged, belongs to another model, or has settings that are not
            carried out here; the message names them. The model is then as it was.
        AdapterNameError: the name cannot be one, or belongs to an adapter of other sites, kinds
            or shapes.
        StateError: the adapter of that name is merged, or a tensor is on the meta device.
        TargetError: a tensor of the model is lazy and has no shape yet.
    """
    path = Path(path)
    check_shapes(places(model))
    check_files(path)
    config = read(path / CONFIG)
    tensors, _ = read_tensors(path / TENSORS)
    foreign = [key for key in tensors if not key.startswith(_PREFIX)]
    if foreign:
        raise CheckpointError(
            f"{path / TENSORS} is no file of PEFT's: keys there start with {_PREFIX!r}, and "
            f"{', '.join(foreign[:3])} does not"
        )
    state = {key.removeprefix(_PREFIX): tensor for key, tensor in tensors.items()}
    found = planned(model, config, state, path)
    for plan in found:
        check_real(plan.place.path, plan.place.stored)
    _warn_of_twice(state)
    return take(model, found, name, path)


def _warn_of_twice(tensors: Mapping[str, Tensor]) -> None:
    """Warn of a defect of PEFT's, by which it computes something else than its own files say.

    It is there in 0.21.2, from the start: https://github.com/huggingface/peft/pull/3774.
    """
    for key, tensor in tensors.items():
        if key.endswith(_OUT_PROJ) and tensor.any():
            module = f"{key.removesuffix(_OUT_PROJ)}.out_proj"
            warnings.warn(
                f"PEFT, up to 0.21.2 at least, adds the update of '{module}.weight' twice (pull "
                "request 3774 there); here it is added once, as the file says. For what such a "
                f"PEFT computes: paramlora.scale(model.get_submodule({module!r}), 2)",
                UserWarning,
                stacklevel=3,
            )
