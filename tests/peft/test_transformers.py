"""PEFT's folders for transformers models, tiny and random; PEFT itself is the oracle."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import paramlora as pl
from paramlora import Delta, DoRA, LoRA
from paramlora.peft.disk import CONFIG
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

pytestmark = pytest.mark.filterwarnings(
    "ignore"
)  # PEFT warns of settings that are tested on purpose

IDS = torch.randint(40, (2, 5), generator=torch.Generator().manual_seed(0))
PIXELS = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=8,
        initializer_range=0.3,
    )
    return transformers.BertForSequenceClassification(config)


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(vocab_size=40, n_positions=8, n_embd=16, n_layer=2, n_head=2)
    return transformers.GPT2LMHeadModel(config)


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=24,
        max_position_embeddings=8,
        tie_word_embeddings=False,
    )
    return transformers.LlamaForCausalLM(config)


def vit() -> nn.Module:
    config = transformers.ViTConfig(
        image_size=8,
        patch_size=4,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
    )
    return transformers.ViTForImageClassification(config)


MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, Tensor]]] = {
    "bert": (bert, {"input_ids": IDS}),
    "gpt2": (gpt2, {"input_ids": IDS}),
    "llama": (llama, {"input_ids": IDS}),
    "vit": (vit, {"pixel_values": PIXELS}),
}


def build_model(name: str, dtype: torch.dtype) -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    make, inputs = MODELS[name]
    cast = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    return make().to(dtype).eval(), cast


def in_dtypes(cases: dict[str, Any]) -> list[Any]:
    """Return all cases in float64, and the first one of each model in float32 too."""
    return [
        pytest.param(case, dtype, id=f"{name}-{dtype}".replace("torch.", ""))
        for name, case in cases.items()
        for dtype in (torch.float64, torch.float32)
        if dtype == torch.float64 or name in MODELS
    ]


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("bert", {"target_modules": ["query", "value"]}),
    "bert, by PEFT's default, a classifier": ("bert", {"task_type": "SEQ_CLS"}),
    "bert, layer 1, biases": (
        "bert",
        {"target_modules": ["dense", "key"], "layers_to_transform": [1], "bias": "all"},
    ),
    "bert, embeddings": ("bert", {"target_modules": ["word_embeddings", "query"]}),
    "gpt2": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "gpt2, all linear": ("gpt2", {"target_modules": "all-linear", "use_rslora": True}),
    "gpt2, positions": ("gpt2", {"target_modules": ["wpe", "c_fc"]}),
    "gpt2, dora": ("gpt2", {"target_modules": ["c_attn", "wpe"], "use_dora": True}),
    "llama, dora": ("llama", {"target_modules": ["q_proj", "down_proj"], "use_dora": True}),
    "llama": ("llama", {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 1}}),
    "llama, all linear": ("llama", {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}),
    "llama, tokens": ("llama", {"target_modules": ["embed_tokens", "lm_head"]}),
    "llama, norms": ("llama", {"target_modules": ["up_proj"], "modules_to_save": ["norm"]}),
    # Older versions of transformers have the second names.
    "vit": (
        "vit",
        {
            "target_modules": ["q_proj", "v_proj", "query", "value"],
            "modules_to_save": ["classifier"],
        },
    ),
    "vit, patches": ("vit", {"target_modules": ["projection", "fc1", "intermediate.dense"]}),
}


@pytest.mark.parametrize(("case", "dtype"), in_dtypes(CASES))
def test_import(case: tuple[str, dict[str, Any]], dtype: torch.dtype, tmp_path: Path) -> None:
    """An adapter that PEFT trained and saved gives the same logits and merged weights here."""
    name, settings = case
    model, inputs = build_model(name, dtype)
    wrapped = trained(model, peft.LoraConfig(r=3, lora_alpha=4, **settings), inputs)
    ours = check_import(model, wrapped, inputs, tmp_path)
    check_merged(ours, loaded(model, tmp_path))


SPECS: dict[str, tuple[str, Any]] = {
    "bert": ("bert", {"*.query": LoRA(3, 5), "*.dense": LoRA(2), "*word_embeddings": LoRA(2)}),
    "bert, a classifier": ("bert", {"*.self.value": LoRA(3, 5), "classifier.*": Delta()}),
    "bert, biases": ("bert", {"*.value": LoRA(3), "*.bias": Delta()}),
    "gpt2": ("gpt2", {"*.c_attn": LoRA(3, 5), "*.c_proj": LoRA(4), "*wpe": LoRA(2)}),
    "gpt2, norms": ("gpt2", {"*.c_fc": LoRA(3, 5, rank_stabilized=True), "*.ln_?.*": Delta()}),
    "gpt2, dora": ("gpt2", {"*.c_*.weight": DoRA(3, 5, dim=1), "*wpe": DoRA(2, dim=1)}),
    "vit, dora": ("vit", {nn.Linear: DoRA(3, 5), "*.projection": DoRA(2)}),
    "llama": ("llama", {"*_proj": LoRA(3, 5), "*embed_tokens": LoRA(2), "lm_head": LoRA(1)}),
    "llama, norms": ("llama", {"*.mlp.*_proj": LoRA(3, 5), "*norm.weight": Delta()}),
    "vit": ("vit", {nn.Linear: LoRA(3, 5), "*.projection": LoRA(2)}),
}


@pytest.mark.parametrize(("case", "dtype"), in_dtypes(SPECS))
def test_export(case: tuple[str, Any], dtype: torch.dtype, tmp_path: Path) -> None:
    """A saved adapter gives the same logits and merged weights in PEFT."""
    name, spec = case
    base, inputs = build_model(name, dtype)
    model = copy.deepcopy(base)
    pl.attach(model, spec, name="digits")
    shake(model)
    pl.scale(model, 0.7)
    check_merged(model, check_export(model, base, inputs, tmp_path / "digits"))


@torch.no_grad()
def test_load_adapter_and_save_pretrained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A transformers model loads folders of paramlora, and paramlora loads its folders."""
    # transformers 5.24 requires PEFT 0.22, which was not released yet. Reading and writing folders
    # does not depend on it.
    minimum = "transformers.integrations.peft.MIN_PEFT_VERSION"
    monkeypatch.setattr(minimum, peft.__version__, raising=False)
    base, inputs = build_model("llama", torch.float64)
    model, loads_ours = copy.deepcopy(base), copy.deepcopy(base)
    pl.attach(model, LoRA(3, 5), "*_proj", name="digits")
    shake(model)
    pl.save_peft(model, tmp_path / "digits", "digits")
    loads_ours.load_adapter(tmp_path / "digits")  # type: ignore[operator]
    assert_close(outputs(loads_ours, inputs), outputs(model, inputs), **bound(base))

    theirs, ours = copy.deepcopy(base), copy.deepcopy(base)
    settings = {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": False}
    theirs.add_adapter(peft.LoraConfig(**settings))  # type: ignore[operator]
    theirs.save_pretrained(tmp_path / "theirs")  # type: ignore[operator]
    pl.load_peft(ours, tmp_path / "theirs")
    assert_close(outputs(ours, inputs), outputs(theirs, inputs), **bound(base))
    assert (outputs(ours, inputs) - outputs(base, inputs)).abs().max() > 1e-3


@pytest.mark.parametrize(("kind", "task"), [("llama", "CAUSAL_LM"), ("gpt2", "CAUSAL_LM")])
def test_auto_peft_model_finds_base_and_task(kind: str, task: str, tmp_path: Path) -> None:
    """PEFT's AutoPeftModel loads the saved folder alone, with the logits of the adapted model."""
    torch.manual_seed(0)
    base: Any = MODELS[kind][0]()
    base.save_pretrained(tmp_path / "base")
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    pl.attach(model, LoRA(2))
    shake(model)
    pl.save_peft(model, tmp_path / "adapter")
    found = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert found.peft_config["default"].task_type == task
    assert_close(found(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_given_base_and_task(tmp_path: Path) -> None:
    """A given base and task are written; without transformers' class there is neither."""
    model = nn.Sequential(nn.Linear(4, 3))
    pl.attach(model, LoRA(2))
    pl.save_peft(model, tmp_path / "plain")
    pl.save_peft(model, tmp_path / "given", base="me/base", task_type="FEATURE_EXTRACTION")
    plain, given = (json.loads((tmp_path / n / CONFIG).read_text()) for n in ("plain", "given"))
    assert {*given} - {*plain} == {"base_model_name_or_path", "task_type"}
    assert given["base_model_name_or_path"] == "me/base"
    with pytest.raises(ValueError, match="PEFT has no task_type 'causal'; it has CAUSAL_LM"):
        pl.save_peft(model, tmp_path / "wrong", task_type="causal")
    assert not (tmp_path / "wrong").exists()
