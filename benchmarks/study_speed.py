"""The digit study and the sweep, compared with a plain script of the study (`blog_study.py`).

In each round the script, the study and the sweep run one after the other, each from the start, so
that a disturbance of the machine affects all of them.

script      pre-training, fine-tuning and evaluation as in the blog post.
study       The study with one adapter seed. It does more than the script: it merges, unmerges,
            checks, fine-tunes wrapped layers, and tries every strength and set of layers. Its
            report and figures are timed separately, since the script makes none.
evaluation  A pass over the test images with all counts. The study makes seven.
strength    An evaluation at one of the nine strengths, which share most of their arithmetic.
sweep       10 adapter seeds × 5 ranks × 9 strengths on one base, by the command that a user would
            type. The time includes starting Python, pre-training and the report.

On a machine that other processes use, threads that wait for each other can make the script ten
times slower. OMP_NUM_THREADS=1 limits all three to one thread. CPU times vary less.
"""

import argparse
import contextlib
import io
import os
import statistics
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch
from torchvision.datasets import MNIST

from benchmarks import blog_study
from experiments.analysis.evaluate import logits_of, score, scores
from experiments.analysis.explore import STRENGTHS
from experiments.digits.data import load_data
from experiments.digits.model import DigitNet
from experiments.digits.report.report import write_report
from experiments.digits.settings import preset
from experiments.digits.strengths import Strengths, Update
from experiments.digits.study import run_digits
from experiments.harness.rundir import RunDirectory

from .harness import options as shared
from .harness.results import Row, Table, append
from .harness.timing import timed_call

# How many times faster than the script each has to be.
WANTED = {"study": 4.0, "evaluation": 50.0, "sweep": 1.0}
GRID = ("rank=1,2,4,8,16", f"strength={','.join(map(str, STRENGTHS))}")
PASSES = 50  # evaluations, so that they take about as long as one of the script's
EXAMPLES = """\
examples:
  python -m benchmarks study-speed data --download
  OMP_NUM_THREADS=1 python -m benchmarks study-speed data --rounds 1
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this subcommand."""
    layout = "folder of MNIST in torchvision's layout, MNIST/raw/ with archives and unpacked files"
    parser.add_argument("folder", type=Path, help=layout)
    parser.add_argument("--download", action="store_true", help="download MNIST if it is missing")
    how = parser.add_argument_group("how to measure").add_argument
    shared.add_rounds(how, 3, "repetitions of script, study and sweep")
    shared.add_file(parser.add_argument_group("results").add_argument, "runs/study-speed.jsonl")


def run(options: argparse.Namespace) -> int:
    """Measure, write rows and print a table; return 0 if all ratios are as wanted, else 1."""
    MNIST(options.folder, download=options.download)
    warm_up()
    rows = []
    for number in range(options.rounds):
        for name, measure in (("script", script), ("study", study), ("sweep", sweep)):
            load = os.getloadavg()[0]
            row = {"round": number, "name": name, "load": load, **measure(options.folder)}
            rows.append(row)
            append(options.out, [row])
            print({key: row[key] for key in row if key not in ("base", "round")}, flush=True)
    return conclude(rows)


def script(folder: Path) -> Row:
    """Run the script; return the base's counts and the seconds of all and of one evaluation."""
    start = cpu_seconds()
    result = blog_study.study(folder)
    row = {key: result[key] for key in ("base", "seconds", "evaluation")}
    return row | {"cpu": cpu_seconds() - start}


def study(folder: Path) -> Row:
    """Run the study with one adapter seed and without a stored base, and its report.

    Returns the same as `script`, and the seconds of a strength and of the report.
    """
    with tempfile.TemporaryDirectory() as scratch:
        settings = preset(
            "blog",
            seeds=1,
            compat="none",
            device="cpu",
            data="mnist",
            data_dir=str(folder),
            out=f"{scratch}/run",
            bases=f"{scratch}/bases",
        )
        start = cpu_seconds()
        with contextlib.redirect_stdout(io.StringIO()):
            finished, seconds = timed_call(partial(run_digits, settings))
        cpu = cpu_seconds() - start
        _, report = timed_call(partial(write_report, finished.folder))
    row = {"base": finished.rows[0]["wrong_counts"], "seconds": seconds, "cpu": cpu}
    return row | evaluations(folder) | {"report": report}


