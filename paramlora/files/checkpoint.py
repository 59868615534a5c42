"""Save an adapter to one `.safetensors` file, and load it.

A file holds the factors as tensors and one metadata entry, described in `metadata.py`. Loading it
executes and unpickles nothing. If an adapter is of a kind of your own, import its class before you
load the file.
"""

import json
import os

from safetensors.torch import save as serialized
from torch import nn

from ..layers.install import check_tied
from ..site.survey import Survey
from ..stack.storage import settle, writes_files
from ..verbs.add import Activate
from ..verbs.summary import Summary
from ..wrappers import check_model, check_not_peft
from .base import check_base as check_same_base
from .base import checksums
from .metadata import ENTRY, describe, digest_of, read
from .plan import plan_sites
from .refresh import attach_or_refresh
from .safetensors_file import damaged, on_cpu, write_atomically
from .state import tensors_of


def save(model: nn.Module, path: str | os.PathLike[str], name: str | None = None) -> None:
    """Save an adapter to one `.safetensors` file which is sufficient for `load`.

    Saving is atomic: after a crash, `path` holds either the old file or the new one. If FSDP has
    sharded the model, all processes call `save`, and the first one writes. Each call reads the
    whole base for its checksums (0.23 s for 0.5 GB), unless the base is sharded.

    Args:
        model: a module with adapters.
        path: the file, in a folder that exists. An existing file is replaced.
        name: the adapter; by default the only one.

    Raises:
        AdapterNameError: the model has no adapter of this name; or no name is given, and the model
            has several adapters or none.
        FileNotFoundError: the folder does not exist.
        StateError: the model is on the meta device.
        TypeError: a kind of your own has a field that JSON cannot express.

    >>> import tempfile
    >>> import paramlora as pl
    >>> model = nn.Sequential(nn.Linear(4, 3))
    >>> _ = pl.attach(model, pl.LoRA(rank=2, alpha=4), name="digits")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     pl.save(model, f"{folder}/digits.safetensors", "digits")
    ...     pl.load(nn.Sequential(nn.Linear(4, 3)), f"{folder}/digits.safetensors").sites[0].scale
    2.0
    """
    settle(model)
    survey = Survey(model)
    name = survey.one(name)
    parts = survey.parts([name])
    state = tensors_of(parts)
    tensors = on_cpu(state)
    content = describe(parts, name)
    sharded = any(hasattr(parameter, "full_tensor") for parameter in model.parameters())
    content["base"] = {} if sharded else checksums(model)  # these would gather the whole base
    try:
        content["digest"] = digest_of(tensors, content)
    except TypeError as error:
        raise TypeError(
            f"cannot save adapter {name!r}: a spec's fields must be numbers, strings, booleans or "
            f"None ({error})"
        ) from error
    if writes_files(list(state.values())):
        # Not by safetensors' `save_file`, which makes files that only their owner can read.
        write_atomically(path, serialized(tensors, {"format": "pt", ENTRY: json.dumps(content)}))


def load(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    name: str | None = None,
    into: str | None = None,
    activate: Activate | None = None,
    finite: bool = True,
    check_base: bool = False,
) -> Summary:
    """Attach the adapter in a file, or copy its values into the attached adapter of that name.

    A new adapter is attached as by `attach`, with trainable factors and a frozen base. It is active
    if it is the model's first adapter, and switched off otherwise. An attached adapter of that name
    must have the same sites, kinds and shapes. Its values, settings and strengths are replaced, and
    nothing else changes. This also works if FSDP has sharded the model; then all processes call
    `load`.

    Args:
        model: a module with the tensors that the file names.
        path: a file that `save` wrote.
        name: the adapter's name in the model; by default its name in the file.
        into: the name of an attached LoRA, the slot, that takes the file's update instead. Ranks up
            to the slot's fit, and sites that the file lacks get no update. The slot's settings and
            strength stay, and a compiled model is not compiled again.
        activate: "only", "also" or "no", as in `attach`. None means "only" if the model has no
            adapter yet and "no" otherwise; for an adapter that is attached, it changes nothing.
        finite: whether to refuse NaN and infinite values. With False they load with a warning.
        check_base: whether to refuse a base with other values than the one that the adapter was
            saved with. It is False by default, because adapters are also used on purpose on a base
            that was cast, quantized or trained further, whose values differ.

    Returns:
        The model's summary.

    Raises:
        ValueError: both `name` and `into` are given.
        FileNotFoundError: the file does not exist.
        OSError: it cannot be read.
        CheckpointError: the file is damaged, was not written by paramlora, belongs to another
            model, does not fit the slot, or has values that are not finite; or `check_base` is True
            and the base differs, or is not known. The message names the file, the site or the
            first tensors that differ, and what was expected and found. The model does not change.
        AdapterNameError: the name is not valid, or belongs to an adapter with other sites, kinds
            or shapes; or there is no adapter `into`.
        StateError: the adapter of that name is merged, or another one is and `activate` is "only",
            or it is "also" and their order counts; or the model is on the meta device.
        TargetError: a tensor of the model is lazy and has no shape yet.

    >>> import tempfile
    >>> import paramlora as pl
    >>> model, other = nn.Sequential(nn.Linear(4, 3)), nn.Sequential(nn.Linear(4, 3))
    >>> _ = pl.attach(model, pl.LoRA(rank=2), name="digits")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     pl.save(model, f"{folder}/digits.safetensors", "digits")
    ...     pl.load(other, f"{folder}/digits.safetensors", name="numbers").sites[0].adapter
    'numbers'
    """
    check_model(model)
    if name is not None and into is not None:
        raise ValueError(f"into={into!r} is the adapter that takes the file's update; pass no name")
    tensors, content = read(path)
    name = content["name"] if name is None else name
    survey = Survey(model)
    refresh = into is not None or name in survey.names
    check_not_peft(survey.modules)
    planned = plan_sites(survey.places, tensors, content["sites"], path, refresh=refresh)
    check_tied(survey, [plan.place for plan in planned])
    # The digest is checked last, because the checks above can name the key or site that differs. It
    # also finds changed values, so it is checked before anything is attached.
    if digest_of(tensors, content) != content["digest"]:
        raise damaged(path, "its content does not match its digest")
    if check_base:
        check_same_base(model, content.get("base", {}), path)
    return attach_or_refresh(survey, planned, name, path, activate, finite, into)
