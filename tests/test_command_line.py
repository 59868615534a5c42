"""The command line of the library: what it shows, checks and converts, and what it refuses."""

import configparser
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import paramlora as pl
from paramlora.__main__ import main
from paramlora.integrations.diffusers import save_diffusers
from tests.support.reference import shake

ROOT = Path(__file__).parents[1]
ARTEFACTS = ROOT / "tests" / "artefacts"
Captured = pytest.CaptureFixture[str]


class Net(nn.Module):
    """A Linear inside another module, and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.ModuleDict({"fc": nn.Linear(6, 4)})
        self.conv = nn.Conv2d(3, 2, 3)


def adapted() -> Net:
    """Return a network with a trained adapter."""
    torch.manual_seed(0)
    model = Net()
    pl.attach(model, pl.LoRA(rank=2, alpha=3), ["fc", "conv"], name="digits")
    shake(model)
    pl.scale(model, 0.5)
    return model


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """The file of an adapter."""
    pl.save(adapted(), tmp_path / "digits.safetensors")
    return tmp_path / "digits.safetensors"


def test_what_is_installed(capsys: Captured) -> None:
    """Without a command: the versions, the state of the native extension, the devices."""
    assert main([]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["paramlora"] == pl.__version__
    assert lines["torch"].startswith(torch.__version__.partition("+")[0])
    assert lines["extension"].startswith(("loaded", "not built", "switched off", "cannot be"))
    assert "device" in lines


def test_the_version(capsys: Captured) -> None:
    """`--version` prints the version alone."""
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"paramlora {pl.__version__}\n"


def test_the_console_script() -> None:
    """`paramlora` is the same command."""
    found = configparser.ConfigParser()
    found.read(ROOT / "setup.cfg")
    script = found["options.entry_points"]["console_scripts"].strip()
    assert script == f"paramlora = {main.__module__}:{main.__name__}"


@pytest.mark.parametrize(
    ("path", "row"),
    [
        ("1/LoRA.safetensors", "emb.weight   kept     5×4    LoRA  1     0.5 "),
        ("1/LoRA-blocks.safetensors", "fc.weight[2:, 1:]   kept     2×5    LoRA  2     0.5 "),
        ("1/LoRA-experts.safetensors", "experts    kept     2×3×4  LoRA  2     0.5 "),
        ("1/Delta.safetensors", "kept     4      Delta "),
        ("peft/LoRA", "emb.weight   default  5×4    LoRA  2     2 "),
    ],
)
def test_the_sites_of_a_file(path: str, row: str, capsys: Captured) -> None:
    """`summary` prints a row for each site, and nothing about a base that it does not know."""
    assert main(["summary", str(ARTEFACTS / path)]) == 0
    shown = capsys.readouterr().out
    assert row in shown
    assert "trainable " not in shown.splitlines()[-1]


@pytest.mark.parametrize("path", sorted((ARTEFACTS / "1").iterdir()), ids=lambda path: path.stem)
def test_every_file_of_an_older_version_is_whole(path: Path, capsys: Captured) -> None:
    """`audit` needs no base for any kind."""
    assert main(["audit", str(path)]) == 0
    assert "whole and finite" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:.*NaN or infinite")
def test_what_an_audit_finds(file: Path, capsys: Captured) -> None:
    """Updates that are zero and values that are not finite are findings; damage is an error."""
    model = Net()
    pl.attach(model, pl.LoRA(rank=2), ["fc", "conv"])
    with torch.no_grad():
        pl.state_dict(model)["conv.weight.B"].fill_(torch.inf)
    pl.save(model, file)
    assert main(["audit", str(file)]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "body.fc.weight: the update is zero, as before any training",
        "conv.weight: B has values that are not finite",
    ]
    content = file.read_bytes()
    for damaged, said in ((content[:-1] + b"x", "does not match its digest"), (b"", "is damaged")):
        file.write_bytes(damaged)
        assert main(["audit", str(file)]) == 2
        assert said in capsys.readouterr().err


def test_from_peft(tmp_path: Path, capsys: Captured) -> None:
    """A folder of PEFT becomes a file, with the same W'."""
    model, folder, again = adapted(), tmp_path / "peft", tmp_path / "again.safetensors"
    pl.save_peft(model, folder)
    assert main(["convert", str(folder), str(again), "--name", "letters"]) == 0
    assert "adapter 'letters' with 2 sites, in the format of paramlora" in capsys.readouterr().out
    torch.manual_seed(0)
    loaded = Net()
    pl.load(loaded, again)
    assert_close(loaded.conv.weight, model.conv.weight)
    assert pl.names(loaded) == ["letters"]


