"""PEFT's interface for custom models, computed by paramlora; `peft_suite` runs PEFT's tests on it.

PEFT creates the first values of an adapter, in a copy of the base, and its folder is then loaded
with `load_peft`. LoHa, LoKr and IA3, whose folders are not read, are attached from their settings.
What cannot be expressed raises `NotExpressed` with a reason, which skips the test.

PEFT words its errors otherwise. `worded` raises PEFT's error in place of one of paramlora's, so that
a test that compares messages tests that the call was refused.
"""

import copy
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations

import paramlora as pl
from paramlora.peft.config import Config

FOLDERS = {"LORA", "OFT", "HIRA", "MISS"}
SPECS = {"LOHA", "LOKR", "IA3"}
# The settings of these kinds that a spec expresses; others must have their default.
_EXPRESSED = {
    *("peft_type", "base_model_name_or_path", "task_type", "inference_mode", "target_modules"),
    *("exclude_modules", "modules_to_save", "r", "alpha", "decompose_factor", "decompose_both"),
    *("init_weights", "init_ia3_weights", "feedforward_modules", "peft_version", "fan_in_fan_out"),
}
_FACTOR = ".parametrizations."


class NotExpressed(Exception):  # noqa: N818
    """A test uses something of PEFT for which paramlora has no counterpart."""


@contextmanager
def worded(message: str) -> Iterator[None]:
    """Raise a ValueError with PEFT's message if paramlora refuses a call."""
    try:
        yield
    except pl.ParamloraError as error:
        raise ValueError(message) from error


