"""What of a PEFT folder is refused, word for word, and that nothing has changed then."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import paramlora as pl
from paramlora import CheckpointError, Delta, DoRA, LoHa, LoRA, TargetError
from tests.support.helpers import refuses, says

PREFIX = "base_model.model."


class Net(nn.Module):
    """Layers of which PEFT adapts some, and some it does not."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(5, 4)
        self.bounded = nn.Embedding(5, 4, max_norm=1.0)
        self.mha = nn.MultiheadAttention(4, 2)
        self.cross = nn.MultiheadAttention(4, 2, kdim=3)
        self.dilated = nn.Conv1d(4, 4, 3, dilation=2)
        self.circular = nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")
        self.grouped = nn.Conv1d(4, 4, 3, groups=2)
        self.rnn = nn.LSTM(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.fc = nn.Linear(4, 3)
        self.last_fc = nn.Linear(4, 3)
        self.head = nn.Linear(4, 5, bias=False)
        self.tied = nn.Linear(4, 5, bias=False)
        self.tied.weight = self.head.weight
        self.gain = nn.Parameter(torch.ones(3, 3))


def net() -> nn.Module:
    torch.manual_seed(0)
    return Net()


def attached() -> nn.Module:
    model = net()
    pl.attach(model, {"fc": LoRA(2, 3), "fc.bias": Delta(), "norm.*": Delta()})
    with torch.no_grad():
        for parameter in pl.parameters(model):
            parameter.normal_()
    return model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a low-rank update, a bias and a whole module."""
    pl.save_peft(attached(), tmp_path / "digits")
    return tmp_path / "digits"


def setting(**settings: Any) -> Callable[[dict[str, Any], dict[str, Tensor]], None]:
    return lambda config, tensors: config.update(settings)


def tensor(key: str, value: Tensor | None) -> Callable[[dict[str, Any], dict[str, Tensor]], None]:
    def change(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        if value is None:
            del tensors[PREFIX + key]
        else:
            tensors[PREFIX + key] = value

    return change


OTHERS = "{path}/adapter_config.json has settings that paramlora does not support: "
DAMAGED = "{path}/adapter_config.json is damaged: "

# What is changed in a folder, and what loading it says.
CHANGES: dict[str, tuple[Callable[[dict[str, Any], dict[str, Tensor]], Any], str]] = {
    "another method": (
        setting(peft_type="LOHA"),
        "{path}/adapter_config.json has peft_type 'LOHA'; only 'LORA' can be loaded",
    ),
    "repeated layers": (
        setting(layer_replication=[[0, 2]]),
        OTHERS + "layer_replication=[[0, 2]]",
    ),
    "quantized": (setting(use_qalora=True), OTHERS + "use_qalora=True"),
    "tokens": (setting(trainable_token_indices=[3]), OTHERS + "trainable_token_indices=[3]"),
    "raw parameters": (setting(target_parameters=["gain"]), OTHERS + "target_parameters=['gain']"),
    "a bias in B": (setting(lora_bias=True), OTHERS + "lora_bias=True"),
    "several, and one of a later version": (
        setting(kasa_config={"beta": 1}, use_new=1, use_newer=None, use_newest=False),
        OTHERS + "kasa_config={{'beta': 1}}, use_new=1",
    ),
    "an initialisation that changes the base": (
        setting(init_lora_weights="pissa_niter_4"),
        "{path}/adapter_config.json has init_lora_weights 'pissa_niter_4', with which PEFT changes "
        "the base when it loads; save it from PEFT as a plain LoRA, with "
        "path_initial_model_for_weight_conversion=",
    ),
    "a start from the base for another layer": (
        setting(init_lora_weights="olora", target_modules="emb"),
        "{path} adapts 'emb', but init_lora_weights 'olora' is supported for LoRA on a Linear only",
    ),
    "a start from the base without a scale": (
        setting(init_lora_weights="pissa", lora_alpha=0),
        "{path} adapts 'fc', but init='pissa' needs an alpha above 0, got 0",
    ),
    "a start from the base of too large a rank": (
        lambda config, tensors: (
            config.update(init_lora_weights="pissa", r=4),
            tensors.update({f"{PREFIX}fc.lora_A.weight": torch.ones(4, 4)}),
            tensors.update({f"{PREFIX}fc.lora_B.weight": torch.ones(3, 4)}),
        ),
        "{path} does not fit this model: cannot adapt 'fc.weight' with LoRA: init='pissa' needs a "
        "rank of at most 3, the smaller side of the matrix; got 4 [...]",
    ),
    "no targets": (
        lambda config, tensors: config.pop("target_modules"),
        "{path}/adapter_config.json has no target_modules; add them",
    ),
    "targets of a wrong type": (
        setting(target_modules=[1]),
        DAMAGED + "'target_modules' must be a string or a list of strings, found [1]",
    ),
    "rank 0": (setting(r=0), DAMAGED + "'r' must be an integer of at least 1, found 0"),
    "a rank that no memory holds": (
        setting(r=10**30),
        DAMAGED + f"'r' must be an integer of at least 1, found {10**30}",
    ),
    "a large rank": (
        setting(r=2**30),
        "{path} does not fit: fc.lora_A.weight: expected (1073741824, 4), found (2, 4); "
        "fc.lora_B.weight: expected (3, 1073741824), found (3, 2)",
    ),
    "an alpha that is no number": (
        setting(lora_alpha=float("nan")),
        DAMAGED + "'lora_alpha' must be a finite number, found nan",
    ),
    "an alpha that no float holds": (
        setting(lora_alpha=10**400),
        DAMAGED + "'lora_alpha' must be a finite number, found 1000[...]",
    ),
    "a pattern of a wrong type": (
        setting(rank_pattern={"fc": "2"}),
        DAMAGED + "'rank_pattern' must be integers of at least 1 by pattern, found {{'fc': '2'}}",
    ),
    "layers without a list": (
        setting(layers_to_transform=[0]),
        DAMAGED + "with layers_to_transform, target_modules must be a list, found a string",
    ),
    "a broken expression": (
        setting(target_modules="(fc"),
        "{path} has a setting that is not a valid regular expression: [...]",
    ),
    "a broken pattern": (
        setting(alpha_pattern={"*": 1}),
        "{path} has a setting that is not a valid regular expression: [...]",
    ),
    "no such module": (
        setting(target_modules="fcc"),
        "{path} belongs to another model: no module here matches target_modules 'fcc'; did you "
        "mean fc?",
    ),
    "more modules than tensors": (
        setting(target_modules=["fc", "last_fc"]),
        "{path} does not fit: missing last_fc.lora_A.weight, last_fc.lora_B.weight",
    ),
    "fewer modules than tensors": (
        setting(target_modules="last_fc"),
        "{path} does not fit: missing last_fc.lora_A.weight, last_fc.lora_B.weight; unexpected "
        "fc.lora_A.weight, fc.lora_B.weight",
    ),
    "a module without factors": (
        setting(target_modules="fc|rnn"),
        "{path} does not fit this model: its target_modules match rnn, which PEFT cannot adapt, or "
        "adapts without effect",
    ),
    "an out_proj alone": (
        setting(target_modules=["fc", "mha.out_proj"]),
        "{path} does not fit this model: its target_modules match mha.out_proj, which PEFT cannot "
        "adapt, or adapts without effect",
    ),
    "a tied module": (
        lambda config, tensors: (
            config.update(target_modules="fc|tied"),
            tensors.update({f"{PREFIX}tied.lora_A.weight": torch.ones(2, 4)}),
            tensors.update({f"{PREFIX}tied.lora_B.weight": torch.ones(5, 2)}),
        ),
        "{path} adapts 'tied.weight', which is tied to head.weight; PEFT adapts only one of them, "
        "and paramlora always adapts tied tensors together",
    ),
    "a rank that groups do not divide": (
        setting(target_modules="fc|grouped", r=3),
        "{path} adapts 'grouped', but its rank, 3, is not a multiple of its 2 groups",
    ),
    "a dilated convolution": (
        setting(target_modules="dilated"),
        "{path} adapts 'dilated', but PEFT ignores the dilation of a convolution",
    ),
    "a missing tensor": (
        tensor("fc.lora_B.weight", None),
        "{path} does not fit: missing fc.lora_B.weight",
    ),
    "a tensor too many": (
        tensor("fc.lora_magnitude_vector", torch.ones(3)),
        "{path} does not fit: unexpected fc.lora_magnitude_vector",
    ),
    "factors that are whole numbers": (
        tensor("fc.lora_A.weight", torch.ones(2, 4, dtype=torch.int32)),
        "{path} is damaged: fc.lora_A.weight has dtype torch.int32",
    ),
    "a tensor that the model does not have": (
        tensor("other.weight", torch.ones(3)),
        "{path} does not fit: unexpected other.weight",
    ),
    "a bias of another shape": (
        tensor("fc.base_layer.bias", torch.ones(4)),
        "{path} does not fit: fc.base_layer.bias: expected (3,), found (4,)",
    ),
    "a part of a module to save": (
        tensor("norm.running_mean", None),
        "{path} does not fit: modules_to_save is ['norm'], but norm.running_mean is missing",
    ),
    "statistics of another base": (
        tensor("norm.running_mean", torch.ones(4)),
        "{path} has values at norm.running_mean that differ from the model's; only parameters that "
        "PEFT trains by bias= or modules_to_save= are loaded",
    ),
    "an embedding of another base": (
        tensor("emb.weight", torch.ones(5, 4)),
        "{path} has values at emb.weight that differ from the model's; only parameters that PEFT "
        "trains by bias= or modules_to_save= are loaded",
    ),
    "two values of one tensor": (
        tensor("norm.modules_to_save.bias", torch.full((4,), 9.0)),
        "{path} is damaged: it has two different values for 'norm.bias'",
    ),
}


@pytest.mark.parametrize(("change", "message"), CHANGES.values(), ids=CHANGES.keys())
def test_a_folder_is_refused(folder: Path, change: Callable[..., Any], message: str) -> None:
    """A folder that is damaged, foreign, or says more than is carried out is refused, by name."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    change(config, tensors)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
    for make in (net, attached):
        refuses(
            make(), lambda m: pl.load_peft(m, folder), CheckpointError, message.format(path=folder)
        )


def test_what_the_model_has_already_is_no_obstacle(folder: Path) -> None:
    """Tensors of the base that PEFT adds to a folder are taken where they are the model's."""
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
        "{path} is not a folder; pass one that PEFT's save_pretrained wrote",
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
        "{path} has its tensors in adapter_model.bin, a pickle, which could run any code and is "
        "not opened; load it in PEFT and save it again, as .safetensors",
    ),
    "a config that is no JSON": (
        lambda path: (path / "adapter_config.json").write_bytes(b"\xff{"),
        CheckpointError,
        "{path}/adapter_config.json is damaged: it is not JSON ([...])",
    ),
    "a deep config": (
        lambda path: (path / "adapter_config.json").write_text("[" * 10**6),
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
        "{path}/adapter_model.safetensors is damaged or not a .safetensors file ([...]); save the "
        "adapter again",
    ),
    "tensors of another program": (
        lambda path: save_file({"a": torch.ones(1)}, path / "adapter_model.safetensors"),
        CheckpointError,
        "{path}/adapter_model.safetensors was not written by PEFT: its keys must start with "
        "'base_model.model.', found a",
    ),
}


