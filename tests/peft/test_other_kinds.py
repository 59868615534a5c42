"""PEFT's folders of OFT, HiRA and MiSS, read and written; PEFT itself is the oracle."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import paramlora as pl
from paramlora.files.metadata import read
from tests.support.helpers import refuses
from tests.support.reference import shake

peft = pytest.importorskip("peft", reason="the oracle of these tests is PEFT")
from tests.support.peft_oracle import check_export, check_import, check_merged  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:Invalid `oft_block_size`:UserWarning:peft")


class Net(nn.Module):
    """An Embedding and Linears; the input is ids (n, 5)."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(7, 8, padding_idx=1)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.emb(ids)
        return self.head(self.fc(x + self.conv(x.mT).mT).tanh())


def net() -> nn.Module:
    torch.manual_seed(0)
    return Net().double()


IDS = torch.tensor([[0, 1, 2, 3, 6], [4, 5, 6, 1, 0]])
BOTH, LINEARS = ["emb", "fc"], ["fc", "head"]
OFT = {"oft_block_size": 2}
CONFIGS: dict[str, Callable[[], Any]] = {
    "oft": lambda: peft.OFTConfig(**OFT, use_cayley_neumann=False, target_modules=BOTH),
    "oft, series": lambda: peft.OFTConfig(**OFT, target_modules=BOTH),
    "oft, by number of blocks": lambda: peft.OFTConfig(r=2, oft_block_size=0, target_modules=BOTH),
    "coft": lambda: peft.OFTConfig(
        **OFT, use_cayley_neumann=False, coft=True, eps=0.25, target_modules=BOTH
    ),
    "hira": lambda: peft.HiraConfig(r=2, target_modules=BOTH),
    "miss": lambda: peft.MissConfig(r=4, target_modules=LINEARS),
    "all linear": lambda: peft.HiraConfig(r=2, target_modules="all-linear"),
}


def shake_theirs(wrapped: nn.Module) -> None:
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape) / 4)


def test_adjusted_block_size(tmp_path: Path) -> None:
    """Where PEFT has taken another block size, because its own does not divide, so does loading."""
    model = net()
    config = peft.OFTConfig(oft_block_size=4, target_modules=LINEARS)
    wrapped = peft.get_peft_model(copy.deepcopy(model), config).double().eval()
    shake_theirs(wrapped)
    ours = check_import(model, wrapped, IDS, tmp_path)
    assert [tuple(factor.shape) for factor in pl.parameters(ours)] == [(2, 6), (2, 3)]


def test_default_of_coft(tmp_path: Path) -> None:
    """A folder of the constrained form without eps has PEFT's default."""
    folder = saved(pl.OFT(2, eps=0.25), "fc", tmp_path / "one")
    file = folder / "adapter_config.json"
    content = json.loads(file.read_text())
    del content["eps"]
    file.write_text(json.dumps(content))
    model = net()
    pl.load_peft(model, folder)
    pl.save(model, tmp_path / "ours")
    fields = read(tmp_path / "ours")[1]["sites"]["fc.weight"]["fields"]
    assert fields["eps"] == peft.OFTConfig().eps


@pytest.mark.parametrize("make", CONFIGS.values(), ids=CONFIGS.keys())
def test_peft_to_ours_and_back(make: Callable[[], Any], tmp_path: Path) -> None:
    """A folder of PEFT computes the same here, and saved again the same in PEFT."""
    model = net()
    wrapped = peft.get_peft_model(copy.deepcopy(model), make()).double().eval()
    shake_theirs(wrapped)
    ours = check_import(model, wrapped, IDS, tmp_path / "theirs")
    check_merged(ours, check_export(ours, model, IDS, tmp_path / "ours"))


SPECS: dict[str, tuple[Any, list[str], float]] = {
    "oft": (pl.OFT(2), BOTH, -0.5),
    "oft, series": (pl.OFT(2, terms=6), BOTH, 0.5),
    "coft": (pl.OFT(2, eps=0.25), BOTH, 1.0),
    "hira": (pl.HiRA(2), BOTH, 0.5),
    "miss": (pl.MiSS(4), LINEARS, 0.5),
    "loraxs": (pl.LoRAXS(2, alpha=3), [*BOTH, "conv"], 0.5),
}


