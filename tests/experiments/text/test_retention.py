"""Mean pooling, what is kept of a second data set, joint training, and the front over rates."""

import doctest
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from experiments.__main__ import main
from experiments.analysis import front as analysis
from experiments.harness.parallel import Group
from experiments.harness.rundir import RunDirectory
from experiments.harness.settings import StudyError, replace
from experiments.text import front
from experiments.text.context import TextContext, prepare_context
from experiments.text.data import load_corpus
from experiments.text.front import cells
from experiments.text.front_report import KEPT, difference_table, front_table
from experiments.text.models import head_of, load_classifier, mean_pooled
from experiments.text.retention import Probe, fit_probe, kept, retention_of
from experiments.text.settings import FrontGrid, TextSettings
from experiments.text.training import cross_entropy, objective_of
from tests.support import tiny_text

pytest.importorskip("transformers", reason="transformers is not installed")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny checkpoint and two data sets."""
    return tiny_text.world(tmp_path_factory.mktemp("world"), train=60, test=20, other=80)


def context_in(world: Path, **changes: Any) -> TextContext:
    given = {
        "model": str(world / "bert"),
        "data_dir": str(world),
        "tokens": str(world / "tokens"),
        "retention": str(world / "other.jsonl"),
        "pooling": "mean",
        "batch": 8,
        "device": "cpu",
    }
    settings = replace(TextSettings(), **{**given, **changes})
    device = torch.device("cpu")
    run = RunDirectory(world, {}, {}, [])
    return prepare_context(settings, run, load_corpus(settings.dataset), device, Group())


@pytest.mark.parametrize("module", [analysis])
def test_examples_in_docstrings_run(module):
    """The examples in the docstrings pass."""
    result = doctest.testmod(module)
    assert result.attempted
    assert not result.failed


def test_mean_pooling_ignores_padding_and_leaves_out_the_pooler(world: Path) -> None:
    """The head reads the mean over a text's own tokens; the seed determines the head alone."""
    model = load_classifier(str(world / "bert"), 2, 0, 3, "mean")
    ids, mask = torch.tensor([[2, 5, 6, 3, 0, 0]]), torch.tensor([[1, 1, 1, 1, 0, 0]])
    backbone = model.get_submodule("backbone")
    hidden = backbone(input_ids=ids, attention_mask=mask).last_hidden_state
    expected = hidden[0, :4].double().mean(0)
    assert_close(mean_pooled(backbone, ids, mask)[0].double(), expected, rtol=1e-5, atol=1e-6)
    head: Any = model.get_submodule("classifier")
    logits = F.linear(expected.float(), head.weight, head.bias)
    assert_close(model(input_ids=ids, attention_mask=mask).logits[0], logits)
    assert not [name for name, _ in model.named_parameters() if "pooler" in name]
    assert head_of(model) == ["classifier.weight", "classifier.bias"]
    again = load_classifier(str(world / "bert"), 2, 0, 4, "mean")
    different = {
        name
        for (name, a), (_, b) in zip(
            model.named_parameters(), again.named_parameters(), strict=True
        )
        if not torch.equal(a, b)
    }
    assert different == {"classifier.weight"}


def test_a_probe_counts_each_label_equally() -> None:
    """Balanced accuracy: always answering the label of nine in ten texts is worth one half."""
    labels = torch.tensor([0] * 9 + [1])
    constant = Probe(torch.zeros(2, 3), torch.tensor([1.0, 0.0]))
    assert constant.balanced_accuracy(torch.randn(10, 3), labels) == 0.5
    apart = F.normalize(torch.randn(40, 3), dim=-1)
    labels = (apart[:, 0] > 0).long()
    assert fit_probe(apart, labels).balanced_accuracy(apart, labels) > 0.9