@pytest.mark.parametrize(("change", "error", "message"), FILES.values(), ids=FILES.keys())
def test_files_are_refused(
    folder: Path, change: Callable[[Path], Any], error: type[Exception], message: str
) -> None:
    """A folder without the two files, or with damaged ones, is refused."""
    change(folder)
    refuses(net(), lambda m: pl.load_peft(m, folder), error, message.format(path=folder))


def test_another_adapter_of_the_name_is_refused(folder: Path) -> None:
    """A folder does not replace an adapter of the same name and another make, nor a merged one."""
    model = net()
    pl.attach(model, LoRA(3), "fc", name="digits")
    refuses(
        model,
        lambda m: pl.load_peft(m, folder, name="digits"),
        pl.AdapterNameError,
        "adapter 'digits' is attached already, and its sites, kinds or ranks differ from [...]",
    )
    again = attached()
    pl.merge(again)
    refuses(
        again,
        lambda m: pl.load_peft(m, folder),
        pl.StateError,
        "cannot load adapter 'default' while it is merged; unmerge first",
    )


def hold(path: str, reason: str) -> str:
    return (
        f"a PEFT folder cannot store the adapter at {path!r}: {reason}; detach it from there, or "
        "use paramlora.save"
    )


PLACES = (
    "PEFT adapts the weights of Linear, Conv1d, Conv2d, Conv3d, Embedding and Conv1D submodules, "
    "and the projections of a MultiheadAttention"
)