class Tuner(nn.Module):
    """The part of PEFT's model that holds the base as `model`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)


class PeftModel(nn.Module):
    """A model with adapters of paramlora, with the methods of `peft.PeftModel`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.base_model = Tuner(model)
        self.peft_config: dict[str, Any] = {}
        self.active_adapters: list[str] = []

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if hasattr(peft.PeftModel, name) or name in ("vblora_vector_bank", "modules_to_save"):
                raise NotExpressed(f"PeftModel.{name}") from None
            return getattr(self.base_model.model, name)

    @property
    def base(self) -> nn.Module:
        return self.base_model.model

    @property
    def active_adapter(self) -> str:
        return self.active_adapters[0]

    @property
    def prefix(self) -> str:
        return _FACTOR

    @property
    def merged(self) -> list[str]:
        sites = pl.summary(self.base).sites if pl.names(self.base) else ()
        return list(dict.fromkeys(site.adapter for site in sites if site.merged))

    def get_base_model(self) -> nn.Module:
        return self.base

    def forward(self, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Any:
        if adapter_names is None:
            return self.base_model(*args, **kwargs)
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        names = list(dict.fromkeys(name for name in adapter_names if name != "__base__"))
        ids = torch.tensor([names.index(name) if name in names else -1 for name in adapter_names])
        with pl.routed(self.base, ids, *names):
            return self.base_model(*args, **kwargs)

    # Adapters: add, load, save, delete.

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: Any,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: Any = None,
        **options: Any,
    ) -> "PeftModel":
        self = cls(model)
        self.load_adapter(model_id, adapter_name, is_trainable, config, **options)
        self.set_adapter(adapter_name)
        if not is_trainable:
            pl.freeze(model)
        return self

    def load_adapter(
        self,
        model_id: Any,
        adapter_name: str,
        is_trainable: bool = False,
        config: Any = None,
        *,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
        torch_device: Any = None,
        device_map: Any = None,
        ignore_mismatched_sizes: bool = False,
    ) -> Any:
        del low_cpu_mem_usage, torch_device, device_map  # the time and place of loading
        if ignore_mismatched_sizes:
            raise NotExpressed("ignore_mismatched_sizes")
        config = config or peft.PeftConfig.from_pretrained(model_id)
        config.inference_mode = not is_trainable
        check_expressed(config, self)
        if config.peft_type in SPECS:
            file = Path(model_id, "adapter_model.safetensors")
            pl.load(self.base, file, name=adapter_name, finite=False)
        else:
            load_folder(self.base, model_id, adapter_name)
        self._added(adapter_name, config, autocast_adapter_dtype)
        if not is_trainable:
            pl.freeze(self.base, adapter_name)
            self.eval()
        return SimpleNamespace(missing_keys=[], unexpected_keys=[])

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: Any,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        del low_cpu_mem_usage
        if adapter_name in self.peft_config:
            raise ValueError(f"Adapter with name {adapter_name} already exists.")
        check_expressed(peft_config, self)
        create = from_spec if peft_config.peft_type in SPECS else from_peft
        config = create(self.base, plain(self.base), peft_config, adapter_name)
        self._added(adapter_name, config, autocast_adapter_dtype)
        if self.active_adapters:
            pl.freeze(self.base, adapter_name)

    def _added(self, name: str, config: Any, in_float32: bool) -> None:
        self.peft_config[name] = config
        if not in_float32:
            dtype = next(p for p in plain(self.base).parameters()).dtype
            for key, factor in self.base.named_parameters():
                if _FACTOR in key and f".{name}." in key:
                    factor.data = factor.data.to(dtype)

    def save_pretrained(
        self,
        save_directory: Any,
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        save_embedding_layers: Any = "auto",
    ) -> None:
        if save_embedding_layers != "auto":
            raise NotExpressed("save_embedding_layers")
        if not safe_serialization:
            raise NotExpressed("pickled files")
        for name in selected_adapters or list(self.peft_config):
            folder = Path(save_directory, *([] if name == "default" else [name]))
            folder.parent.mkdir(parents=True, exist_ok=True)
            self._save(name, folder)

    def _save(self, name: str, folder: Path) -> None:
        config = self.peft_config[name]
        if config.peft_type in SPECS:
            folder.mkdir(exist_ok=True)
            config.save_pretrained(folder)
            pl.save(self.base, folder / "adapter_model.safetensors", name)
            return
        # `save_peft` leaves folders alone that have other folders, such as a second adapter's.
        with tempfile.TemporaryDirectory() as scratch:
            pl.save_peft(self.base, Path(scratch, "new"), name)
            folder.mkdir(exist_ok=True)
            for file in Path(scratch, "new").iterdir():
                file.replace(folder / file.name)

    def delete_adapter(self, adapter_name: str) -> None:
        if adapter_name in self.merged:
            refused = f"Cannot delete adapter(s) ['{adapter_name}'] while they are merged. "
            refused += "Please unmerge them first."
        else:
            refused = f"Adapter {adapter_name} does not exist"
        with worded(refused):
            pl.detach(self.base, adapter_name)
        del self.peft_config[adapter_name]
        if adapter_name in self.active_adapters:
            self.active_adapters.remove(adapter_name)
            if not self.active_adapters and self.peft_config:
                self.set_adapter(next(iter(self.peft_config)))

    # Switches.

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        pl.activate(self.base, *names)
        pl.freeze(self.base)
        if not inference_mode:
            pl.unfreeze(self.base, *names)
        self.active_adapters = names

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        merged = self.merged
        if merged:
            pl.unmerge(self.base)
        with pl.disabled(self.base):
            yield
        if merged:
            pl.merge(self.base, *merged)

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False
    ) -> None:
        names = adapter_names or self.active_adapters
        if set(names) <= set(self.merged):
            warnings.warn("All adapters are already merged, nothing to do.", stacklevel=2)
            return
        if not self.merged:
            pl.activate(self.base, *names)  # PEFT merges an adapter whether it is on or off
        else:
            pl.enable(self.base, *names)
        if safe_merge:
            self._check_finite(names)
        pl.merge(self.base, *names)

    def _check_finite(self, names: list[str]) -> None:
        for tensor in pl.merged_state_dict(self.base).values():
            if not torch.isfinite(tensor).all():
                raise ValueError(
                    "NaNs detected in the merged weights. "
                    f"The adapter {names[0]} seems to be broken"
                )

    def unmerge_adapter(self) -> None:
        pl.unmerge(self.base)
        pl.activate(self.base, *self.active_adapters)

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        names = adapter_names or self.active_adapters
        if not self.merged:
            self.merge_adapter(names, safe_merge)
        others = set(pl.names(self.base)) - set(names)
        if others:
            pl.detach(self.base, *others)
        pl.bake(self.base)
        return self.base

    def unload(self) -> nn.Module:
        pl.detach(self.base)
        return self.base

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "svd",
        **options: Any,
    ) -> None:
        if options or combination_type != "cat":
            raise NotExpressed(f"add_weighted_adapter with {combination_type} {[*options]}")
        pl.combine(self.base, dict(zip(adapters, weights, strict=True)), name=adapter_name)
        self.peft_config[adapter_name] = self.peft_config[adapters[0]]


