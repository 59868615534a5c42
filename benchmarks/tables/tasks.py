"""The tables of sequences of tasks, from the runs docs/data/tasks-*."""

from collections.abc import Callable

from experiments.harness.rundir import RunDirectory
from experiments.report.table import Sample, Table
from experiments.tasks import published
from experiments.tasks.report import differences, methods_in, units_of

from .registry import grouped, json_rows, kept_run, minus, table

RUNS = {
    "split": "tasks-split",
    "split, task given": "tasks-split-given",
    "rotated": "tasks-rotated",
    "permuted": "tasks-permuted",
}


@table("tasks")
def accuracies() -> Table:
    """Return the accuracy at the end and the forgetting of each method, one column per stream."""
    runs = [kept_run(name) for name in RUNS.values()]
    lines = [[method, *(_cell(run, method) for run in runs)] for method in methods_in(runs[0])]
    return Table(["method", *RUNS], lines)


def _cell(run: RunDirectory, method: str) -> str:
    """Return "ACC ± sd (forgetting)", in %, over the bases."""
    rows = [row for unit in units_of(run, method).values() for row in unit]
    accuracy = Sample(tuple(100 * row["ACC"] for row in rows))
    forgetting = Sample(tuple(100 * row["forgetting"] for row in rows))
    return f"{accuracy.mean_sd(1)} ({minus(f'{forgetting.mean:.1f}')})"


@table("tasks-differences")
def compared() -> Table:
    """Return LoRA less full fine-tuning, one after the other and jointly, paired by base."""
    lines = []
    for stream, name in RUNS.items():
        run = kept_run(name)
        for ours, theirs in (("one", "full"), ("joint-lora", "joint")):
            found = differences(run, theirs)
            cells = next(row[1:] for row in found.rows if row[0] == ours)
            lines.append([stream, f"{ours} − {theirs}", *map(minus, cells)])
    return Table(["tasks", "difference", *found.head[1:]], lines, (0, 1))


@table("tasks-rates")
def rates() -> Table:
    """Return what one adapter and all weights learn and forget at several rates, rotated digits."""
    groups = grouped(json_rows("tasks-rates"), "method", "rate")
    lines = []
    for (method, rate), rows in sorted(groups.items(), reverse=True):
        cells = [Sample(tuple(100 * row[key] for row in rows)) for key in ("LA", "forgetting")]
        lines.append([method, f"{rate:g}", *(cell.mean_sd(1) for cell in cells), str(len(rows))])
    return Table(["method", "rate", "learned (LA)", "forgotten", "n"], lines)


@table("three-types")
def three_types() -> Table:
    """Return ACC of each method and scenario of Split MNIST, with the published figure."""
    return _by_scenario("tasks-split-mnist", _beside_published)


@table("three-types-kept")
def three_types_kept() -> Table:
    """Return forgetting and WC-ACC of each method and scenario of Split MNIST."""
    return _by_scenario("tasks-split-mnist", _forgetting_and_worst)


@table("three-types-units")
def three_types_units() -> Table:
    """Return class-incremental ACC with all units and with those so far, with the published one."""
    runs = [kept_run(name) for name in ("tasks-split-mnist", "tasks-split-mnist-so-far")]
    lines = [
        [method, *(_beside_published(run, method, "class") for run in runs)]
        for method in published.methods_in(runs[1])
    ]
    return Table(["method", "all units", "units of the contexts so far"], lines)


@table("three-types-permuted")
def three_types_permuted() -> Table:
    """Return ACC of each method and scenario of Permuted MNIST, with the published figure."""
    return _by_scenario("tasks-permuted-mnist", _beside_published)


@table("three-types-permuted-kept")
def three_types_permuted_kept() -> Table:
    """Return forgetting and WC-ACC of each method and scenario of Permuted MNIST."""
    return _by_scenario("tasks-permuted-mnist", _forgetting_and_worst)


@table("three-types-permuted-first")
def three_types_permuted_first() -> Table:
    """Return ACC with the units and LwF's weight of the authors' first code, Permuted MNIST."""
    return _by_scenario("tasks-permuted-mnist-first", _beside_published)


@table("three-types-permuted-weights")
def three_types_permuted_weights() -> Table:
    """Return class-incremental ACC with other weights of the penalty, units so far, one seed."""
    run, lines = kept_run("tasks-permuted-mnist-first"), []
    for row in json_rows("tasks-permuted-mnist-weights"):
        method, accuracy = row["method"], Sample((100 * row["ACC"],))
        cells = [_with_published(run, method, "class", accuracy)]
        cells += [f"{100 * row[name]:.1f}" for name in ("LA", "forgetting")]
        lines.append([method, f"{row['weight']:g}", *cells])
    return Table(["method", "λ or c", "ACC (published)", "learned (LA)", "forgetting"], lines)


@table("three-types-permuted-adapters")
def three_types_permuted_adapters() -> Table:
    """Return adapters on Permuted MNIST at two learning rates, and with and without a penalty."""
    groups = grouped(
        json_rows("tasks-permuted-mnist-adapters"), "method", "scenario", "rate", "penalty"
    )
    lines = []
    for (method, scenario, rate, penalty), rows in groups.items():
        settings = [method, scenario, f"{rate:g}", "" if penalty is None else f"{penalty:g}"]
        names = ("ACC", "LA", "forgetting")
        cells = [Sample(tuple(100 * row[name] for row in rows)).mean_sd(1) for name in names]
        lines.append([*settings, *cells, str(len(rows))])
    head = ["method", "scenario", "rate", "penalty", "ACC", "learned (LA)", "forgetting", "n"]
    return Table(head, lines, (0, 1))


def _by_scenario(kept: str, cell: Callable[[RunDirectory, str, str], str]) -> Table:
    run, scenarios = kept_run(kept), ("task", "domain", "class")
    lines = []
    for method in published.methods_in(run):
        counts = {len(published.rows_of(run, method, name)) for name in scenarios} - {0}
        cells = [cell(run, method, name) for name in scenarios]
        lines.append([method, *cells, " to ".join(map(str, sorted(counts)))])
    return Table(["method", *(f"{name}-incremental" for name in scenarios), "n"], lines)


def _beside_published(run: RunDirectory, method: str, scenario: str) -> str:
    found = tuple(100 * row["ACC"] for row in published.rows_of(run, method, scenario))
    return _with_published(run, method, scenario, Sample(found)) if found else ""


def _with_published(run: RunDirectory, method: str, scenario: str, found: Sample) -> str:
    """Return "ACC (published mean ± standard error)", with an asterisk outside of their spread."""
    known = published.published(run, method, scenario)
    if known is None:
        return found.mean_sd(2)
    mark = "" if published.is_within(known, found) else "*"
    return f"{found.mean_sd(2)}{mark} ({known[0]:.2f} ± {known[1]:.2f})"


def _forgetting_and_worst(run: RunDirectory, method: str, scenario: str) -> str:
    rows = published.rows_of(run, method, scenario)
    names = ("forgetting", "WC-ACC")
    means = [Sample(tuple(100 * row[name] for row in rows)).mean for name in names if rows]
    return " / ".join(minus(f"{mean:.1f}") for mean in means)
