"""Errors for names of other libraries, whose arguments and functions have other names here."""

import inspect
from collections.abc import Collection, Iterable
from typing import Any, NoReturn

from ..errors import nearest

# The names of other libraries, with ours.
_OURS = {
    "r": "rank",
    "lora_r": "rank",
    "lora_alpha": "alpha",
    "use_rslora": "rank_stabilized",
    "init_lora_weights": "init",
    "lora_dropout": "dropout",
    "target_modules": "targets",
    "target_parameters": "targets",
    "exclude_modules": "exclude",
    "adapter_name": "name",
    **{name: name for name in ("rank", "alpha", "dropout", "targets", "exclude", "name")},
}
_OF_ATTACH = ("targets", "exclude", "name")
_MAP = "a mapping from target to spec, as in {'q_proj': LoRA(rank=8), 'fc': LoRA(rank=4)}"
_OTHERWISE = {
    "use_dora": "use DoRA() as the spec",
    "modules_to_save": "map the module to a Delta(), as in {'q_proj': LoRA(), 'head': Delta()}",
    "bias": "map the biases to a Delta(), as in {'q_proj': LoRA(), '*.bias': Delta()}",
    "rank_pattern": f"give attach {_MAP}",
    "alpha_pattern": f"give attach {_MAP}",
    "layers_to_transform": "name the layers in the targets, as in 'layers.[0-3].*.q_proj'",
    "layers_pattern": "name the layers in the targets, as in 'layers.[0-3].*.q_proj'",
    "fan_in_fan_out": "layouts are found out; leave it out",
    "task_type": "models keep their class; leave it out",
    "inference_mode": "freeze(model) stops training; leave it out",
}
# The names of functions and classes of PEFT, minLoRA and loralib, and those of ours that
# `paramlora` does not import, by our names.
_FUNCTIONS = {
    "attach": "get_peft_model PeftModel add_adapter inject_adapter_in_model add_lora "
    "mark_only_lora_as_trainable",
    "detach": "delete_adapter unload remove_lora",
    "activate": "set_adapter select_lora",
    "disabled": "disable_adapter",
    "merge": "merge_adapter",
    "unmerge": "unmerge_adapter",
    "bake": "merge_and_unload merge_lora",
    "combine": "add_weighted_adapter",
    "load_peft": "load_adapter from_pretrained hotswap_adapter",
    "save_peft": "save_pretrained",
    "summary": "print_trainable_parameters get_layer_status",
    "parameters": "get_lora_params",
    "state_dict": "get_peft_model_state_dict get_lora_state_dict lora_state_dict",
    "load_state_dict": "set_peft_model_state_dict",
    "LoRA": "LoraConfig",
    "integrations.hub.push_to_hub": "push_to_hub",
    "integrations.hub.from_hub": "from_hub",
    "integrations.diffusers.load_diffusers": "load_diffusers",
    "integrations.diffusers.save_diffusers": "save_diffusers",
    "integrations.transformers.AdapterTrainer": "AdapterTrainer",
}


def our_name(name: str, known: Iterable[str]) -> str:
    """Return the end of a message that names our function for another library's, or the nearest."""
    ours = next((ours for ours, theirs in _FUNCTIONS.items() if name in theirs.split()), None)
    return nearest(name, known) if ours is None else f"; its name here is {ours}"


def check_fields(cls: type, given: Collection[str]) -> None:
    """Raise a TypeError if a kind is given an argument of another library."""
    foreign = [key for key in given if key in _OURS or key in _OTHERWISE]
    if not foreign:
        return
    known = inspect.signature(cls.__init__).parameters  # type: ignore[misc]
    if not any(p.kind is p.VAR_KEYWORD for p in known.values()):
        at_attach = f"pass the {{0}} to attach: attach(model, {cls.__name__}(...), {{0}}=...)"
        for key in [key for key in foreign if key not in known]:
            elsewhere = at_attach if _OURS.get(key) in _OF_ATTACH else "this kind has no {0}"
            _refuse(cls.__name__, key, known, elsewhere)


def check_attach_arguments(known: Collection[str], given: Collection[str]) -> None:
    """Raise a TypeError if `attach` is given an argument that it does not have."""
    for key in given:
        _refuse("attach", key, known, "write LoRA({0}=...) as the spec")


def _refuse(called: str, key: str, known: Collection[str], elsewhere: str) -> NoReturn:
    """Raise the TypeError for an unknown argument; `elsewhere` is used if ours is not known."""
    ours = _OURS.get(key)
    hint = f": {_OTHERWISE[key]}" if key in _OTHERWISE else nearest(key, known)
    if ours is not None:
        hint = f": write {ours}=" if ours in known else f": {elsewhere.format(ours)}"
    raise TypeError(f"{called}() has no argument {key!r}{hint}")


class SignatureOfInit:
    """The signature of a class that has a `__new__` for all arguments: that of its `__init__`."""

    def __get__(self, instance: Any, cls: type) -> inspect.Signature:
        full = inspect.signature(cls.__init__)  # type: ignore[misc]
        return full.replace(parameters=list(full.parameters.values())[1:])
