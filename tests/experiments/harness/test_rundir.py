"""Run directories: which folders are runs, who may write to them, and what damage leaves."""

import errno
import json
import lzma
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from experiments.__main__ import main
from experiments.harness import lock, rundir
from experiments.harness.lock import FolderLock
from experiments.harness.rundir import Row, RunDirectory
from experiments.harness.settings import StudyError, disk_problem

SETTINGS, ENVIRONMENT = {"adapter": {"rank": 2}}, {"study": "digits", "torch": "2.6"}
ROWS: list[Row] = [{"stage": "on", "seed": seed, "accuracy": seed / 4} for seed in range(3)]


def start(folder: Path, **settings: Any) -> RunDirectory:
    return RunDirectory.start(folder, {**SETTINGS, **settings}, ENVIRONMENT, ("torch",))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder of a run with ROWS."""
    with start(tmp_path / "run") as run:
        run.record_all(ROWS)
    return tmp_path / "run"


def test_folder_of_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The report of a folder that has only runs in folders of its own says where they are."""
    for name in ("test", "seed"):
        RunDirectory.start(tmp_path / "remedies" / name, {"rank": 2}, {"study": "sweeps"}, ())
    assert main(["report", str(tmp_path / "remedies")]) == 2
    folder = tmp_path / "remedies"
    expected = f"settings.json is missing; there are runs in {folder / 'seed'}, {folder / 'test'}"
    assert f"no run in {folder}: {expected}" in capsys.readouterr().err


def test_folder_without_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The report of a folder without a run names the file that is missing."""
    assert main(["report", str(tmp_path)]) == 2
    assert f"no run in {tmp_path}: settings.json is missing\n" in capsys.readouterr().err


def test_a_second_run_in_a_folder_is_refused(folder: Path) -> None:
    """While a run writes to a folder, another is refused with its process; afterwards it starts."""
    with start(folder):
        holder = rf"another run writes to .*\(process {os.getpid()} on .*\): wait until"
        with pytest.raises(StudyError, match=holder):
            start(folder)
        assert RunDirectory.read(folder).rows == ROWS
    with start(folder) as run:
        assert run.rows == ROWS
    with pytest.raises(StudyError, match="rank 2 there, 3 now"):
        start(folder, adapter={"rank": 3})
    start(folder)  # the refused run has released the lock


HOLDER = """
import sys, time
from pathlib import Path
from experiments.harness.lock import FolderLock
lock = FolderLock(Path(sys.argv[1]))
print("locked", flush=True)
time.sleep(60)
"""


def test_a_killed_run_leaves_the_folder_free(folder: Path) -> None:
    """The lock of another process counts until that process ends, even if it is killed."""
    program = [sys.executable, "-c", HOLDER, str(folder)]
    with subprocess.Popen(program, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline().split() == [b"locked"]
        with pytest.raises(StudyError, match=f"process {process.pid} on"):
            FolderLock(folder)
        process.send_signal(signal.SIGKILL if os.name == "posix" else signal.SIGTERM)
        process.wait()
    FolderLock(folder).release()


def test_a_file_system_without_locks_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a file system that has no locks the run goes on, with a warning."""

    def refuse(file: int) -> bool:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock, "_lock", refuse)
    with pytest.warns(UserWarning, match=r"cannot be locked \(.*No locks.*\): make sure"):
        start(folder)


def test_an_evaluation_counts_once(folder: Path) -> None:
    """Rows that two runs have recorded count once, with a warning; the next run removes them."""
    path = folder / "results.jsonl"
    content = path.read_bytes()
    changed = json.dumps({**ROWS[1], "accuracy": 0.9, "commit": "abc"}) + "\n"
    path.write_bytes(content + content + changed.encode())
    said = "recorded more than once: 4, in lines 4, 5, 6, 7; 1, in line 7 with other results"
    with pytest.warns(UserWarning, match=said):
        assert RunDirectory.read(folder).rows == ROWS
    with pytest.warns(UserWarning, match=said):
        assert start(folder).rows == ROWS
    assert path.read_bytes() == content
    assert (folder / "results.jsonl.damaged").read_bytes().endswith(changed.encode())


@pytest.mark.filterwarnings("ignore:.*has damaged rows")
@pytest.mark.parametrize("damage", [b"\0" * 40, b'{"stage": "on", \xff}', b"[1]", b'{"seed": [0]}'])
def test_a_damaged_row_is_left_out(folder: Path, damage: bytes) -> None:
    """A damaged row is named and left out; the other rows stay, and it is recorded again."""
    path = folder / "results.jsonl"
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([lines[0], damage, lines[2], lines[1][:9]]))
    with pytest.warns(UserWarning, match=r"damaged rows.*: 1, in line 2\. Run the command"):
        assert RunDirectory.read(folder).rows == [ROWS[0], ROWS[2]]
    with pytest.warns(UserWarning, match="incomplete row, which is dropped"):
        run = start(folder)
    assert not run.has(seed=1)
    run.record(ROWS[1])
    assert path.read_bytes().splitlines() == [lines[0], lines[2], lines[1]]
    assert damage in (folder / "results.jsonl.damaged").read_bytes()


