"""Files that older versions wrote load to the same bits; see tests/artefacts/make.py."""

import json
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

import paramlora as pl
from paramlora.files.metadata import VERSION
from paramlora.peft.other_kinds import OTHER_TYPES
from paramlora.site.survey import Survey
from tests.artefacts.make import EXPECTED, HERE, Net, loaded

PATHS = sorted(path for folder in HERE.iterdir() if folder.is_dir() for path in folder.iterdir())
ARTEFACTS = [path for path in PATHS if path.is_dir() or path.suffix == ".safetensors"]


def ids(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


@pytest.fixture(scope="module")
def expected() -> dict[str, dict[str, Tensor]]:
    """W' of each changed tensor, by artefact."""
    found: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, tensor in load_file(EXPECTED).items():
        artefact, _, path = key.partition(":")
        found[artefact][path] = tensor
    return found


@pytest.mark.filterwarnings("ignore:.*adds the update of 'mha.out_proj.weight' twice")
@pytest.mark.parametrize("path", ARTEFACTS, ids=ids)
def test_same_bits(path: Path, expected: dict[str, dict[str, Tensor]]) -> None:
    """A stored file or folder gives the stored W', bit for bit, in float32 and in float64."""
    for dtype in (torch.float32, torch.float64):
        found = loaded(path, dtype)
        wanted = {key: value.to(dtype) for key, value in expected[ids(path)].items()}
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def test_every_artefact_is_expected(expected: dict[str, dict[str, Tensor]]) -> None:
    """No stored file lacks its values, and no values lack their file."""
    assert sorted(expected) == sorted(map(ids, ARTEFACTS))


def test_every_version_and_kind() -> None:
    """There is a folder for each format version, and in the newest a file of each kind."""
    assert {path.parent.name for path in ARTEFACTS if not path.is_dir()} == {
        str(version) for version in range(1, VERSION + 1)
    }
    stored = set()
    for path in (HERE / str(VERSION)).iterdir():
        with safe_open(path, framework="pt") as file:
            sites = json.loads(file.metadata()["paramlora"])["sites"]
        stored |= {site["kind"] for site in sites.values()}
    kinds = {
        value.__name__
        for value in vars(pl).values()
        if isinstance(value, type) and issubclass(value, pl.kinds.Spec)
    }
    assert stored == kinds
    for folder in ("peft", "save_peft"):
        contents = [
            json.loads((path / "adapter_config.json").read_text())
            for path in (HERE / folder).iterdir()
        ]
        assert {content["peft_type"] for content in contents} == {"LORA", *OTHER_TYPES}


def test_a_file_from_before_a_setting() -> None:
    """A file without a setting that a kind has got since loads with its default."""
    with safe_open(HERE / "1" / "LoRA.safetensors", framework="pt") as file:
        assert '"dropout"' not in file.metadata()["paramlora"]
    model = Net()
    pl.load(model, HERE / "1" / "LoRA.safetensors")
    specs = {part.path: part.factors.spec for part in Survey(model).parts()}
    assert specs["fc.weight"] == pl.LoRA(2, 4, dropout=0.0)
