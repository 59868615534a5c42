"""PEFT folders that cannot be loaded: each error word by word, with the model unchanged."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import paramlora as pl
from paramlora import CheckpointError, LoRA
from tests.support.helpers import refuses
from tests.support.peft_layers import PREFIX, attached, net


def set_config(**settings: Any) -> Callable[[dict[str, Any], dict[str, Tensor]], None]:
    return lambda config, tensors: config.update(settings)


def set_tensor(
    key: str, value: Tensor | None
) -> Callable[[dict[str, Any], dict[str, Tensor]], None]:
    def change(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        if value is None:
            del tensors[PREFIX + key]
        else:
            tensors[PREFIX + key] = value

    return change


UNSUPPORTED = "{path}/adapter_config.json has settings that paramlora does not support: "


DAMAGED = "{path}/adapter_config.json is damaged: "


# A change of a folder, and the message of loading it.
CHANGES: dict[str, tuple[Callable[[dict[str, Any], dict[str, Tensor]], Any], str]] = {
    "another method": (
        set_config(peft_type="LOHA"),
        "{path}/adapter_config.json has peft_type 'LOHA'; only 'LORA', 'OFT', 'HIRA' "
        "and 'MISS' can be loaded",
    ),
    "repeated layers": (
        set_config(layer_replication=[[0, 2]]),
        UNSUPPORTED + "layer_replication=[[0, 2]]",
    ),
    "quantized": (set_config(use_qalora=True), UNSUPPORTED + "use_qalora=True"),
    "tokens": (
        set_config(trainable_token_indices=[3]),
        UNSUPPORTED + "trainable_token_indices=[3]",
    ),
    "a raw parameter of the model itself": (
        set_config(target_parameters=["gain"]),
        "{path} adapts 'gain', but PEFT cannot adapt a parameter of the model itself, only those "
        "of submodules",
    ),
    "a raw parameter of one dimension": (
        set_config(target_parameters=["norm.weight"]),
        "{path} adapts 'norm.weight', but PEFT adapts the weights of [...]",
    ),
    "a parameter of an adapted layer": (
        set_config(target_parameters=["fc.weight"]),
        "{path} adapts 'fc.weight', but PEFT adapts its module as a layer, and then no raw "
        "parameter of it",
    ),
    "a parameter that is read without a call": (
        set_config(target_parameters=["mha.out_proj.weight"]),
        "{path} adapts 'mha.out_proj.weight', but an attention reads it without a call of its "
        "module, so PEFT has no effect",
    ),
    "a raw parameter by DoRA": (
        set_config(target_parameters=["rnn.weight_ih_l0"], use_dora=True),
        "{path} adapts 'rnn.weight_ih_l0', but PEFT adapts the weights of [...]",
    ),
    "a raw parameter that starts from the base": (
        set_config(target_parameters=["last_fc.weight"], init_lora_weights="pissa"),
        "{path} adapts 'last_fc.weight', but init_lora_weights 'pissa' is supported for LoRA on a "
        "Linear only",
    ),
    "a raw parameter without tensors": (
        set_config(target_parameters=["rnn.weight_ih_l0", "weight_hh_l0"]),
        "{path} does not fit: missing rnn.lora_A.weight, rnn.lora_B.weight, "
        "rnn.base_layer.lora_A.weight, rnn.base_layer.lora_B.weight",
    ),
    "an unknown raw parameter": (
        set_config(target_modules=[], target_parameters=["rnn.weight_ih"]),
        "{path} belongs to another model: no parameter here matches target_parameters "
        "['rnn.weight_ih']; did you mean rnn.weight_ih_l0[...]?",
    ),
    "a bias in B": (set_config(lora_bias=True), UNSUPPORTED + "lora_bias=True"),
    "several, and one of a later version": (
        set_config(kasa_config={"beta": 1}, use_new=1, use_newer=None, use_newest=False),
        UNSUPPORTED + "kasa_config={{'beta': 1}}, use_new=1",
    ),
    "an initialisation that changes the base": (
        set_config(init_lora_weights="pissa_niter_4"),
        "{path}/adapter_config.json has init_lora_weights 'pissa_niter_4', with which "
        "PEFT changes the base when it loads; save it from PEFT as a plain LoRA, with "
        "path_initial_model_for_weight_conversion=",
    ),
    "a start from the base for another layer": (
        set_config(init_lora_weights="olora", target_modules="emb"),
        "{path} adapts 'emb', but init_lora_weights 'olora' is supported for LoRA on a Linear only",
    ),
    "a start from the base without a scale": (
        set_config(init_lora_weights="pissa", lora_alpha=0),
        "{path} adapts 'fc', but init='pissa' needs an alpha above 0, got 0",
    ),
    "a start from the base of too large a rank": (
        lambda config, tensors: (
            config.update(init_lora_weights="pissa", r=4),
            tensors.update({f"{PREFIX}fc.lora_A.weight": torch.ones(4, 4)}),
            tensors.update({f"{PREFIX}fc.lora_B.weight": torch.ones(3, 4)}),
        ),
        "{path} does not fit this model: cannot adapt 'fc.weight' with LoRA: "
        "init='pissa' needs a rank of at most 3, the smaller side of the matrix; got 4 "
        "[...]",
    ),
    "no targets": (
        lambda config, tensors: config.pop("target_modules"),
        "{path}/adapter_config.json has no target_modules; add them",
    ),
    "targets of a wrong type": (
        set_config(target_modules=[1]),
        DAMAGED + "'target_modules' must be a string or a list of strings, found [1]",
    ),
    "rank 0": (set_config(r=0), DAMAGED + "'r' must be an integer of at least 1, found 0"),
    "a rank that no memory holds": (
        set_config(r=10**30),
        DAMAGED + f"'r' must be an integer of at least 1, found {10**30}",
    ),
    "a rank above 2³¹ − 1": (
        set_config(r=2**31),
        DAMAGED + f"'r' must be an integer of at least 1, found {2**31}",
    ),
    "layers by name": (
        set_config(layers_to_transform=["0"]),
        DAMAGED + "'layers_to_transform' must be an integer or a list of integers, found ['0']",
    ),
    "a large rank": (
        set_config(r=2**30),
        "{path} does not fit: fc.lora_A.weight: expected (1073741824, 4), found (2, 4); "
        "fc.lora_B.weight: expected (3, 1073741824), found (3, 2)",
    ),
    "an alpha of NaN": (
        set_config(lora_alpha=float("nan")),
        DAMAGED + "'lora_alpha' must be a finite number, found nan",
    ),
    "an alpha of 10**400": (
        set_config(lora_alpha=10**400),
        DAMAGED + "'lora_alpha' must be a finite number, found 1000[...]",
    ),
    "a pattern of a wrong type": (
        set_config(rank_pattern={"fc": "2"}),
        DAMAGED + "'rank_pattern' must be integers of at least 1 by pattern, found {{'fc': '2'}}",
    ),
    "layers without a list": (
        set_config(layers_to_transform=[0], target_modules="fc"),
        DAMAGED + "with layers_to_transform, target_modules must be a list, found a string",
    ),
    "a broken expression": (
        set_config(target_modules="(fc"),
        "{path} has a setting that is not a valid regular expression: [...]",
    ),
    "a broken pattern": (
        set_config(alpha_pattern={"*": 1}),
        "{path} has a setting that is not a valid regular expression: [...]",
    ),
    "an unknown module": (
        set_config(target_modules="fcc"),
        "{path} belongs to another model: no module here matches target_modules 'fcc'; "
        "did you mean fc?",
    ),
    "more modules than tensors": (
        set_config(target_modules=["fc", "last_fc"]),
        "{path} does not fit: missing last_fc.lora_A.weight, last_fc.lora_B.weight",
    ),
    "fewer modules than tensors": (
        set_config(target_modules="last_fc"),
        "{path} does not fit: missing last_fc.lora_A.weight, last_fc.lora_B.weight; unexpected "
        "fc.lora_A.weight, fc.lora_B.weight",
    ),
    "a module without factors": (
        set_config(target_modules="fc|rnn"),
        "{path} does not fit this model: its target_modules match rnn, which PEFT cannot "
        "adapt, or adapts without effect",
    ),
    "an out_proj alone": (
        set_config(target_modules=["fc", "mha.out_proj"]),
        "{path} does not fit this model: its target_modules match mha.out_proj, which "
        "PEFT cannot adapt, or adapts without effect",
    ),
    "a tied module": (
        lambda config, tensors: (
            config.update(target_modules="fc|tied"),
            tensors.update({f"{PREFIX}tied.lora_A.weight": torch.ones(2, 4)}),
            tensors.update({f"{PREFIX}tied.lora_B.weight": torch.ones(5, 2)}),
        ),
        "{path} adapts 'tied.weight', which is tied to head.weight; PEFT adapts only one "
        "of them, and paramlora always adapts tied tensors together",
    ),
    "a rank that groups do not divide": (
        set_config(target_modules="fc|grouped", r=3),
        "{path} adapts 'grouped', but its rank, 3, is not a multiple of its 2 groups",
    ),
    "a dilated convolution": (
        set_config(target_modules="dilated"),
        "{path} adapts 'dilated', but PEFT ignores the dilation of a convolution",
    ),
    "a missing tensor": (
        set_tensor("fc.lora_B.weight", None),
        "{path} does not fit: missing fc.lora_B.weight",
    ),
    "a tensor too many": (
        set_tensor("fc.lora_magnitude_vector", torch.ones(3)),
        "{path} does not fit: unexpected fc.lora_magnitude_vector",
    ),
    "factors that are whole numbers": (
        set_tensor("fc.lora_A.weight", torch.ones(2, 4, dtype=torch.int32)),
        "{path} is damaged: fc.lora_A.weight has dtype torch.int32; factors are floating tensors "
        "of 16 to 64 bits",
    ),
    "a tensor that the model does not have": (
        set_tensor("other.weight", torch.ones(3)),
        "{path} does not fit: unexpected other.weight",
    ),
    "a bias of another shape": (
        set_tensor("fc.base_layer.bias", torch.ones(4)),
        "{path} does not fit: fc.base_layer.bias: expected (3,), found (4,)",
    ),
    "a part of a module to save": (
        set_tensor("norm.running_mean", None),
        "{path} does not fit: modules_to_save is ['norm'], but norm.running_mean is missing",
    ),
    "statistics of another base": (
        set_tensor("norm.running_mean", torch.ones(4)),
        "{path} has values at norm.running_mean that differ from the model's; only "
        "parameters that PEFT trains by bias= or modules_to_save= are loaded",
    ),
    "an embedding of another base": (
        set_tensor("emb.weight", torch.ones(5, 4)),
        "{path} has values at emb.weight that differ from the model's; only parameters "
        "that PEFT trains by bias= or modules_to_save= are loaded",
    ),
    "two values of one tensor": (
        set_tensor("norm.modules_to_save.bias", torch.full((4,), 9.0)),
        "{path} is damaged: it has two different values for 'norm.bias'",
    ),
}


@pytest.mark.parametrize(("change", "message"), CHANGES.values(), ids=CHANGES.keys())
def test_changed_folder(folder: Path, change: Callable[..., Any], message: str) -> None:
    """A folder that is damaged, foreign or uses unsupported settings raises CheckpointError."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    change(config, tensors)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
    for make in (net, attached):
        refuses(
            make(), lambda m: pl.load_peft(m, folder), CheckpointError, message.format(path=folder)
        )


