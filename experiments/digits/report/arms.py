"""LoRA beside full fine-tuning and joint training, from a run's rows: the table and its legend."""

from ...harness.rundir import Row, RunDirectory
from ...report.table import Sample, Table, percent
from .tables import BY_DIGIT, LABEL, methods_in, rows_of

ARMS = "LoRA, full fine-tuning and joint training"
GROUPS = {"all": "accuracy", "tuned": "tuned_accuracy", "other": "other_accuracy"}


def has_arms(run: RunDirectory) -> bool:
    """Return whether the run has full fine-tuning or joint training."""
    return any(method not in BY_DIGIT for method in methods_in(run))


def arms_legend(run: RunDirectory) -> list[str]:
    """Return an explanation of the table of LoRA, full fine-tuning and joint training."""
    return [
        "full: all weights and biases are trained on the tuned digits, on the images of `on`",
        "joint: the same steps on images of all digits, which were also those of pre-training",
        "rate: the learning rate of Adam, which no result here was used to choose. It moves both "
        "learning and forgetting, so one rate for each method does not show which method "
        "forgets less. `sweep --preset front-relu` compares them at equal learning.",
        "− on: paired by adapter seed. The interval is that of the mean over the adapter seeds of "
        "this one base; it does not cover other bases.",
    ]


def arm_table(run: RunDirectory) -> Table:
    """Return each method's accuracies and its paired differences from LoRA.

    The differences are in points, with 95 % intervals of their mean over the adapter seeds.
    """
    below = {row["seed"]: row for row in rows_of(run, "lora")}
    head = ["method", "trained", "rate", *(f"{group}, %" for group in GROUPS)]
    head += [f"{group} − on\n(95 % interval)" for group in GROUPS]
    table = []
    for method in (m for m in methods_in(run) if m == "lora" or m not in BY_DIGIT):
        rows = rows_of(run, method)
        rate = rows[0].get("rate", run.settings["lr"])
        cells = [LABEL[method], f"{rows[0]['trainable']:,}", f"{rate:g}"]
        for key in GROUPS.values():
            cells.append(percent(tuple(row[key] for row in rows)))
        for key in GROUPS.values():
            cells.append("" if method == "lora" else _apart(rows, below, key))
        table.append([*cells, str(len(rows))])
    return Table([*head, "n"], table)


def _apart(rows: list[Row], below: dict[int, Row], key: str) -> str:
    """Return the mean of the differences paired by adapter seed, in points, and its interval."""
    sample = Sample(
        tuple(100 * (r[key] - below[r["seed"]][key]) for r in rows if r["seed"] in below)
    )
    return f"{sample.mean:+.1f} ({sample.interval(1)})" if sample.values else "-"