@pytest.mark.parametrize(("spec", "targets", "strength"), SPECS.values(), ids=SPECS.keys())
def test_ours_to_peft_and_back(
    spec: Any, targets: list[str], strength: float, tmp_path: Path
) -> None:
    """A saved adapter computes the same in PEFT, and here when loaded again."""
    model, again = net(), net()
    pl.attach(model, spec, targets, name="one")
    shake(model)
    pl.scale(model, strength)
    check_merged(model, check_export(model, net(), IDS, tmp_path / "one"))
    pl.load_peft(again, tmp_path / "one")
    torch.testing.assert_close(again(IDS), model(IDS), rtol=0, atol=1e-12)


def saved(spec: pl.kinds.Spec, targets: Any, folder: Path, **settings: Any) -> Path:
    """Save an adapter of a net, and change settings in its config."""
    model = net()
    pl.attach(model, spec, targets)
    pl.save_peft(model, folder)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return folder


UNSUPPORTED: dict[str, tuple[pl.kinds.Spec, dict[str, Any], str]] = {
    "shared blocks": (pl.OFT(2), {"block_share": True}, "[...]not support: block_share=True"),
    "biases": (pl.OFT(2), {"bias": "all"}, "[...]not support: bias='all'"),
    "saved modules": (
        pl.MiSS(2),
        {"modules_to_save": ["head"]},
        "[...]not support: modules_to_save=['head']",
    ),
    "bat": (pl.MiSS(2), {"init_weights": "bat"}, "[...]not support: init_weights='bat'"),
    "mini": (pl.MiSS(2), {"init_weights": "mini"}, "[...]not support: init_weights='mini'"),
    "an old series": (
        pl.OFT(2, terms=5),
        {"peft_version": "0.17.1"},
        "{path} adapts 'fc', but its series (use_cayley_neumann) is of a PEFT before 0.18[...]",
    ),
    "a short series": (
        pl.OFT(2, terms=5),
        {"num_cayley_neumann_terms": 3},
        "{path} adapts 'fc', but terms must be a whole number of at least 4, got 3",
    ),
    "a convolution": (
        pl.HiRA(2),
        {"target_modules": ["fc", "conv"]},
        "{path} adapts 'conv', but folders of HIRA are supported for the weights of Linear and "
        "Embedding submodules",
    ),
    "another rank": (pl.MiSS(2), {"r": 3}, "[...]fc.miss_block[...]"),
    "another module": (pl.HiRA(2), {"target_modules": ["fc", "head"]}, "[...]head.hira_A[...]"),
    "no rank": (pl.HiRA(2), {"r": "two"}, "[...]'r' must be an integer of at least 1[...]"),
}


@pytest.mark.parametrize(
    ("spec", "settings", "message"), UNSUPPORTED.values(), ids=UNSUPPORTED.keys()
)
def test_unsupported_folder(
    spec: pl.kinds.Spec, settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    """A folder with settings that paramlora does not have is refused, and nothing changes."""
    folder = saved(spec, "fc", tmp_path / "one", **settings)
    message = message.replace("{path}", str(folder))
    refuses(net(), lambda m: pl.load_peft(m, folder), pl.CheckpointError, message)


def test_unsupported_adapter(tmp_path: Path) -> None:
    """An adapter that PEFT's folders cannot hold is refused by name."""
    folder = tmp_path / "one"
    cases: list[tuple[Any, float, str]] = [
        (
            {"fc": pl.HiRA(2), "head": pl.LoRA(2)},
            1.0,
            "[...]'fc.weight': a folder with HiRA has[...]",
        ),
        ({"emb": pl.MiSS(2)}, 1.0, "[...]'emb.weight': folders of MISS are supported for[...]"),
        ({"conv": pl.OFT(2)}, 1.0, "[...]'conv.weight': folders of OFT are supported for[...]"),
        ({"fc": pl.OFT(2), "head": pl.OFT(3)}, 1.0, "[...]'head.weight': PEFT needs the same[...]"),
        ({"fc": pl.OFT(2, eps=0.1)}, 0.5, "[...]'fc.weight': PEFT has no strength, 0.5[...]"),
    ]
    for spec, strength, message in cases:
        model = net()
        pl.attach(model, spec)
        pl.scale(model, strength)
        refuses(model, lambda m: pl.save_peft(m, folder), pl.TargetError, message)
        assert not folder.exists()


def test_keys(tmp_path: Path) -> None:
    """A folder has the keys that PEFT writes."""
    model = net()
    peft.get_peft_model(net(), CONFIGS["hira"]()).save_pretrained(tmp_path / "theirs")
    pl.attach(model, pl.HiRA(2), BOTH)
    pl.save_peft(model, tmp_path / "ours")
    theirs, ours = (
        {k: v.shape for k, v in load_file(tmp_path / d / "adapter_model.safetensors").items()}
        for d in ("theirs", "ours")
    )
    assert ours == theirs
