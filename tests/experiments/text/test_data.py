"""Texts are read from every form that the data sets have, split once and for all, and batched."""

import bz2
import gzip
import json
import lzma
import tarfile
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from experiments.harness.settings import StudyError, replace
from experiments.text.data import Corpus, load_corpus
from experiments.text.models import globs
from experiments.text.settings import AdapterSettings, DatasetSettings, TextSettings
from experiments.text.tokens import Tokens, by_length, tokenized
from tests.support.tiny_text import texts, write_jsonl


def settings(folder: Path, data: str, **more: Any) -> DatasetSettings:
    return DatasetSettings(data=data, data_dir=str(folder), **more)


def imdb_files(folder: Path) -> dict[str, list[dict[str, Any]]]:
    rows = {"train": texts(40, 0), "test": texts(20, 1)}
    for split, its in rows.items():
        write_jsonl(folder / f"{split}.jsonl", its)
    return rows


def all_of(splits: dict[str, list[tuple[str, str]]]) -> list[tuple[str, str]]:
    return [row for rows in splits.values() for row in rows]


def as_pairs(rows: list[dict[str, Any]]) -> set[tuple[str, str]]:
    return {(row["text"], str(row["label"])) for row in rows}


def test_imdb_as_json_lines(tmp_path: Path) -> None:
    """Train and test are the files' rows; validation is a share of train, and no row is lost."""
    rows = imdb_files(tmp_path)
    corpus = load_corpus(settings(tmp_path, "imdb", validation=0.25))
    assert corpus.labels == ("0", "1")
    assert {split: len(its) for split, its in corpus.splits.items()} == {
        "train": 30,
        "validation": 10,
        "test": 20,
    }
    learned = corpus.splits["train"] + corpus.splits["validation"]
    assert Counter(learned) == Counter((r["text"], str(r["label"])) for r in rows["train"])
    assert set(corpus.splits["test"]) == as_pairs(rows["test"])


@pytest.mark.parametrize(("end", "pack"), [(".xz", lzma), (".gz", gzip), (".bz2", bz2)])
def test_packed_files(tmp_path: Path, end: str, pack: Any) -> None:
    """Packed JSON lines give the same corpus as plain ones."""
    plain, packed = tmp_path / "plain", tmp_path / "packed"
    for folder in (plain, packed):
        folder.mkdir()
    imdb_files(plain)
    for path in plain.iterdir():
        (packed / f"{path.name}{end}").write_bytes(pack.compress(path.read_bytes()))
    corpora = [load_corpus(settings(folder, "imdb")) for folder in (plain, packed)]
    assert corpora[0].digest == corpora[1].digest


def test_official_imdb_archive_and_folder(tmp_path: Path) -> None:
    """The archive as published, and the folder in it, have the same rows; unsup is left out."""
    unpacked, archive = tmp_path / "unpacked", tmp_path / "archive"
    archive.mkdir()
    for split in ("train", "test"):
        for name in ("pos", "neg", "unsup"):
            folder = unpacked / "aclImdb" / split / name
            folder.mkdir(parents=True)
            for i in range(6):
                path, text = folder / f"{i}_7.txt", f"{split} {name} number {i}, naïve"
                path.write_text(text, encoding="utf-8")
    with tarfile.open(archive / "aclImdb_v1.tar.gz", "w:gz") as file:
        file.add(unpacked / "aclImdb", "aclImdb")
    for folder in (unpacked, archive):
        splits = load_corpus(settings(folder, "imdb")).splits
        rows = all_of(splits)
        assert set(rows) == {
            (f"{split} {name} number {i}, naïve", label)
            for split in ("train", "test")
            for name, label in (("pos", "1"), ("neg", "0"))
            for i in range(6)
        }


SMS = "ham\tGo until jurong point\nspam\tFree entry in 2 a wkly comp\t!\n" + "ham\tOk lar\n" * 8


def test_spam_as_published(tmp_path: Path) -> None:
    """The UCI file and the archive around it give the same rows, tabs in a message kept."""
    (tmp_path / "file").mkdir()
    (tmp_path / "zip").mkdir()
    (tmp_path / "file" / "SMSSpamCollection").write_text(SMS)
    with zipfile.ZipFile(tmp_path / "zip" / "sms+spam+collection.zip", "w") as file:
        file.writestr("SMSSpamCollection", SMS)
        file.writestr("readme", "")
    corpora = [load_corpus(settings(tmp_path / name, "spam")) for name in ("file", "zip")]
    assert corpora[0].splits == corpora[1].splits
    assert corpora[0].labels == ("ham", "spam")
    rows = all_of(corpora[0].splits)
    assert ("Free entry in 2 a wkly comp\t!", "spam") in rows
    assert len(rows) == 10


