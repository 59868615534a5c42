"""Find, read and split text data sets.

    IMDb            train.jsonl and test.jsonl (id, rating, label 0 or 1, text), or the official
                    aclImdb folder or its archive aclImdb_v1.tar.gz
    SMS spam        SMSSpamCollection, the UCI file: label, tab, text; or its archive
    any other       a .csv file with a header, or a .jsonl file with one object per line

Files may be packed (.gz, .bz2, .xz). A row has a text and a label. The class of a label is its
index in the sorted labels. If a data set has no test set, one is split off with a fixed seed, so
that all runs have the same splits.
"""

import bz2
import csv
import gzip
import hashlib
import io
import json
import lzma
import re
import tarfile
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from os import environ
from pathlib import Path
from typing import Any

import torch

from ..harness.settings import StudyError
from .settings import DatasetSettings

SPLIT_SEED = 123
PACKED: dict[str, Any] = {"": open, ".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
Rows = list[tuple[str, str]]  # text, label


@dataclass(frozen=True)
class Corpus:
    """Texts with their labels in three splits, and a description of the data and its source."""

    name: str
    why: str
    labels: tuple[str, ...]
    splits: dict[str, Rows]

    @cached_property
    def digest(self) -> str:
        """The SHA-256 of all rows, in hexadecimal."""
        total = hashlib.sha256()
        for split, rows in self.splits.items():
            total.update(json.dumps([split, rows]).encode())
        return total.hexdigest()

    def majority(self) -> dict[str, float]:
        """Return the accuracy of the train split's most frequent label on the other splits."""
        most = Counter(label for _, label in self.splits["train"]).most_common(1)[0][0]
        return {
            split: sum(label == most for _, label in rows) / len(rows)
            for split, rows in self.splits.items()
            if split != "train" and rows
        }


def load_corpus(settings: DatasetSettings) -> Corpus:
    """Return the data set that the settings name, split into "train", "validation" and "test".

    Raises:
        StudyError: the data set is not found, or a row cannot be read. The message says where.
    """
    where = (Path(settings.data_dir), settings.text_column, settings.label_column)
    train, test, why = _read(settings.data, *where)
    if settings.balanced:
        train, test = _balance(train), _balance(test)
    splits = _split(train, test, settings)
    labels = tuple(sorted({label for _, label in train}))
    if len(labels) < 2:
        raise StudyError(f"--data {settings.data}: needs two labels, found {labels}")
    unknown = {label for rows in splits.values() for _, label in rows} - {*labels}
    if unknown:
        raise StudyError(f"--data {settings.data}: labels only in the test rows: {sorted(unknown)}")
    return Corpus(settings.data, why, labels, splits)


# Cached for the next run of a sweep, because unpacking and reading take seconds.
@lru_cache(maxsize=1)
def _read(data: str, folder: Path, text: str, label: str) -> tuple[Rows, Rows, str]:
    """Return the training rows, the rows of the test set (if any), and their place on disk."""
    if data in ("imdb", "spam"):
        named = environ.get(f"PARAMLORA_{data.upper()}")
        folders = [*([Path(named)] if named else []), folder, folder / data]
        return _imdb(folders) if data == "imdb" else _spam(folders)
    path = Path(data)
    if not path.is_file():
        raise StudyError(f"--data must be imdb, spam or the path of a file; {path} does not exist")
    return list(_table(path, text, label)), [], f"on disk, in {path}"


def _imdb(folders: list[Path]) -> tuple[Rows, Rows, str]:
    for folder in folders:
        files = [_packed(folder / f"{split}.jsonl") for split in ("train", "test")]
        if all(files):
            train, test = (list(_table(path, "text", "label")) for path in files if path)
            return train, test, f"on disk, in {folder}"
        if (folder / "aclImdb" / "train" / "pos").is_dir():
            train, test = (_acl_folder(folder / "aclImdb" / split) for split in ("train", "test"))
            return train, test, f"on disk, in {folder / 'aclImdb'}"
        if (archive := folder / "aclImdb_v1.tar.gz").is_file():
            return *_acl_archive(archive), f"on disk, in {archive}"
    raise _missing(
        "imdb", folders, "train.jsonl and test.jsonl (or .jsonl.xz), or aclImdb_v1.tar.gz"
    )


def _acl_folder(folder: Path) -> Rows:
    return [
        (path.read_text(encoding="utf-8"), label)
        for label, name in (("0", "neg"), ("1", "pos"))
        for path in sorted((folder / name).glob("*.txt"))
    ]


def _acl_archive(path: Path) -> tuple[Rows, Rows]:
    found: dict[str, Rows] = {"train": [], "test": []}
    with tarfile.open(path) as archive:
        for member in archive:
            match = re.fullmatch(r"aclImdb/(train|test)/(neg|pos)/[^/]+\.txt", member.name)
            file = archive.extractfile(member) if match else None
            if match and file:
                label = "1" if match[2] == "pos" else "0"
                found[match[1]].append((file.read().decode("utf-8"), label))
    # Sorted, because archives of the same data can have different orders.
    return sorted(found["train"]), sorted(found["test"])


def _spam(folders: list[Path]) -> tuple[Rows, Rows, str]:
    for folder in folders:
        for path in (folder / "SMSSpamCollection", folder / "sms_spam" / "SMSSpamCollection"):
            if path.is_file():
                return _sms(path.read_text(encoding="utf-8"), path), [], f"on disk, in {path}"
        for path in folder.glob("*sms*spam*collection.zip"):
            with zipfile.ZipFile(path) as archive:
                text = archive.read("SMSSpamCollection").decode("utf-8")
            return _sms(text, path), [], f"on disk, in {path}"
    raise _missing("spam", folders, "SMSSpamCollection, or sms+spam+collection.zip")


def _sms(text: str, path: Path) -> Rows:
    rows: Rows = []
    for number, line in enumerate(text.rstrip("\n").split("\n"), start=1):
        label, tab, message = line.partition("\t")
        if not tab or label not in ("ham", "spam"):
            raise StudyError(
                f"{path}, line {number}: no 'ham' or 'spam', tab and text: {line!r:.60}"
            )
        rows.append((message.rstrip("\r"), label))
    return rows


def _missing(name: str, folders: list[Path], files: str) -> StudyError:
    looked = ", ".join(map(str, dict.fromkeys(folders)))
    return StudyError(
        f"--data {name} is not in {looked}: put {files} into a folder and name it by --data-dir, "
        f"or by the environment variable PARAMLORA_{name.upper()}"
    )


def _packed(path: Path) -> Path | None:
    """Return the path, or the path of its packed file, or None if neither exists."""
    return next((p for end in PACKED if (p := Path(f"{path}{end}")).is_file()), None)


def _table(path: Path, text: str, label: str) -> Iterator[tuple[str, str]]:
    """Yield the text and label of each row of a CSV or JSON-lines file, which may be packed."""
    packed = path.suffix if path.suffix in PACKED else ""
    kind = Path(path.name.removesuffix(packed)).suffix
    if kind not in (".csv", ".jsonl"):
        raise StudyError(f"--data {path}: only .csv and .jsonl files can be read, packed or not")
    with PACKED[packed](path, "rt", encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file) if kind == ".csv" else _objects(file, path)
        for number, row in enumerate(rows, start=1):
            missing = [column for column in (text, label) if row.get(column) is None]
            if missing:
                raise StudyError(
                    f"{path}, row {number} has no {' and no '.join(map(repr, missing))}, only "
                    f"{', '.join(map(repr, row))}; see --text-column and --label-column"
                )
            yield str(row[text]), str(row[label])


def _objects(file: io.TextIOBase, path: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(file, start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise StudyError(f"{path}, line {number} is not JSON: {error}") from None
        if not isinstance(row, dict):
            raise StudyError(f"{path}, line {number} must be an object, found {line!r:.60}")
        yield row


def _balance(rows: Rows) -> Rows:
    """Return equally many rows of each label, as many as the rarest has, by a fixed seed."""
    if not rows:
        return rows
    fewest = min(Counter(label for _, label in rows).values())
    kept: Counter[str] = Counter()
    chosen = []
    for text, label in _shuffled(rows):
        if kept[label] < fewest:
            kept[label] += 1
            chosen.append((text, label))
    return chosen


def _split(train: Rows, test: Rows, settings: DatasetSettings) -> dict[str, Rows]:
    """Return the three splits. Missing splits are taken from the front of the shuffled rows."""
    train = _shuffled(train)
    if not test:
        size = max(1, round(settings.test * len(train)))
        test, train = train[:size], train[size:]
    else:
        test = _shuffled(test)
    size = max(1, round(settings.validation * len(train)))
    splits = {"train": train[size:], "validation": train[:size], "test": test}
    if not splits["train"]:
        raise StudyError(f"--data {settings.data}: too few rows to split, {len(train)}")
    return {name: rows[: settings.rows or None] for name, rows in splits.items()}


def _shuffled(rows: Rows) -> Rows:
    """Return the rows in a random order that is the same in all runs."""
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    return [rows[i] for i in torch.randperm(len(rows), generator=generator).tolist()]
