"""Files of diffusers and of kohya's programs: `save_diffusers` and `load_diffusers`.

    format      the key of a factor                 alpha
    diffusers   unet.conv_in.lora_A.weight          in PEFT's settings, as metadata
    kohya       lora_unet_conv_in.lora_down.weight  lora_unet_conv_in.alpha

A key begins with the name of the model in a pipeline. A model's own `save_lora_adapter` leaves it
out. Older files of diffusers have "lora.down", or "to_q_lora.down" for "to_q.lora_A". All of these
are read. diffusers computes with PEFT, so the files hold what `paramlora.peft` can write.

Nothing is unpickled. This file does not import diffusers.
"""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as serialized
from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations

from ..errors import CheckpointError, TargetError, some
from ..files.refresh import attach_or_refresh
from ..files.safetensors_file import on_cpu, read_tensors, write_atomically
from ..peft.config_file import Content, config_content, parse_config, read_config
from ..peft.folder import plan_content
from ..peft.modules import PeftView
from ..peft.write import folder_content
from ..site.survey import Survey
from ..verbs.add import Activate
from ..verbs.summary import Summary
from ..wrappers import check_model, inner

_FILE, _ENTRY = "pytorch_lora_weights.safetensors", "lora_adapter_metadata"
# How keys begin in diffusers' format, and in kohya's, by the name of the model in a pipeline.
_PREFIXES: dict[str, tuple[str, ...]] = {
    "unet": ("unet.", "lora_unet_"),
    "transformer": ("transformer.", "lora_unet_"),
    "transformer_2": ("transformer_2.",),
    "text_encoder": ("text_encoder.", "lora_te_", "lora_te1_"),
    "text_encoder_2": ("text_encoder_2.", "lora_te2_"),
}
_KEY = re.compile(
    r"(.+?)(?:[._]lora(?:_linear_layer)?[._](A|B|down|up|magnitude_vector)(?:\.weight)?)?(\.alpha)?"
)
_ENDS = {"A": "A.weight", "down": "A.weight", "B": "B.weight", "up": "B.weight"}
# diffusers, up to at least 0.42.1, does not find these modules by kohya's keys, without dots.
_LOST = re.compile(r".*\b(add_embedding|class_embedding|cond_proj|encoder_hid_proj|add_._proj)\b.*")


def save_diffusers(
    models: nn.Module | Mapping[str, nn.Module],
    path: str | os.PathLike[str],
    name: str | None = None,
    *,
    format: str = "diffusers",
) -> None:
    """Save an adapter as a file for `load_lora_weights` and `load_lora_adapter` of diffusers.

    It can have `LoRA`s, and in diffusers' format `DoRA`s, of Linears and convolutions. Ranks and
    alphas may differ by layer. A strength is multiplied into alpha.

    In diffusers' format alpha is in the metadata. A pipeline reads it; a model does so in
    `load_lora_adapter(path, prefix="unet", use_safetensors=True)`. Without `use_safetensors=True`,
    and before diffusers 0.34, alpha silently counts as the rank. In kohya's format all layers have
    one alpha, and B is rescaled if theirs differ, because diffusers misreads several ones.

    Args:
        models: a module with adapters, or several by their names in a pipeline, such as "unet" and
            "text_encoder". A single module is named by its class. The name "" omits the prefix.
        path: the file, or a folder for `pytorch_lora_weights.safetensors`.
        name: the adapter; by default the only one.
        format: "diffusers", or "kohya" for a U-Net.

    Raises:
        AdapterNameError, StateError, TargetError: as `save_peft`. Nothing is written then.
        ValueError: there is no such format, or not for these models.

    >>> import tempfile
    >>> import paramlora as pl
    >>> unet, other = nn.Sequential(nn.Linear(4, 3)), nn.Sequential(nn.Linear(4, 3))
    >>> _ = pl.attach(unet, pl.LoRA(rank=2, alpha=4))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_diffusers({"unet": unet}, folder)
    ...     load_diffusers(other, folder, component="unet").sites[0].scale
    2.0
    """
    if not (isinstance(models, Mapping) and models):
        model = check_model(models)
        models = {_component(model): model}
    if format != "diffusers" and (format, *models) != ("kohya", "unet"):
        raise ValueError(
            "format must be 'diffusers', or 'kohya' for a U-Net alone; got "
            f"{format!r} for {', '.join(map(repr, models))}"
        )
    tensors: dict[str, Tensor] = {}
    settings: dict[str, Any] = {}
    for component, model in models.items():
        config, state = _content(inner(check_model(model)), name, format)
        prefix = component and f"{component}."
        if format == "kohya":
            prefix, config, state = "", {}, _to_kohya(config, state)
        tensors |= {prefix + key: tensor for key, tensor in on_cpu(state).items()}
        settings |= {prefix + key: value for key, value in config.items()}
    metadata = {"format": "pt"} | ({_ENTRY: json.dumps(settings)} if settings else {})
    write_atomically(_file(path), serialized(tensors, metadata))


