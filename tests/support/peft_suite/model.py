"""PEFT's interface for custom models, computed by paramlora; `peft_suite` runs PEFT's tests on it.

PEFT creates the first values of an adapter, in a copy of the base, and its folder is then loaded
with `load_peft`. LoHa, LoKr and IA3, whose folders are not read, are attached from their settings.
What cannot be expressed raises `NotExpressed` with a reason, which skips the test.

PEFT words its errors otherwise. `worded` raises PEFT's error in place of one of paramlora's, so
that a test that compares messages tests that the call was refused.
"""

import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import torch
from torch import nn

import paramlora as pl

from .attach import SPECS, check_expressed, from_peft, from_spec, load_folder, plain
from .expressed import NotExpressed, worded

_FACTOR = ".parametrizations."


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
        self.is_disabled = False

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
        if adapter_names is None or self.is_disabled:
            return self.base_model(*args, **kwargs)
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        names = list(dict.fromkeys(name for name in adapter_names if name != "__base__"))
        ids = torch.tensor([names.index(name) if name in names else -1 for name in adapter_names])
        try:
            with pl.routed(self.base, ids, *names):
                return self.base_model(*args, **kwargs)
        except (pl.ParamloraError, ValueError) as error:
            raise NotExpressed("the messages of PEFT for adapter_names") from error

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
        check_expressed(config)
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
        check_expressed(peft_config)
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

    # Switches and merging.

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
        before, self.is_disabled = self.is_disabled, True
        with pl.disabled(self.base):
            yield
        self.is_disabled = before
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
