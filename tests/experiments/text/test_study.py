"""The text study: its parts by themselves, and a whole run on a tiny checkpoint."""

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import paramlora as pl
from benchmarks import text_methods
from experiments.__main__ import main
from experiments.harness.parallel import Group
from experiments.harness.rundir import RunDirectory
from experiments.harness.settings import replace
from experiments.report.checks import any_failed
from experiments.report.document import markdown
from experiments.text import report as text_report
from experiments.text import study as text
from experiments.text.context import TextContext, prepare_context
from experiments.text.data import load_corpus
from experiments.text.forgetting import Similarity, similarity
from experiments.text.models import ADAPTER, load_classifier, load_tokenizer, prepare
from experiments.text.settings import METHODS, TextSettings
from experiments.text.training import TextBatches, cross_entropy, fine_tune, linear
from tests.support import tiny_text
from tests.support.processes import forked
from tests.support.tiny_text import checkpoint, texts, write_jsonl

pytest.importorskip("transformers", reason="transformers is not installed")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny checkpoint, and texts that it can learn to tell apart."""
    return tiny_text.world(tmp_path_factory.mktemp("world"), train=100, test=40, other=120)


def settings_in(world: Path, **changes: Any) -> TextSettings:
    given = {
        "model": str(world / "bert"),
        "data_dir": str(world),
        "tokens": str(world / "tokens"),
        "methods": ",".join(METHODS),
        "targets": "*.query,*.dense",
        "batch": 10,
        "epochs": 10,
        "patience": 0,
        "evaluations": 1,
        "validation": 0.2,
        "seeds": 1,
        "lr": 3e-3,
        "full_lr": 3e-3,
        "last_lr": 3e-3,
        "alpha": 4.0,
        "device": "cpu",
        "retention": str(world / "other.jsonl"),
        "out": str(world / "run"),
    }
    return replace(TextSettings(), **{**given, **changes})


def context_in(world: Path, **changes: Any) -> TextContext:
    settings = settings_in(world, **changes)
    run = RunDirectory(world, {}, {}, [])
    device = torch.device("cpu")
    return prepare_context(settings, run, load_corpus(settings.dataset), device, Group())


@pytest.fixture(scope="module")
def finished(world: Path) -> RunDirectory:
    """A whole run by all methods."""
    return text.run_text(settings_in(world), lambda line: None)


def test_every_method_learns(finished: RunDirectory) -> None:
    """The methods that reach the whole model tell the texts apart; each says what it trained."""
    rows = {row["method"]: row for row in text_report.tuned_rows(finished)}
    assert list(rows) == list(METHODS)
    assert rows["full"]["trainable"] == rows["full"]["parameters"]
    r, d, inner, layers = 8, 16, 32, 2
    # Query and attention.output are (d, d), intermediate and output (d, inner), the pooler (d, d).
    count = layers * (2 * r * 2 * d + 2 * r * (d + inner)) + r * 2 * d
    assert rows["lora"]["trainable"] == count
    assert rows["lora+head"]["trainable"] == count + d * 2 + 2
    assert rows["last-layers"]["trainable"] == d * d + d + d * 2 + 2
    for method, row in rows.items():
        assert method == "last-layers" or row["accuracy"] > 0.7, method
        assert row["n"] == 40
        assert 0 < row["best_step"] <= row["steps"] == 10 * 8
        assert row["validation_accuracy"] == max(row["validation_curve"])


def test_the_report_says_what_is_kept(finished: RunDirectory) -> None:
    """A line per method and one of the checkpoint, in the report and in the terminal."""
    table = text_report.kept_table(finished)
    assert [row[0] for row in table.rows] == ["checkpoint", *METHODS]
    assert table.text() in text_report.terminal(finished)
    assert table.markdown() in markdown("", "", text_report.sections(finished))


def test_checks_pass(finished: RunDirectory) -> None:
    """Before training and off, outputs are bitwise the base's; merged, those of on to rounding."""
    checks = text_report.checks(finished)
    assert not any_failed(checks)
    assert len(checks) == 5
    for row in text_report.strength_rows(finished):
        assert row["agreement"][0] == pytest.approx(1)
        assert row["retrieval"][0] == row["base_retrieval"]
        on = next(r for r in finished.rows if r["stage"] == "on" and r["method"] == row["method"])
        for key, there in (("accuracy", "accuracy"), ("validation", "validation_accuracy")):
            assert row[key][row["strengths"].index(1.0)] == pytest.approx(on[there])


