"""A run's directory: settings, environment and rows, so that a run can be resumed and reported.

    settings.json      the settings that determine the results
    environment.json   versions, device, data, commit
    results.jsonl      one row per evaluation, appended immediately
    adapters/          the trained adapters, METHOD-SEED.safetensors
    report.md, *.png   made only from the first three files

An interrupted run resumes from its rows; see Note [Stages and resuming] in stages.py. An incomplete
last line of results.jsonl is dropped.
"""

import gzip
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .settings import StudyError, flattened

Row = dict[str, Any]
KEY = ("stage", "method", "base_seed", "seed")


class RunDirectory:
    """The files of one run. Rows are kept in the order in which they were recorded.

    Use `RunDirectory.start` to write to a run and `RunDirectory.read` to report on it. `settings`
    has the values of settings.json by option name. The file nests them in groups. Older runs have a
    flat file, which gives the same `settings`.
    """

    # Two rows with the same values of these keys are the same evaluation. A study may set others.
    key: tuple[str, ...] = KEY

    def __init__(self, folder: Path, settings: Row, environment: Row, rows: list[Row]) -> None:
        self.folder, self.settings, self.environment = folder, settings, environment
        self.rows = rows

    @classmethod
    def start(
        cls, folder: Path, settings: Row, environment: Row, fixed: tuple[str, ...]
    ) -> "RunDirectory":
        """Start a run in `folder`, or resume the run in it.

        Args:
            folder: the run's folder, created if missing.
            settings: the run's settings, nested or flat. To resume a run they must be the same.
            environment: the run's environment. A resumed run keeps the environment of its start.
            fixed: the keys of `environment` that must be the same to resume a run.

        Raises:
            StudyError: the folder has a run with other settings. The message names the fields that
                differ.
        """
        (folder / "adapters").mkdir(parents=True, exist_ok=True)
        if not (folder / "environment.json").exists():
            _write(folder / "settings.json", settings)
            _write(folder / "environment.json", environment)  # last: it marks a started run
        there = cls.read(folder)
        _same(folder, there.settings, flattened(settings))
        mine = {key: environment[key] for key in fixed}
        _same(folder, {key: there.environment.get(key) for key in fixed}, mine)
        there._drop_incomplete_line()
        return there

    @classmethod
    def read(cls, folder: Path) -> "RunDirectory":
        """Return the run in `folder`, finished or not.

        Raises:
            StudyError: the folder has no run, or a file of the run is damaged.
        """
        try:
            settings = json.loads((folder / "settings.json").read_text())
            environment = json.loads((folder / "environment.json").read_text())
            rows = [json.loads(line) for line in _text_of_rows(folder).split("\n")[:-1]]
            return cls(folder, flattened(settings), environment, rows)
        except FileNotFoundError as error:
            missing = Path(error.filename).name
            below = sorted(str(path.parent) for path in folder.glob("*/settings.json"))
            there = f"; there are runs in {', '.join(below)}" if below else ""
            raise StudyError(f"no run in {folder}: {missing} is missing{there}") from None
        except ValueError as error:
            raise StudyError(f"the run in {folder} is damaged: {error}") from None

    def has(self, **key: Any) -> bool:
        """Return whether a row with these values is recorded."""
        return any(all(row.get(name) == key[name] for name in key) for row in self.rows)

    def record(self, row: Row) -> None:
        """Append a row. If the same evaluation is recorded already, check that the rows agree.

        Raises:
            StudyError: the recorded row of the same evaluation has other values.
        """
        self.record_all([row])

    def record_all(self, rows: Iterable[Row]) -> None:
        """Record several rows in one write, each as `record` does.

        Raises:
            StudyError: a recorded row of the same evaluation has other values. No row is appended.
        """
        there = {self._key(row): row for row in self.rows}
        new = []
        for row in rows:
            row = json.loads(json.dumps(row))
            before = there.setdefault(self._key(row), row)
            if before is row:
                new.append(row)
            else:
                _same_again(self.folder, self.key, before, row)
        if new:
            with open(self.folder / "results.jsonl", "a") as file:
                file.writelines(json.dumps(row) + "\n" for row in new)
                file.flush()
                os.fsync(file.fileno())
            self.rows += new

    def _key(self, row: Row) -> tuple[Any, ...]:
        return tuple(row.get(name) for name in self.key)

    def _drop_incomplete_line(self) -> None:
        """Remove an incomplete last line, which an interrupted write leaves in results.jsonl."""
        path = self.folder / "results.jsonl"
        if path.exists():
            whole = path.read_bytes().rfind(b"\n") + 1
            if whole < path.stat().st_size:
                os.truncate(path, whole)


def replace_file(path: Path, content: bytes) -> None:
    """Write a file atomically: after a crash, it has either the old or the new content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        half.write_bytes(content)
        os.replace(half, path)
    finally:
        half.unlink(missing_ok=True)


def _text_of_rows(folder: Path) -> str:
    """Return the text of results.jsonl, or of results.jsonl.gz in a run that is kept compressed."""
    path, compressed = folder / "results.jsonl", folder / "results.jsonl.gz"
    if not path.exists() and compressed.exists():
        return gzip.decompress(compressed.read_bytes()).decode()
    return path.read_text() if path.exists() else ""


def _write(path: Path, values: Row) -> None:
    replace_file(path, (json.dumps(values, indent=2) + "\n").encode())


def _same(folder: Path, there: Row, mine: Row) -> None:
    differing = [key for key in {**there, **mine} if there.get(key) != mine.get(key)]
    if differing:
        said = "; ".join(f"{k} {there.get(k)!r} there, {mine.get(k)!r} now" for k in differing)
        raise StudyError(f"{folder} has a run with other settings: {said}. Choose another --out")


def _same_again(folder: Path, key: tuple[str, ...], there: Row, row: Row) -> None:
    differing = [k for k in row if there.get(k) != row[k] and k != "commit"]
    if differing:
        name = " ".join(str(row.get(part)) for part in key)
        raise StudyError(
            f"the row '{name}' in {folder} was evaluated again and differs in "
            f"{', '.join(differing)}: the code or the machine has changed since; "
            "choose another --out"
        )
