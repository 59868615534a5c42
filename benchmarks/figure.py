"""Draw the overheads that `layers` measured.

From a results.jsonl: all contestants by cell, in training and in inference. From a layers.csv: one
cell as four bars, paramlora and PEFT in training and in inference.
"""

import argparse
import csv
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import MaxNLocator

from experiments.report.style import LINE, STYLE

from .harness.results import Row, read

plt.rcParams.update(STYLE)

# The colour of each contestant and its mark; variants of one have its colour.
LOOKS = {
    "paramlora": (LINE["on"], "o"),
    "paramlora, one dtype": (LINE["on"], "s"),
    "paramlora, merged": (LINE["on"], "^"),
    "paramlora, off": (LINE["on"], "v"),
    "PEFT": (LINE["off"], "o"),
    "PEFT, one dtype": (LINE["off"], "s"),
    "loralib": (LINE["full"], "D"),
    "LyCORIS": (LINE["scrambled"], "P"),
    "naive": (LINE["base"], "X"),
}
# The axis ends here: smaller differences from the floor are noise.
LEAST = 0.01
EXAMPLES = """\
examples:
  python -m benchmarks figure runs/benchmarks/results.jsonl overheads.png
  python -m benchmarks figure docs/data/layers-gpu.csv docs/performance.png --x 4096×4096
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this subcommand."""
    about = "a results.jsonl, whose other rows are skipped, or a layers.csv"
    parser.add_argument("results", type=Path, help=about)
    parser.add_argument("figure", type=Path, help="the figure to write, .png or .svg")
    add = parser.add_argument_group("the cell of the bars").add_argument
    add("--model", default="feed-forward", help="model")
    add("--x", default="4096×4096", help="shape of the input")
    settings = "peft and paramlora in their default, or with factors in the model's dtype"
    add("--setting", choices=["default", "one_dtype"], default="one_dtype", help=settings)


def run(options: argparse.Namespace) -> None:
    """Draw the figure."""
    if options.results.suffix == ".csv":
        with open(options.results, encoding="utf-8", newline="") as file:
            cell = [
                r
                for r in csv.DictReader(file)
                if (r["model"], r["x"]) == (options.model, options.x)
            ]
        bars(cell, options.setting, options.figure)
        return
    draw([row for row in read(options.results) if "work" in row], options.figure)


def bars(rows: list[dict[str, str]], setting: str, path: Path) -> None:
    """Draw a cell as four bars: overheads in training and in inference, in per cent."""
    ending = "" if setting == "default" else f"_{setting}"
    works = {"train": "training step", "infer": "inference"}
    figure, axis = plt.subplots(figsize=(6.4, 3.2), layout="constrained")
    for i, name in enumerate(("paramlora", "PEFT")):
        ratios = {row["work"]: float(row[name.lower() + ending]) for row in rows}
        drawn = axis.bar(
            [place + (i - 0.5) * 0.38 for place in range(len(works))],
            [100 * (ratios[work] - 1) for work in works],
            width=0.36,
            color=LOOKS[name][0],
            label=name,
        )
        axis.bar_label(drawn, fmt="%.0f %%", padding=2)
    axis.yaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_xticks(range(len(works)), list(works.values()))
    axis.set_ylabel("more time than the\nfrozen model, %")
    axis.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw(rows: list[Row], path: Path) -> None:
    """Draw time over the floor, less 1, for each contestant and cell."""
    places = {cell: -i for i, cell in enumerate(dict.fromkeys(map(_cell, rows)))}
    figure, axes = plt.subplots(
        1, 2, figsize=(11, 1.6 + 0.24 * len(places)), sharey=True, layout="constrained"
    )
    for axis, work in zip(axes, ("train", "infer"), strict=True):
        for name, (colour, mark) in LOOKS.items():
            own = [row for row in rows if row["contestant"] == name and row["work"] == work]
            axis.scatter(
                [max(row["ratio"] - 1, LEAST) for row in own],
                [places[_cell(row)] for row in own],
                color=colour,
                marker=mark,
                label=name,
                s=34 if name.startswith("paramlora") else 18,
                zorder=3 if name.startswith("paramlora") else 2,
            )
        axis.set_xscale("log")
        axis.set_title({"train": "training step", "infer": "inference"}[work])
        axis.set_xlabel(
            f"overhead: time over the frozen floor, less 1 (log scale; at least {LEAST:g})"
        )
        axis.grid(alpha=0.3)
    axes[0].set_yticks(list(places.values()), list(places))
    figure.legend(*axes[1].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _cell(row: Row) -> str:
    shape = "×".join(map(str, row["shape"]))
    mode = "" if row["mode"] == "eager" else f", {row['mode']}"
    return f"{row['suite']} {shape}, r {row['rank']}{mode}"