def test_tensors_of_the_base(folder: Path) -> None:
    """Tensors of the base in a folder are accepted if they equal those of the model."""
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors[f"{PREFIX}emb.weight"] = net().get_parameter("emb.weight").detach()
    tensors[f"{PREFIX}norm.original_module.bias"] = torch.zeros(4)
    save_file(tensors, folder / "adapter_model.safetensors")
    sites = [row.site for row in pl.load_peft(net(), folder).sites]
    assert sites == ["norm.weight", "norm.bias", "fc.weight", "fc.bias"]


FILES: dict[str, tuple[Callable[[Path], Any], type[Exception], str]] = {
    "no folder": (
        lambda path: path.rename(path.with_name("elsewhere")),
        FileNotFoundError,
        "{path} is not a folder; pass one that PEFT's save_pretrained wrote, or use load for a "
        "file of paramlora.save",
    ),
    "no config": (
        lambda path: (path / "adapter_config.json").unlink(),
        FileNotFoundError,
        "{path} has no adapter_config.json; pass a folder that PEFT wrote",
    ),
    "no tensors": (
        lambda path: (path / "adapter_model.safetensors").unlink(),
        FileNotFoundError,
        "{path} has no adapter_model.safetensors; pass a folder that PEFT wrote",
    ),
    "a pickle": (
        lambda path: (path / "adapter_model.safetensors").rename(path / "adapter_model.bin"),
        CheckpointError,
        "{path} has its tensors in adapter_model.bin, a pickle, which could run any code "
        "and is not opened; load it in PEFT and save it again, as .safetensors",
    ),
    "a config that is not JSON": (
        lambda path: (path / "adapter_config.json").write_bytes(b"\xff{"),
        CheckpointError,
        "{path}/adapter_config.json is damaged: it is not JSON ([...])",
    ),
    "a deep config": (
        lambda path: (path / "adapter_config.json").write_text("[" * 10**6),
        CheckpointError,
        "{path}/adapter_config.json is damaged: it is not JSON ([...])",
    ),
    "a config of too many digits": (
        lambda path: (path / "adapter_config.json").write_text('{"r": ' + "9" * 5000 + "}"),
        CheckpointError,
        "{path}/adapter_config.json is damaged: it is not JSON ([...])",
    ),
    "a config that is a list": (
        lambda path: (path / "adapter_config.json").write_text("[1]"),
        CheckpointError,
        "{path}/adapter_config.json is damaged: it must hold an object, found [1]",
    ),
    "tensors cut short": (
        lambda path: (path / "adapter_model.safetensors").write_bytes(b"abc"),
        CheckpointError,
        "{path}/adapter_model.safetensors is damaged or not a .safetensors file ([...]); "
        "save the adapter again",
    ),
    "tensors of another program": (
        lambda path: save_file({"a": torch.ones(1)}, path / "adapter_model.safetensors"),
        CheckpointError,
        "{path}/adapter_model.safetensors was not written by PEFT: its keys must start "
        "with 'base_model.model.', found a",
    ),
}


