"""An adapter pushed to the Hub and loaded from there; the Hub is a local folder."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import paramlora as pl
from tests.support.reference import shake

hub_library = pytest.importorskip("huggingface_hub")
from paramlora.integrations import hub  # noqa: E402


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))


X = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that is the repository "me/digits" of a Hub."""
    repository = tmp_path / "me" / "digits"

    def create(api: Any, repo_id: str, *, private: bool | None, exist_ok: bool) -> None:
        (tmp_path / repo_id).mkdir(parents=True, exist_ok=exist_ok)

    def upload(
        api: Any,
        *,
        repo_id: str,
        folder_path: str,
        delete_patterns: list[str],
        commit_message: str = "",
    ) -> str:
        for name in delete_patterns:
            (tmp_path / repo_id / name).unlink(missing_ok=True)
        shutil.copytree(folder_path, tmp_path / repo_id, dirs_exist_ok=True)
        return commit_message

    def snapshot(repo_id: str, *, allow_patterns: list[str], revision: Any, token: Any) -> str:
        return str(tmp_path / repo_id)

    monkeypatch.setattr(hub.HfApi, "create_repo", create)
    monkeypatch.setattr(hub.HfApi, "upload_folder", upload)
    monkeypatch.setattr(hub, "snapshot_download", snapshot)
    return repository


def test_push_and_pull(remote: Path) -> None:
    """A pushed adapter loads from the Hub with the same outputs, by paramlora's file or PEFT's."""
    model = net()
    pl.attach(model, pl.LoRA(2), name="digits")
    shake(model)
    said = hub.push_to_hub(model, "me/digits", base="them/base", commit_message="first")
    assert said == "first"
    names = {entry.name for entry in remote.iterdir()}
    assert names == {hub.FILE, hub.CARD, "adapter_config.json", "adapter_model.safetensors"}
    ours = net()
    assert hub.from_hub(ours, "me/digits", check_base=True).sites[0].adapter == "digits"
    assert torch.equal(ours(X), model(X))
    (remote / hub.FILE).unlink()
    for place in ("me/digits", str(remote)):
        theirs = net()
        hub.from_hub(theirs, place, name="again")
        torch.testing.assert_close(theirs(X), model(X))
    (remote / "adapter_config.json").unlink()
    with pytest.raises(pl.CheckpointError, match=r"me/digits has no adapter.safetensors and no"):
        hub.from_hub(net(), "me/digits")


def test_card(remote: Path) -> None:
    """The card has front matter that the Hub reads, and says how to load the adapter."""
    model = net()
    pl.attach(model, pl.LoRA(2), name="digits")
    hub.push_to_hub(model, "me/digits", base="them/base")
    card = hub_library.ModelCard.load(remote / hub.CARD)
    assert card.data.to_dict() == {
        "base_model": "them/base",
        "library_name": "paramlora",
        "tags": ["paramlora", "adapter", "lora", "peft"],
    }
    assert 'hub.from_hub(model, "me/digits")' in card.text
    assert 'PeftModel.from_pretrained(model, "me/digits")' in card.text


def test_what_peft_cannot_express(remote: Path) -> None:
    """An adapter that PEFT cannot express is pushed as paramlora's file, and the card says so."""
    model = net()
    pl.attach(model, pl.LoRA(2), "1", name="digits")
    hub.push_to_hub(model, "me/digits")  # with PEFT's files, which the next push removes
    pl.detach(model)
    pl.attach(model, {"0": pl.LoHa(2), "1": pl.LoRA(2)}, name="digits")
    hub.push_to_hub(model, "me/digits")
    assert {entry.name for entry in remote.iterdir()} == {hub.FILE, hub.CARD}
    card = hub_library.ModelCard.load(remote / hub.CARD)
    assert card.data.to_dict()["tags"] == ["paramlora", "adapter", "loha", "lora"]
    assert "base_model" not in card.data.to_dict()
    assert "PEFT cannot load it: a PEFT folder cannot store the adapter at '0.weight'" in card.text
    assert hub.from_hub(net(), "me/digits").sites[0].kind == "LoHa"


def test_folders_that_are_written_again(tmp_path: Path) -> None:
    """PEFT's files of an earlier adapter go; PEFT's files alone cannot check the base."""
    model = net()
    pl.attach(model, pl.LoRA(2), "1", name="digits")
    hub.write_folder(model, tmp_path)
    (tmp_path / hub.FILE).rename(tmp_path / "aside")
    with pytest.raises(pl.CheckpointError, match="do not describe their base"):
        hub.from_hub(net(), str(tmp_path), check_base=True)
    (tmp_path / "aside").unlink()
    pl.attach(model, pl.LoHa(2), "0", name="loha")
    hub.write_folder(model, tmp_path, "loha")
    assert {entry.name for entry in tmp_path.iterdir()} == {hub.FILE, hub.CARD}