def get_peft_model(
    model: nn.Module,
    peft_config: Any,
    adapter_name: str = "default",
    autocast_adapter_dtype: bool = True,
    **options: Any,
) -> PeftModel:
    """Return a model with one adapter, as `peft.get_peft_model`."""
    if set(options) - {"low_cpu_mem_usage"}:
        raise NotExpressed(f"get_peft_model with {sorted(options)}")
    adapted = PeftModel(model)
    adapted.add_adapter(adapter_name, peft_config, autocast_adapter_dtype=autocast_adapter_dtype)
    adapted.set_adapter(adapter_name, peft_config.inference_mode)
    return adapted


def plain(model: nn.Module) -> nn.Module:
    """Return a copy of a model without its adapters."""
    copied = copy.deepcopy(model)
    if pl.names(copied):
        pl.unmerge(copied)
        pl.detach(copied)
    return copied


def check_expressed(config: Any, model: PeftModel) -> None:
    """Raise if paramlora has no counterpart of a method of PEFT or of its settings."""
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind not in FOLDERS | SPECS:
        raise NotExpressed(f"the method {kind}")
    if kind in SPECS:
        default = type(config)()
        given = {key for key, value in config.__dict__.items() if value != getattr(default, key)}
        if given - _EXPRESSED:
            raise NotExpressed(f"the settings {sorted(given - _EXPRESSED)} of {kind}")
    if config.peft_type != "LORA" and getattr(config, "modules_to_save", None):
        raise NotExpressed(f"modules_to_save of {kind}")


def from_peft(model: nn.Module, base: nn.Module, config: Any, name: str) -> Any:
    """Attach an adapter with the first values that PEFT gives it; return the settings."""
    wrapped = peft.get_peft_model(base, config, adapter_name=name)
    with tempfile.TemporaryDirectory() as scratch:
        wrapped.save_pretrained(scratch)
        load_folder(model, Path(scratch, *([] if name == "default" else [name])), name)
    return config


def load_folder(model: nn.Module, folder: Any, name: str) -> None:
    """Load a PEFT folder, which may hold values that are not finite."""
    try:
        pl.load_peft(model, folder, name=name, finite=False)
    except pl.CheckpointError as error:
        raise NotExpressed(f"refused: {_general(str(error), str(folder))}") from error


def _general(message: str, folder: str) -> str:
    """Return the part of an error message that does not depend on the case."""
    message = message.replace(folder, "").split("json", 1)[-1].strip()
    if "has settings that" in message:
        return f"the settings {', '.join(re.findall(r'(?<=[:,] )([a-z_]+)=', message))}"
    return re.sub(r"'[^']*'", "…", message)[:100]


def from_spec(model: nn.Module, base: nn.Module, config: Any, name: str) -> Any:
    """Attach a LoHa, LoKr or IA3 from PEFT's settings; draw its factors if PEFT would."""
    paths = _targets(base, config)
    specs: dict[str, pl.kinds.Spec] = {
        f"{path}.weight": _spec(config, base.get_submodule(path)) for path in paths
    }
    if config.peft_type == "IA3":
        # PEFT rescales outputs, biases included, and inputs of the feed-forward modules.
        for path in paths:
            if not _feeds(config, path) and getattr(base.get_submodule(path), "bias", None) is not None:
                specs[f"{path}.bias"] = pl.IA3()
        raise_if_bias(specs)
    pl.attach(model, specs, name=name, activate="only" if not pl.names(model) else "no")
    if not (getattr(config, "init_weights", True) and getattr(config, "init_ia3_weights", True)):
        with torch.no_grad():
            for factor in pl.parameters(model, name):
                factor.normal_() if config.peft_type == "IA3" else factor.normal_(std=0.3)
    return config


