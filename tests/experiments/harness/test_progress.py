"""What a command says while it runs, and in --help."""

import pytest

from experiments.__main__ import main
from experiments.harness import progress as module
from experiments.harness.progress import progress


def test_lines_off_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Off a terminal a line with an estimate appears once a minute, and none in a short run."""
    now = 0.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    seen = []
    for item in progress(range(8), 8, "stages", "stage"):
        seen.append(item)
        now += 25
    assert seen == list(range(8))
    assert capsys.readouterr().err.splitlines() == [
        "stages   3 of 8 stages, about 2 min left",
        "stages   6 of 8 stages, about 50 s left",
    ]
    assert list(progress(range(8), None, "stages", "stage")) == seen
    assert capsys.readouterr().err == ""


def test_help_lists_the_commands_in_groups(capsys: pytest.CaptureFixture[str]) -> None:
    """--help has every command with its summary in a group, and three examples that parse."""
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    shown = capsys.readouterr().out
    _, studies, grids, reports, examples = shown.rsplit("\n\n", 4)
    listed = [line.split()[0] for line in studies.splitlines()]
    assert {"studies:", "digits", "tasks", "text"} <= set(listed)
    assert "sweep" not in listed
    assert [line.split()[0] for line in grids.splitlines()[1:]] == ["sweep", "text-front"]
    assert reports.startswith("reports:\n  report      write the reports")
    assert examples.count("\n  python -m experiments ") == 3