def test_from_diffusers(tmp_path: Path) -> None:
    """A file of diffusers becomes a file of paramlora, with the same W'."""
    model, one, again = adapted(), tmp_path / "unet.safetensors", tmp_path / "again.safetensors"
    save_diffusers({"unet": model}, one)
    assert main(["convert", str(one), str(again), "--from", "diffusers"]) == 0
    torch.manual_seed(0)
    loaded = Net()
    pl.load(loaded, again)
    assert_close(loaded.conv.weight, model.conv.weight)


def test_a_weight_and_its_bias(tmp_path: Path, capsys: Captured) -> None:
    """`summary` shows a Delta on the bias of a Linear beside an adapter of its weight."""
    model = Net()
    pl.attach(model, {"body.fc.weight": pl.LoRA(2), "body.fc.bias": pl.Delta()})
    pl.save(model, tmp_path / "both.safetensors")
    assert main(["summary", str(tmp_path / "both.safetensors")]) == 0
    assert "body.fc.bias " in capsys.readouterr().out


def test_with_a_base(tmp_path: Path, capsys: Captured) -> None:
    """With --model a DoRA of transformers' Conv1D is converted, whose norms are the base's."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.GPT2Config(n_layer=1, n_head=1, n_embd=8, n_positions=8, vocab_size=9)
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    model = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "base")
    pl.attach(model, pl.DoRA(rank=2, dim=1), "c_attn", name="default")
    shake(model)
    pl.save(model, tmp_path / "one.safetensors")
    words = ["convert", str(tmp_path / "one.safetensors"), str(tmp_path / "peft")]
    assert main(words) == 2
    assert "the format of peft needs the types of the layers" in capsys.readouterr().err
    assert main([*words, "--model", str(tmp_path / "base")]) == 0
    fresh = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "base")
    pl.load_peft(fresh, tmp_path / "peft")
    ids = torch.arange(5)[None]
    assert_close(fresh(ids).logits, model(ids).logits)
    settings = tmp_path / "base" / "config.json"
    settings.write_text(settings.read_text().replace("GPT2LMHeadModel", "OtherModel"))
    assert main([*words, "--model", str(tmp_path / "base")]) == 2
    assert "needs OtherModel, which transformers does not have" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["summary", "none.safetensors"],
            "none.safetensors does not exist: pass a file or a folder",
        ),
        (["summary", "{artefacts}/peft/LoRA-patterns"], "needs its base, because of"),
        (["summary", "{artefacts}/peft/LoRA-attention"], "needs its base, because of"),
        (["audit", "{artefacts}/peft/LoRA/adapter_model.safetensors"], "not written by paramlora"),
        (["summary", "{artefacts}/peft/OFT"], "because of its settings: pass --model"),
        (["summary", "{artefacts}/peft/HiRA"], "because of its settings: pass --model"),
        (
            ["convert", "{artefacts}/1/LoRA.safetensors", "out"],
            "needs the types of the layers",
        ),
        (["convert", "{artefacts}/1/LoRA.safetensors", "out", "--to", "diffusers"], "pass --model"),
        (
            ["convert", "{artefacts}/1/LoRA.safetensors", "out.safetensors", "--model", "gpt2"],
            "PEFT's format is a folder, and out.safetensors is the name of a file",
        ),
        (
            ["convert", "{artefacts}/1/LoRA.safetensors", "out", "--from", "diffusers"],
            "has no key that begins with 'unet.': load it in Python, by load_diffusers",
        ),
    ],
)
def test_what_cannot_be_done_is_said(words: list[str], said: str, capsys: Captured) -> None:
    """A command that cannot be carried out says why, and writes nothing."""
    assert main([word.format(artefacts=ARTEFACTS) for word in words]) == 2
    assert said in capsys.readouterr().err
    assert not Path("out").exists()
    assert not Path("out.safetensors").exists()
