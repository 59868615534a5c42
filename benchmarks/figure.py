"""Draw the overheads in a results.jsonl of `layers`, by cell, in training and in inference."""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from .harness.results import Row, read

COLOURS = {
    "paramlora": "#d62728",
    "paramlora, one dtype": "#ff9896",
    "paramlora, merged": "#8c564b",
    "paramlora, off": "#e377c2",
    "PEFT": "#1f77b4",
    "PEFT, one dtype": "#aec7e8",
    "loralib": "#2ca02c",
    "LyCORIS": "#9467bd",
    "naive": "#7f7f7f",
}
# The axis ends here: smaller differences from the floor are noise.
LEAST = 0.01
EXAMPLES = """\
examples:
  python -m benchmarks figure runs/benchmarks/results.jsonl overheads.png
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this subcommand."""
    parser.add_argument("results", type=Path, help="a results.jsonl; rows of others are skipped")
    parser.add_argument("figure", type=Path, help="the figure to write, .png or .svg")


def run(options: argparse.Namespace) -> None:
    """Draw the figure."""
    draw([row for row in read(options.results) if "work" in row], options.figure)


def draw(rows: list[Row], path: Path) -> None:
    """Draw time over the floor, less 1, for each contestant and cell."""
    places = {cell: -i for i, cell in enumerate(dict.fromkeys(map(_cell, rows)))}
    figure, axes = plt.subplots(
        1, 2, figsize=(11, 1.6 + 0.24 * len(places)), sharey=True, layout="constrained"
    )
    for axis, work in zip(axes, ("train", "infer"), strict=True):
        for name, colour in COLOURS.items():
            own = [row for row in rows if row["contestant"] == name and row["work"] == work]
            axis.scatter(
                [max(row["ratio"] - 1, LEAST) for row in own],
                [places[_cell(row)] for row in own],
                color=colour,
                label=name,
                s=34 if name.startswith("paramlora") else 18,
                zorder=3 if name.startswith("paramlora") else 2,
            )
        axis.set_xscale("log")
        axis.set_title({"train": "training step", "infer": "inference"}[work])
        axis.set_xlabel("overhead: time over the frozen floor, less 1 (log scale)")
        axis.grid(alpha=0.3)
    axes[0].set_yticks(list(places.values()), list(places))
    figure.legend(*axes[1].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _cell(row: Row) -> str:
    shape = "×".join(map(str, row["shape"]))
    mode = "" if row["mode"] == "eager" else f", {row['mode']}"
    return f"{row['suite']} {shape}, r {row['rank']}{mode}"