def test_csv_with_other_columns(tmp_path: Path) -> None:
    """A CSV file with a head is read by the names of its columns, line breaks in texts kept."""
    path = tmp_path / "mine.csv"
    rows = [f'"line one\nline two, {i}",{"abc"[i % 3]}' for i in range(30)]
    path.write_bytes("\n".join(["review,verdict", *rows, ""]).encode())
    named = {"text_column": "review", "label_column": "verdict"}
    corpus = load_corpus(settings(tmp_path, str(path), test=0.2, validation=0.25, **named))
    assert corpus.labels == ("a", "b", "c")
    assert {split: len(its) for split, its in corpus.splits.items()} == {
        "train": 18,
        "validation": 6,
        "test": 6,
    }
    found = all_of(corpus.splits)
    assert set(found) == {(f"line one\nline two, {i}", "abc"[i % 3]) for i in range(30)}


def test_splits_are_the_same_every_time(tmp_path: Path) -> None:
    """Two reads of a file give the same splits, which share no row."""
    path = write_jsonl(
        tmp_path / "mine.jsonl", [{"text": str(i), "label": i % 2} for i in range(50)]
    )
    one, two = (load_corpus(settings(tmp_path, str(path))) for _ in range(2))
    assert one.splits == two.splits
    assert len(set(all_of(one.splits))) == 50


def test_balanced(tmp_path: Path) -> None:
    """With balanced each label keeps as many rows as the rarest has, before the split."""
    rows = [{"text": str(i), "label": int(i < 12)} for i in range(60)]
    path = write_jsonl(tmp_path / "mine.jsonl", rows)
    corpus = load_corpus(settings(tmp_path, str(path), balanced=True))
    counts = Counter(label for its in corpus.splits.values() for _, label in its)
    assert counts == {"0": 12, "1": 12}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "text,label\n1,a\n", "too few rows to split"),
        ("a.jsonl", '{"text": "x", "label": 1}\n{"text": "x"}\n', r"row 2 has no 'label', only"),
        ("a.jsonl", '{"text": "x", "label": 1}\nno\n', r"line 2 is not JSON"),
        ("a.jsonl", "[1]\n", r"line 1 must be an object"),
        ("a.txt", "hello\n", r"only .csv and .jsonl files can be read"),
        ("a.csv", "text,label\n" + "1,a\n" * 9, "needs two labels, found"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, content: str, message: str) -> None:
    """A file that cannot be used is refused with its name, the place in it, and what to do."""
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(StudyError, match=message):
        load_corpus(settings(tmp_path, str(path)))


def test_missing_data_say_where_they_were_looked_for(tmp_path: Path) -> None:
    """A data set that is not there is refused with the folders, the files and the option."""
    for data, file in (("imdb", "train.jsonl"), ("spam", "SMSSpamCollection")):
        with pytest.raises(StudyError, match=f"{data} is not in .*{file}.*--data-dir"):
            load_corpus(settings(tmp_path, data))
    with pytest.raises(StudyError, match=r"nowhere\.csv does not exist"):
        load_corpus(settings(tmp_path, "nowhere.csv"))


def test_bad_spam_line(tmp_path: Path) -> None:
    """A line of the spam file without its label is named by its number."""
    (tmp_path / "SMSSpamCollection").write_text("ham\tfine\nhello\n")
    with pytest.raises(StudyError, match="line 2: no 'ham' or 'spam'"):
        load_corpus(settings(tmp_path, "spam"))


class Words:
    """A tokenizer: a word's number is its length, between 1 and 2."""

    pad_token_id = 0
    calls = 0

    def get_vocab(self) -> dict[str, int]:
        return {"<": 1, ">": 2}

    def __call__(self, given: list[str], truncation: bool, max_length: int) -> dict[str, Any]:
        self.calls += 1
        middle = [[len(word) + 2 for word in text.split()][: max_length - 2] for text in given]
        return {"input_ids": [[1, *ids, 2] for ids in middle]}


def corpus_of(given: list[str]) -> Corpus:
    rows = [(text, "ab"[i % 2]) for i, text in enumerate(given)]
    return Corpus("mine", "", ("a", "b"), {"train": rows})


def test_tokens_and_batches(tmp_path: Path) -> None:
    """A batch has its rows' tokens, padded to the longest, with mask and labels."""
    tokenizer = Words()
    corpus = corpus_of(["a bb", "a", "ccc ccc ccc ccc ccc"])
    for _ in range(2):  # anew, and from the file that the first time left
        tokens = tokenized(corpus, "train", tokenizer, 5, lambda digest: tmp_path / digest)
        ids, mask, labels = tokens.batch(torch.tensor([2, 1]))
        assert ids.tolist() == [[1, 5, 5, 5, 2], [1, 3, 2, 0, 0]]
        assert mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
        assert labels.tolist() == [0, 1]
    assert tokenizer.calls == 1


