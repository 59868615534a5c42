"""The examples of docs/huggingface.md run unchanged, each section as one program."""

import copy
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import paramlora as pl

DOC = Path(__file__).parents[2] / "docs" / "huggingface.md"
SECTION = re.compile(r"^## (.+?)\n(.*?)(?=^## |\Z)", re.MULTILINE | re.DOTALL)
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TEXT = DOC.read_text(encoding="utf-8")
SECTIONS = {match[1]: match for match in SECTION.finditer(TEXT)}


def test_sections_have_code() -> None:
    """Each section has code to run."""
    assert SECTIONS
    for title, match in SECTIONS.items():
        assert BLOCK.search(match[2]), title


def run(title: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Run the blocks of a section in a folder, and return the names that they define."""
    section = SECTIONS[title]
    for package in re.findall(r"^(?:import|from) (\w+)", section[2], re.MULTILINE):
        if find_spec(package) is None:
            pytest.skip(f"no {package} here")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in BLOCK.finditer(section[2]):
        # Empty lines, so that a traceback shows the line number in the document.
        padding = "\n" * TEXT.count("\n", 0, section.start(2) + block.start(1))
        exec(compile(padding + block[1], str(DOC), "exec"), namespace)
    return namespace


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("title", SECTIONS)
def test_examples(title: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All blocks of a section run, each after those before it, and their assertions pass."""
    run(title, tmp_path, monkeypatch)


@pytest.mark.filterwarnings("ignore")
def test_best_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With load_best_model_at_end the Trainer ends with the factors of the best checkpoint."""
    names = run("transformers' Trainer", tmp_path, monkeypatch)
    arguments = names["transformers"].TrainingArguments(
        "best",
        max_steps=4,
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=True,  # so that the best one is not the last
        per_device_train_batch_size=4,
        learning_rate=0.1,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    model = copy.deepcopy(names["base"])
    pl.attach(model, {"*.query": pl.LoRA(4), "classifier.*": pl.Delta()})
    texts = names["texts"]
    trainer = names["AdapterTrainer"](model, arguments, train_dataset=texts, eval_dataset=texts)
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name != "checkpoint-4"
    saved = load_file(best / "adapter.safetensors")
    assert all(torch.equal(saved[key], factor) for key, factor in pl.state_dict(model).items())
