"""The table of docs/text-study.md: methods and settings on one data set, chosen and then repeated.

    python -m benchmarks.text_methods --data imdb --data-dir DIR --model FOLDER --out runs/imdb

First every method is trained once at each of its learning rates, and the rate is kept that gives
the highest accuracy on the validation rows, the lowest of several that do. Then every method is
trained with it over the seeds; last, each three times more for an epoch, in a process of its own
and alone on the device: the last of these, free from what the first use of every kernel and of
every length of a batch costs, gives its time and memory.
Every training is an ordinary run of the text study in a folder of its own, so that a table that was
cut off goes on. Where `--rates` leaves one rate there is nothing to choose, and no grid.
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
# By name: the setting that holds the rate, and what else is set.
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
# By data set and method, in ascending order. Spam's reach further: its trainings are short.
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


def settings_for(base: TextSettings, name: str, rate: float, folder: str) -> TextSettings:
    """Return the settings of one run: scale alpha/r = 2 whatever r is."""
    field, more = METHODS[name]
    more = {**more, field: rate, "alpha": 2.0 * more.get("rank", base.adapter.rank), "out": folder}
    more["forgetting"] = base.forgetting and more.get("forgetting", True)
    return replace(base, **more)


def run_quietly(settings: TextSettings) -> str:
    """Run the study, or what is left of it; return its folder."""
    from experiments.text.study import run_text

    run_text(settings, lambda line: None)
    write_text_report(Path(settings.folder))
    return settings.folder


def run_all(jobs: Iterable[TextSettings], workers: int) -> None:
    """Run studies side by side, each in one of so many processes."""
    jobs = list(jobs)
    if workers == 1:
        for job in jobs:
            print(run_quietly(job), flush=True)
    else:
        _run_in(workers, jobs)


def run_apart(jobs: Iterable[TextSettings]) -> None:
    """Run studies one after the other, each in a process of its own."""
    for job in jobs:
        _run_in(1, [job])


def _run_in(processes: int, jobs: list[TextSettings]) -> None:
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        for folder in pool.map(run_quietly, jobs):
            print(folder, flush=True)


def slug(name: str, rate: float) -> str:
    return f"{name.replace(', ', '-').replace(' ', '-')}-{rate:g}"


def best_rate(folder: Path, name: str, rates: tuple[float, ...]) -> float:
    """Return the rate of the highest accuracy on the validation rows, the lowest of several."""
    if len(rates) == 1:
        return rates[0]

    def validation(rate: float) -> float:
        return tuned_rows(RunDirectory.read(folder / "grid" / slug(name, rate)))[0][
            "validation_accuracy"
        ]

    return max(sorted(rates), key=validation)


def rates_of(word: str) -> tuple[str, tuple[float, ...]]:
    """Return a method and its rates, as `--rates` names them.

    >>> rates_of("lora, all linear, r 8=1e-3,2e-3")
    ('lora, all linear, r 8', (0.001, 0.002))
    """
    name, _, values = word.rpartition("=")
    if name not in METHODS:
        raise argparse.ArgumentTypeError(f"{word!r} names none of {list(METHODS)}: NAME=RATE,…")
    try:
        return name, tuple(float(value) for value in values.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{values!r} is no list of numbers: {name}=1e-3") from None


def result(folder: Path, name: str, rate: float) -> Row:
    """Return a line of the table: what the seeds gave, and time and memory of the run alone."""
    rows = tuned_rows(RunDirectory.read(folder / "seeds" / slug(name, rate)))
    alone = folder / "alone" / slug(name, rate)
    timed = tuned_rows(RunDirectory.read(alone))[-1] if alone.exists() else {}
    return {
        "method": name,
        "rate": rate,
        "trainable": rows[0]["trainable"],
        "parameters": rows[0]["parameters"],
        "validation": [row["validation_accuracy"] for row in rows],
        "test": [row["accuracy"] for row in rows],
        "seconds": timed.get("seconds"),
        "steps": timed.get("steps"),
        "peak_bytes": timed.get("peak_bytes"),
    }


def table(results: list[Row]) -> Table:
    head = ["method", "trained", "share", "rate", "validation %", "test %", "n", "ms a step", "GB"]
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


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.text_methods", description=__doc__)
    parser.add_argument("--data", choices=["imdb", "spam"], default="imdb")
    parser.add_argument("--data-dir", default="data", help="folder with the data set [data]")
    parser.add_argument("--model", default="sentence-transformers/all-MiniLM-L6-v2")
    parser.add_argument("--tokens", default="runs/tokens", help="folder of tokenized texts")
    parser.add_argument("--out", type=Path, default=Path("runs/text-methods"), help="a folder")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument(
        "--rates",
        nargs="+",
        type=rates_of,
        default=[],
        metavar="NAME=RATE",
        help="of a method, in place of its grid: one, or several with commas to choose from",
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=1, help="processes side by side [1]")
    parser.add_argument("--rows", type=int, default=0, help="rows of a split at most; 0: all")
    parser.add_argument("--max-length", type=int, help="tokens of a text; else the preset's")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--no-forgetting",
        dest="forgetting",
        action="store_false",
        help="leave out what is left of the checkpoint's similarities, of lora and lora+head, r 8",
    )
    parser.add_argument(
        "--phases",
        nargs="+",
        choices=["seeds", "alone"],
        default=["seeds", "alone"],
        help="what to do after the choice of rates; `alone` wants a device that nobody else uses",
    )
    options = parser.parse_args(arguments)
    taken = ("model", "data_dir", "tokens", "rows", "device", "epochs", "batch", "forgetting")
    given = {key: getattr(options, key) for key in taken} | {"patience": 0}
    if options.max_length:
        given["max_length"] = options.max_length
    base = TextSettings.of_preset(f"minilm-{options.data}", **given)
    grid = replace(base, seeds=1, forgetting=False)
    rates = {**RATES[options.data], **dict(options.rates)}
    run_all(
        [
            settings_for(grid, name, rate, str(options.out / "grid" / slug(name, rate)))
            for name in options.methods
            for rate in rates[name]
            if len(rates[name]) > 1
        ],
        options.workers,
    )
    chosen = {name: best_rate(options.out, name, rates[name]) for name in options.methods}
    print(json.dumps(chosen), flush=True)
    seeds, alone = replace(base, seeds=options.seeds), replace(grid, seeds=3, epochs=1)
    for part, settings in (("seeds", seeds), ("alone", alone)):
        if part not in options.phases:
            continue
        jobs = [
            settings_for(settings, name, rate, str(options.out / part / slug(name, rate)))
            for name, rate in chosen.items()
        ]
        run_apart(jobs) if part == "alone" else run_all(jobs, options.workers)
        results = [result(options.out, name, rate) for name, rate in chosen.items()]
        lines = "".join(json.dumps(row) + "\n" for row in results)
        (options.out / "table.jsonl").write_text(lines)
        print(table(results).text(), flush=True)


if __name__ == "__main__":
    main()