def test_the_checkpoint_keeps_everything(world: Path) -> None:
    """On the unchanged checkpoint the measures are those of the checkpoint, in any head."""
    context = context_in(world)
    found = kept(context, context.model(5))
    assert found["kept_probe"] == found["kept_refit"] == found["base_probe"]
    assert found["kept_retrieval"] == found["base_retrieval"]
    assert found["kept_agreement"] == pytest.approx(1)
    assert kept(context_in(world, retention=""), context.model(0)) == {}


def test_moved_embeddings_are_found_by_the_measures_that_see_them(world: Path) -> None:
    """A mirrored space keeps the cosines and the fitted-again probe; the old probe fails there."""
    context = context_in(world)
    model = context.model(0)
    last: Any = [m for m in model.modules() if isinstance(m, torch.nn.LayerNorm)][-1]
    with torch.no_grad():
        last.weight.neg_()
        last.bias.neg_()
    found = kept(context, model)
    assert found["kept_agreement"] == pytest.approx(1)
    assert found["kept_refit"] == pytest.approx(found["base_probe"], abs=0.1)
    assert found["kept_probe"] == pytest.approx(1 - found["base_probe"], abs=0.2)


def test_joint_training_adds_the_loss_of_the_unchanged_probe(world: Path) -> None:
    """The objective is the task's cross-entropy and the probe's on a batch of other texts."""
    context = context_in(world, methods="joint")
    model, second = context.model(0), retention_of(context)
    ids, mask, labels = context.tokens["train"].batch(torch.arange(8))
    batch = (ids, mask, labels, torch.ones(()))
    found = objective_of(context, "joint", 7)(model, *batch)
    rows = torch.randint(len(second.train), (8,), generator=torch.Generator().manual_seed(7))
    ids, mask, labels = second.train.batch(rows)
    embedded = mean_pooled(model.get_submodule("backbone"), ids, mask).double()
    embedded = embedded / embedded.norm(dim=1, keepdim=True)
    logits = embedded @ second.probe.weight.double().T + second.probe.bias.double()
    expected = cross_entropy(model, *batch).double() + F.cross_entropy(logits, labels)
    assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    assert objective_of(context, "full", 7) is cross_entropy


def test_joint_training_needs_a_second_data_set() -> None:
    """The error names the option and the method."""
    with pytest.raises(StudyError, match="--retention must be a second data set for joint"):
        replace(TextSettings(), methods="full,joint")


@pytest.mark.slow
def test_a_front_is_trained_reported_and_resumed(world: Path, tmp_path: Path, capsys) -> None:
    """The command trains every arm at every rate, writes tables and figure, and resumes."""
    words = ["text-front", "--model", str(world / "bert"), "--data-dir", str(world)]
    words += ["--tokens", str(world / "tokens"), "--retention", str(world / "other.jsonl")]
    words += ["--pooling", "mean", "--targets", "*.query,*.dense", "--no-forgetting"]
    words += ["--device", "cpu", "--batch", "12", "--epochs", "1", "--seeds", "1"]
    words += ["--ranks", "2", "--rates", "1e-3,1e-2", "--full-rates", "1e-4,1e-2"]
    words += [
        "--head-rates",
        "",
        "--joint-rates",
        "1e-2",
        "--joint-full-rates",
        "1e-2",
        "--out",
        str(tmp_path / "f"),
    ]
    assert main(words) == 0
    run = RunDirectory.read(tmp_path / "f")
    arms = ["full"] * 2 + ["lora r 2"] * 2 + ["joint full", "joint lora r 2"]
    assert [row["method"] for row in run.rows] == arms
    assert [row["rate"] for row in run.rows[:2]] == [1e-4, 1e-2]
    assert (tmp_path / "f" / "front.png").stat().st_size > 10_000
    assert "At equal accuracy" in (tmp_path / "f" / "front.md").read_text()
    capsys.readouterr()
    assert main(words) == 0
    assert "arm − full" in capsys.readouterr().out
    assert RunDirectory.read(tmp_path / "f").rows == run.rows


