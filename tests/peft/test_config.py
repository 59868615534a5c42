"""The modules, ranks and alphas that a PEFT config means: the same as in PEFT itself."""

from typing import Any

import pytest
from torch import nn

from paramlora.peft.config import Config
from paramlora.peft.config_file import as_list, config_content
from paramlora.peft.modules import PeftView
from paramlora.peft.read import resolve_all_linear
from paramlora.site.survey import Survey

peft = pytest.importorskip("peft", reason="the oracle of these tests is PEFT")
from peft.tuners.tuners_utils import check_target_module_exists  # noqa: E402
from peft.utils.other import get_pattern_key  # noqa: E402

LAYERS = ["q", "k_proj", "mlp.fc1", "mlp.fc2", "moe.experts.3.fc1"]
PATHS = [
    *["fc1", "q", "head", "pre_head", "sub.head", "sub.head.dense", "net.0", "sub.net.0", "xnet.0"],
    *[f"{stem}.{i}.{layer}" for stem in ("layers", "h.layers", "h.blocks") for i in (0, 1, 10)
      for layer in LAYERS],
]  # fmt: skip

# Regular expressions and lists. PEFT turns a list into a set, so its order has no effect.
TARGETS: dict[str, dict[str, Any]] = {
    "ends": {"target_modules": ["fc1", "net.0", "q"]},
    "whole paths": {"target_modules": ["h.layers.1.q", "layers.0.mlp.fc1"]},
    "an expression": {"target_modules": r".*\.mlp\.fc\d"},
    "an expression that is a name": {"target_modules": "q"},
    "alternatives": {"target_modules": "fc1|q|.*1.*q"},
    "excluded ends": {"target_modules": ["fc1", "q"], "exclude_modules": ["mlp.fc1", "net.0"]},
    "an excluded expression": {"target_modules": r".*fc\d", "exclude_modules": r"h\..*"},
    "one layer": {"target_modules": ["q", "fc1"], "layers_to_transform": 1},
    "layers": {"target_modules": ["q", "fc1"], "layers_to_transform": [0, 10]},
    "no layers": {"target_modules": ["q", "fc1"], "layers_to_transform": []},
    "layers of a pattern": {
        "target_modules": ["q", "fc1", "k_proj"],
        "layers_to_transform": [1, 3],
        "layers_pattern": "blocks",
    },
    "layers of patterns": {
        "target_modules": ["q", "fc1", "layers.0.q"],
        "layers_to_transform": [1, 3],
        "layers_pattern": ["layers", "experts"],
    },
    "an empty pattern": {
        "target_modules": ["q", "fc1"],
        "layers_to_transform": [1],
        "layers_pattern": [],
    },
    "modules to save": {"target_modules": r".*(head|dense|q|fc1)", "modules_to_save": ["head"]},
    "modules to save by an expression": {
        "target_modules": r".*(head|dense|q|fc1)",
        "modules_to_save": ["mlp.fc.", "layers.1"],
    },
}


@pytest.mark.parametrize("settings", TARGETS.values(), ids=TARGETS.keys())
def test_target_modules(settings: dict[str, Any]) -> None:
    """A list matches the end of a path, an expression all of it, with PEFT's exceptions."""
    theirs, ours = peft.LoraConfig(**settings), Config(**settings)
    expected = [path for path in PATHS if check_target_module_exists(theirs, path)]
    assert [path for path in PATHS if ours.targets(path)] == expected
    assert expected


@pytest.mark.parametrize(
    "numbers",
    [
        {"fc1": 2, "q": 3},
        {"mlp.fc1": 2, "fc1": 3, r"^fc1": 4},
        {r"layers\.\d+\..*": 2, "^h.*q": 3},
        {r"^net\.0": 2, "0": 3},
        {"fc1|q": 5},
        {"^h\\.layers\\.1\\.q": 7},
    ],
)
def test_rank_and_alpha_patterns(numbers: dict[str, int]) -> None:
    """The first pattern that matches the end of a path gives its rank and alpha."""
    config = Config(["q"], r=9, lora_alpha=9, rank_pattern=numbers, alpha_pattern=numbers)
    expected = [numbers.get(get_pattern_key(numbers, path), 9) for path in PATHS]
    assert [config.rank(path) for path in PATHS] == expected
    assert [config.alpha(path) for path in PATHS] == expected
    assert set(expected) != {9}


def test_written_config() -> None:
    """The written config is minimal and gives each module its rank and alpha."""
    targets = {"net.0": (4, 8.0), "sub.net.0": (4, 8.0), "fc1": (2, 8.0), "xnet.0": (4, 0.5)}
    content = config_content(targets, use_rslora=False, bias="all")
    assert content == {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": r"net\.0|sub\.net\.0|fc1|xnet\.0",
        "inference_mode": True,
        "rank_pattern": {"^fc1": 2},
        "alpha_pattern": {r"^xnet\.0": 0.5},
        "bias": "all",
    }
    del content["peft_type"], content["inference_mode"]
    config = Config(**content)
    found = {
        path: (config.rank(path), config.alpha(path)) for path in PATHS if config.targets(path)
    }
    assert found == targets


def test_targets_as_a_list() -> None:
    """The written targets are the shortest list that selects these modules alone, if there is one.

    Otherwise they are an expression: an entry selects also the paths that end with it.
    """
    paths = ["h.0.q", "h.0.k", "h.1.q", "net.0", "sub.net.0"]
    for targets, expected in (
        (["h.0.q", "h.1.q"], ["q"]),
        (["h.1.q"], ["h.1.q"]),
        (["sub.net.0"], ["sub.net.0"]),
        (["net.0"], "expression"),
    ):
        found = as_list("expression", targets, paths)
        assert found == expected
        if isinstance(found, list):
            assert [path for path in paths if Config(found).targets(path)] == targets


def test_all_linear() -> None:
    """`"all-linear"` means every Linear below the model except the output layer."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(2, 2), nn.Conv1d(2, 2, 1), nn.Linear(2, 2))
            self.head = nn.Linear(2, 2)

    model = Net()
    seen = PeftView(Survey(model))
    config = resolve_all_linear(seen, Config("all-linear"))
    found = [path for path in seen.paths if config.targets(path)]
    assert found == ["body.0", "body.2", "head"]
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear"))
    assert sorted(wrapped.targeted_module_names) == sorted(found)