def test_saved_adapter_gives_the_row(world: Path, finished: RunDirectory) -> None:
    """The file of a run, on a classifier of the same seed, answers as the row says."""
    context = context_in(world)
    model = context.model(0)
    pl.load(model, finished.folder / "adapters" / "lora-0.safetensors")
    row = next(r for r in finished.rows if r["stage"] == "on" and r["method"] == "lora")
    assert context.accuracy(model, "test") == pytest.approx(row["accuracy"])


@pytest.mark.filterwarnings("ignore:.*incomplete row")
def test_a_stopped_run_goes_on(world: Path, finished: RunDirectory) -> None:
    """What a run left is not made again, and what is missing comes out the same."""
    settings, folder = settings_in(world), finished.folder
    lines = (folder / "results.jsonl").read_text().splitlines(keepends=True)
    before = [json.loads(line) for line in lines]
    kept = [line for line, row in zip(lines, before, strict=True) if row["method"] != "lora"]
    (folder / "results.jsonl").write_text("".join(kept) + '{"stage": "on", "meth')
    said: list[str] = []
    again = text.run_text(settings, said.append)
    assert f"resumed  {len(kept)} rows recorded, 2 stages remaining" in said

    def without_time(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        rows = [{k: v for k, v in row.items() if k not in ("seconds", "commit")} for row in rows]
        return sorted(rows, key=lambda row: (row["method"], row["stage"]))

    assert without_time(again.rows) == without_time(before)


def test_report(world: Path, finished: RunDirectory) -> None:
    """The report has methods, strengths, checks and settings, and is the same if made again.

    The page has the same content. The majority baseline always answers one label.
    """
    assert main(["report", str(finished.folder)]) == 0
    report = (finished.folder / "report.md").read_text()
    for said in (
        "| lora+head |",
        "retrieval",
        "adapter off, logits are bit-for-bit",
        "strengths.png",
        "n = 1",
    ):
        assert said in report
    rows = load_corpus(settings_in(world).dataset).splits
    labels = [label for _, label in rows["train"]]
    most = max(set(labels), key=labels.count)
    right = [[label == most for _, label in rows[split]] for split in ("validation", "test")]
    validation, test = (f"{100 * sum(one) / len(one):.2f}" for one in right)
    assert f"| majority | 0 |  | {validation} | {test} |" in report
    page = (finished.folder / "report.html").read_text()
    assert f"<td>majority</td><td>0</td><td></td><td>{validation}</td><td>{test}</td>" in page
    assert "<details><summary><h2>Settings</h2>" in page
    figure = (finished.folder / "strengths.png").read_bytes()
    text_report.write_text_report(finished.folder)
    assert (finished.folder / "report.md").read_text() == report
    assert (finished.folder / "strengths.png").read_bytes() == figure


def test_command_line(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`python -m experiments text` runs a study of a file and prints its table."""
    rows = write_jsonl(world / "own.jsonl", texts(60, 2))
    arguments = (
        f"text --model {world / 'bert'} --data {rows} --methods lora --targets *.query *.key"
    )
    arguments += f" --epochs 1 --seeds 1 --batch 8 --device cpu --tokens {world / 'tokens'}"
    arguments += f" --out {world / 'own'} --no-forgetting --accumulate 2 --precision bf16"
    assert main(arguments.split()) == 0
    printed = capsys.readouterr().out
    assert "1/1 passed: adapter off, logits are bit-for-bit the base's" in printed
    assert "lora" in printed


def test_what_cannot_be_done_is_said(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No checkpoint, and targets that match nothing, end with a message and status 2."""
    common = f"--data-dir {world} --device cpu --tokens {world / 'tokens'} --out {world / 'bad'}"
    assert main(f"text --model {world / 'none'} {common}".split()) == 2
    assert "cannot load a text model from there" in capsys.readouterr().err
    arguments = f"text --model {world / 'bert'} --targets *.q_lin --methods lora {common}2"
    assert main(arguments.split()) == 2
    assert "--targets *.q_lin: no tensor matches '*.q_lin'" in capsys.readouterr().err


def test_all_methods_see_the_same(world: Path) -> None:
    """A seed decides the classifier and the batches, whatever the method."""
    context = context_in(world)
    one, two = context.model(3), context.model(3)
    assert pl.fingerprint(one) == pl.fingerprint(two) != pl.fingerprint(context.model(4))
    for a, b in zip(TextBatches(context, 3), TextBatches(context, 3), strict=True):
        assert_close(a, b, rtol=0, atol=0)


def test_global_stream_is_left_alone(world: Path) -> None:
    """Loading a classifier and attaching draw nothing from torch's global generator."""
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    model = load_classifier(str(world / "bert"), 2, 0, seed=1)
    prepare(model, "lora", settings_in(world), torch.Generator().manual_seed(0))
    assert_close(torch.rand(3), expected, rtol=0, atol=0)


@pytest.mark.parametrize("parts", [1, 3, 4])
def test_parts_of_a_batch_add_up(world: Path, parts: int) -> None:
    """Accumulated over parts and processes, the gradient is that of the whole batch's mean."""
    context = context_in(world, epochs=1, accumulate=parts, by_length=False)
    model: Any = context.model(0).double()
    batches = TextBatches(context, 0)
    whole = context.tokens["train"].batch(batches.rows[0])
    logits = model(input_ids=whole[0], attention_mask=whole[1]).logits
    F.cross_entropy(logits, whole[2]).backward()
    expected = model.classifier.weight.grad.clone()
    found = torch.zeros_like(expected)
    for rank in range(3):
        object.__setattr__(context, "group", Group(rank, 3))
        mine = list(TextBatches(context, 0))[:parts]
        rows = sum(len(batch[0]) for batch in mine)
        for batch in mine:
            model.zero_grad()
            cross_entropy(model, *batch).backward()
            # As the training loop weighs parts, and DistributedDataParallel processes.
            found += model.classifier.weight.grad * len(batch[0]) / rows / 3
    # The objective is computed in float32.
    assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_schedule() -> None:
    """The rate rises to its peak over the first 6 %, and falls in a line, above 0 to the last."""
    rates = [linear(2.0, 100)(step) for step in range(1, 101)]
    assert rates[:6] == pytest.approx([2 * i / 6 for i in range(1, 7)])
    assert rates[-1] > 0
    falls = [a - b for a, b in pairwise(rates[6:])]
    assert falls == pytest.approx([falls[0]] * len(falls))
    assert rates[-1] == pytest.approx(2 / 94)


def test_similarity_measures() -> None:
    """Retrieval counts nearest halves; agreement is 1 for the same order, -1 for the reverse."""
    generator = torch.Generator().manual_seed(0)
    vectors = F.normalize(torch.randn(2, 30, 8, generator=generator), dim=-1)
    one = Similarity(vectors)
    mine = [int((vectors[0, i] @ vectors[1].T).argmax()) == i for i in range(30)]
    assert one.retrieval == pytest.approx(sum(mine) / 30)
    assert Similarity(torch.stack([vectors[0], vectors[0]])).retrieval == 1
    assert one.agreement(one) == pytest.approx(1)
    assert one.agreement(Similarity(torch.stack([vectors[0], -vectors[1]]))) == pytest.approx(-1)


def test_similarity_is_the_mean_over_tokens(world: Path) -> None:
    """An embedding is the mean of the last hidden states over a text's own tokens, normalised."""
    context = context_in(world)
    model: Any = context.model(0)
    found = similarity(context, model).embeddings
    first = context.corpus.splits["test"][0][0].split()
    half = " ".join(first[: len(first) // 2])
    ids = load_tokenizer(str(world / "bert"))(half, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        states = model.bert(input_ids=ids).last_hidden_state[0]
    assert_close(found[0, 0], F.normalize(states.mean(0), dim=0), rtol=1e-4, atol=1e-5)


def test_early_stopping_keeps_the_best(world: Path) -> None:
    """A training that gets worse stops, and the model is that of its best evaluation."""
    context = context_in(world, lr=0.5, epochs=6, patience=2, evaluations=2, schedule="constant")
    model = context.model(0)
    prepare(model, "lora", context.settings, torch.Generator().manual_seed(0))
    row = fine_tune(context, model, "lora", 0)
    assert row["steps"] < 6 * 8
    assert context.accuracy(model, "validation") == pytest.approx(row["validation_accuracy"])
    assert row["best_step"] <= row["steps"] - 2 * (8 // 2)


@pytest.mark.parametrize(
    ("preset", "kind"),
    [
        ("distilbert-imdb", "distilbert"),
        ("distilbert-imdb-best", "distilbert"),
        ("gpt2-spam", "gpt2"),
        ("mpnet-imdb", "mpnet"),
    ],
)
def test_presets(preset: str, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Each preset runs as it is on a local checkpoint: --model is all that it needs.

    Data, one epoch and one seed are further flags here. Targets, methods and rates are those of
    the preset.
    """
    for name, rows in (("train", texts(32, 0)), ("test", texts(16, 1))):
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
    lines = (f"{('spam', 'ham')[row['label']]}\t{row['text']}" for row in texts(48, 0))
    (tmp_path / "SMSSpamCollection").write_text("\n".join(lines))
    model = checkpoint(tmp_path / kind, kind)
    words = f"text --preset {preset} --model {model} --data-dir {tmp_path} --epochs 1 --seeds 1"
    words += f" --tokens {tmp_path / 'tokens'} --out {tmp_path / 'run'} --device cpu"
    assert main(words.split()) == 0
    run = RunDirectory.read(tmp_path / "run")
    rows = text_report.tuned_rows(run)
    assert [row["method"] for row in rows] == TextSettings.of_preset(preset).chosen_methods
    assert all(math.isfinite(row["train_loss"]) for row in rows)
    checks = text_report.checks(run)
    assert len(checks) == 5
    assert not any_failed(checks)
    assert "adapter off, logits are bit-for-bit the base's" in capsys.readouterr().out


def test_two_adapters_on_one_base(world: Path) -> None:
    """Two tasks' adapters on one base, switched per request or routed per row, answer as alone."""
    context = context_in(world)
    base, alone = context.model(0), {}
    for seed, name in enumerate(("spam", "sentiment")):
        model = context.model(0)
        prepare(model, "lora", context.settings, torch.Generator().manual_seed(seed))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for factor in pl.parameters(model):
                factor.add_(torch.randn(factor.shape, generator=generator), alpha=0.1)
        pl.save(model, world / f"{name}.safetensors", ADAPTER)
        alone[name] = context.logits(model, "validation")
        pl.load(base, world / f"{name}.safetensors", name=name)
    assert not torch.equal(alone["spam"], alone["sentiment"])
    for name in ("sentiment", "spam", "sentiment"):
        with pl.using(base, name):
            assert_close(context.logits(base, "validation"), alone[name])
    ids, mask, _ = context.tokens["validation"].batch(torch.arange(9))
    route = torch.tensor([0, 1, 1, 0, -1, 1, 0, -1, 0])
    with torch.no_grad(), pl.routed(base, route, "spam", "sentiment"):
        mixed = base(input_ids=ids, attention_mask=mask).logits
    with pl.disabled(base):
        alone["base"] = context.logits(base, "validation")
    expected = torch.stack(
        [alone[("spam", "sentiment", "base")[which]][i] for i, which in enumerate(route.tolist())]
    )
    assert_close(mixed, expected, rtol=1e-4, atol=1e-5)


def test_sweep(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A sweep runs every combination in its own folder; validation rows order its table."""
    arguments = f"text --model {world / 'bert'} --data-dir {world} --tokens {world / 'tokens'}"
    arguments += f" --out {world / 'sweep'} --seeds 1 --epochs 1 --batch 20 --device cpu"
    arguments += " --methods last-layers,lora --no-forgetting --validation 0.2 --rows 40"
    arguments += " --vary rank=1,2 --vary targets=*.query;*.query,*.key"
    assert main(arguments.split()) == 0
    table = capsys.readouterr().out
    folders = sorted(path.name for path in (world / "sweep").iterdir() if path.is_dir())
    assert len(folders) == 4
    lines = (world / "sweep" / "sweep.md").read_text().splitlines()[4:12]
    assert len(lines) == 8
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert {(cell[0], cell[1]) for cell in cells} == {
        (method, f"rank={rank} targets={targets}")
        for method in ("last-layers", "lora")
        for rank in (1, 2)
        for targets in ("*.query", "*.query,*.key")
    }
    validation = [float(cell[3]) for cell in cells]
    assert validation == sorted(validation, reverse=True)
    trained = {cell[1]: cell[2] for cell in cells if cell[0] == "lora"}
    assert trained["rank=2 targets=*.query,*.key"] == str(2 * 2 * 2 * 2 * 16)
    assert "validation" in table
    assert (world / "sweep" / "results.csv").read_text().count("\n") == 9
    assert main([*arguments.split(), "--vary", "colour=1"]) == 2
    assert "--vary takes SETTING=VALUES" in capsys.readouterr().err


@pytest.mark.thorough
def test_benchmark_of_methods(
    world: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One rate given is taken as it is; of several the validation rows choose; then the seeds."""
    from benchmarks.__main__ import main as benchmark

    monkeypatch.setattr(text_methods, "get_context", lambda method: forked())
    lora, out = "lora, query and value, r 8", world / "methods"
    arguments = ["text-methods", "--data-dir", str(world), "--model", str(world / "bert")]
    arguments += ["--tokens", str(world / "tokens"), "--out", str(out), "--batch", "10"]
    arguments += ["--device", "cpu", "--epochs", "1", "--seeds", "2", "--methods", "full", lora]
    assert benchmark([*arguments, "--rates", "full=3e-3", f"{lora}=3e-3,1e-3"]) == 0
    made = sorted(path.name for path in (out / "grid").iterdir())
    assert made == [text_methods.slug(lora, rate) for rate in (0.001, 0.003)]
    rows = [json.loads(line) for line in (out / "table.jsonl").read_text().splitlines()]
    assert [row["method"] for row in rows] == ["full", lora]
    assert rows[0]["rate"] == 3e-3
    validation = {
        rate: text_report.tuned_rows(
            RunDirectory.read(out / "grid" / text_methods.slug(lora, rate))
        )[0]["validation_accuracy"]
        for rate in (0.001, 0.003)
    }
    assert validation[rows[1]["rate"]] == max(validation.values())
    assert all(len(row["test"]) == 2 and row["seconds"] > 0 for row in rows)
    with pytest.raises(SystemExit):
        benchmark([*arguments, "--rates", "half=1"])
    assert "'half=1' is not NAME=RATE[,RATE...] with NAME one of 'full'" in capsys.readouterr().err
