"""A run's directory: settings, environment and rows, so that a run can be resumed and reported.

    settings.json      the settings that determine the results
    environment.json   versions, device, data, commit
    results.jsonl      one row per evaluation, appended immediately
    adapters/          the trained adapters, METHOD-SEED.safetensors
    report.md, *.png   made only from the first three files
    .lock              one process at a time writes to the folder; see lock.py

An interrupted run resumes from its rows; see Note [Stages and resuming] in stages.py. Each
evaluation counts once, however often it is recorded, and damaged lines of results.jsonl are left
out with a warning; see rows.py.
"""

import json
import os
import warnings
from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from paramlora.files.safetensors_file import write_atomically

from .lock import FolderLock
from .rows import FILE, KEY, Row, differences, key_of, read_rows
from .settings import StudyError, flattened

__all__ = ["KEY", "Row", "RunDirectory", "read_json", "replace_file"]


class RunDirectory(AbstractContextManager):
    """The files of one run. Rows are kept in the order in which they were recorded.

    Use `with RunDirectory.start(...) as run` to write to a run and `RunDirectory.read` to report on
    it. The run is locked until the end of the `with` block; it can be read afterwards. `settings`
    has the values of settings.json by option name. The file nests them in groups. Older runs have a
    flat file, which gives the same `settings`.
    """

    lock: FolderLock | None = None

    def __init__(self, folder: Path, settings: Row, environment: Row, rows: list[Row]) -> None:
        self.folder, self.settings, self.environment = folder, settings, environment
        self.rows = rows

    @classmethod
    def start(
        cls, folder: Path, settings: Row, environment: Row, fixed: tuple[str, ...]
    ) -> "RunDirectory":
        """Start a run in `folder`, or resume the run in it, and lock the folder.

        Lines of results.jsonl that are damaged or repeat an evaluation are removed from it. The
        file as it was is kept in results.jsonl.damaged.

        Args:
            folder: the run's folder, created if missing.
            settings: the run's settings, nested or flat. To resume a run they must be the same.
            environment: the run's environment. A resumed run keeps the environment of its start.
            fixed: the keys of `environment` that must be the same to resume a run.

        Raises:
            StudyError: another run writes to the folder; or the folder has a run with other
                settings, and the message names the fields that differ; or settings.json or
                environment.json is damaged.
            OSError: the folder cannot be written to.
        """
        (folder / "adapters").mkdir(parents=True, exist_ok=True)
        lock = FolderLock(folder)
        try:
            rows = _mended(folder)
            for name, values in (("settings.json", settings), ("environment.json", environment)):
                # environment.json is written last, so a folder with neither it nor rows was not
                # started, and its settings.json may be of another attempt.
                begun = rows or (folder / "environment.json").exists()
                if not begun or not (folder / name).exists():
                    replace_file(folder / name, (json.dumps(values, indent=2) + "\n").encode())
            there = cls(folder, *_settings_and_environment(folder), rows)
            _same(folder, there.settings, flattened(settings))
            mine = {key: environment[key] for key in fixed}
            _same(folder, {key: there.environment.get(key) for key in fixed}, mine)
        except BaseException:
            lock.release()
            raise
        there.lock = lock
        return there

    def __exit__(self, *exception: object) -> None:
        if self.lock is not None:
            self.lock.release()
            self.lock = None  # the run can be pickled again

    @classmethod
    def read(cls, folder: Path) -> "RunDirectory":
        """Return the run in `folder`, finished or not.

        Raises:
            StudyError: the folder has no run, or its settings.json or environment.json is damaged.
        """
        try:
            described = _settings_and_environment(folder)
        except FileNotFoundError as error:
            missing = Path(error.filename).name
            below = sorted(str(path.parent) for path in folder.glob("*/settings.json"))
            there = f"; there are runs in {', '.join(below)}" if below else ""
            raise StudyError(f"no run in {folder}: {missing} is missing{there}") from None
        recorded = read_rows(folder)
        recorded.warn(folder)
        return cls(folder, *described, recorded.rows)

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
        there = {key_of(row): row for row in self.rows}
        new = []
        for row in rows:
            row = json.loads(json.dumps(row))
            before = there.setdefault(key_of(row), row)
            if before is row:
                new.append(row)
            else:
                _same_again(self.folder, before, row)
        if new:
            with open(self.folder / FILE, "a", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in new)
                file.flush()
                os.fsync(file.fileno())
            self.rows += new


def replace_file(path: Path, content: bytes) -> None:
    """Write a file atomically: after a crash, it has either the old or the new content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, content)


def read_json(path: Path, advice: str) -> Row:
    """Return the JSON object in a file.

    Raises:
        FileNotFoundError: the file does not exist.
        StudyError: it is damaged. The message ends with the advice.
    """
    try:
        found = json.loads(path.read_bytes())
        if not isinstance(found, dict):
            raise ValueError("it has no JSON object")
        return found
    except ValueError as error:
        raise StudyError(f"{path} is damaged ({error}): {advice}") from None


def _settings_and_environment(folder: Path) -> tuple[Row, Row]:
    """Return the settings, flat, and the environment of a run."""
    found = []
    for name, same in (("settings", "settings"), ("environment", "torch, device and data")):
        advice = (
            f"if you know the {same} of the run, delete this file and run the command of the run "
            "again, which keeps the rows; otherwise choose another --out"
        )
        found.append(read_json(folder / f"{name}.json", advice))
    return flattened(found[0]), found[1]


def _mended(folder: Path) -> list[Row]:
    """Return a run's rows, and leave a results.jsonl that has these and nothing else."""
    path, recorded = folder / FILE, read_rows(folder)
    recorded.warn(folder)
    if recorded.tail:
        warnings.warn(
            f"{path} ended with an incomplete row, which is dropped; it is evaluated again",
            stacklevel=3,
        )
    if (recorded.damaged or recorded.repeated) and path.exists():
        kept = folder / f"{FILE}.damaged"
        replace_file(kept, (kept.read_bytes() if kept.exists() else b"") + path.read_bytes())
    if recorded.left_out or (recorded.rows and not path.exists()):
        replace_file(path, recorded.content)
    return recorded.rows


def _same(folder: Path, there: Row, mine: Row) -> None:
    differing = [key for key in {**there, **mine} if there.get(key) != mine.get(key)]
    if differing:
        said = "; ".join(f"{k} {there.get(k)!r} there, {mine.get(k)!r} now" for k in differing)
        raise StudyError(f"{folder} has a run with other settings: {said}. Choose another --out")


def _same_again(folder: Path, there: Row, row: Row) -> None:
    if differing := differences(there, row):
        name = " ".join(str(row[part]) for part in KEY if part in row)
        raise StudyError(
            f"the row '{name}' in {folder} was evaluated again and differs in "
            f"{', '.join(differing)}: the code or the machine has changed since; "
            "choose another --out"
        )
