"""The report of the kinds of adapters on texts, from its rows alone.

A seed is one observation: it sets the new head, the start of the adapter and the order of texts.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from scipy.stats import ttest_1samp

from ..analysis.front import level
from ..harness.rundir import Row, RunDirectory, replace_file
from ..report.figures import Figure, plt, png
from ..report.style import COLOUR
from ..report.table import Sample, Table, holm, key_value_table
from .front_report import KEPT, by_rate
from .kinds import ARMS, FULL, SELECTION, TEST, best_rate, rows_of

REFERENCE = "lora"
# As KEPT: by name in the rows, the name in tables, its factor, and the digits shown.
MEASURES = {"accuracy": ("test, %", 100, 2), **KEPT}
DRAWN = ("accuracy", "kept_agreement")
Differences = dict[str, tuple[Sample, float]]  # of each kind, with its p
_VALIDATED = {"validation_accuracy": ("validation, %", 100, 2), **MEASURES}


def is_kinds(folder: Path) -> bool:
    """Return whether the run in a folder compares kinds of adapters."""
    return bool(RunDirectory.read(folder).environment.get("kinds"))


def selected(run: RunDirectory) -> list[str]:
    """Return the kinds with rows in the selection."""
    return [kind for kind in ARMS if rows_of(run.rows, SELECTION, kind)]


def measured(run: RunDirectory) -> dict[str, dict[int, Row]]:
    """Return the row of each seed at the chosen rate, for each kind that has any."""
    found = {}
    for kind in selected(run):
        rows, chosen = rows_of(run.rows, TEST, kind), best_rate(run.rows, kind)
        found[kind] = {row["seed"]: row for row in rows if row["rate"] == chosen}
    return {kind: rows for kind, rows in found.items() if rows}


def rate_table(run: RunDirectory) -> Table:
    """Return a line per kind and rate of the selection, with the choice and where it lies."""
    head = ["kind", "rate", "chosen", *(name for name, _, _ in _VALIDATED.values())]
    lines = []
    for kind in selected(run):
        groups, chosen = by_rate(rows_of(run.rows, SELECTION, kind)), best_rate(run.rows, kind)
        edge = chosen in (min(groups), max(groups))
        for rate, rows in groups.items():
            said = ("at the edge" if edge else "yes") if rate == chosen else ""
            cells = [
                _sample(rows, key, factor).mean_sd(n) for key, (_, factor, n) in _VALIDATED.items()
            ]
            lines.append([kind, f"{rate:g}", said, *cells])
    return Table(head, lines, (0, 2))


def _sample(rows: Sequence[Row], key: str, factor: float) -> Sample:
    return Sample(tuple(factor * row[key] for row in rows))


def chosen_table(run: RunDirectory) -> Table:
    """Return a line per kind at its chosen rate: what it learned and kept."""
    head = ["kind", "trained", "rate", *(name for name, _, _ in MEASURES.values()), "n"]
    lines = []
    for kind, by_seed in measured(run).items():
        rows = list(by_seed.values())
        cells = [_sample(rows, key, f).mean_sd(digits) for key, (_, f, digits) in MEASURES.items()]
        size = [f"{rows[0]['trainable']:,}", f"{rows[0]['rate']:g}"]
        lines.append([kind, *size, *cells, str(len(rows))])
    return Table(head, lines)


def _corrected(samples: Mapping[str, Sample]) -> Differences:
    """Return samples with the p of the paired t-test, corrected by Holm's method over the kinds."""
    p = holm([float(ttest_1samp(sample.values, 0).pvalue) for sample in samples.values()])
    return dict(zip(samples, zip(samples.values(), p, strict=True), strict=True))


def differences(run: RunDirectory, key: str) -> Differences:
    """Return each kind's difference from LoRA, paired by seed, and its p corrected by Holm."""
    rows, samples = measured(run), dict[str, Sample]()
    theirs = rows.get(REFERENCE, {})
    for kind, ours in rows.items():
        pairs = [(row, theirs[seed]) for seed, row in ours.items() if seed in theirs]
        if kind != REFERENCE and len(pairs) > 1:
            samples[kind] = Sample(tuple(MEASURES[key][1] * (a[key] - b[key]) for a, b in pairs))
    return _corrected(samples)


