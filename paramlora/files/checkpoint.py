"""State dicts of adapters, and one `.safetensors` file for an adapter.

A file has the factors under `<site>.<factor>`, such as `fc1.weight.A`, and one metadata entry,
`paramlora`: JSON with the format's version, for each site the kind, its fields, the strength and
the tensor's shape, and a digest of all that and of the factors. Nothing in it is executed or
unpickled. Where a kind is not one of the library's, its class has to be imported before the file
is loaded.
"""

import json
import os

from safetensors.torch import save as serialized
from torch import nn

from ..errors import CheckpointError
from ..layers.install import check_tied
from ..site.names import names_of, sites_of
from ..site.storage import check_real, whole, writes_files
from ..verbs.summary import Summary
from .digest import digest
from .metadata import ENTRY, VERSION, describe, read
from .plan import planned
from .refresh import take
from .safetensors_file import write_atomically
from .state import state_dict


def save(model: nn.Module, path: str | os.PathLike[str], name: str = "default") -> None:
    """Save an adapter to one `.safetensors` file that says all that `load` needs.

    The file is written beside its place and moved there: a crash leaves the old one or the new.
    Where the model is sharded all processes call it, and the first one writes.

    Raises:
        AdapterNameError: no adapter of that name.
        FileNotFoundError: no such folder.
        TypeError: a kind of your own has a field that JSON cannot hold.
    """
    state = state_dict(model, name)
    for key, tensor in state.items():
        check_real(key, tensor)
    # Copies: safetensors refuses tensors that share memory.
    tensors = {
        key: whole(tensor).to("cpu", copy=True).contiguous() for key, tensor in state.items()
    }
    described = {
        path: describe(factors, site)
        for site in sites_of(model, name)
        for path, factors in site.parts(name).items()
    }
    content = {"version": VERSION, "name": name, "sites": described}
    try:
        content["digest"] = digest(tensors.items(), json.dumps(content))
    except TypeError as error:
        raise TypeError(
            f"cannot save adapter {name!r}: a spec's fields must be numbers, strings, booleans or "
            f"None ({error})"
        ) from error
    if writes_files(list(state.values())):
        # Not by safetensors' own save_file, whose files only their owner may read.
        write_atomically(path, serialized(tensors, {"format": "pt", ENTRY: json.dumps(content)}))


def load(model: nn.Module, path: str | os.PathLike[str], *, name: str | None = None) -> Summary:
    """Attach the adapter of a file, or refresh the one of that name that is attached.

    A new one is attached as `attach` does it: switched on, its factors trained, the base frozen.
    Into one of the same name, sites and shapes only the values and strengths are copied; that can
    be done in a model that is sharded, too, by all processes.

    Args:
        model: a module with the tensors that the file names.
        path: a file that `save` wrote.
        name: the adapter's name here; without one, its name in the file.

    Returns:
        The model's summary.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: the file is damaged, was not written by paramlora, or belongs to another
            model; the message names the file, the site, and the shapes expected and found. The
            model is then as it was.
        AdapterNameError: the name cannot be one, or belongs to an adapter of other sites, kinds
            or shapes.
        StateError: the adapter of that name is merged, or the model is on the meta device.
        TargetError: a tensor of the model is lazy and has no shape yet.
    """
    tensors, content = read(path)
    name = content["name"] if name is None else name
    found = planned(model, tensors, content["sites"], path, name in names_of(model))
    for plan in found:
        check_real(plan.place.path, plan.place.stored)
    check_tied(model, [plan.place for plan in found])
    # Last, because the checks before it say more.
    saved = content.pop("digest")
    if digest(tensors.items(), json.dumps(content)) != saved:
        raise CheckpointError(
            f"{path} is damaged: its digest is not that of what was saved; save the adapter again"
        )
    return take(model, found, name, path)
