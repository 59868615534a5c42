"""The tables of the text study."""

from collections.abc import Sequence
from itertools import combinations

from scipy.stats import spearmanr

from experiments.analysis.intruders import predictors
from experiments.harness.rundir import Row
from experiments.report.table import Sample, Table
from experiments.text import kinds_report
from experiments.text.front_report import (
    KEPT,
    arms_in,
    by_rate,
    chosen_table,
    difference_table,
    front_table,
    spectra_table,
)
from experiments.text.report import percent2, tuned_rows

from .registry import aligned, csv_rows, grouped, kept_run, table, with_minus

PREDICTORS = predictors((0.5, 0.7))
# Those of the tables of counts, and the digits shown: the right vectors give the same counts.
COUNTED = dict(zip([name for name in PREDICTORS if "right" not in name], (3, 1, 1), strict=True))


@table("text-imdb-summary")
def imdb_summary() -> Table:
    """Return the main methods on IMDb, for the study's README."""
    names = {
        "full": "full",
        "last-layers": "last two layers",
        "lora, query and value, r 8": "LoRA, query and value, rank 8",
        "lora, all linear, r 8": "LoRA, all linear layers, rank 8",
    }
    rows = {row["method"]: row for row in csv_rows("text-imdb")}
    head = ["method", "trained", "share", "test, %"]
    keys = ("trained parameters", "share", "test, %")
    return aligned(head, [[name, *(rows[key][k] for k in keys)] for key, name in names.items()])


@table("text-front")
def front_rates() -> Table:
    """Return the accuracy and the retention of the messages, by arm and rate."""
    return front_table(kept_run("text-front"))


@table("text-front-best")
def front_best() -> Table:
    """Return each arm at its best rate on the held-out reviews, paired with full fine-tuning."""
    return with_minus(chosen_table(kept_run("text-front")))


@table("text-front-differences")
def front_differences() -> Table:
    """Return what LoRA keeps less full fine-tuning at equal accuracy."""
    return with_minus(difference_table(kept_run("text-front")))


@table("text-mpnet")
def mpnet_rates() -> Table:
    """Return the accuracy and the retention of the messages with MPNet, by arm and rate."""
    return front_table(kept_run("text-front-mpnet"))


@table("text-mpnet-best")
def mpnet_best() -> Table:
    """Return each arm with MPNet at its best rate on the held-out reviews."""
    return with_minus(chosen_table(kept_run("text-front-mpnet")))


@table("text-mpnet-differences")
def mpnet_differences() -> Table:
    """Return what LoRA keeps less full fine-tuning at equal accuracy, with MPNet."""
    return with_minus(difference_table(kept_run("text-front-mpnet")))


@table("text-mpnet-methods")
def mpnet_methods() -> Table:
    """Return the methods with MPNet at the published settings' equivalents, over the seeds."""
    lines = []
    for (method,), rows in grouped(tuned_rows(kept_run("text-mpnet")), "method").items():
        first = rows[0]
        numbers = [
            f"{first['trainable']:,}",
            f"{100 * first['trainable'] / first['parameters']:.2f} %",
        ]
        shares = [
            percent2([row[key] for row in rows]) for key in ("validation_accuracy", "accuracy")
        ]
        gigabytes = f"{max(row['peak_bytes'] for row in rows) / 1e9:.1f}"
        lines.append([method, *numbers, *shares, gigabytes, str(len(rows))])
    head = ["method", "trained parameters", "share", "held out, %", "test, %", "peak GB", "n"]
    return Table(head, lines)


@table("text-mpnet-methods-differences")
def mpnet_methods_differences() -> Table:
    """Return the differences between the methods with MPNet, paired by seed, in points."""
    groups = grouped(tuned_rows(kept_run("text-mpnet")), "method").items()
    accuracy = {name: {r["seed"]: 100 * r["accuracy"] for r in rows} for (name,), rows in groups}
    lines = []
    for one, other in combinations(reversed(accuracy), 2):
        ours, theirs = accuracy[one], accuracy[other]
        found = Sample(tuple(ours[seed] - theirs[seed] for seed in ours))
        lines.append([f"{one} − {other}", f"{found.mean:+.2f}", found.interval(2), str(len(ours))])
    return with_minus(Table(["difference", "points", "95 % interval", "n"], lines))


