"""A run's directory: settings, environment and rows, so that a run can be resumed and reported.

    settings.json      what was asked for
    environment.json   what it ran on: versions, device, data, commit
    results.jsonl      one row an evaluation, appended as each is made
    adapters/          the trained adapters, METHOD-SEED.safetensors
    report.md, *.png   made from the first three alone

A run that was stopped goes on from its rows; half a line at their end is dropped.
"""

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

    Make one with `RunDirectory.start` to write to it, `RunDirectory.read` to report on it.
    `settings` are those of settings.json by option name. The file has them in groups; in runs of
    before the groups it has them flat, which gives the same.
    """

    # Of two rows that agree in these, one is the other made anew; a study can have others.
    key: tuple[str, ...] = KEY

    def __init__(self, folder: Path, settings: Row, environment: Row, rows: list[Row]) -> None:
        self.folder, self.settings, self.environment = folder, settings, environment
        self.rows = rows

    @classmethod
    def start(
        cls, folder: Path, settings: Row, environment: Row, fixed: tuple[str, ...]
    ) -> "RunDirectory":
        """Begin a run in `folder`, or go on with the one that is there.

        Args:
            folder: made where it is missing.
            settings: of this run, in groups or not. A run that goes on must have the same.
            environment: of this run; that of the run's beginning is kept.
            fixed: the keys of `environment` that must be the same too.

        Raises:
            StudyError: another run's folder, naming the fields that differ.
        """
        (folder / "adapters").mkdir(parents=True, exist_ok=True)
        if not (folder / "environment.json").exists():
            _write(folder / "settings.json", settings)
            _write(folder / "environment.json", environment)  # last: with it a run has begun
        there = cls.read(folder)
        _same(folder, there.settings, flattened(settings))
        mine = {key: environment[key] for key in fixed}
        _same(folder, {key: there.environment.get(key) for key in fixed}, mine)
        there._drop_half_a_line()
        return there

    @classmethod
    def read(cls, folder: Path) -> "RunDirectory":
        """Return the run in `folder`, as far as it went.

        Raises:
            StudyError: no run is there, or one of its files is damaged.
        """
        try:
            settings = json.loads((folder / "settings.json").read_text())
            environment = json.loads((folder / "environment.json").read_text())
            path = folder / "results.jsonl"
            lines = path.read_text().split("\n")[:-1] if path.exists() else []
            rows = [json.loads(line) for line in lines]
            return cls(folder, flattened(settings), environment, rows)
        except FileNotFoundError as error:
            missing = Path(error.filename).name
            raise StudyError(f"no run in {folder}: {missing} is missing") from None
        except ValueError as error:
            raise StudyError(f"the run in {folder} is damaged: {error}") from None

    def has(self, **key: Any) -> bool:
        """Whether a row with these values is there."""
        return any(all(row.get(name) == key[name] for name in key) for row in self.rows)

    def record(self, row: Row) -> None:
        """Append a row, or check that the one that is there says the same.

        Raises:
            StudyError: the same evaluation gave something else before.
        """
        self.record_all([row])

    def record_all(self, rows: Iterable[Row]) -> None:
        """Do so with several rows, which are written together.

        Raises:
            StudyError: as `record`; no row is appended then.
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

    def _drop_half_a_line(self) -> None:
        """Cut off what a run that was stopped while writing left at the end of its rows."""
        path = self.folder / "results.jsonl"
        if path.exists():
            whole = path.read_bytes().rfind(b"\n") + 1
            if whole < path.stat().st_size:
                os.truncate(path, whole)


def replace_file(path: Path, content: bytes) -> None:
    """Write a file at once: a crash leaves the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        half.write_bytes(content)
        os.replace(half, path)
    finally:
        half.unlink(missing_ok=True)


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
            f"the row '{name}' in {folder} was made anew and differs in {', '.join(differing)}: "
            "the code or the machine has changed since; choose another --out"
        )
