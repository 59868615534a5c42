"""PEFT's folders for each type of torch layer, read and written; PEFT itself is the oracle."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import paramlora as pl
from paramlora import Delta, DoRA, LoRA
from tests.support.helpers import refuses
from tests.support.reference import shake

peft = pytest.importorskip("peft", reason="the oracle of these tests is PEFT")
from tests.support.peft_oracle import (  # noqa: E402
    bound,
    check_export,
    check_import,
    check_merged,
    loaded,
    outputs,
    trained,
)

# PEFT warns of settings that are tested on purpose. `out_proj` has a test of its warning.
pytestmark = [
    pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer:UserWarning:peft"),
    pytest.mark.filterwarnings("ignore:PEFT, up to at least .*, adds the update:UserWarning"),
    pytest.mark.filterwarnings("ignore:in training PEFT applies lora_dropout:UserWarning"),
]
LoraConfig = peft.LoraConfig


class Mixed(nn.Module):
    """One layer of each type that PEFT's LoRA adapts; the input is ids (n, 6)."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(7, 8, padding_idx=1)
        self.conv1 = nn.Conv1d(8, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(1, 4, (3, 1), padding=(1, 0), bias=False)
        self.conv3 = nn.Conv3d(4, 1, (1, 3, 1), padding=(0, 1, 0))
        self.mha = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.fc = nn.Linear(8, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.emb(ids)
        x = x + self.conv1(x.mT).mT
        x = x + self.conv3(self.conv2(x.unsqueeze(1)).unsqueeze(2))[:, 0, 0]
        x = x + self.mha(x, x, x)[0]
        return self.head(self.fc(self.norm(x)).tanh())


class Grouped(nn.Module):
    """A convolution of two groups, and a depthwise convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, groups=2, padding=1)
        self.depthwise = nn.Conv1d(6, 6, 3, groups=6)

    def forward(self, x: Tensor) -> Tensor:
        return self.depthwise(self.conv(x).tanh().flatten(2))


IDS = torch.randint(7, (3, 6), generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(0)).double()


def mixed(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return Mixed().to(dtype).eval()


def grouped() -> nn.Module:
    torch.manual_seed(0)
    return Grouped().double().eval()


FILE = "adapter_model.safetensors"
ALL = ["emb", "conv1", "conv2", "conv3", "mha", "fc"]
CONFIGS: dict[str, dict[str, Any]] = {
    **{name: {"target_modules": [name]} for name in ALL},
    "all": {"target_modules": ALL},
    "rslora": {"target_modules": ALL, "use_rslora": True},
    "a regular expression": {"target_modules": r"conv\d|fc", "lora_dropout": 0.5},
    "dora": {"target_modules": ["conv1", "conv2", "conv3", "fc"], "use_dora": True},
    "dora of an embedding": {
        "target_modules": ["emb", "fc"],
        "use_dora": True,
        "use_rslora": True,
        "rank_pattern": {"emb": 2},
        "bias": "all",
    },
    "patterns": {
        "target_modules": ALL,
        "rank_pattern": {"conv.": 2, "fc": 5},
        "alpha_pattern": {"fc|emb": 1.5, "^conv1": 7},
    },
    "patterns, rslora": {
        "target_modules": ALL,
        "rank_pattern": {"conv.": 2, "fc": 5},
        "alpha_pattern": {"fc|emb": 1.5, "^conv1": 7},
        "use_rslora": True,
    },
    "excluded": {"target_modules": ALL, "exclude_modules": ["mha", "conv2"]},
    "excluded by an expression": {"target_modules": ALL, "exclude_modules": ".*3"},
    "all linear": {"target_modules": "all-linear", "exclude_modules": ".*out_proj"},
    "all biases": {"target_modules": ["fc", "mha"], "bias": "all"},
    "their biases": {"target_modules": ["fc", "mha", "conv1"], "bias": "lora_only"},
    "a head": {"target_modules": ["fc", "emb"], "modules_to_save": ["head"]},
    "a head, a norm, biases": {
        "target_modules": ["conv1", "emb"],
        "modules_to_save": ["head", "norm"],
        "bias": "all",
    },
}


@pytest.mark.parametrize("settings", CONFIGS.values(), ids=CONFIGS.keys())
def test_import(settings: dict[str, Any], tmp_path: Path) -> None:
    """An adapter that PEFT trained and saved gives the same outputs and merged weights here."""
    model = mixed()
    wrapped = trained(model, LoraConfig(r=3, lora_alpha=4, **settings), IDS)
    ours = check_import(model, wrapped, IDS, tmp_path)
    check_merged(ours, loaded(model, tmp_path))


SPECS: dict[str, Any] = {
    **{name: {name: LoRA(3, 4)} for name in ALL if name != "mha"},
    "mha": {"mha.*_proj_weight": LoRA(3, 4), "mha.out_proj": LoRA(3, 4)},
    "half of an mha": {"mha.in_proj_weight": LoRA(3)},
    "ranks and alphas": {
        "conv?": LoRA(2, 3),
        "fc": LoRA(5, 0.7),
        "emb": LoRA(2, 0),
        "head": LoRA(2, 3, rank_stabilized=True),
    },
    "rank_stabilized": {
        "conv1": LoRA(2, 3, rank_stabilized=True),
        "head": LoRA(5, rank_stabilized=True),
    },
    "dora": {"conv?": DoRA(2, 3), "fc": DoRA(3), "emb": DoRA(2, dim=1)},
    "dora, rank_stabilized": {"fc": DoRA(3, 4, rank_stabilized=True)},
    "pissa": {"conv1": LoRA(2, 3, init="pissa"), "fc": LoRA(2, 3)},
    "olora, rank_stabilized": {"fc": LoRA(2, 3, init="olora", rank_stabilized=True)},
    "a bias": {"fc": LoRA(3), "fc.bias": Delta()},
    "biases": {"fc": LoRA(3), "mha.out_proj.bias": Delta(), "norm.bias": Delta()},
    "bias of a projection": {
        "mha.in_proj_weight": LoRA(3),
        "mha.out_proj.bias": Delta(),
    },
    "a head": {"fc": LoRA(3), "head.*": Delta()},
    "a norm and biases": {"emb": LoRA(3), "norm.weight": Delta(), "conv1.bias": Delta()},
    "attention whole": {"emb": LoRA(3), "mha.in_proj_bias": Delta()},
}


@pytest.mark.parametrize("strength", [1.0, -0.37])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
def test_export(spec: Any, strength: float, tmp_path: Path) -> None:
    """A saved adapter gives the same outputs and merged weights in PEFT, strength included."""
    base = mixed()
    model = copy.deepcopy(base)
    pl.attach(model, spec, name="digits")
    shake(model)
    pl.scale(model, strength)
    wrapped = check_export(model, base, IDS, tmp_path / "digits")
    check_merged(model, wrapped)
    reloaded = copy.deepcopy(base)
    pl.load_peft(reloaded, tmp_path / "digits", name="again")
    check_merged(reloaded, loaded(base, tmp_path / "digits"))


def test_out_proj_in_peft(tmp_path: Path) -> None:
    """PEFT to 0.21.2 adds the update of `out_proj` twice; loading and saving warn of it.

    A strength of 2 on `out_proj` gives PEFT's outputs.
    """
    base = mixed()
    wrapped = trained(base, LoraConfig(r=3, target_modules=["mha"]), IDS).requires_grad_(False)
    wrapped.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"adds the update of 'mha.out_proj.weight' twice"):
        pl.load_peft(base, tmp_path)
    pl.scale(base.get_submodule("mha.out_proj"), 2)
    assert_close(outputs(base, IDS), outputs(wrapped, IDS), **bound(base))
    pl.scale(base, 1)  # PEFT has one scale for both projections
    with pytest.warns(UserWarning, match=r"adds the update of 'mha.out_proj.weight' twice"):
        pl.save_peft(base, tmp_path / "reloaded")


@pytest.mark.parametrize("target", ["conv", "depthwise"])
def test_grouped_convolution(target: str, tmp_path: Path) -> None:
    """The update of a grouped convolution is saved for PEFT with rank r·groups, and loads again."""
    base = grouped()
    model = copy.deepcopy(base)
    for rslora in (False, True):
        pl.attach(model, LoRA(2, 3, rank_stabilized=rslora), target, name="digits")
        shake(model)
        check_export(model, base, IMAGES, tmp_path / "digits")
        reloaded = copy.deepcopy(base)
        row = pl.load_peft(reloaded, tmp_path / "digits").sites[0]
        assert (row.rank, row.kind) == (2, "LoRA")
        assert_close(outputs(reloaded, IMAGES), outputs(model, IMAGES), **bound(base))
        pl.detach(model)


def test_grouped_convolution_with_other_blocks(tmp_path: Path) -> None:
    """An A that is zero outside of each group's inputs is loaded, whichever rows are zero."""
    base = grouped()
    config = LoraConfig(r=4, target_modules=["conv"], init_lora_weights=False)
    wrapped = peft.get_peft_model(copy.deepcopy(base), config).eval()
    A = wrapped.base_model.model.conv.lora_A.default.weight
    with torch.no_grad():
        A[:2, 2:] = 0
        A[2:, :2] = 0
    ours = check_import(base, wrapped, IMAGES, tmp_path)
    assert pl.summary(ours).sites[0].rank == 4


def test_grouped_convolution_that_mixes_groups(tmp_path: Path) -> None:
    """An update that mixes groups, as PEFT trains it, raises: no weight can hold it."""
    base = grouped()
    trained(base, LoraConfig(r=2, target_modules=["conv"]), IMAGES).save_pretrained(tmp_path)
    message = (
        f"{tmp_path} has an update at 'conv' that mixes the groups of the convolution; PEFT trains "
        "such updates, but the weight of a grouped convolution cannot express them"
    )
    refuses(base, lambda m: pl.load_peft(m, tmp_path), pl.CheckpointError, message)


def test_dora_of_a_grouped_convolution_in_peft(tmp_path: Path) -> None:
    """PEFT to 0.21.2 divides by the norms of another matrix, so its folder is refused, by name."""
    base = grouped()
    config = LoraConfig(r=2, target_modules=["conv"], use_dora=True, init_lora_weights=False)
    wrapped = peft.get_peft_model(copy.deepcopy(base), config).eval()
    layer = wrapped.base_model.model.conv
    A, B = layer.lora_A.default.weight, layer.lora_B.default.weight
    with torch.no_grad():
        A[:1, 2:] = 0  # zero outside of each group's inputs
        A[1:, :2] = 0
        layer.lora_magnitude_vector.default.weight.fill_(1)
        # The update of group j is B_j A_j; PEFT's scale is 8 / 2.
        update = B[:3].flatten(1) @ A[:1, :2].flatten(1)
        other = B[3:].flatten(1) @ A[1:, 2:].flatten(1)
        weight = base.get_parameter("conv.weight") + 4 * torch.cat([update, other]).view(6, 2, 3, 3)
        weight = weight / weight.flatten(1).norm(dim=1).view(6, 1, 1, 1)
        expected = nn.functional.conv2d(IMAGES, weight, groups=2, padding=1)
        found = layer(IMAGES) - base.get_parameter("conv.bias").view(6, 1, 1)
    assert (found - expected).abs().max() > 1e-2
    ratio = found / expected  # one number for each output: only the norms differ
    assert_close(ratio, ratio[:1, :, :1, :1].expand_as(ratio))
    wrapped.save_pretrained(tmp_path)
    message = (
        f"{tmp_path} adapts 'conv', but PEFT's DoRA of a grouped convolution divides by the norms "
        "of another matrix than W + s·BA"
    )
    refuses(base, lambda m: pl.load_peft(m, tmp_path), pl.CheckpointError, message)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_round_trip(dtype: torch.dtype, tmp_path: Path) -> None:
    """Saved and loaded, an adapter keeps its settings and the bits of its factors."""
    base = mixed(dtype)
    model = copy.deepcopy(base)
    spec: dict[Any, pl.kinds.Spec] = {
        "conv?": LoRA(49, 1),
        "fc": LoRA(3),
        "emb": LoRA(2, 0.1),
        "mha.*weight": LoRA(2, 3),
        "head.*": Delta(),
    }
    pl.attach(model, spec, name="digits")
    shake(model)
    pl.save_peft(model, tmp_path / "digits", "digits")
    reloaded = copy.deepcopy(base)
    rows = pl.load_peft(reloaded, tmp_path / "digits", name="digits").sites
    assert rows == pl.summary(model).sites
    expected = pl.state_dict(model, "digits")
    for key, factor in pl.state_dict(reloaded, "digits").items():
        assert factor.dtype == expected[key].dtype
        if key.endswith(".D"):  # a whole tensor is saved in the dtype of the model
            assert_close(factor, expected[key], rtol=0, atol=4 * torch.finfo(dtype).eps)
        else:
            assert torch.equal(factor, expected[key]), key


def test_saving_is_independent_of_state(tmp_path: Path) -> None:
    """The files are the same whether the adapter is on, merged or off, or one of two."""
    model = mixed()
    pl.attach(model, {"fc": LoRA(3), "head.*": Delta()}, name="digits")
    pl.attach(model, LoRA(2), "fc", name="letters", activate="also")
    shake(model)
    folders = [tmp_path / name for name in ("plain", "merged", "disabled")]
    pl.save_peft(model, folders[0], "digits")
    with pl.merged(model):
        pl.save_peft(model, folders[1], "digits")
    with pl.disabled(model):
        pl.save_peft(model, folders[2], "digits")
    first, *rest = [
        [(folder / file).read_bytes() for file in ("adapter_config.json", FILE)]
        for folder in folders
    ]
    assert rest == [first, first]


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_init_from_the_weight(init: str, tmp_path: Path) -> None:
    """PiSSA and OLoRA of PEFT load without changing the base, and are saved as plain LoRAs."""
    base = mixed(torch.float32)
    settings = {"target_modules": ["fc", "head"], "alpha_pattern": {"head": 2}}
    wrapped = trained(base, LoraConfig(r=3, lora_alpha=4, init_lora_weights=init, **settings), IDS)
    with torch.no_grad():
        expected = outputs(wrapped, IDS)
    ours = check_import(base, wrapped, IDS, tmp_path / "theirs")
    assert_close(outputs(ours, IDS), expected, **bound(base))
    assert pl.fingerprint(ours) == pl.fingerprint(base)
    # Saved again, it is for the original base, without the init.
    check_export(ours, base, IDS, tmp_path / "ours")
    config = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert config["r"] == 6
    assert "init_lora_weights" not in config
