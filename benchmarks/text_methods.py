"""Fine-tuning methods on one text data set: the tables of docs/text-study.md.

1. Grid: each method is trained once at each of its learning rates. The rate with the highest
   accuracy on the validation rows is chosen, the lowest of several with the same.
2. Seeds: each method is trained at its chosen rate over the seeds.
3. Alone: each method is trained three times for one epoch, in its own process and alone on the
   device. The last training gives its time and memory. It excludes the cost of the first use of
   each kernel and of each length of a batch.

Every training is an ordinary run of the text study in its own folder, so an interrupted command
continues when it is run again. A method with one rate skips the grid.
"""

import argparse
import json
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from experiments.harness.rundir import Row, RunDirectory
from experiments.harness.settings import replace
from experiments.report.table import Table
from experiments.text.report import percent2, tuned_rows, write_text_report
from experiments.text.settings import TextSettings

ALL = "*.query,*.key,*.value,*.dense"
# By name: the setting that holds the learning rate, and the other settings.
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "full": ("full_lr", {"methods": "full"}),
    "last-layers": ("last_lr", {"methods": "last-layers"}),
    "lora, query and value, r 8": (
        "lr",
        {"methods": "lora", "targets": "*.query,*.value", "forgetting": False},
    ),
    "lora, all linear, r 2": (
        "lr",
        {"methods": "lora", "targets": ALL, "rank": 2, "forgetting": False},
    ),
    "lora, all linear, r 8": ("lr", {"methods": "lora", "targets": ALL}),
    "lora+head, all linear, r 8": ("lr", {"methods": "lora+head", "targets": ALL}),
}
Rates = dict[str, tuple[float, ...]]
# By data set and method, in ascending order. Those of spam go higher: its trainings are short.
RATES: dict[str, Rates] = {
    "imdb": {
        "full": (3e-5, 6e-5, 1.2e-4),
        "last-layers": (1e-3, 4e-3),
        "lora, query and value, r 8": (1e-3, 3e-3),
        "lora, all linear, r 2": (1e-3, 2e-3),
        "lora, all linear, r 8": (5e-4, 1e-3, 2e-3),
        "lora+head, all linear, r 8": (5e-4, 1e-3),
    },
    "spam": {
        "full": (3e-5, 6e-5, 1.2e-4, 2.4e-4),
        "last-layers": (1e-3, 4e-3, 1.6e-2),
        "lora, query and value, r 8": (1e-3, 3e-3, 6e-3),
        "lora, all linear, r 2": (1e-3, 2e-3, 4e-3),
        "lora, all linear, r 8": (5e-4, 1e-3, 2e-3, 4e-3),
        "lora+head, all linear, r 8": (5e-4, 1e-3, 2e-3, 4e-3),
    },
}

EXAMPLES = """\
examples:
  python -m benchmarks text-methods --data imdb --data-dir DIR --model MODEL
  python -m benchmarks text-methods --data spam --data-dir DIR --model MODEL --epochs 5 --batch 32
  python -m benchmarks text-methods --data-dir DIR --model MODEL --methods full last-layers \\
      --rates full=1.2e-4 last-layers=4e-3 --no-forgetting
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this subcommand."""
    data = parser.add_argument_group("data and model").add_argument
    data("--data", choices=["imdb", "spam"], default="imdb", help="data set")
    data("--data-dir", default="data", metavar="DIR", help="folder with the data set")
    checkpoint = "sentence-transformers/all-MiniLM-L6-v2"
    data("--model", default=checkpoint, help="checkpoint, a folder or a name")
    data("--tokens", default="runs/tokens", metavar="DIR", help="folder of tokenized texts")
    data("--rows", type=int, default=0, help="maximum rows per split, 0 for all")
    data("--max-length", type=int, help="maximum tokens per text (default: the preset's)")
    what = parser.add_argument_group("what to measure").add_argument
    names = f"{', '.join(map(repr, METHODS))} (default: all)"
    what("--methods", nargs="+", choices=METHODS, metavar="NAME", help=names)
    rates = "rates of a method in place of its grid: one, or several with commas to choose from"
    what("--rates", nargs="+", type=rates_of, default=[], metavar="NAME=RATE[,RATE...]", help=rates)
    phases = ["seeds", "alone"]
    after = "phases after the grid, seeds and alone; the latter needs an otherwise idle device"
    what("--phases", nargs="+", choices=phases, default=phases, metavar="PHASE", help=after)
    kept = "do not measure how well lora and lora+head, r 8, keep the checkpoint's similarities"
    what("--no-forgetting", dest="forgetting", action="store_false", help=kept)
    how = parser.add_argument_group("training").add_argument
    how("--seeds", type=int, default=3, help="seeds of each method")
    how("--epochs", type=int, default=3, help="epochs of a training")
    how("--batch", type=int, default=64, help="texts in a batch")
    how("--device", default="auto", help="auto, cpu or cuda")
    how("--workers", type=int, default=1, help="processes that train at a time")
    out = parser.add_argument_group("results").add_argument
    folder = Path("runs/text-methods")
    out("--out", type=Path, default=folder, metavar="DIR", help="folder of runs and table.jsonl")


