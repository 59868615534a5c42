"""Where a step spends its time: on the clock, on the host, and on the GPU.

A step is bound by the host if the clock follows the host's time and not the GPU's. The clock then
differs from run to run, with the processor's speed. Each contestant, cell and kind of work gives a
row in results.jsonl with the time of each run, and with the operations that took most of the host's
time.

With `--graphs` each step is also recorded as a CUDA graph once and replayed, without the host.
"over floor" compares with the floor that runs in the same way.
"""

import argparse
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from .harness import options as shared
from .harness.cases import Case, check, infer, train_step
from .harness.contestants import select
from .harness.models import SUITES, cells
from .harness.results import Row, Table, append, machine
from .harness.timing import interleaved, now

REPLAYED = ", replayed"
EXAMPLES = """\
examples:
  python -m benchmarks host-time --suites gpu-autocast --graphs
  python -m benchmarks host-time --suites cpu-mlp --quick --runs 2
"""
Step = Callable[[], Tensor]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this subcommand."""
    what = parser.add_argument_group("what to measure").add_argument
    suites = f"suites of `layers`: {', '.join(SUITES)}"
    default = ["gpu-autocast"]
    what("--suites", nargs="+", choices=SUITES, metavar="SUITE", default=default, help=suites)
    shared.add_only(what, ["paramlora", "PEFT"])
    what("--quick", action="store_true", help="first cell of each suite")
    what("--graphs", action="store_true", help="also replay each step from a CUDA graph")
    how = parser.add_argument_group("how to measure").add_argument
    how("--runs", type=int, default=10, help="runs; the table shows the fastest and the slowest")
    how("--steps", type=int, default=20, help="steps per run, without waiting between them")
    how("--top", type=int, default=8, help="operations to list by host time")
    shared.add_folder(parser.add_argument_group("results").add_argument)


def run(options: argparse.Namespace) -> None:
    """Measure all cells, write their rows and print them."""
    rows: list[Row] = []
    for cell in tqdm([c for suite in options.suites for c in cells(suite, options.quick)]):
        case = Case.create(cell, "cpu" if cell.suite.startswith("cpu") else "cuda")
        new = measure(case, options)
        append(options.out / "results.jsonl", new)
        rows += new
    print(table(rows).text())
    for row in rows:
        about = f"{row['contestant']}, {row['suite']} {row['shape']}, {row['work']}"
        listed = [f"{ms:8.3f} ms {calls:5.0f} × {name}" for name, calls, ms in row["operations"]]
        print("\n".join([f"\n{about}: host time per step by operation", *listed]))


def measure(case: Case, options: argparse.Namespace) -> list[Row]:
    """Return a row for each contestant and kind of work."""
    entries = [case.prepare(contestant, "eager") for contestant in select(options.only)]
    for entry in entries:
        check(case, entry)
    x = case.x.clone().requires_grad_()
    rows = []
    for work, step in (("train", train_step), ("infer", infer)):
        steps: dict[str, Step] = {
            entry.contestant.name: partial(step, entry, x) for entry in entries
        }
        for act in steps.values():
            act()
        if options.graphs:
            steps |= {name + REPLAYED: replayed(act) for name, act in steps.items()}
        device = x.device.type
        seconds = interleaved(steps, options.runs, repeats=options.steps, warm_up=1, device=device)
        for name, act in steps.items():
            rows.append(
                {
                    "suite": case.cell.suite,
                    "shape": list(case.cell.shape),
                    "work": work,
                    "contestant": name,
                    "runs_s": seconds[name],
                    "host_s": host_seconds(act, device),
                    **profiled(act, options.top, x.is_cuda),
                    "torch": torch.__version__,
                    "machine": machine(device),
                }
            )
    return rows


def replayed(step: Step) -> Step:
    """Return a function that replays a step from a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()  # a first run chooses algorithms, which a capture must not do
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        output = step()

    def replay() -> Tensor:
        graph.replay()
        return output

    return replay


def host_seconds(step: Step, device: str) -> float:
    """Return the median seconds until a step returns, with the GPU idle when it starts."""
    taken = []
    for _ in range(10):
        start = now(device)
        step()
        taken.append(now() - start)
    return median(taken)


def profiled(step: Step, top: int, on_gpu: bool) -> Row:
    """Return the GPU's seconds per step, its kernels, and operations by their own host time."""
    steps = 5
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=kinds) as found:
        for _ in range(steps):
            step()
        now("cuda" if on_gpu else "cpu")
    events = found.key_averages()
    kernels = [e for e in events if e.device_type != torch.autograd.DeviceType.CPU]
    by_host = sorted(events, key=lambda event: -event.self_cpu_time_total)[:top]
    return {
        "gpu_s": sum(event.self_device_time_total for event in kernels) / steps / 1e6,
        "kernels": sum(event.count for event in kernels) / steps,
        "operations": [
            (event.key, event.count / steps, event.self_cpu_time_total / steps / 1e3)
            for event in by_host
        ],
    }


def table(rows: list[Row]) -> Table:
    """Return a line per row, in milliseconds per step."""
    head = ["suite", "x", "work", "contestant", "clock", "fastest", "slowest", "over floor"]
    head += ["host", "GPU", "kernels"]
    lines, floors = [], {}
    for row in rows:
        runs, typical = row["runs_s"], median(row["runs_s"])
        how = row["contestant"].endswith(REPLAYED)
        if row["contestant"].startswith("floor"):
            floors[how] = typical
        times = [f"{s * 1e3:.3f}" for s in (typical, min(runs), max(runs))]
        about = [row["suite"], "×".join(map(str, row["shape"])), row["work"], row["contestant"]]
        spent = [f"{row['host_s'] * 1e3:.3f}", f"{row['gpu_s'] * 1e3:.3f}", f"{row['kernels']:.0f}"]
        lines.append([*about, *times, f"{typical / floors[how]:.2f}", *spent])
    return Table(head, lines)