@pytest.mark.slow
def test_a_front_of_one_arm_needs_no_other(world: Path, tmp_path: Path, capsys) -> None:
    """Arms without rates are left out. --spectra measures the weights that the adapter changed."""
    words = ["text-front", "--model", str(world / "bert"), "--data-dir", str(world)]
    words += ["--tokens", str(world / "tokens"), "--retention", str(world / "other.jsonl")]
    words += ["--pooling", "mean", "--targets", "*.query", "--no-forgetting", "--epochs", "1"]
    words += ["--device", "cpu", "--seeds", "1", "--ranks", "1", "--head-rates", "1e-3"]
    for name in ("rates", "full-rates", "joint-rates", "joint-full-rates"):
        words += [f"--{name}", ""]
    assert main([*words, "--spectra", "--out", str(tmp_path / "f")]) == 0
    (row,) = RunDirectory.read(tmp_path / "f").rows
    assert row["method"] == "lora+head r 1"
    assert len(row["sizes"]) == len(row["left"]) == 2  # the query of two layers
    assert min(row["sizes"]) > 0
    assert "## Intruder dimensions" in (tmp_path / "f" / "front.md").read_text()
    assert "lora+head r 1" in capsys.readouterr().out


def test_no_training_begins_after_the_time_given(world: Path, tmp_path: Path, monkeypatch) -> None:
    """With no minute left the command says that nothing was trained."""
    monkeypatch.setattr(front, "_run", lambda settings, end: None)
    settings = context_in(world).settings
    with pytest.raises(StudyError, match=r"no training of .* ended within 0 minutes"):
        front.run_front(settings, FrontGrid(), tmp_path, minutes=0, say=lambda line: None)
    plain = replace(settings, retention="")
    with pytest.raises(StudyError, match="--retention must name a second data set"):
        front.run_front(plain, FrontGrid(), tmp_path)


def test_the_cells_of_a_front_differ_as_their_names_say() -> None:
    """Each cell sets method, rate, rank and seed; alpha is twice the rank; names are unique."""
    base = replace(TextSettings(), seeds=2, seed_from=4)
    found = list(cells(base, FrontGrid()))
    assert len({cell.name for cell in found}) == len(found) == 2 * (5 + 3 * 5 + 3 * 4 + 2 + 2)
    for cell in found:
        made = cell.settings(replace(base, retention="spam"), Path("runs"))
        assert cell.rank is not None
        assert (made.adapter.rank, made.adapter.alpha) == (cell.rank, 2 * cell.rank)
        assert (made.seed_from, made.seeds) == (cell.seed, 1)
        assert (made.finetuning.lr, made.finetuning.full_lr) == (cell.rate, cell.rate)
    assert [cell.seed for cell in found] == sorted(cell.seed for cell in found)


def test_the_difference_at_equal_learning_is_paired_by_seed(tmp_path: Path) -> None:
    """LoRA keeps 2 points more at each accuracy, at rates that learn less: the table says 2."""
    rows = [
        {
            "stage": "front",
            "method": method,
            "rate": rate,
            "seed": seed,
            "accuracy": x + 0.01 * seed,
            **dict.fromkeys(KEPT, 1 - x + (0.02 if method != "full" else 0)),
            "base_probe": 1.0,
            "base_retrieval": 1.0,
        }
        for seed in range(3)
        for method, xs in (("full", (0.5, 0.9)), ("lora r 1", (0.4, 0.8)))
        for rate, x in zip((1e-4, 1e-3), xs, strict=True)
    ]
    run = RunDirectory(tmp_path, {}, {}, rows)
    assert difference_table(run).rows[0] == ["lora r 1", "probe, %", "2.0", "2.0 to 2.0", "3"]
    assert front_table(run).rows[1][:3] == ["full", "0.0001", "51.0 ± 1.0"]
    assert analysis.difference([(0.1, 1.0)], [(0.2, 1.0)]) is None