# What is attached, and what saving it as a folder says.
SPECS: dict[str, tuple[Any, str]] = {
    "a recurrent layer": ({"rnn.weight_ih_l0": LoRA(2)}, hold("rnn.weight_ih_l0", PLACES)),
    "a raw parameter": ({"gain": LoRA(2)}, hold("gain", PLACES)),
    "full updates alone": (
        {"head.weight": Delta()},
        hold("head.weight", "it is tied to tied.weight, and PEFT adapts only one of them"),
    ),
    "no low-rank update": (
        {"fc.bias": Delta()},
        "adapter 'digits' has no low-rank update, and a PEFT folder needs at least one",
    ),
    "a whole parameter of the model itself": (
        {"fc": LoRA(2), "gain": Delta()},
        hold("gain", "PEFT saves whole submodules, and the model itself has this tensor"),
    ),
    "an update and a whole tensor in one module": (
        {"mha.in_proj_weight": LoRA(2), "mha.in_proj_bias": Delta()},
        hold("mha", "PEFT does not adapt modules_to_save, here ['mha']"),
    ),
    "a whole module whose name ends another's": (
        {"last_fc": LoRA(2), "fc.weight": Delta()},
        hold("last_fc", "PEFT does not adapt modules_to_save, here ['fc']"),
    ),
    "a block of a weight": (
        {"fc.weight[:2]": LoRA(1)},
        hold("fc.weight", "it adapts blocks of the tensor"),
    ),
    "projections of two ranks": (
        {"mha.in_proj_weight": LoRA(2), "mha.out_proj": LoRA(3)},
        hold("mha.out_proj.weight", "PEFT has one rank and one scale for both projections"),
    ),
    "projections of their own": (
        {"cross.out_proj": LoRA(2)},
        hold(
            "cross.out_proj.weight",
            "PEFT needs queries, keys and values of the same size in a MultiheadAttention",
        ),
    ),
    "another kind": (
        {"fc": LoRA(2), "last_fc": LoHa(2)},
        hold("last_fc.weight", "LoHa is not a low-rank update of it"),
    ),
    "a DoRA beside a LoRA": (
        {"fc": LoRA(2), "last_fc": DoRA(2)},
        hold("last_fc.weight", "it is a DoRA, which PEFT needs at all sites or at none"),
    ),
    "a DoRA of projections": (
        {"mha.in_proj_weight": DoRA(2)},
        hold(
            "mha.in_proj_weight",
            "PEFT does not support DoRA on a MultiheadAttention or a grouped convolution",
        ),
    ),
    "a DoRA of a grouped convolution": (
        {"grouped": DoRA(2)},
        hold(
            "grouped.weight",
            "PEFT does not support DoRA on a MultiheadAttention or a grouped convolution",
        ),
    ),
    "magnitudes of rows of an embedding": (
        {"emb": DoRA(2)},
        hold("emb.weight", "PEFT has the magnitudes of a DoRA along dimension 1 there, not 0"),
    ),
    "a dilated convolution": (
        {"dilated": LoRA(2)},
        hold("dilated.weight", "PEFT ignores the dilation of a convolution"),
    ),
    "a convolution that pads in circles": (
        {"circular": LoRA(2)},
        hold("circular.weight", "PEFT pads with zeros and ignores padding_mode='circular'"),
    ),
    "a bounded embedding": (
        {"bounded": LoRA(2)},
        hold(
            "bounded.weight",
            "PEFT renormalises the factors of an Embedding that has max_norm",
        ),
    ),
}


