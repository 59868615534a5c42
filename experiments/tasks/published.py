"""The report of the recipe three-types: its rows beside the figures of van de Ven and Tolias."""

from collections.abc import Sequence
from math import sqrt
from pathlib import Path

from scipy.special import stdtrit

from ..digits.data import small_note
from ..harness.rundir import Row, RunDirectory, replace_file
from ..report.figures import Figure, plt, png
from ..report.style import COLOUR, EDGE
from ..report.table import Sample, Table, key_value_table
from .settings import THREE_TYPES_METHODS

METRICS = ("ACC", "LA", "BWT", "forgetting", "WC-ACC", "stability gap")
RUNS = 20  # that each published figure is the mean of
SPREAD = "#eeeeee"
LOOKS = ((COLOUR["full"], "o"), (COLOUR["on"], "s"))  # methods of all weights, of adapters
Figures = dict[str, dict[str, dict[str, tuple[float, float]]]]


def _table(text: str) -> dict[str, dict[str, tuple[float, float]]]:
    """Return mean and standard error by method and scenario from lines of a published table."""
    found = {}
    for line in text.strip().splitlines():
        method, *cells = line.split()
        pairs = [(float(m), float(e)) for m, e in zip(cells[::2], cells[1::2], strict=True)]
        found[method] = dict(zip(("task", "domain", "class"), pairs, strict=True))
    return found


# Accuracy over all contexts at the end in % and its standard error over 20 seeds, for task, domain
# and class. Tables 3 and 4 of arXiv 1809.10635; "joint" is its "offline".
EARLIER: Figures = {
    "split": _table("""
        none   85.15 1.00   57.33 1.66   19.90 0.02
        ewc    85.48 1.20   57.80 1.61   19.90 0.02
        si     99.14 0.11   63.77 1.18   20.04 0.08
        lwf    99.60 0.03   71.02 1.26   24.17 0.51
        joint  99.64 0.03   98.41 0.06   97.93 0.04
    """),
    "permuted": _table("""
        none   81.79 0.48   78.51 0.24   17.26 0.19
        ewc    94.74 0.05   94.31 0.11   25.04 0.50
        si     94.75 0.14   95.33 0.11   29.31 0.62
        lwf    69.84 0.46   72.64 0.52   22.64 0.23
        joint  97.68 0.01   97.59 0.01   97.59 0.02
    """),
}
# Of arXiv 1904.07734, for EWC, whose λ was much larger there than in the earlier paper. The
# settings here have these λ.
LATER: Figures = {"split": _table("ewc 98.64 0.22 63.95 1.90 20.01 0.06"), "permuted": {}}


def rows_of(run: RunDirectory, method: str, scenario: str) -> list[Row]:
    """Return the rows of a method in a scenario, one per seed."""
    return [r for r in run.rows if r["method"] == method and r["scenario"] == scenario]


def methods_in(run: RunDirectory) -> list[str]:
    """Return the methods that have rows in the run."""
    found = {row["method"] for row in run.rows}
    return [method for method in THREE_TYPES_METHODS if method in found]


def scenarios_in(run: RunDirectory) -> list[str]:
    """Return the scenarios that have rows in the run."""
    found = {row["scenario"] for row in run.rows}
    return [name for name in ("task", "domain", "class") if name in found]


def published(run: RunDirectory, method: str, scenario: str) -> tuple[float, float] | None:
    """Return the published mean and standard error, or None if there is no such figure.

    For EWC it is that of the later paper, if it has one.
    """
    if run.environment.get("data") != "MNIST":
        return None
    stream = run.settings["stream"]
    found = LATER[stream].get(method, EARLIER[stream].get(method, {}))
    return found.get(scenario)


def spread(mean: float, error: float, n: int) -> tuple[float, float]:
    """Return the interval in which the mean of n further seeds lies with a probability of 95 %.

    It is Student's, with the standard deviation of the published seeds, `error` · √20.

    >>> [round(end, 1) for end in spread(85.15, 1.0, 1)]
    [75.6, 94.7]
    """
    half = float(stdtrit(RUNS - 1, 0.975)) * error * sqrt(RUNS) * sqrt(1 / n + 1 / RUNS)
    return mean - half, mean + half


def is_within(known: tuple[float, float], ours: Sample) -> bool:
    """Return whether a mean lies in the interval of `spread` for a published mean and error."""
    low, high = spread(*known, len(ours.values))
    return low <= ours.mean <= high


def accuracy_table(run: RunDirectory) -> Table:
    """Return ACC of each method and scenario beside the published figure and its spread."""
    rows = []
    for method in methods_in(run):
        for scenario in scenarios_in(run):
            found = tuple(100 * row["ACC"] for row in rows_of(run, method, scenario))
            if not found:
                continue
            cells = [method, scenario, Sample(found).mean_sd(2), str(len(found))]
            rows.append(cells + _comparison(run, method, scenario, Sample(found)))
    head = ["method", "scenario", "ACC", "n", "published", "95 % of\nmeans of n", "within"]
    return Table(head, rows, left=(0, 1))