def run(options: argparse.Namespace) -> None:
    """Choose a rate for each method, train with it, write table.jsonl and print the table."""
    base = base_settings(options)
    grid = replace(base, seeds=1, forgetting=False)
    chosen = choose_rates(options, grid)
    print(json.dumps(chosen), flush=True)
    seeds, alone = replace(base, seeds=options.seeds), replace(grid, seeds=3, epochs=1)
    for phase, settings in (("seeds", seeds), ("alone", alone)):
        if phase not in options.phases:
            continue
        jobs = [
            settings_for(settings, name, rate, str(options.out / phase / slug(name, rate)))
            for name, rate in chosen.items()
        ]
        if phase == "alone":
            run_apart(jobs)
        else:
            run_all(jobs, options.workers)
        results = [result(options.out, name, rate) for name, rate in chosen.items()]
        lines = "".join(json.dumps(row) + "\n" for row in results)
        (options.out / "table.jsonl").write_text(lines)
        print(table(results).text(), flush=True)


def base_settings(options: argparse.Namespace) -> TextSettings:
    """Return the settings that all runs share, from the preset of the data set."""
    taken = ("model", "data_dir", "tokens", "rows", "device", "epochs", "batch", "forgetting")
    given = {key: getattr(options, key) for key in taken} | {"patience": 0}
    if options.max_length:
        given["max_length"] = options.max_length
    return TextSettings.of_preset(f"minilm-{options.data}", **given)


def choose_rates(options: argparse.Namespace, grid: TextSettings) -> dict[str, float]:
    """Train each method at each of its rates, and return the best rate of each."""
    rates = {**RATES[options.data], **dict(options.rates)}
    methods = options.methods or list(METHODS)
    jobs = [
        settings_for(grid, name, rate, str(options.out / "grid" / slug(name, rate)))
        for name in methods
        for rate in rates[name]
        if len(rates[name]) > 1
    ]
    run_all(jobs, options.workers)
    return {name: best_rate(options.out, name, rates[name]) for name in methods}


def settings_for(base: TextSettings, name: str, rate: float, folder: str) -> TextSettings:
    """Return the settings of one run. The scale alpha/r is 2 for every rank."""
    rate_field, others = METHODS[name]
    changes = {**others, rate_field: rate, "out": folder}
    changes["alpha"] = 2.0 * others.get("rank", base.adapter.rank)
    changes["forgetting"] = base.forgetting and others.get("forgetting", True)
    return replace(base, **changes)


def run_quietly(settings: TextSettings) -> str:
    """Run the study without messages, or the rest of an interrupted one; return its folder."""
    from experiments.text.study import run_text

    run_text(settings, lambda line: None)
    write_text_report(Path(settings.folder))
    return settings.folder


def run_all(jobs: Iterable[TextSettings], workers: int) -> None:
    """Run studies in `workers` processes at a time; with one, in this process."""
    jobs = list(jobs)
    if workers == 1:
        for job in jobs:
            print(run_quietly(job), flush=True)
    else:
        _run_in(workers, jobs)


def run_apart(jobs: Iterable[TextSettings]) -> None:
    """Run studies one after the other, each in its own process."""
    for job in jobs:
        _run_in(1, [job])


def _run_in(processes: int, jobs: list[TextSettings]) -> None:
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        for folder in pool.map(run_quietly, jobs):
            print(folder, flush=True)


def slug(name: str, rate: float) -> str:
    """Return the name of the folder of a method at a rate."""
    return f"{name.replace(', ', '-').replace(' ', '-')}-{rate:g}"


def best_rate(folder: Path, name: str, rates: tuple[float, ...]) -> float:
    """Return the rate with the highest accuracy on the validation rows, the lowest of several."""
    if len(rates) == 1:
        return rates[0]

    def validation(rate: float) -> float:
        run = RunDirectory.read(folder / "grid" / slug(name, rate))
        return tuned_rows(run)[0]["validation_accuracy"]

    return max(sorted(rates), key=validation)


def rates_of(word: str) -> tuple[str, tuple[float, ...]]:
    """Return a method and its rates from a value of `--rates`.

    >>> rates_of("lora, all linear, r 8=1e-3,2e-3")
    ('lora, all linear, r 8', (0.001, 0.002))
    """
    name, _, values = word.rpartition("=")
    if name not in METHODS:
        methods = ", ".join(map(repr, METHODS))
        raise argparse.ArgumentTypeError(
            f"{word!r} is not NAME=RATE[,RATE...] with NAME one of {methods}"
        )
    try:
        return name, tuple(float(value) for value in values.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{values!r} is not a list of numbers; write for example '{name}=1e-3,2e-3'"
        ) from None


def result(folder: Path, name: str, rate: float) -> Row:
    """Return accuracies over the seeds, and time and memory of the run alone, if there is one."""
    rows = tuned_rows(RunDirectory.read(folder / "seeds" / slug(name, rate)))
    alone = folder / "alone" / slug(name, rate)
    last = tuned_rows(RunDirectory.read(alone))[-1] if alone.exists() else {}
    return {
        "method": name,
        "rate": rate,
        "trainable": rows[0]["trainable"],
        "parameters": rows[0]["parameters"],
        "validation": [row["validation_accuracy"] for row in rows],
        "test": [row["accuracy"] for row in rows],
        "seconds": last.get("seconds"),
        "steps": last.get("steps"),
        "peak_bytes": last.get("peak_bytes"),
    }


def table(results: list[Row]) -> Table:
    """Return a line per method."""
    head = ["method", "trained", "share", "rate", "validation %", "test %", "n", "ms/step", "GB"]
    return Table(
        head,
        [
            [
                row["method"],
                f"{row['trainable']:,}",
                f"{row['trainable'] / row['parameters']:.2%}",
                f"{row['rate']:g}",
                percent2(row["validation"]),
                percent2(row["test"]),
                str(len(row["test"])),
                "-" if row["seconds"] is None else f"{1e3 * row['seconds'] / row['steps']:.1f}",
                "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e9:.2f}",
            ]
            for row in results
        ],
    )
