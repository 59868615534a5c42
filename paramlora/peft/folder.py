"""`save_peft` and `load_peft`: adapter folders as Hugging Face's PEFT writes and reads them.

A folder holds `adapter_config.json` and `adapter_model.safetensors`. The keys of the tensors are
`base_model.model.`, the path of a module and a suffix. Besides factors a folder can hold whole
tensors: trained biases, and trained modules (`modules_to_save`). Here these are `Delta`s.

`save_peft` raises an error before it writes anything if the format cannot express the adapter.
`load_peft` raises one before it attaches anything if paramlora does not support the folder.
Nothing is unpickled.
"""

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations

from ..errors import CheckpointError
from ..files.refresh import attach_or_refresh
from ..files.safetensors_file import on_cpu, read_tensors
from ..layers.install import PlannedSite
from ..site.place import check_shapes
from ..site.survey import Survey
from ..verbs.add import Activate
from ..verbs.summary import Summary
from ..wrappers import check_model, check_not_peft, inner
from .config_file import parse_config, read_config
from .disk import CONFIG, TENSORS, check_destination, check_files, write_folder
from .modules import PeftView
from .other_kinds import OTHER_TYPES, plan_other
from .patterns import cut_off
from .read import plan_folder, resolve_all_linear
from .whole import Folder
from .write import folder_content

_PREFIX = "base_model.model."
_TASKS = ("CAUSAL_LM", "SEQ_2_SEQ_LM", "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")
# By the ends of the class names of transformers.
_BY_NAME = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
}
_OUT_PROJ = ".base_layer.out_proj.lora_B.weight"


def save_peft(
    model: nn.Module,
    path: str | os.PathLike[str],
    name: str | None = None,
    *,
    base: str | None = None,
    task_type: str | None = None,
) -> None:
    """Save an adapter as a folder that PEFT reads: `PeftModel.from_pretrained(base, path)`.

    PEFT's format can express:

    - low-rank updates (`LoRA`, `DoRA`) of the weight of a Linear, Conv1d, Conv2d, Conv3d, Embedding
      or transformers' Conv1D, and of the `in_proj_weight` and `out_proj.weight` of a
      MultiheadAttention; the strength is multiplied into alpha;
    - a `LoRA` of any other parameter of two dimensions in a submodule, or of three with
      `batch_dims=1`, such as experts, by PEFT's `target_parameters`;
    - one of the kinds `OFT`, `HiRA` and `MiSS` at the weights of Linears, the first two also at
      those of Embeddings, if it is the adapter's only kind; a `LoRAXS` becomes a LoRA;
    - a `Delta` of a bias, as PEFT's `bias`;
    - a `Delta` of any other tensor: its module becomes one of `modules_to_save`, saved whole.

    An existing folder is replaced if it has only PEFT's two files. It is moved aside until the new
    folder is complete and in its place.

    Warns if the adapter updates the `out_proj` of a MultiheadAttention, because PEFT up to at least
    0.21.2 adds that update twice.

    Args:
        model: a module with adapters. Without them, it must be the model that PEFT is given.
        path: the folder. The folder around it must exist.
        name: the adapter; by default the only one.
        base: where PEFT's `AutoPeftModel` finds the base, a folder or an identifier; by default
            the one that a transformers model was loaded from.
        task_type: PEFT's name of the task, such as "CAUSAL_LM"; by default it is written for
            causal and sequence-to-sequence language models. With "SEQ_CLS" or "TOKEN_CLS", PEFT
            also trains the classifier of a model that it loads.

    Raises:
        AdapterNameError: the model has no adapter of this name; or no name is given, and the model
            has several adapters or none.
        ValueError: PEFT has no task of this name.
        TargetError: PEFT's format cannot express the adapter. The message names the tensor, and
            nothing is written.
        StateError: a tensor is sharded, or on the meta device.
        FileExistsError: the folder has other files, or is not a folder.
        FileNotFoundError: the folder around it does not exist.

    >>> import tempfile
    >>> import paramlora as pl
    >>> model = nn.Sequential(nn.Linear(4, 3))
    >>> _ = pl.attach(model, pl.LoRA(rank=2, alpha=4))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     pl.save_peft(model, f"{folder}/digits")
    ...     pl.load_peft(nn.Sequential(nn.Linear(4, 3)), f"{folder}/digits").sites[0].scale
    2.0
    """
    model = inner(check_model(model))
    path = Path(path).resolve()
    check_destination(path)
    config, tensors = folder_content(model, name)
    config |= _origin(model, base, task_type)
    copies = on_cpu(tensors)
    _warn_if_added_twice(tensors)
    write_folder(path, config, {_PREFIX + key: tensor for key, tensor in copies.items()})


