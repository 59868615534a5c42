"""Regular expressions of PEFT's folders that backtrack for ever are cut off."""

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import paramlora as pl
from paramlora.peft import patterns
from paramlora.peft.patterns import cut_off, match
from tests.support.helpers import refuses

FOR_EVER = r"(.*.*)*x"


def model() -> nn.Module:
    """Return a model with a path of 40 characters."""
    return nn.ModuleDict({"language_model_layers_attention_projection": nn.Linear(3, 2)})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    adapted = model()
    pl.attach(adapted, pl.LoRA(1))
    pl.save_peft(adapted, tmp_path / "a")
    return tmp_path / "a"


def change(folder: Path, **settings: object) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


SLOW: dict[str, dict[str, Any]] = {
    "target_modules": {"target_modules": FOR_EVER},
    "exclude_modules": {"exclude_modules": FOR_EVER},
    "rank_pattern": {"rank_pattern": {FOR_EVER: 1}},
    "modules_to_save": {"modules_to_save": [FOR_EVER]},
    "one repeated group": {"target_modules": "([a-z]|_|.)+!"},
    "many repeats": {"target_modules": ".*" * 12 + "!"},
    "optional characters": {"target_modules": ".?" * 40 + "." * 40 + "!"},
    "alternatives": {"target_modules": "(.|[a-z]|_)" * 40 + "!"},
    "lazy repeats": {"target_modules": "(?:.*?.*?)+?!"},
}


@pytest.mark.slow
@pytest.mark.parametrize("settings", SLOW.values(), ids=SLOW.keys())
def test_cut_off(folder: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """An expression that backtracks for ever raises within about a second, in each setting."""
    monkeypatch.setattr(patterns, "_PROGRAM", patterns._PROGRAM.replace("left = 1.0", "left = 0.2"))
    change(folder, **settings)
    start = time.perf_counter()
    refuses(
        model(),
        lambda m: pl.load_peft(m, folder),
        pl.CheckpointError,
        f"{folder}/adapter_config.json has regular expressions that take more than 1 s to match "
        "the modules of this model; list the names of the modules instead",
    )
    assert time.perf_counter() - start < 5  # on a busy machine


@pytest.mark.slow
def test_many_cheap_expressions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Expressions that take a moment each are cut off if they take long together."""
    monkeypatch.setattr(patterns, "SECONDS", 0.05)
    names = [f"language_model_layers_{i}_attention_projection" for i in range(50)]
    large = nn.ModuleDict({name: nn.Linear(3, 2) for name in names})
    pl.attach(large, pl.LoRA(1), name="default")
    pl.save_peft(large, tmp_path / "a")
    change(tmp_path / "a", rank_pattern={f".*.*x{i}": 1 for i in range(300)})
    fresh = nn.ModuleDict({name: nn.Linear(3, 2) for name in names})
    start = time.perf_counter()
    with pytest.raises(pl.CheckpointError, match=r"take more than 0\.05 s to match"):
        pl.load_peft(fresh, tmp_path / "a")
    assert time.perf_counter() - start < 5  # on a busy machine


ORDINARY = [
    r".*\.(q_proj|k_proj|v_proj|o_proj)",
    r"layers\.\d+\.(self_attn|mlp)\.(q_proj|up_proj)",
    r"net\.0|net\.2",
    r"(.*\.)?(^net\.0)$",
    r"(^|.*\.)head($|\..*)",
]


@pytest.mark.parametrize("expression", ORDINARY)
def test_ordinary_expressions(expression: str) -> None:
    """The expressions of most folders are matched without starting a process."""
    assert patterns._ways(expression) < patterns._MOST


LONG = [
    r"(?:.*?(?:vision|language).*?(?:self_attn|mlp).*?(?:q_proj|up_proj).*?)|\bmodel\.\d{1,}",
    r"^(?!.*visual).*(?:q_proj|k_proj).*.*",
    r"(?i)(?:LAYERS?\.(\d)+\.)+Q_(proj)*",
    r"(a+)+b",
]
PATHS = ["", "language.mlp.up_proj", "layers.10.q_proj", "visual.q_proj", "model.3", "aaaab", "é\n"]


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("expression", LONG)
def test_same_matches(expression: str, whole: bool) -> None:
    """In a process of its own an expression matches what it matches here, with the same groups."""
    assert patterns._ways(expression) > patterns._MOST
    how: Callable[..., Any] = re.fullmatch if whole else re.match
    with cut_off(Path("a")):
        for path in PATHS:
            found, wanted = match(expression, path, whole=whole), how(expression, path)
            assert (found and [*found]) == (wanted and [*wanted.groups()])


def test_the_process_ends() -> None:
    """The process is gone after the block, and an invalid expression raises as in `re`."""
    with cut_off(Path("a")):
        assert match("(a+)+", "aa") is not None
        matcher = patterns._MATCHER.get()
        assert matcher is not None
        assert matcher.process is not None
        with pytest.raises(re.error, match="unterminated"):
            match("((a+)+", "aa")
    assert matcher.process.poll() is not None