def raise_if_bias(specs: dict[str, Any]) -> None:
    """One vector of PEFT rescales an output with its bias; here they are two adapters."""
    if any(key.endswith(".bias") for key in specs):
        raise NotExpressed("one IA3 vector for a weight and its bias")


def _spec(config: Any, module: nn.Module) -> Any:
    path = getattr(module, "_shim_path", "")
    if config.peft_type == "LOHA":
        return pl.LoHa(rank=config.r, alpha=config.alpha)
    if config.peft_type == "LOKR":
        return pl.LoKr(
            rank=config.r,
            alpha=config.alpha,
            factor=config.decompose_factor,
            decompose_both=config.decompose_both,
        )
    return pl.IA3(dim=_dim(module, _feeds(config, path)))


def _dim(module: nn.Module, feeds: bool) -> int:
    turned = type_before_parametrizations(module).__name__ in ("Conv1D", "Embedding")
    return int(feeds != turned)


def _feeds(config: Any, path: str) -> bool:
    given = config.feedforward_modules or []
    return Config(given if isinstance(given, str) else list(given)).targets(path) if given else False


def _targets(base: nn.Module, config: Any) -> list[str]:
    given = config.target_modules
    if given is None:
        raise ValueError("Please specify `target_modules` in `peft_config`")
    selects = Config(
        given if isinstance(given, str) else list(given),
        exclude_modules=list(config.exclude_modules or []),
    ).targets
    paths = [path for path, _ in base.named_modules() if selects(path)]
    for path in paths:
        base.get_submodule(path)._shim_path = path  # type: ignore[assignment]
    return paths


def inject_adapter_in_model(
    peft_config: Any, model: nn.Module, adapter_name: str = "default", **options: Any
) -> nn.Module:
    """Attach an adapter to a model without wrapping it."""
    if any(options.values()):
        raise NotExpressed(f"inject_adapter_in_model with {sorted(options)}")
    get_peft_model(model, peft_config, adapter_name)
    return model


def get_peft_model_state_dict(model: Any, *_: Any, **__: Any) -> dict[str, Tensor]:
    """Return copies of the tensors of the active adapter."""
    if isinstance(model, PeftModel):
        return pl.state_dict(model.base, model.active_adapter)
    return {key: tensor.clone() for key, tensor in pl.state_dict(model, "default").items()}


def set_peft_model_state_dict(model: nn.Module, state: dict[str, Tensor], *_: Any, **__: Any) -> Any:
    pl.load_state_dict(model, state, name="default")
    return SimpleNamespace(missing_keys=[], unexpected_keys=[])


def get_base_model_state_dict(model: PeftModel) -> dict[str, Tensor]:
    return pl.base_state_dict(model.base)


def set_base_model_state_dict(model: PeftModel, state: dict[str, Tensor], **_: Any) -> Any:
    pl.load_base_state_dict(model.base, state)
    return SimpleNamespace(missing_keys=[], unexpected_keys=[])


def not_expressed(name: str) -> Callable[..., Any]:
    """Return a function of PEFT that has no counterpart."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise NotExpressed(f"peft's {name}")

    return refuse


class _Inner(type):
    """A class of PEFT's layers, for which paramlora has none: a layer keeps its own."""

    def __instancecheck__(cls, instance: object) -> bool:
        kinds = ("BaseTunerLayer", "LoraLayer")
        factors = dict(instance.named_parameters()) if isinstance(instance, nn.Module) else {}
        # Of the module's own tensors: PEFT's wrappers hold one module each.
        own = [key for key in factors if key.startswith("parametrizations.")]
        if any(cls.__name__ in kinds or key.endswith(".D") for key in own):
            raise NotExpressed(f"the layer class {cls.__name__}")
        return False


def inner_class(name: str) -> type:
    """Return a stand-in for one of PEFT's layer classes; testing for it raises."""
    return _Inner(name, (), {})
