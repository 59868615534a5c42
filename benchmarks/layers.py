"""Time and memory of a training step and of inference, beside other libraries.

All contestants get the same factors and are checked against float64. They are then timed in
interleaved rounds. Each contestant, cell, mode and kind of work gives a row in results.jsonl. The
command prints a table of the times over the floor, the frozen model, and draws the overheads in
overheads.png. It writes the times also to layers.csv, which can replace docs/data/layers-gpu.csv or
layers-cpu.csv: `python -m benchmarks tables` makes the tables of docs/performance.md from those.
Contestants whose package is not installed are named and left out.
"""

import argparse
import csv
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from paramlora.native import load as native

from .figure import draw
from .harness import options as shared
from .harness.cases import Case, Entry, check, infer, train_step
from .harness.contestants import CONTESTANTS, CONTROLS, Contestant, select
from .harness.models import SUITES, cells
from .harness.results import Row, Table, append, machine, overhead_share, summarized
from .harness.timing import interleaved, now, peak_bytes

MODELS = {
    "cpu-mlp": "MLP",
    "cpu-ffn": "feed-forward",
    "cpu-encoder": "encoder",
    "gpu-mlp": "MLP",
    "gpu-ffn": "feed-forward",
    "gpu-block": "Llama block",
    "gpu-autocast": "encoder, autocast",
}
SETTINGS = ("", ", one dtype")
MODES = ["eager", "compiled", "graphs"]
# Contestants are not ranked in a cell where a control differs more than this from the floor.
MOST_BIAS = 0.02
EXAMPLES = """\
examples:
  python -m benchmarks layers --quick
  python -m benchmarks layers --suites cpu-mlp --threads 1 --clock processor
  python -m benchmarks layers --suites gpu-ffn gpu-mlp --modes eager compiled --only paramlora PEFT
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this subcommand."""
    what = parser.add_argument_group("what to measure").add_argument
    suites = f"{', '.join(SUITES)} (default: all that this machine can run)"
    what("--suites", nargs="+", choices=SUITES, metavar="SUITE", help=suites)
    modes = "eager, compiled, or graphs: compiled with CUDA graphs"
    what("--modes", nargs="+", choices=MODES, default=["eager"], metavar="MODE", help=modes)
    shared.add_only(what)
    what("--quick", action="store_true", help="first cell of each suite, 3 rounds")
    how = parser.add_argument_group("how to measure").add_argument
    shared.add_rounds(how, 15, "interleaved rounds per cell")
    how("--threads", type=int, help="threads on the CPU (default: torch's)")
    shared.add_clock(how)
    shared.add_folder(parser.add_argument_group("results").add_argument)


def run(options: argparse.Namespace) -> None:
    """Measure all cells, write their rows, print the table and draw the figure."""
    if options.threads:
        torch.set_num_threads(options.threads)
    if native.module() is None:
        print(
            "the native extension is not built: python -m paramlora.native.build", file=sys.stderr
        )
    contestants = select(options.only, controls=True)
    missing = [contestant.name for contestant in CONTESTANTS if not contestant.installed]
    if missing:
        print(f"not installed, left out: {', '.join(missing)}", file=sys.stderr)
    suites = options.suites or [
        s for s in SUITES if s.startswith("cpu") or torch.cuda.is_available()
    ]
    jobs = [
        (cell, mode)
        for suite in suites
        for cell in cells(suite, options.quick)
        for mode in options.modes
    ]
    rounds = 3 if options.quick else options.rounds
    rows: list[Row] = []
    for cell, mode in tqdm(jobs, unit="cell"):
        case = Case.create(cell, "cpu" if cell.suite.startswith("cpu") else "cuda")
        new = measure(case, contestants, mode, rounds, options.clock)
        append(options.out / "results.jsonl", new)
        rows += new
    print(table(rows).text())
    write_csv(rows, options.out / "layers.csv")
    draw(rows, options.out / "overheads.png")


def measure(
    case: Case, contestants: list[Contestant], mode: str, rounds: int, clock: str
) -> list[Row]:
    """Return a row for each contestant and kind of work.

    If building or checking a contestant fails, the error is printed and the contestant left out.
    Errors of the floor and of paramlora in its default setting are raised.
    """
    torch._dynamo.reset()
    entries: list[Entry] = []
    errors: dict[str, float] = {}
    for contestant in contestants:
        try:
            entry = case.prepare(contestant, mode)
            errors[contestant.name] = check(case, entry)
            entries.append(entry)
        except Exception as error:  # whichever a library raises
            if contestant.name in ("floor", "paramlora"):
                raise
            print(f"{contestant.name} in {case.cell.suite} {mode}: {error}", file=sys.stderr)
    x = case.x.clone().requires_grad_()
    memory = {entry.contestant.name: step_bytes(entry, x) for entry in entries}
    rows = []
    for work, step in (("train", train_step), ("infer", infer)):
        seconds = timed(entries, x, step, rounds, clock)
        floor = summarized(seconds["floor"])
        for entry in entries:
            name = entry.contestant.name
            own = summarized(seconds[name])
            rows.append(
                describe(case, entry.contestant, mode, work)
                | own
                | {
                    "ratio": own["median_s"] / floor["median_s"],
                    "ratio_of_min": own["min_s"] / floor["min_s"],
                    "clock": clock,
                    "error": errors[name],
                    "peak_bytes": memory[name],
                }
            )
    return rows


