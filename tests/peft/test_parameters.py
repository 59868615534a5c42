"""PEFT's `target_parameters`, such as experts, read and written; PEFT itself is the oracle."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import paramlora as pl
from paramlora import Delta, LoRA
from tests.support.helpers import refuses
from tests.support.reference import shake

peft = pytest.importorskip("peft", reason="the oracle of these tests is PEFT")
transformers = pytest.importorskip("transformers")
from tests.support.peft_oracle import (  # noqa: E402
    bound,
    check_export,
    check_import,
    check_merged,
    loaded,
    outputs,
    trained,
)

# PEFT warns of settings that are tested on purpose.
pytestmark = pytest.mark.filterwarnings(
    r"ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning:peft"
)


class Experts(nn.Module):
    """Three experts with raw weights, beside modules that PEFT adapts in another way."""

    def __init__(self, experts: int = 3, is_transposed: bool = False) -> None:
        super().__init__()
        self.is_transposed = is_transposed
        up, down = torch.randn(experts, 6, 4), torch.randn(experts, 4, 6)
        self.up = nn.Parameter(up.mT.contiguous() if is_transposed else up)
        self.bias = nn.Parameter(torch.randn(experts, 6))
        self.norm = nn.LayerNorm(6)
        self.down = nn.Parameter(down.mT.contiguous() if is_transposed else down)
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        up, down = (self.up, self.down) if not self.is_transposed else (self.up.mT, self.down.mT)
        hidden = self.norm((up @ x.T).mT + self.bias[:, None])  # (E, n, 6)
        return self.fc((hidden.tanh() @ down.mT).sum(0))


class Net(nn.Module):
    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.experts = Experts(**settings)
        self.more = Experts(experts=2)
        self.rnn = nn.GRU(4, 3)
        self.gain = nn.Parameter(torch.ones(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(self.more(self.experts(self.first(x))) @ self.gain)[0]


def net(**settings: Any) -> nn.Module:
    torch.manual_seed(0)
    return Net(**settings).double().eval()


X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)).double()

CONFIGS: dict[str, dict[str, Any]] = {
    "one": {"target_parameters": ["experts.up"]},
    "several of a module": {"target_parameters": ["down", "experts.bias", "up"]},
    "a layer inside, a bias": {
        "target_parameters": ["up", "down"],
        "target_modules": ["experts.fc", "more.fc"],
        "modules_to_save": ["rnn"],
        "bias": "all",
    },
    "patterns": {
        "target_parameters": ["up", "experts.down", "first.weight", "weight_hh_l0"],
        "rank_pattern": {"^more.up": 1, "up": 2},
        "alpha_pattern": {"down": 7, "experts": 3},
        "use_rslora": True,
    },
    "no modules": {"target_parameters": ["up"], "target_modules": None},
}


@pytest.mark.parametrize("settings", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("shape", [{}, {"is_transposed": True}, {"experts": 1}], ids=str)
def test_import(settings: dict[str, Any], shape: dict[str, Any], tmp_path: Path) -> None:
    """Parameters that PEFT trained and saved give the same outputs and merged weights here."""
    model = net(**shape)
    config = peft.LoraConfig(r=3, lora_alpha=4, **{"target_modules": []} | settings)
    ours = check_import(model, trained(model, config, X), X, tmp_path)
    if "target_modules" not in settings:  # PEFT unloads no layer inside of a wrapped module
        check_merged(ours, loaded(model, tmp_path))


# PEFT 0.21 compares patterns with the paths of modules only before it warns; it applies them.
IGNORED = r".* keys did not match any targeted module and were ignored"
EXPERTS = LoRA(2, 3, batch_dims=1)
SPECS: dict[str, Any] = {
    "one": {"experts.down": EXPERTS},
    "several of a module": {"*.up": EXPERTS, "*.down": LoRA(3, batch_dims=1), "*rts.bias": LoRA(2)},
    "a layer inside, a bias": {
        "experts.up": EXPERTS,
        "experts.down": EXPERTS,
        "*fc": LoRA(2),
        "*.fc.bias": Delta(),
        "first.*": Delta(),
        "rnn.weight_ih_l0": LoRA(1),
    },
    "stored as (in, out), a start": {
        "experts.up": LoRA(2, 3, batch_dims=1, transposed=True),
        "experts.down": LoRA(2, 3, batch_dims=1, init="pissa"),
        "rnn.weight_hh_l0": LoRA(2, 3, transposed=True),
    },
    "rank_stabilized": {
        "experts.up": LoRA(2, 3, batch_dims=1, rank_stabilized=True),
        "first": LoRA(2, rank_stabilized=True),
    },
}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
@pytest.mark.parametrize("shape", [{}, {"is_transposed": True}], ids=str)
def test_export(spec: Any, shape: dict[str, Any], tmp_path: Path) -> None:
    """A saved adapter of raw parameters gives the same outputs in PEFT, and loads again."""
    base = net(**shape)
    model = copy.deepcopy(base)
    pl.attach(model, spec, name="digits")
    shake(model)
    pl.scale(model, -0.7)
    check_export(model, base, X, tmp_path / "digits", IGNORED)
    reloaded = copy.deepcopy(base)
    pl.load_peft(reloaded, tmp_path / "digits", name="digits")
    assert_close(outputs(reloaded, X), outputs(model, X), **bound(base))


REFUSED: dict[str, tuple[Any, str, str]] = {
    "experts as one matrix": (
        {"experts.up": LoRA(2)},
        "experts.up",
        "PEFT adapts each matrix of such a parameter by itself, as LoRA(batch_dims=1) does",
    ),
    "parameters of nested modules": (
        {"experts.up": EXPERTS, "experts.inner.weight": LoRA(2)},
        "experts.inner.weight",
        "PEFT adapts no raw parameter inside of a module that it wraps",
    ),
    "a whole module inside": (
        {"experts.up": EXPERTS, "experts.norm.*": Delta()},
        "experts.up",
        "PEFT does not adapt modules_to_save, here ['experts.norm']",
    ),
    "a parameter whose path is the end of another": (
        {lambda path, module: path == "up": LoRA(2)},
        "up.weight",
        "PEFT would adapt 'other.up.weight' too, whose path ends with it",
    ),
    "a Conv1D beside a raw parameter": (
        {"experts.up": EXPERTS, "conv": LoRA(2)},
        "experts.up",
        "PEFT adapts no raw parameter beside a Conv1D",
    ),
    "a raw parameter that is parametrized": (
        {"parametrized.weight": LoRA(2)},
        "parametrized.weight",
        "PEFT adapts no raw parameter of a module that has other parametrizations",
    ),
    "one transposed expert": (
        {"alone.up": EXPERTS},
        "alone.up",
        "PEFT does not transpose the update of a single expert, as is_transposed needs",
    ),
}


class Raw(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))


@pytest.mark.parametrize(("spec", "path", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_refused(spec: Any, path: str, reason: str, tmp_path: Path) -> None:
    """A raw parameter that PEFT would refuse or adapt in another way raises, by name."""
    model = nn.Module()
    model.experts, model.conv = Experts(), transformers.pytorch_utils.Conv1D(4, 4)
    model.alone = Experts(experts=1, is_transposed=True)
    model.experts.inner, model.up, model.other, model.parametrized = (
        Raw(),
        Raw(),
        nn.Module(),
        Raw(),
    )
    model.other.up = Raw()
    nn.utils.parametrizations.orthogonal(model.parametrized)
    pl.attach(model, spec, name="digits")
    message = (
        f"a PEFT folder cannot store the adapter at {path!r}: {reason}; detach it from there, or "
        "use paramlora.save"
    )
    refuses(model, lambda m: pl.save_peft(m, tmp_path / "a"), pl.TargetError, message)
    assert not list(tmp_path.iterdir())


def mixture(kind: str) -> nn.Module:
    """Return a tiny mixture of experts of transformers."""
    torch.manual_seed(0)
    shared: dict[str, Any] = {
        "vocab_size": 20,
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 4,
        "initializer_range": 0.3,
        "experts_implementation": "eager",
    }
    own: dict[str, dict[str, Any]] = {
        "Mixtral": {"num_local_experts": 3},
        "GptOss": {"num_local_experts": 4, "layer_types": ["full_attention"] * 2},
        "Qwen3Moe": {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 6},
    }
    config = getattr(transformers, f"{kind}Config")(**shared, **own[kind])
    return getattr(transformers, f"{kind}ForCausalLM")(config).double().eval()


IDS = {"input_ids": torch.randint(20, (2, 5), generator=torch.Generator().manual_seed(0))}


@pytest.mark.parametrize("kind", ["Mixtral", "GptOss", "Qwen3Moe"])
def test_experts_of_transformers(kind: str, tmp_path: Path) -> None:
    """Experts of transformers' models, beside their attention, have PEFT's logits both ways."""
    if kind != "GptOss":
        pytest.importorskip("transformers", "5", reason="experts were lists before 5")
    base = mixture(kind)
    settings = {
        "target_modules": ["q_proj", "v_proj"],
        "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
        "rank_pattern": {"gate_up_proj": 1},
    }
    config = peft.LoraConfig(r=2, lora_alpha=3, **settings)
    check_import(base, trained(base, config, IDS), IDS, tmp_path / "theirs")

    model = copy.deepcopy(base)
    transposed = kind == "GptOss"
    experts = LoRA(2, 3, batch_dims=1, transposed=transposed)
    pl.attach(model, {"*.experts.*_proj": experts, "*.q_proj": LoRA(1)}, name="digits")
    shake(model)
    check_export(model, base, IDS, tmp_path / "digits", IGNORED)
    reloaded = copy.deepcopy(base)
    rows = pl.load_peft(reloaded, tmp_path / "digits", name="digits").sites
    assert rows == pl.summary(model).sites
