"""Speed of the digit study against a plain script of it, `blog_study.py`, in one interleaved run.

    python -m benchmarks.study_speed FOLDER_WITH_MNIST --rounds 3

Each round runs all from nothing, one after the other, so that whatever else the machine does
falls on all. The study does more in its time: it also merges, unmerges, proves, fine-tunes wrapped
layers and tries every strength and set of layers. Its report and figures are timed apart, as the
script makes none. An evaluation is a pass over the test images with all its counts, as the study
makes seven for its proofs; a strength is one of the nine at which study and sweep try an adapter,
with its counts, which share most of their arithmetic. The sweep is 10 adapter seeds × 5 ranks × 9
strengths on one base, as the command that a user would give: starting Python, pre-training and the
report are in its time.
Where others use the machine as well, threads that wait for each other can make the script an order
of magnitude slower; OMP_NUM_THREADS=1 holds all contestants to one. CPU times vary less.
FOLDER is as torchvision lays it out, MNIST/raw/ with archives and unpacked files: `--download`.
"""

import argparse
import contextlib
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

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

WANTED = {"study": 4.0, "evaluation": 50.0, "sweep": 1.0}  # times as fast as the script
GRID = ("rank=1,2,4,8,16", f"strength={','.join(map(str, STRENGTHS))}")
PASSES = 50


def main() -> int:
    """Measure, print a table, write the rows; return 0 where all that is wanted holds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="MNIST, as torchvision lays it out")
    parser.add_argument("--download", action="store_true", help="download it first if need be")
    parser.add_argument("--rounds", type=int, default=3, help="repetitions of all [3]")
    parser.add_argument("--out", type=Path, default=Path("runs/study-speed.jsonl"), help="rows")
    options = parser.parse_args()
    MNIST(options.folder, download=options.download)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    warm_up()
    rows = []
    for number in range(options.rounds):
        for name, run in (("script", script), ("study", study), ("sweep", sweep)):
            row = {"round": number, "name": name, "load": os.getloadavg()[0], **run(options.folder)}
            rows.append(row)
            with options.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print({key: row[key] for key in row if key not in ("base", "round")}, flush=True)
    return conclude(rows)


def script(folder: Path) -> dict[str, Any]:
    """Run the plain script: base counts, seconds of all and of one evaluation."""
    began = cpu()
    result = blog_study.study(folder)
    return {key: result[key] for key in ("base", "seconds", "evaluation")} | {"cpu": cpu() - began}


def study(folder: Path) -> dict[str, Any]:
    """Run the study with one adapter seed and no base kept: the same of it, and its report."""
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
        began, of_cpu = time.perf_counter(), cpu()
        with contextlib.redirect_stdout(io.StringIO()):
            run = run_digits(settings)
        seconds, of_cpu = time.perf_counter() - began, cpu() - of_cpu
        began = time.perf_counter()
        write_report(run.folder)
        report = time.perf_counter() - began
    base = run.rows[0]["wrong_counts"]
    its = {"base": base, "seconds": seconds, "cpu": of_cpu}
    return its | evaluations(folder) | {"report": report}


def sweep(folder: Path) -> dict[str, Any]:
    """Run the sweep of GRID by its command with no base kept: base counts and seconds."""
    command = [sys.executable, "-m", "experiments", "sweep", "--preset", "blog", "--seeds", "10"]
    command += [word for values in GRID for word in ("--vary", values)]
    command += ["--data", "mnist", "--data-dir", str(folder.absolute()), "--device", "cpu"]
    with tempfile.TemporaryDirectory() as scratch:
        out = f"{scratch}/run"
        began, of_cpu = time.perf_counter(), cpu()
        subprocess.run(
            [*command, "--bases", f"{scratch}/bases", "--out", out],
            cwd=Path(__file__).parents[1],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        seconds, of_cpu = time.perf_counter() - began, cpu() - of_cpu
        rows = RunDirectory.read(Path(out)).rows
    assert sum(row["stage"] == "on" for row in rows) == 450
    return {"base": rows[0]["wrong_counts"], "seconds": seconds, "cpu": of_cpu}


def cpu() -> float:
    """Return the CPU time, user's and system's, of this process and of those that it ran, s."""
    return sum(os.times()[:4])


def evaluations(folder: Path) -> dict[str, float]:
    """Return the seconds of one evaluation with all its counts: of a pass, and of a strength.

    Means over so many that they take about as long as one of the script's.
    """
    test = load_data("mnist", str(folder)).test
    inputs, model = test.inputs(0.1301, 0.3081), DigitNet([256, 128], "none", True)
    tuned = list(blog_study.TUNED)
    began = time.perf_counter()
    for _ in range(PASSES):
        score(logits_of(model, inputs), test.labels, tuned)
    passes = (time.perf_counter() - began) / PASSES
    its = {
        name: Update(torch.randn(2, layer.in_features), torch.randn(layer.out_features, 2), 0.5)
        for name, layer in model.named_children()
        if isinstance(layer, torch.nn.Linear)
    }
    at = Strengths(model, inputs, logits_of(model, inputs))
    began = time.perf_counter()
    for _ in range(PASSES):
        scores(at.logits(its, STRENGTHS), test.labels, tuned)
    each = (time.perf_counter() - began) / PASSES / len(STRENGTHS)
    return {"evaluation": passes, "strength": each}


def warm_up() -> None:
    """Let torch load what its first optimizer needs, so that the script does not pay for it."""
    torch.optim.Adam([torch.zeros(1, requires_grad=True)])


def conclude(rows: list[dict[str, Any]]) -> int:
    """Print all sides' medians and their ratios; return 0 where what is wanted holds."""

    def median(name: str, key: str) -> float:
        return statistics.median(row[key] for row in rows if row["name"] == name)

    same = len({tuple(row["base"]) for row in rows}) == 1
    print(f"\n{'':15}{'script':>10}{'ours':>10}{'ratio':>8}{'wanted':>8}")
    held = [same]
    for label, name, key, its in (
        ("study", "study", "seconds", "seconds"),
        ("evaluation", "study", "evaluation", "evaluation"),
        ("a strength", "study", "evaluation", "strength"),
        ("sweep", "sweep", "seconds", "seconds"),
        ("study, CPU", "study", "cpu", "cpu"),
        ("sweep, CPU", "sweep", "cpu", "cpu"),
    ):
        slow, fast = median("script", key), median(name, its)
        wanted = WANTED.get(label)
        held.append(wanted is None or slow / fast >= wanted)
        said = "" if wanted is None else f"{wanted:8.0f}"
        print(f"{label + ', s':15}{slow:10.3f}{fast:10.4f}{slow / fast:8.1f}{said}")
    print(f"report, s      {'':10}{median('study', 'report'):10.3f}")
    print(f"base counts {'all the same' if same else 'DIFFER'}: {rows[0]['base']}")
    return 0 if all(held) else 1


if __name__ == "__main__":
    sys.exit(main())