def load_diffusers(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    name: str = "default",
    into: str | None = None,
    component: str | None = None,
    pipeline: Any = None,
    activate: Activate | None = None,
    finite: bool = True,
) -> Summary:
    """Attach the adapter that a file of diffusers or kohya has for one model of a pipeline.

    It is attached as by `load_peft`. Keys of other models of the pipeline are skipped.

    Args:
        model: the model, without another library's adapters.
        path: the `.safetensors` file, or a folder with `pytorch_lora_weights.safetensors`.
        name, into, activate, finite: as in `load_peft`.
        component: the name of the model in the pipeline; by default its class gives it.
        pipeline: a pipeline class of diffusers, whose `lora_state_dict` first converts the keys.
            Files of SDXL, SD 3 and Flux with the original names of the modules need it.

    Returns:
        The model's summary.

    Raises:
        CheckpointError: the file is damaged, belongs to another model, or has something that
            paramlora does not support. The message names it, and the model does not change.
        AdapterNameError, FileNotFoundError, StateError, TargetError: as `load_peft`.
    """
    model, path = inner(check_model(model)), _file(path)
    survey = Survey(model)
    tensors, metadata = read_tensors(path)
    if pipeline is not None:
        # It returns the tensors, for U-Nets the alphas, and metadata, which it does not get here.
        tensors, *alphas, _ = pipeline.lora_state_dict(
            tensors, unet_config=getattr(model, "config", None), return_lora_metadata=True
        )
        tensors = {**tensors, **(alphas[0] if alphas and alphas[0] else {})}
    component = _component(model) if component is None else component
    settings = _part(parse_config(metadata.get(_ENTRY, "{}"), path), component)
    content, state = _read(_part(tensors, component), settings, model, path)
    planned = plan_content(survey, content, state, path, path)
    return attach_or_refresh(survey, planned, name, path, activate, finite, into)


def _file(path: str | os.PathLike[str]) -> Path:
    return Path(path, _FILE) if Path(path).is_dir() else Path(path)


def _component(model: nn.Module) -> str:
    """Return the usual name of a model in a pipeline."""
    name = type_before_parametrizations(inner(model)).__name__
    text = "TextModel" in name or name.endswith("EncoderModel")
    return "unet" if "UNet" in name else "text_encoder" if text else "transformer"


def _content(model: nn.Module, name: str | None, format: str) -> Content:
    """Return PEFT's settings and tensors of an adapter, or raise if diffusers cannot read them."""
    name = Survey(model).one(name)
    config, state = folder_content(model, name)
    paths = _paths(model)
    for key in state:
        lost = format == "kohya" and (config.get("use_dora") or _LOST.fullmatch(key))
        if lost or _peft_key(key, paths) != key:
            raise TargetError(
                f"diffusers cannot read {key!r} of adapter {name!r} in the format {format!r}; "
                "detach it from there, write another format, or use paramlora.save"
            )
    config.pop("inference_mode")  # diffusers' own files leave the factors trainable
    return config, state


def _paths(model: nn.Module) -> dict[str, str]:
    """Return the paths of the modules that PEFT adapts, by themselves and by kohya's names."""
    paths = list(PeftView(Survey(model)).parts)
    flat = [_flat(path) for path in paths]
    unique = {key: path for key, path in zip(flat, paths, strict=True) if flat.count(key) == 1}
    return unique | {path: path for path in paths}