def _origin(model: nn.Module, base: str | None, task_type: str | None) -> dict[str, str]:
    """Return the entries that say what the adapter belongs to, as far as they are known."""
    if task_type is None and hasattr(model, "prepare_inputs_for_generation"):
        class_name = type_before_parametrizations(model).__name__
        endings = (task for ending, task in _BY_NAME.items() if class_name.endswith(ending))
        task_type = next(endings, None)
    elif task_type not in (None, *_TASKS):
        raise ValueError(f"PEFT has no task_type {task_type!r}; it has {', '.join(_TASKS)}")
    base = base or getattr(getattr(model, "config", None), "name_or_path", None)
    entries = {"base_model_name_or_path": base, "task_type": task_type}
    return {key: value for key, value in entries.items() if isinstance(value, str) and value}


def load_peft(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    name: str = "default",
    into: str | None = None,
    activate: Activate | None = None,
    finite: bool = True,
) -> Summary:
    """Attach the adapter of a PEFT folder, or copy its values into the attached adapter.

    It is attached as by `load`, with trainable factors and a frozen base; it is active if it is the
    model's first adapter. Biases and modules that PEFT trained become `Delta`s. The patterns in a
    config are run as regular expressions, as PEFT runs them.

    Warns if the adapter updates the `out_proj` of a MultiheadAttention, because PEFT up to at least
    0.21.2 adds that update twice.

    Args:
        model: the base that PEFT was given, its modules under the same paths.
        path: a folder with `adapter_config.json` and `adapter_model.safetensors`.
        name: the adapter's name in the model.
        into, activate, finite: as in `load`.

    Returns:
        The model's summary.

    Raises:
        FileNotFoundError: the folder or one of its two files does not exist.
        CheckpointError: a file is damaged, belongs to another model, or has settings that
            paramlora does not support. The message names them, and the model does not change.
        AdapterNameError: the name is not valid, or belongs to an adapter with other sites, kinds
            or shapes; or there is no adapter `into`.
        StateError: the adapter of that name is merged, or another one is and `activate` is "only",
            or it is "also" and their order counts; or a tensor is on the meta device.
        TargetError: a tensor of the model is lazy and has no shape yet.

    >>> import tempfile
    >>> import paramlora as pl
    >>> model, other = nn.Sequential(nn.Linear(4, 3)), nn.Sequential(nn.Linear(4, 3))
    >>> _ = pl.attach(model, {"0.weight": pl.LoRA(rank=2), "0.bias": pl.Delta()})
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     pl.save_peft(model, f"{folder}/digits")
    ...     [row.kind for row in pl.load_peft(other, f"{folder}/digits").sites]
    ['LoRA', 'Delta']
    """
    model, path = inner(check_model(model)), Path(path)
    survey = Survey(model)
    check_files(path)
    content = parse_config((path / CONFIG).read_bytes(), path / CONFIG)
    state = _without_prefix(read_tensors(path / TENSORS)[0], path / TENSORS)
    planned = plan_content(survey, content, state, path, path / CONFIG)
    _warn_if_added_twice(state)
    return attach_or_refresh(survey, planned, name, path, activate, finite, into)


def plan_content(
    survey: Survey,
    content: Mapping[str, Any],
    state: Mapping[str, Tensor],
    path: Path,
    config: Path,
) -> list[PlannedSite]:
    """Return the factors that PEFT's settings and tensors have for a model, in its order.

    `path` and `config` are what the tensors and the settings were read from, for messages.
    """
    check_not_peft(survey.modules)
    check_shapes(survey.places)
    seen, settings = PeftView(survey), read_config(config, content)
    folder = Folder(path, content, resolve_all_linear(seen, settings), state, seen)
    with cut_off(path):
        planned = plan_other(folder) if content["peft_type"] in OTHER_TYPES else plan_folder(folder)
    order = {site: i for i, site in enumerate(seen.places)}
    return sorted(planned, key=lambda plan: order[plan.place.path])


def _without_prefix(tensors: Mapping[str, Tensor], file: Path) -> dict[str, Tensor]:
    foreign = [key for key in tensors if not key.startswith(_PREFIX)]
    if foreign:
        raise CheckpointError(
            f"{file} was not written by PEFT: its keys must start with {_PREFIX!r}, found "
            f"{', '.join(foreign[:3])}"
        )
    return {key.removeprefix(_PREFIX): tensor for key, tensor in tensors.items()}


def _warn_if_added_twice(tensors: Mapping[str, Tensor]) -> None:
    """Warn if PEFT adds an update in the adapter twice, so that its outputs differ from ours.

    PEFT runs a MultiheadAttention by merging both projections for the forward. For `out_proj` it
    adds the update to the weight, and then calls the `merge` of the layer that wraps `out_proj`,
    which adds it again: W + 2·s·BA. paramlora computes W + s·BA, as the format defines it. See
    https://github.com/huggingface/peft/pull/3774.
    """
    for key, tensor in tensors.items():
        if key.endswith(_OUT_PROJ) and tensor.any():
            module = f"{key.removesuffix(_OUT_PROJ)}.out_proj"
            warnings.warn(
                f"PEFT, up to at least 0.21.2, adds the update of '{module}.weight' twice (its "
                "pull request 3774); paramlora adds it once, as the file says. To compute what "
                f"such a PEFT computes: paramlora.scale(model.get_submodule({module!r}), 2)",
                UserWarning,
                stacklevel=3,
            )
