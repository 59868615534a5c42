"""The published parameter counts come out exactly, on random models of the published shapes."""

from typing import Any

import pytest
import torch
from torch import nn

import paramlora as pl
from experiments.text.models import ADAPTER, prepare, with_bias
from experiments.text.settings import TextSettings

transformers = pytest.importorskip("transformers", reason="transformers is not installed")


def distilbert() -> nn.Module:
    """DistilBERT with a new head of two labels, of the published shape, on the meta device."""
    with torch.device("meta"):
        config = transformers.DistilBertConfig(num_labels=2)
        return transformers.DistilBertForSequenceClassification(config)


def gpt2() -> nn.Module:
    """GPT-2 small with a head of two labels that has a bias, on the meta device."""
    with torch.device("meta"):
        config = transformers.GPT2Config(num_labels=2, pad_token_id=50256)
        return with_bias(transformers.GPT2ForSequenceClassification(config))


def trained(model: nn.Module, method: str, preset: str, **changes: Any) -> int:
    settings = TextSettings.of_preset(preset, **changes)
    learned = prepare(model, method, settings, torch.Generator())
    assert {id(p) for p in learned} == {id(p) for p in model.parameters() if p.requires_grad}
    return sum(p.numel() for p in learned)


@pytest.mark.parametrize(
    ("method", "preset", "count"),
    [
        ("full", "distilbert-imdb", 66_955_010),
        ("last-layers", "distilbert-imdb", 592_130),
        ("lora", "distilbert-imdb", 147_456),
        ("lora", "distilbert-imdb-best", 516_096),
    ],
)
def test_distilbert(method: str, preset: str, count: int) -> None:
    """What Raschka's "Code LoRA From Scratch" trains, by method and setting."""
    assert trained(distilbert(), method, preset) == count


def test_gpt2() -> None:
    """What LLMs-from-scratch, appendix E, trains: one update each for query, key and value."""
    assert trained(gpt2(), "full", "gpt2-spam") == 124_441_346
    assert trained(gpt2(), "lora", "gpt2-spam") == 2_666_528 == 12 * 221_184 + 12_320


def test_gpt2_with_one_update_for_query_key_and_value() -> None:
    """One update for the fused tensor is smaller, and of another rank."""
    targets = "*.c_attn,*.c_proj,*.c_fc,score"
    assert trained(gpt2(), "lora", "gpt2-spam", targets=targets) == 2_371_616


def test_the_head_is_trained_in_full_where_that_is_asked_for() -> None:
    """lora+head adds a full-size update of the layers outside of the backbone, and no more."""
    model = distilbert()
    assert trained(model, "lora+head", "distilbert-imdb") == 147_456 + 592_130
    kinds = {row.site: row.kind for row in pl.summary(model).sites if row.adapter == ADAPTER}
    assert {site for site, kind in kinds.items() if kind == "Delta"} == {
        "pre_classifier.weight",
        "pre_classifier.bias",
        "classifier.weight",
        "classifier.bias",
    }