def _flat(path: str) -> str:
    # Before version 5 of transformers, the layers of a CLIPTextModel were in its `text_model`.
    return path.replace(".processor", "").replace(".", "_").removeprefix("text_model_")


def _peft_key(key: str, paths: Mapping[str, str]) -> str | None:
    """Return PEFT's key for the key of a file, or None if no module here has such a factor.

    >>> _peft_key("attn.processor.to_q_lora.down.weight", {"attn_to_q": "attn.to_q"})
    'attn.to_q.lora_A.weight'
    >>> _peft_key("attn_to_q.alpha", {"attn_to_q": "attn.to_q"})
    'attn.to_q.lora_alpha'
    """
    module, factor, alpha = match.groups() if (match := _KEY.fullmatch(key)) else (key, "", "")
    # `to_out.0` was `to_out` in old files.
    found = paths.get(module) or paths.get(_flat(module)) or paths.get(f"{_flat(module)}_0")
    end = "alpha" if alpha else _ENDS.get(factor, factor)
    return f"{found}.lora_{end}" if found and end else None


def _to_kohya(content: Mapping[str, Any], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return kohya's tensors for a U-Net, with one alpha for all layers.

    diffusers, up to at least 0.42.1, ignores that an attention layer has another alpha than most.
    """
    config = read_config(Path(_FILE), content)
    alpha = torch.tensor(float(config.lora_alpha or 1))
    tensors: dict[str, Tensor] = {}
    for key, tensor in state.items():
        path, _, end = key.partition(".lora_")
        flat = "lora_unet_" + path.replace(".", "_")
        if end == "A.weight":
            tensors |= {f"{flat}.lora_down.weight": tensor, f"{flat}.alpha": alpha}
        else:
            ratio = config.alpha(path) * (config.rank(path) ** 0.5 if config.use_rslora else 1)
            tensors[f"{flat}.lora_up.weight"] = tensor * (ratio / alpha.item())
    return tensors


def _part(entries: Mapping[str, Any], component: str) -> dict[str, Any]:
    """Return the entries of one model without its prefix, and without those of other models."""
    mine = _PREFIXES.get(component, (component and f"{component}.",))
    others = tuple({prefix for known in _PREFIXES.values() for prefix in known} - {*mine})
    start = "^(" + "|".join(map(re.escape, mine)) + ")"
    return {
        re.sub(start, "", key): entry
        for key, entry in entries.items()
        if key.startswith(mine) or not key.startswith(others)
    }


def _read(
    tensors: dict[str, Any], settings: dict[str, Any], model: nn.Module, path: Path
) -> Content:
    """Return the settings and tensors that a PEFT folder of the same adapter has.

    Without settings, a missing alpha is the rank, as in diffusers.
    """
    paths = _paths(model)
    keys = {key: _peft_key(key, paths) for key in tensors}
    state = {ours: tensors[key] for key, ours in keys.items() if ours}
    ranks = {key[:-14]: len(state[key]) for key in state if key.endswith(".lora_A.weight")}
    alphas = {key[:-11]: state.pop(key) for key in [*state] if key.endswith(".lora_alpha")}
    unknown = [key for key, ours in keys.items() if ours is None]
    unknown += [
        f"{key}.alpha"
        for key in alphas
        if key not in ranks or torch.as_tensor(alphas[key]).numel() != 1
    ]
    if len(state) + len(alphas) < sum(ours is not None for ours in keys.values()):
        raise CheckpointError(f"{path} names a factor in two ways, as diffusers and as kohya")
    if unknown or not ranks:
        found = f"has {some(unknown)}, which no module here takes" if unknown else "has no factors"
        raise CheckpointError(
            f"{path} does not fit this model: it {found}; component= names another model of the "
            "pipeline, and pipeline= converts other names of modules"
        )
    targets = {owner: (rank, float(alphas.get(owner, rank))) for owner, rank in ranks.items()}
    use_dora = any(key.endswith("magnitude_vector") for key in state)
    return settings or config_content(targets, use_dora=use_dora), state
