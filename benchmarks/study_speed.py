"""Speed of the digit study against a plain script of it, `blog_study.py`, in one interleaved run.

    python -m benchmarks.study_speed FOLDER_WITH_MNIST --rounds 3

Each round runs both from nothing, one after the other, so that whatever else the machine does
falls on both. The study does more in its time: it also merges, unmerges, proves and fine-tunes
wrapped layers. Its report and figures are timed apart, as the script makes none. FOLDER is as
torchvision lays it out, MNIST/raw/ with archives and unpacked files; `--download` fills it.
"""

import argparse
import contextlib
import io
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torchvision.datasets import MNIST

from benchmarks import blog_study
from experiments.data import load_data
from experiments.evaluate import logits_of, score
from experiments.models import DigitNet
from experiments.report import write_report
from experiments.settings import preset
from experiments.study import run_digits

WANTED = {"study": 4.0, "evaluation": 50.0}  # times as fast as the script
PASSES = 50


def main() -> int:
    """Measure, print a table, write the rows; return 0 where all that is wanted holds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="MNIST, as torchvision lays it out")
    parser.add_argument("--download", action="store_true", help="download it first if need be")
    parser.add_argument("--rounds", type=int, default=3, help="repetitions of both [3]")
    parser.add_argument("--out", type=Path, default=Path("runs/study-speed.jsonl"), help="rows")
    options = parser.parse_args()
    MNIST(options.folder, download=options.download)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    warm_up()
    rows = []
    for number in range(options.rounds):
        for name, run in (("script", script), ("study", study)):
            row = {"round": number, "name": name, "load": os.getloadavg()[0], **run(options.folder)}
            rows.append(row)
            with options.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print({key: row[key] for key in row if key not in ("base", "round")}, flush=True)
    return conclude(rows)


def script(folder: Path) -> dict[str, Any]:
    """Run the plain script: base counts, seconds of all and of one evaluation."""
    result = blog_study.study(folder)
    return {key: result[key] for key in ("base", "seconds", "evaluation")}


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
        began = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()):
            run = run_digits(settings)
        seconds = time.perf_counter() - began
        began = time.perf_counter()
        write_report(run.folder)
        report = time.perf_counter() - began
    base = run.rows[0]["wrong_counts"]
    return {"base": base, "seconds": seconds, "evaluation": evaluation(folder), "report": report}


def evaluation(folder: Path) -> float:
    """Return the seconds of one evaluation as the study makes it: a pass, and all its counts.

    The mean of PASSES of them, which together take about as long as one of the script's.
    """
    test = load_data("mnist", str(folder)).test
    inputs, model = test.inputs(0.1301, 0.3081), DigitNet([256, 128], "none", True)
    began = time.perf_counter()
    for _ in range(PASSES):
        score(logits_of(model, inputs), test.labels, [2, 3, 5, 8, 9])
    return (time.perf_counter() - began) / PASSES


def warm_up() -> None:
    """Let torch load what its first optimizer needs, so that the script does not pay for it."""
    torch.optim.Adam([torch.zeros(1, requires_grad=True)])


def conclude(rows: list[dict[str, Any]]) -> int:
    """Print both sides' medians and their ratio; return 0 where what is wanted holds."""

    def median(name: str, key: str) -> float:
        return statistics.median(row[key] for row in rows if row["name"] == name)

    same = len({tuple(row["base"]) for row in rows}) == 1
    print(f"\n{'':12}{'script':>10}{'study':>10}{'ratio':>8}{'wanted':>8}")
    held = [same]
    for label, key in (("study", "seconds"), ("evaluation", "evaluation")):
        slow, fast = median("script", key), median("study", key)
        held.append(slow / fast >= WANTED[label])
        print(f"{label + ', s':12}{slow:10.3f}{fast:10.3f}{slow / fast:8.1f}{WANTED[label]:8.0f}")
    print(f"report, s   {'':10}{median('study', 'report'):10.3f}")
    print(f"base counts {'all the same' if same else 'DIFFER'}: {rows[0]['base']}")
    return 0 if all(held) else 1


if __name__ == "__main__":
    sys.exit(main())