def test_another_length_is_tokenized_anew(tmp_path: Path) -> None:
    """What is kept of a tokenization is not taken for that of other texts or another length."""
    tokenizer, corpus = Words(), corpus_of(["a bb ccc", "a"])
    for made, length in ((corpus, 5), (corpus, 4), (corpus_of(["a bb ccc", "b b"]), 5)):
        tokenized(made, "train", tokenizer, length, lambda digest: tmp_path / digest)
    assert tokenizer.calls == 3


def test_batches_by_length() -> None:
    """Every row comes once, batches are of like length, and their order is random but seeded."""
    lengths = torch.randint(1, 200, (1000,), generator=torch.Generator().manual_seed(1))

    def epoch(seed: int) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(1000, generator=generator)
        return by_length(lengths, order, 16, generator)

    batches = epoch(0)
    assert_close(torch.cat(batches).sort().values, torch.arange(1000))
    assert all(torch.equal(a, b) for a, b in zip(batches, epoch(0), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(batches, epoch(1), strict=True))
    padded = sum(len(rows) * int(lengths[rows].max()) for rows in batches)
    in_order = sum(len(r) * int(lengths[r].max()) for r in torch.arange(1000).split(16))
    assert padded < 1.1 * int(lengths.sum()) < in_order
    widths = torch.tensor([int(lengths[rows].max()) for rows in batches])
    assert not torch.equal(widths, widths.sort().values)


def test_tokens_move_to_a_device() -> None:
    """What batches are made of lies on the device; the lengths stay where Python reads them."""
    values = (torch.arange(4), torch.tensor([0, 2]), torch.tensor([2, 2]), torch.tensor([0, 1]))
    tokens = Tokens(*values, pad=0).to(torch.device("meta"))
    assert tokens.ids.is_meta
    assert tokens.labels.is_meta
    assert not tokens.lengths.is_meta


def test_globs_with_blocks() -> None:
    """A comma inside an index in brackets separates nothing."""
    preset = TextSettings.of_preset("gpt2-spam")
    assert globs(preset.adapter.targets) == [
        "*.c_attn.weight[:, :768]",
        "*.c_attn.weight[:, 768:1536]",
        "*.c_attn.weight[:, 1536:]",
        "*.c_proj",
        "*.c_fc",
        "score",
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": "full,half"}, "--methods must be a list of full, last-layers, lora"),
        ({"methods": "full,full"}, "--methods must be"),
        ({"scale": "alpha/2"}, "--scale must be alpha or alpha/r"),
        ({"validation": 0.0}, "--validation must be a share between 0 and 1"),
        ({"accumulate": 0}, "--accumulate must be a whole number of at least 1"),
        ({"targets": ""}, "--targets must be comma-separated globs"),
        ({"device": "gpu"}, "--device must be auto or a device"),
        ({"lr": float("inf")}, "--lr must be a finite number above 0"),
    ],
)
def test_bad_settings_are_named(changes: dict[str, Any], message: str) -> None:
    """A setting that is not allowed is refused with its option, its value and what is allowed."""
    with pytest.raises(StudyError, match=message):
        replace(TextSettings(), **changes)


def test_conventions_of_the_scale() -> None:
    """`scale` says whether alpha multiplies the update itself, or alpha/r or alpha/√r does."""
    found = {
        scale: AdapterSettings(alpha=6.0, rank=4, scale=scale).scaling
        for scale in ("alpha", "alpha/r", "alpha/sqrt_r")
    }
    assert found == {"alpha": 6.0, "alpha/r": 1.5, "alpha/sqrt_r": 3.0}


def test_rows_are_json(tmp_path: Path) -> None:
    """What the settings say of a run can be written down and read back."""
    from experiments.harness.settings import result_settings

    for name in TextSettings.PRESETS:
        said = result_settings(TextSettings.of_preset(name))
        assert json.loads(json.dumps(said)) == said
        assert "data_dir" not in said


def test_folders_have_names_that_file_systems_take() -> None:
    """A run's folder is named after what differs from its preset; a long name ends in a digest."""
    assert (
        TextSettings(adapter=AdapterSettings(rank=4)).folder == "runs/text-distilbert-imdb-rank_4"
    )
    long = [
        replace(TextSettings(), targets="*.query," * 60 + last).folder
        for last in ("*.key", "*.value")
    ]
    assert long[0] != long[1]
    assert all(len(folder) <= len("runs/") + 120 for folder in long)
