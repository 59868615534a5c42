"""`python -m benchmarks.figure RESULTS.jsonl FIGURE.png`: the overheads of a benchmark's rows."""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

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
# Below this a difference from the floor is noise; the axis ends there.
LEAST = 0.01


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw time over the floor, less 1, for each contestant: a line a cell, a panel each work."""
    cells: dict[str, None] = {}
    for row in rows:
        cells.setdefault(_cell(row))
    places = {cell: -i for i, cell in enumerate(cells)}
    figure, axes = plt.subplots(
        1, 2, figsize=(11, 1.6 + 0.24 * len(cells)), sharey=True, layout="constrained"
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


def _cell(row: dict[str, Any]) -> str:
    shape = "×".join(map(str, row["shape"]))
    mode = "" if row["mode"] == "eager" else f", {row['mode']}"
    return f"{row['suite']} {shape}, r {row['rank']}{mode}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.figure", description=__doc__)
    parser.add_argument("results", type=Path, help="a results.jsonl")
    parser.add_argument("figure", type=Path, help="the figure to write, .png or .svg")
    options = parser.parse_args()
    rows = [json.loads(line) for line in options.results.read_text().splitlines()]
    draw([row for row in rows if "work" in row], options.figure)


if __name__ == "__main__":
    main()