@pytest.mark.parametrize(("change", "error", "message"), FILES.values(), ids=FILES.keys())
def test_missing_or_damaged_files(
    folder: Path, change: Callable[[Path], Any], error: type[Exception], message: str
) -> None:
    """A folder whose files are missing or damaged raises, and names the file."""
    change(folder)
    refuses(net(), lambda m: pl.load_peft(m, folder), error, message.format(path=folder))


def test_name_in_use(folder: Path) -> None:
    """A folder does not replace a merged adapter, nor one with other sites, kinds or ranks."""
    model = net()
    pl.attach(model, LoRA(3), "fc", name="digits")
    refuses(
        model,
        lambda m: pl.load_peft(m, folder, name="digits"),
        pl.AdapterNameError,
        "adapter 'digits' is attached already, and its sites, kinds or ranks differ from [...]",
    )
    merged = attached()
    pl.merge(merged)
    refuses(
        merged,
        lambda m: pl.load_peft(m, folder),
        pl.StateError,
        "cannot load adapter 'default' while it is merged; unmerge first",
    )


def test_refresh(folder: Path) -> None:
    """Loading into an adapter of the same make copies values and settings, and nothing else."""
    model = attached()
    with torch.no_grad():
        for parameter in pl.parameters(model):
            parameter.zero_()
    pl.freeze(model)
    pl.load_peft(model, folder)
    assert not any(parameter.requires_grad for parameter in pl.parameters(model))
    other = copy.deepcopy(net())
    pl.load_peft(other, folder)
    for key, factor in pl.state_dict(other).items():
        assert torch.equal(pl.state_dict(model)[key], factor), key


@pytest.mark.parametrize("wrapped", [True, False], ids=["the PeftModel", "the model inside"])
def test_a_model_with_adapters_of_peft(folder: Path, wrapped: bool) -> None:
    """A model with PEFT's layers is refused, since PEFT's own factors would be adapted."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(net(), peft.LoraConfig(target_modules=["fc"]))
    model = model if wrapped else model.base_model.model
    path = "base_model, base_model.model.fc" if wrapped else "fc"
    pl.load_peft(other := net(), folder)
    pl.save(other, folder.parent / "digits.safetensors")
    for call in (
        lambda m: pl.attach(m, LoRA(2)),
        lambda m: pl.load_peft(m, folder),
        lambda m: pl.load(m, folder.parent / "digits.safetensors"),
    ):
        refuses(
            model,
            call,
            pl.StateError,
            f"the model has adapters of PEFT, at {path}; call this on the plain base: load it anew "
            "and load_peft the adapter, or take what merge_and_unload() of PEFT returns",
        )