@table("text-kinds")
def kinds() -> Table:
    """Return what each kind of adapter learned and kept at its chosen rate."""
    return kinds_report.chosen_table(kept_run("text-kinds"))


@table("text-kinds-differences")
def kinds_differences() -> Table:
    """Return each kind's differences from LoRA, paired by seed."""
    return with_minus(kinds_report.difference_table(kept_run("text-kinds")))


@table("text-kinds-rates")
def kinds_rates() -> Table:
    """Return the selection of the rates on the validation texts."""
    return with_minus(kinds_report.rate_table(kept_run("text-kinds")))


@table("text-kinds-front")
def kinds_front() -> Table:
    """Return what each kind keeps less LoRA of rank 8 at equal accuracy, paired by seed."""
    front = kept_run("text-front")  # seeds 0 to 2
    front.rows.extend(kept_run("text-front-head").rows)  # seeds 3 and 4
    return with_minus(kinds_report.equal_table(kept_run("text-kinds"), front, "lora+head r 8"))


@table("text-kinds-intruders")
def kinds_intruders() -> Table:
    """Return the intruder dimensions, the size of the update and what is kept, by kind."""
    kinds = kinds_report.measured(kept_run("text-kinds"))
    lines = [[kind, *_counted(list(by_seed.values()))] for kind, by_seed in kinds.items()]
    return Table(["kind", *COUNTED, "agreement", "n"], lines)


@table("text-intruders-rates")
def intruders_rates() -> Table:
    """Return the same for LoRA and full fine-tuning at several rates."""
    lines = [
        [arm, f"{rate:g}", *_counted(these)]
        for arm, rows in arms_in(kept_run("text-intruders")).items()
        for rate, these in by_rate(rows).items()
    ]
    return Table(["arm", "rate", *COUNTED, "agreement", "n"], lines)


def _counted(rows: Sequence[Row]) -> list[str]:
    """Return cells with the means of the predictors in COUNTED, the agreement, and n."""
    cells = [
        Sample(tuple(float(PREDICTORS[name](row)) for row in rows)).mean_sd(digits)
        for name, digits in COUNTED.items()
    ]
    kept = Sample(tuple(row["kept_agreement"] for row in rows)).mean_sd(3)
    return [*cells, kept, str(len(rows))]


@table("text-intruders")
def intruders() -> Table:
    """Return the rank correlations with the agreement, over both arms, each, and the kinds."""
    run = kept_run("text-intruders")
    arms = {"both": ("full", "lora"), "LoRA r 8": ("lora",), "full": ("full",)}
    found = [spectra_table(run, prefixes) for prefixes in arms.values()]
    place = found[0].head.index(KEPT["kept_agreement"][0])
    lines = [
        [rows[0][0], *(row[place] for row in rows), _across_kinds(rows[0][0])]
        for rows in zip(*(one.rows for one in found), strict=True)
    ]
    return with_minus(Table(["predictor", *arms, "kinds"], lines))


def _across_kinds(name: str) -> str:
    """Return a predictor's rank correlation with the agreement over the kinds of a seed."""
    kinds = kinds_report.measured(kept_run("text-kinds")).values()
    pairs = [
        [(PREDICTORS[name](rows[seed]), rows[seed]["kept_agreement"]) for rows in kinds]
        for seed in next(iter(kinds))
    ]
    found = Sample(tuple(float(spearmanr(one).statistic) for one in pairs))
    return f"{found.mean:+.2f} ({found.interval(2)})"


@table("text-intruders-measures")
def intruders_measures() -> Table:
    """Return the rank correlations with all measures, over both arms."""
    return with_minus(spectra_table(kept_run("text-intruders")))


@table("text-pooling")
def pooling() -> Table:
    """Return the last two layers with the checkpoint's pooler and with the mean over the tokens."""
    lines = []
    for (name, rate), rows in grouped(csv_rows("text-pooling"), "pooling", "last_lr").items():
        cells = [
            percent2([float(row[key]) for row in rows])
            for key in ("validation_accuracy", "accuracy")
        ]
        lines.append([name, rate, *cells, str(len(rows))])
    return Table(["pooling", "rate", "held out, %", "test, %", "n"], lines)