def at_equal_accuracy(run: RunDirectory, front: RunDirectory, arm: str, key: str) -> Differences:
    """Return what each kind keeps less an arm of a front with the same accuracy and seed.

    A seed with another accuracy than those between the arm's rates does not count, nor do kinds
    with fewer than two such seeds.
    """
    factor, found = KEPT[key][1], dict[str, list[float]]()
    ascending = sorted(front.rows, key=lambda row: row["rate"])
    for kind, by_seed in measured(run).items():
        for seed, row in by_seed.items():
            rows = [r for r in ascending if (r["method"], r["seed"]) == (arm, seed)]
            points = [(r["accuracy"], r[key]) for r in rows]
            other = level(points, row["accuracy"]) if points and kind != REFERENCE else None
            found.setdefault(kind, []).extend(
                () if other is None else (factor * (row[key] - other),)
            )
    return _corrected({kind: Sample(tuple(v)) for kind, v in found.items() if len(v) > 1})


def difference_table(run: RunDirectory) -> Table:
    """Return each kind's differences from LoRA with 95 % intervals; a star: p < 0.05 by Holm."""
    return _starred(REFERENCE, {key: differences(run, key) for key in MEASURES})


def equal_table(run: RunDirectory, front: RunDirectory, arm: str) -> Table:
    """Return each kind's differences from an arm of a front at equal accuracy, in the same way."""
    return _starred(arm, {key: at_equal_accuracy(run, front, arm, key) for key in KEPT})


def _starred(reference: str, found: Mapping[str, Differences]) -> Table:
    head = [f"kind − {reference}", *(MEASURES[key][0] for key in found), "n"]
    lines = []
    for kind, (sample, _) in next(iter(found.values())).items():
        cells = []
        for key, of_kinds in found.items():
            (one, p), digits = of_kinds[kind], MEASURES[key][2]
            cells.append(f"{one.mean:+.{digits}f} ({one.interval(digits)})" + "*" * (p < 0.05))
        lines.append([kind, *cells, str(len(sample.values))])
    return Table(head, lines)


def beyond_noise(run: RunDirectory) -> str:
    """Return a sentence per measure about the differences from LoRA that exceed the noise."""
    said = []
    for key, (name, _, digits) in MEASURES.items():
        found = {k: s.mean for k, (s, p) in differences(run, key).items() if p < 0.05}
        kinds = ", ".join(f"{kind} {mean:+.{digits}f}" for kind, mean in found.items())
        said.append(f"- {name}: {kinds or 'none'}")
    return "\n".join(said)


def kinds_figure(run: RunDirectory) -> Figure:
    """Draw what each kind kept against what it learned, at its chosen rate; bars are sds."""
    figure, axis = plt.subplots(figsize=(5.6, 3.8), layout="constrained")
    for number, (kind, by_seed) in enumerate(measured(run).items()):
        x, y = (_sample(list(by_seed.values()), key, MEASURES[key][1]) for key in DRAWN)
        colour = COLOUR[{REFERENCE: "on", FULL: "full"}.get(kind, "off")]
        marker = {REFERENCE: "s", FULL: "D"}.get(kind, "o")
        axis.errorbar(x.mean, y.mean, y.sd, x.sd, marker=marker, color=colour, capsize=2)
        offset = (5, 5 if number % 2 else -12)  # neighbours' names on both sides of their bars
        axis.annotate(kind, (x.mean, y.mean), offset, textcoords="offset points", fontsize=9)
    axis.set(xlabel="accuracy on the task, test texts, %", ylabel="kept: agreement")
    axis.set_title(f"each kind at its chosen rate; mean ± sd of {run.settings['seeds']} seeds")
    return figure


def write_kinds(folder: Path) -> RunDirectory:
    """Write kinds.md of the run in `folder` from its rows, and kinds.png; return the run."""
    run = RunDirectory.read(folder)
    replace_file(folder / "kinds.png", png(kinds_figure(run)))
    env, settings = run.environment, run.settings
    parts = [
        "# Kinds of adapters on texts",
        f"{settings['model']} on {env['data']}, {env['train_texts']:,} training, "
        f"{env['validation_texts']:,} validation and {env['test_texts']:,} test texts of "
        f"{settings['max_length']} tokens at most; kept: {settings['retention']}. "
        "Mean ± sample sd over n seeds.",
        "## At the chosen rate",
        chosen_table(run).markdown(),
        f"Less {REFERENCE}, paired by seed, with 95 % intervals. A star: p < 0.05 by the paired "
        "t-test, corrected by Holm's method over the kinds of a column.",
        difference_table(run).markdown(),
        "![What is kept against what is learned](kinds.png)",
        "## Differences beyond the noise",
        beyond_noise(run),
        "## The learning rate",
        rate_table(run).markdown(),
        f"Chosen by the accuracy on the validation texts, with {settings['selection_seeds']} "
        "seed(s) that follow those of the tables above.",
        "## Settings",
        key_value_table(settings).markdown(),
    ]
    replace_file(folder / "kinds.md", ("\n\n".join(parts) + "\n").encode())
    return run