@pytest.mark.parametrize(("spec", "message"), SPECS.values(), ids=SPECS.keys())
def test_what_peft_cannot_say_is_refused(spec: Any, message: str, tmp_path: Path) -> None:
    """What PEFT cannot say is refused by name, and nothing is written."""
    model = net()
    pl.attach(model, spec, name="digits")
    refuses(model, lambda m: pl.save_peft(m, tmp_path / "a", "digits"), TargetError, message)
    assert not list(tmp_path.iterdir())


def test_other_parametrizations_are_refused(tmp_path: Path) -> None:
    """A parametrization on top of the adapter is one that PEFT does not have."""
    model = net()
    pl.attach(model, LoRA(2), "fc", name="digits")
    parametrizations.orthogonal(model.get_submodule("fc"))
    message = hold("fc.weight", "another parametrization comes after the adapter")
    refuses(model, lambda m: pl.save_peft(m, tmp_path / "a", "digits"), TargetError, message)
    other = net()
    parametrizations.orthogonal(other.get_submodule("fc"))
    pl.attach(other, {"last_fc": LoRA(2), "fc.weight": Delta()}, name="digits")
    message = hold("fc.weight", "it is parametrized, so that PEFT's model does not store it")
    refuses(other, lambda m: pl.save_peft(m, tmp_path / "a", "digits"), TargetError, message)