def test_nan_equals_nan(folder: Path) -> None:
    """An evaluation whose result is NaN may be recorded again."""
    run, row = start(folder), {**ROWS[0], "seed": 9, "loss": float("nan")}
    run.record(row)
    run.record(json.loads(json.dumps(row)))
    with pytest.raises(StudyError, match="differs in loss"):
        run.record({**row, "loss": 1.0})


def test_all_damaged_lines_are_kept(folder: Path) -> None:
    """Lines of deep brackets and of no values are damage; each repair keeps the lines before it."""
    path = folder / "results.jsonl"
    for damage in (b"[" * 100_000, b"{}"):
        path.write_bytes(path.read_bytes() + damage + b"\n")
        with pytest.warns(UserWarning, match="damaged rows"), start(folder) as run:
            assert run.rows == ROWS
    kept = (folder / "results.jsonl.damaged").read_bytes()
    assert b"[[[" in kept
    assert b"{}\n" in kept


def test_a_compressed_run_goes_on(folder: Path) -> None:
    """A run whose rows are kept compressed goes on from them; damaged ones are named."""
    path, compressed = folder / "results.jsonl", folder / "results.jsonl.xz"
    content = lzma.compress(path.read_bytes())
    compressed.write_bytes(content)
    path.unlink()
    with start(folder) as run:
        run.record({"stage": "on", "seed": 3})
    assert len(RunDirectory.read(folder).rows) == 4
    path.unlink()
    compressed.write_bytes(content[:-12])
    with pytest.raises(StudyError, match=r"results.jsonl.xz is damaged .*: copy it again"):
        RunDirectory.read(folder)


@pytest.mark.parametrize("name", ["settings.json", "environment.json"])
@pytest.mark.parametrize("content", [b"", b'{"adapter": {"ra', b"\xff\xfe", b"[]"])
def test_a_damaged_description_can_be_deleted(
    folder: Path, name: str, content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    """Damaged settings are an error that says what to do; done so, the run has all its rows."""
    (folder / name).write_bytes(content)
    with pytest.raises(StudyError, match=rf"{name} is damaged .*delete this file and run"):
        start(folder)
    assert main(["report", str(folder)]) == 2
    assert f"error: {folder / name} is damaged" in capsys.readouterr().err
    (folder / name).unlink()
    with start(folder) as run:
        assert run.rows == ROWS
        assert run.settings == {"rank": 2}
        assert run.environment == ENVIRONMENT


def test_settings_without_an_environment_still_count(folder: Path) -> None:
    """If only environment.json is deleted, the run's settings are compared, not overwritten."""
    (folder / "environment.json").unlink()
    with pytest.raises(StudyError, match="rank 2 there, 3 now"):
        start(folder, adapter={"rank": 3})


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_a_full_disk_keeps_the_rows(folder: Path) -> None:
    """A row that does not fit on the disk raises, and the earlier rows stay."""
    with start(folder) as run:
        path = folder / "results.jsonl"
        path.rename(folder / "kept")
        path.symlink_to("/dev/full")
        with pytest.raises(OSError, match="No space left") as raised:
            run.record({"stage": "on", "seed": 3})
        assert run.rows == ROWS
        path.unlink()
        (folder / "kept").rename(path)
    assert "run the same command again" in str(disk_problem(raised.value))
    assert RunDirectory.read(folder).rows == ROWS


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.ENOSPC, "error: the disk has no space left for {}: free some"),
        (errno.EROFS, "error: {} cannot be read or written (Read-only file system): change its"),
        (errno.EACCES, "error: {} cannot be read or written (Permission denied): change its"),
        (errno.EIO, "error: {} cannot be read or written: Input/output error"),
    ],
)
def test_a_disk_that_refuses_is_said(
    number: int,
    said: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Errors of the disk end a command with a message and status 2."""

    def refuse(path: Path) -> None:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(rundir, "read_rows", refuse)
    assert main(["report", str(folder)]) == 2
    assert said.format(folder) in capsys.readouterr().err


def test_an_error_of_another_kind_is_not_hidden(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An OSError without a file, such as one of the network, is raised."""

    def refuse(path: Path) -> None:
        raise ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")

    monkeypatch.setattr(rundir, "read_rows", refuse)
    with pytest.raises(ConnectionResetError, match="Connection reset"):
        main(["report", str(folder)])
