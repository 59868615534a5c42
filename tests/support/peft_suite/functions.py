"""PEFT's functions on models with adapters of paramlora."""

from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn

import paramlora as pl

from .expressed import NotExpressed
from .model import PeftModel

__all__ = ["PeftModel"]


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


def set_peft_model_state_dict(
    model: nn.Module, state: dict[str, Tensor], *_: Any, **__: Any
) -> Any:
    pl.load_state_dict(model, state, name="default")
    return SimpleNamespace(missing_keys=[], unexpected_keys=[])


def get_base_model_state_dict(model: PeftModel) -> dict[str, Tensor]:
    return pl.base_state_dict(model.base)


def set_base_model_state_dict(model: PeftModel, state: dict[str, Tensor], **_: Any) -> Any:
    pl.load_base_state_dict(model.base, state)
    return SimpleNamespace(missing_keys=[], unexpected_keys=[])