def test_the_folder_there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of an adapter is replaced whole; one with other files, or a file, stays as it is."""
    model = attached()
    pl.scale(model, 0.5)
    pl.save_peft(model, folder)
    assert json.loads((folder / "adapter_config.json").read_text())["lora_alpha"] == 1.5
    assert sorted(entry.name for entry in folder.parent.iterdir()) == ["digits"]
    before = (folder / "adapter_config.json").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", lambda _: 1 / 0)
        pl.scale(model, 1)
        with pytest.raises(ZeroDivisionError, match="zero"):
            pl.save_peft(model, folder)
    assert sorted(entry.name for entry in folder.parent.iterdir()) == ["digits"]
    assert (folder / "adapter_config.json").read_bytes() == before
    (folder / "notes.txt").write_text("mine")
    message = f"cannot write {folder}: the folder exists and also has notes.txt, which would be "
    with pytest.raises(FileExistsError, match=says(message + "lost; choose another path")):
        pl.save_peft(model, folder)
    (folder.parent / "file").touch()
    with pytest.raises(FileExistsError, match="a file of that name exists"):
        pl.save_peft(model, folder.parent / "file")
    with pytest.raises(FileNotFoundError, match=r"the folder \S*nowhere does not exist"):
        pl.save_peft(model, folder.parent / "nowhere" / "digits")
    with pytest.raises(pl.AdapterNameError, match="no adapter 'letters' here"):
        pl.save_peft(model, folder.parent / "other", "letters")


def test_a_model_without_values_is_refused(folder: Path, tmp_path: Path) -> None:
    """On the meta device there are no values to save, and none that a file's would be kept in."""
    model = attached().to("meta")
    reason = "is on the meta device and holds no values: materialise the model first, [...]"
    refuses(
        model,
        lambda m: pl.save_peft(m, tmp_path / "a"),
        pl.StateError,
        f"'fc.lora_A.weight' {reason}",
    )
    refuses(
        net().to("meta"), lambda m: pl.load_peft(m, folder), pl.StateError, f"'fc.bias' {reason}"
    )
    pl.detach(model := attached(), "default")
    pl.attach(model, LoRA(2), "fc")
    pl.save_peft(model, tmp_path / "low")
    refuses(
        net().to("meta"),
        lambda m: pl.load_peft(m, tmp_path / "low"),
        pl.StateError,
        f"'fc.weight' {reason}",
    )


def test_a_refresh_copies_the_values(folder: Path) -> None:
    """Loading into an adapter of the same make copies values and settings, and no more."""
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