def step_bytes(entry: Entry, x: Tensor) -> int | None:
    """Return the bytes that a training step adds at its peak, after a first step; None on a CPU."""
    step = partial(train_step, entry, x)
    if x.is_cuda:
        step()
    return peak_bytes(step, x.device.type)


def timed(
    entries: list[Entry],
    x: Tensor,
    step: Callable[[Entry, Tensor], Tensor],
    rounds: int,
    clock: str,
) -> dict[str, list[float]]:
    """Return the seconds per step of each contestant, one value per round.

    A round repeats the step of each contestant for about 20 ms, by the time of one step of the
    floor, and at least once.
    """
    for entry in entries:
        for _ in range(3):
            step(entry, x)
    start = now(x.device.type, clock)
    step(entries[0], x)
    elapsed = now(x.device.type, clock) - start
    return interleaved(
        {entry.contestant.name: partial(step, entry, x) for entry in entries},
        rounds,
        repeats=max(1, min(200, int(0.02 / max(elapsed, 1e-6)))),
        device=x.device.type,
        clock=clock,
    )


def describe(case: Case, contestant: Contestant, mode: str, work: str) -> Row:
    """Return the fields of a row that identify the measurement and the machine."""
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
        "machine": machine(case.x.device.type),
        "threads": None if on_gpu else torch.get_num_threads(),
    }


def table(rows: list[Row]) -> Table:
    """Return a line per cell: times over the floor, and our overhead divided by PEFT's.

    A cell whose controls differ from the floor by more than `MOST_BIAS` has no share.
    """
    names = list(dict.fromkeys(row["contestant"] for row in rows))
    head = ["suite", "x", "r", "mode", "work", "floor ms"]
    head += [name.replace(", ", ",\n") for name in names[1:]]
    head += ["share of\nPEFT's", "in one\ndtype"]
    lines = []
    for group in by_cell(rows):
        ratios = {name: row["ratio"] for name, row in group.items()}
        of = group["floor"]
        line = [of["suite"], _shape(of), str(of["rank"]), of["mode"], of["work"]]
        line += [f"{group['floor']['median_s'] * 1e3:.3f}"]
        line += [f"{ratios[name]:.2f}" if name in ratios else "-" for name in names[1:]]
        shares = [share(ratios, setting) for setting in SETTINGS]
        lines.append(line + (shares if is_fair(ratios) else ["unfair"] * 2))
    return Table(head, lines)


def write_csv(rows: list[Row], path: Path) -> None:
    """Write a line per cell: times over the floor, and shares where the controls allow them."""
    lines = []
    for group in by_cell(rows):
        ratios = {name: row["ratio"] for name, row in group.items()}
        of = group["floor"]
        line = {"model": MODELS[of["suite"]], "x": _shape(of), "rank": of["rank"]}
        line |= {"work": of["work"], "mode": of["mode"]}
        line["floor_ms"] = f"{of['median_s'] * 1e3:.3f}"
        line |= {_column(name): f"{ratios[name]:.2f}" for name in ratios if name != "floor"}
        for setting in SETTINGS:
            line[_column("share" + setting)] = share(ratios, setting) if is_fair(ratios) else "-"
        lines.append(line)
    with open(path, "w", encoding="utf-8", newline="") as file:
        columns = dict.fromkeys(column for line in lines for column in line)
        writer = csv.DictWriter(file, list(columns), restval="-", lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)


def by_cell(rows: list[Row]) -> list[dict[str, Row]]:
    """Return the rows of each cell, mode and kind of work by contestant."""
    cells: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        cell = (row["suite"], _shape(row), str(row["rank"]), row["mode"], row["work"])
        cells.setdefault(cell, {})[row["contestant"]] = row
    return list(cells.values())


def is_fair(ratios: dict[str, float]) -> bool:
    """Return whether the controls of a cell took the time of the floor."""
    return all(abs(ratios[name] - 1) <= MOST_BIAS for name in CONTROLS if name in ratios)


def _shape(row: Row) -> str:
    return "×".join(map(str, row["shape"]))


def _column(name: str) -> str:
    return name.replace(",", "").replace(" ", "_").lower()


def share(ratios: dict[str, float], setting: str) -> str:
    """Return our overhead divided by PEFT's; both with the setting that ends their names."""
    own, peer = ratios.get("paramlora" + setting), ratios.get("PEFT" + setting)
    return "-" if own is None or peer is None else overhead_share(own, peer)