def _comparison(run: RunDirectory, method: str, scenario: str, ours: Sample) -> list[str]:
    known = published(run, method, scenario)
    if known is None:
        return ["-"] * 3
    low, high = spread(*known, len(ours.values))
    within = "yes" if is_within(known, ours) else f"{ours.mean - known[0]:+.2f}"
    return [f"{known[0]:.2f} ± {known[1]:.2f}", f"{low:.2f} to {high:.2f}", within]


def metrics_table(run: RunDirectory) -> Table:
    """Return all metrics of each method and scenario, mean ± sd over the seeds, in points."""
    rows = []
    for method in methods_in(run):
        for scenario in scenarios_in(run):
            if found := rows_of(run, method, scenario):
                bands = [Sample(tuple(100 * row[name] for row in found)) for name in METRICS]
                cells = [band.mean_sd(1) for band in bands]
                rows.append([method, scenario, *cells, str(len(found))])
    return Table(["method", "scenario", *METRICS, "n"], rows, left=(0, 1))


def figure(run: RunDirectory) -> Figure:
    """Draw ACC of each method, one panel per scenario, with the spread of the published figures."""
    names = scenarios_in(run)
    counts = {len(rows_of(run, method, name)) for method in methods_in(run) for name in names} - {0}
    made, panels = plt.subplots(
        1, len(names), figsize=(3.2 * len(names), 3.7), layout="constrained", squeeze=False
    )
    for axes, scenario in zip(panels[0], names, strict=True):
        found = [method for method in methods_in(run) if rows_of(run, method, scenario)]
        for place, method in enumerate(found):
            _draw(axes, run, method, scenario, place)
        axes.set_xticks(range(len(found)), found, rotation=60)
        axes.set_xlabel("method")
        axes.set_title(f"{scenario}-incremental")
        axes.margins(y=0.1)
        axes.use_sticky_edges = False  # the lowest points and intervals stay above the axis
    panels[0][0].set_ylabel("ACC, %")
    marks = [plt.Line2D([], [], ls="", color=colour, marker=mark) for colour, mark in LOOKS]
    keys = [*marks, plt.Rectangle((0, 0), 1, 1, facecolor=SPREAD, **EDGE)]
    count = f"n {'=' if len(counts) == 1 else '≤'} {max(counts)}"
    labels = ["all weights", "adapters", f"95 % interval of published figures; {count} here"]
    made.legend(keys, labels, frameon=False, ncols=3, loc="outside upper center")
    return made


def _draw(axes: "plt.Axes", run: RunDirectory, method: str, scenario: str, place: int) -> None:
    values = [100 * row["ACC"] for row in rows_of(run, method, scenario)]
    known = published(run, method, scenario)
    if known is not None:
        low, high = spread(*known, max(1, len(values)))
        axes.bar(place, high - low, bottom=low, width=0.7, color=SPREAD, **EDGE)
    colour, mark = LOOKS[method in THREE_TYPES_METHODS[6:]]
    axes.plot([place] * len(values), values, mark, color=colour, markersize=4)
    if len(values) > 1:
        axes.plot(place, sum(values) / len(values), "_", color="black", markersize=14)


def explanation(run: RunDirectory) -> Sequence[str]:
    """Return the paragraphs that define the columns."""
    return (
        "ACC is the mean accuracy over all contexts after the last one; LA, BWT, forgetting and "
        "WC-ACC are defined, with sources, in `experiments/analysis/task_metrics.py`: forgetting "
        "is that of Chaudhry et al., WC-ACC that of De Lange et al. over all contexts. WC-ACC and "
        "the stability gap count the evaluations during later contexts, on the first 1,000 test "
        "images of each earlier one.",
        "Published: mean ± standard error over 20 seeds of arXiv 1809.10635, tables 3 and 4, and "
        "for EWC on split tasks of arXiv 1904.07734, which has these λ (1809.10635 has 85.48, "
        "57.80 and 19.90 with others). The interval has the mean of n further seeds with a "
        "probability of 95 %, by the published spread. A number in the last column is the "
        "difference of a mean outside of it. Adapters and er have no figure in these papers.",
    )


def write_published_report(folder: Path) -> RunDirectory:
    """Write tasks.md and the figure of a run of the recipe three-types from its rows."""
    run = RunDirectory.read(folder)
    stream = run.settings["stream"]
    replace_file(folder / "published.png", png(figure(run)))
    parts = [
        f"# Three types of incremental learning: {stream} tasks",
        f"{run.environment['data']}; points, mean ± sample sd over n seeds."
        f"{small_note(run.environment['data'])}",
        accuracy_table(run).markdown(),
        metrics_table(run).markdown(),
        *explanation(run),
        "![Accuracy of each method beside the published spread](published.png)",
        "## Settings",
        key_value_table(run.settings).markdown(),
    ]
    replace_file(folder / "tasks.md", ("\n\n".join(parts) + "\n").encode())
    return run