def sweep(folder: Path) -> Row:
    """Run the command of the sweep of GRID without a stored base; return counts and seconds."""
    command = [sys.executable, "-m", "experiments", "sweep", "--preset", "blog", "--seeds", "10"]
    command += [word for values in GRID for word in ("--vary", values)]
    command += ["--data", "mnist", "--data-dir", str(folder.absolute()), "--device", "cpu"]
    with tempfile.TemporaryDirectory() as scratch:
        out = f"{scratch}/run"
        start = cpu_seconds()
        _, seconds = timed_call(
            lambda: subprocess.run(
                [*command, "--bases", f"{scratch}/bases", "--out", out],
                cwd=Path(__file__).parents[1],
                check=True,
                stdout=subprocess.DEVNULL,
            )
        )
        cpu = cpu_seconds() - start
        rows = RunDirectory.read(Path(out)).rows
    assert sum(row["stage"] == "on" for row in rows) == 450
    return {"base": rows[0]["wrong_counts"], "seconds": seconds, "cpu": cpu}


def cpu_seconds() -> float:
    """Return the CPU time, user's and system's, of this process and its finished children."""
    return sum(os.times()[:4])


def evaluations(folder: Path) -> dict[str, float]:
    """Return the mean seconds of an evaluation with all its counts: of a pass, of a strength."""
    test = load_data("mnist", str(folder)).test
    inputs, model = test.inputs(0.1301, 0.3081), DigitNet([256, 128], "none", True)
    tuned = list(blog_study.TUNED)
    updates = {
        name: Update(torch.randn(2, layer.in_features), torch.randn(layer.out_features, 2), 0.5)
        for name, layer in model.named_children()
        if isinstance(layer, torch.nn.Linear)
    }
    strengths = Strengths(model, inputs, logits_of(model, inputs))

    def passes() -> None:
        for _ in range(PASSES):
            score(logits_of(model, inputs), test.labels, tuned)

    def all_strengths() -> None:
        for _ in range(PASSES):
            scores(strengths.logits(updates, STRENGTHS), test.labels, tuned)

    _, of_passes = timed_call(passes)
    _, of_strengths = timed_call(all_strengths)
    return {
        "evaluation": of_passes / PASSES,
        "strength": of_strengths / PASSES / len(STRENGTHS),
    }


def warm_up() -> None:
    """Make torch import what its first optimizer needs, so that the script's time excludes it."""
    torch.optim.Adam([torch.zeros(1, requires_grad=True)])


def conclude(rows: list[Row]) -> int:
    """Print the medians and their ratios; return 0 if counts agree and ratios are as wanted."""

    def median(name: str, key: str) -> float:
        return statistics.median(row[key] for row in rows if row["name"] == name)

    counts_agree = len({tuple(row["base"]) for row in rows}) == 1
    passed = counts_agree
    lines = []
    for label, name, key, own_key in (
        ("study", "study", "seconds", "seconds"),
        ("evaluation", "study", "evaluation", "evaluation"),
        ("a strength", "study", "evaluation", "strength"),
        ("sweep", "sweep", "seconds", "seconds"),
        ("study, CPU", "study", "cpu", "cpu"),
        ("sweep, CPU", "sweep", "cpu", "cpu"),
    ):
        slow, fast, wanted = median("script", key), median(name, own_key), WANTED.get(label)
        passed = passed and (wanted is None or slow / fast >= wanted)
        lines.append(
            [
                f"{label}, s",
                f"{slow:.3f}",
                f"{fast:.4f}",
                f"{slow / fast:.1f}",
                "" if wanted is None else f"{wanted:.0f}",
            ]
        )
    lines.append(["report, s", "", f"{median('study', 'report'):.3f}", "", ""])
    print("\n" + Table(["", "script", "ours", "ratio", "wanted"], lines).text())
    print(f"base counts {'all the same' if counts_agree else 'DIFFER'}: {rows[0]['base']}")
    return 0 if passed else 1
