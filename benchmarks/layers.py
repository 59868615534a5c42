"""`python -m benchmarks`: time and memory of a training step and of inference, beside peers.

It writes a row for each contestant, cell and mode to `results.jsonl`, prints a table, and draws
the overheads. Contestants whose package is not installed are named and left out.
"""

import argparse
import json
import platform
import sys
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tqdm import tqdm

from paramlora import native

from .figure import draw
from .harness.contestants import CONTESTANTS, Contestant
from .harness.measure import Case, Entry, check, infer, peak_memory, timed, train_step
from .harness.models import SUITES, cells


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--suites", nargs="+", choices=SUITES, help="default: all that can run")
    parser.add_argument("--modes", nargs="+", default=["eager"],
                        choices=["eager", "compiled", "graphs"])  # fmt: skip
    parser.add_argument("--rounds", type=int, default=15, help="interleaved rounds a cell")
    parser.add_argument("--quick", action="store_true", help="the first cell of a suite, 3 rounds")
    parser.add_argument("--threads", type=int, help="threads on the CPU")
    parser.add_argument("--clock", choices=["wall", "processor"], default="wall",
                        help="processor: its time, on a CPU that others use as well")  # fmt: skip
    parser.add_argument("--only", nargs="+", help="names of contestants, beside the floor")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"), help="a folder")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    suites = options.suites or [s for s in SUITES if s[:3] == "cpu" or torch.cuda.is_available()]
    if native.module() is None:
        print("paramlora's compiled twin is not built: python -m paramlora.build", file=sys.stderr)
    there = [c for c in CONTESTANTS if c.there and _wanted(c, options.only)]
    lacking = [c.name for c in CONTESTANTS if not c.there]
    if lacking:
        print(f"not installed, left out: {', '.join(lacking)}", file=sys.stderr)
    options.out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    with open(options.out / "results.jsonl", "a") as file:
        todo = [(s, cell, mode) for s in suites for cell in cells(s, options.quick)
                for mode in options.modes]  # fmt: skip
        for suite, cell, mode in tqdm(todo, unit="cell"):
            device = "cpu" if suite[:3] == "cpu" else "cuda"
            rounds = 3 if options.quick else options.rounds
            new = _measure(Case.of(cell, device), there, mode, rounds, options.clock)
            for row in new:
                file.write(json.dumps(row) + "\n")
            file.flush()
            rows += new
    print(table(rows))
    draw(rows, options.out / "overheads.png")


def table(rows: list[dict[str, Any]]) -> str:
    """Return time over the floor, and our overhead over the best peer's, a line a cell."""
    names = list(dict.fromkeys(row["contestant"] for row in rows))
    groups: dict[tuple[str, ...], dict[str, dict[str, Any]]] = {}
    for row in rows:
        key = (row["suite"], str(row["shape"]), str(row["rank"]), row["mode"], row["work"])
        groups.setdefault(key, {})[row["contestant"]] = row
    head: tuple[str, ...] = (
        "suite",
        "x",
        "r",
        "mode",
        "work",
        "floor ms",
        *names[1:],
        "ours / PEFT",
        "in one dtype",
    )
    lines: list[tuple[str, ...]] = [head]
    for cell, group in groups.items():
        ratios = [f"{group[n]['ratio']:.2f}" if n in group else "-" for n in names[1:]]
        shares = [_share(group, setting) for setting in ("", ", one dtype")]
        lines.append((*cell, f"{group['floor']['median_s'] * 1e3:.3f}", *ratios, *shares))
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def _share(group: dict[str, dict[str, Any]], setting: str) -> str:
    """Return our overhead over PEFT's, with the same setting of the factors' dtype."""
    own, peer = group.get("paramlora" + setting), group.get("PEFT" + setting)
    if own is None or peer is None or peer["ratio"] <= 1:
        return "-"
    return f"{(own['ratio'] - 1) / (peer['ratio'] - 1):.2f}"


def _measure(
    case: Case, there: list[Contestant], mode: str, rounds: int, clock: str
) -> list[dict[str, Any]]:
    torch._dynamo.reset()
    entries: list[Entry] = []
    errors: dict[str, float] = {}
    for contestant in there:
        try:
            entry = case.enter(contestant, mode)
            errors[contestant.name] = check(case, entry)
            entries.append(entry)
        except Exception as error:  # a peer that fails in a cell is a finding, not the end
            if contestant.name in ("floor", "paramlora"):
                raise
            print(f"{contestant.name} in {case.cell.suite} {mode}: {error}", file=sys.stderr)
    x = case.x.clone().requires_grad_()
    memory = {e.contestant.name: peak_memory(e, x) for e in entries}
    rows = []
    for work, step in (("train", train_step), ("infer", infer)):
        seconds = timed(entries, x, step, rounds, clock)
        for entry in entries:
            name = entry.contestant.name
            rows.append(
                _row(case, entry.contestant, mode, work)
                | {
                    "median_s": median(seconds[name]),
                    "min_s": min(seconds[name]),
                    "ratio": median(seconds[name]) / median(seconds["floor"]),
                    "ratio_of_min": min(seconds[name]) / min(seconds["floor"]),
                    "rounds": rounds,
                    "clock": clock,
                    "error": errors[name],
                    "peak_bytes": memory[name],
                }
            )
    return rows


def _row(case: Case, contestant: Contestant, mode: str, work: str) -> dict[str, Any]:
    on_gpu = case.x.is_cuda
    return {
        "suite": case.cell.suite,
        "shape": list(case.cell.shape),
        "rank": case.cell.rank,
        "dtype": str(case.cell.dtype).removeprefix("torch."),
        "products": str(case.cell.products).removeprefix("torch."),
        "mode": mode,
        "work": work,
        "contestant": contestant.name,
        "version": contestant.version,
        "torch": torch.__version__,
        "native": native.module() is not None,
        "machine": torch.cuda.get_device_name() if on_gpu else processor(),
        "threads": None if on_gpu else torch.get_num_threads(),
    }


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _wanted(contestant: Contestant, only: list[str] | None) -> bool:
    return not only or contestant.name in (*only, "floor")


if __name__ == "__main__":
    main()
