"""The tables of the digit study's report, computed from a run's rows."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ...analysis.confusion import accuracy, change, old_and_new
from ...harness.rundir import Row, RunDirectory
from ...harness.settings import flattened, result_settings
from ...report.table import Sample, Table, percent
from ..settings import preset

# By method: the stage of its rows with the fine-tuned weights active, and its name in tables.
STAGE = {"lora": "on", "wrapped": "wrapped", "scrambled": "on", "full": "full", "joint": "joint"}
LABEL = {method: method for method in ("base", *STAGE)} | {"lora": "on"}


@dataclass(frozen=True)
class Published:
    """Published figures of one method on MNIST: wrong answers to the test images, by digit.

    `train_loss` is the mean over all steps, in nats, or None if it was not published.
    """

    wrong_counts: tuple[int, ...]
    train_loss: float | None = None


# Published figures to compare with, by preset and method. This project measured none of them.
# "base" is the network before fine-tuning.
#
# "blog": a blog post of 2024-04-17 on low-rank adapters by parametrization. Its "method 1" is
# `scrambled` here, its "method 2" is `wrapped`. "nine": the script that the blog post starts from,
# hkproj/pytorch-lora, run on a GPU.
#
# Each was measured with one adapter seed, and its A came from another random generator. So only
# the base can agree exactly. A fine-tuned figure can lie within our range over seeds.
PUBLISHED: dict[str, dict[str, Published]] = {
    "blog": {
        "base": Published((33, 12, 147, 115, 69, 196, 98, 91, 185, 148), 0.72),
        "scrambled": Published((543, 484, 79, 101, 609, 98, 348, 765, 103, 44), 0.329),
        "wrapped": Published((88, 503, 97, 101, 361, 119, 120, 651, 103, 55), 0.413),
    },
    "nine": {
        "base": Published((33, 28, 42, 95, 19, 10, 61, 52, 19, 107)),
        "lora": Published((53, 32, 60, 201, 186, 85, 69, 677, 193, 11)),
    },
}


def rows_of(run: RunDirectory, method: str, stage: str | None = None) -> list[Row]:
    """Return a method's rows of a stage (default: the stage with the fine-tuned weights active)."""
    wanted = "base" if method == "base" else stage or STAGE[method]
    return [row for row in run.rows if row["method"] == method and row["stage"] == wanted]


def methods_in(run: RunDirectory) -> list[str]:
    """Return the methods that the run has fine-tuned, in the order of the tables."""
    return [method for method in STAGE if rows_of(run, method)]


def base_of(run: RunDirectory) -> Row:
    """Return the row of the base model."""
    return rows_of(run, "base")[0]


def published_for(run: RunDirectory) -> dict[str, Published]:
    """Return the published figures that this run can be compared with, by method.

    The result is empty if the data are not MNIST or a setting differs from the preset's.
    """
    usual = flattened(result_settings(preset(run.settings["preset"])))
    free = ("seeds", "seed_from", "compat", "data", "device", "threads")
    changed = any(run.settings[key] != usual[key] for key in usual if key not in free)
    if changed or run.environment["data"] != "MNIST":
        return {}
    return PUBLISHED.get(run.settings["preset"], {})


def images_of(run: RunDirectory) -> list[int]:
    """Return the number of test images of each digit."""
    return [sum(counts) for counts in base_of(run)["confusion"]]


def confusion_with(wrong: Sequence[int], images: Sequence[int]) -> list[list[int]]:
    """Return a confusion matrix with these numbers of wrong answers and images, by digit.

    Only the counts of wrong answers are published. Each digit's wrong answers are put into one
    arbitrary column, which no accuracy depends on.
    """
    rows = [[0] * len(images) for _ in images]
    for digit, (count, total) in enumerate(zip(wrong, images, strict=True)):
        rows[digit][digit], rows[digit][digit - 1] = total - count, count
    return rows


def digit_table(run: RunDirectory) -> Table:
    """Return wrong answers by digit and accuracies, one column per stage, then published ones."""
    tuned, images = base_of(run)["tuned"], images_of(run)
    columns = [("base", rows_of(run, "base")), ("off", rows_of(run, "lora", "off"))]
    columns += [(LABEL[method], rows_of(run, method)) for method in methods_in(run)]
    published = published_for(run)
    published = {m: published[m] for m in ("base", *methods_in(run)) if m in published}
    head = ["digit", "images", *(label for label, _ in columns)]
    head += [f"published\n{LABEL[method]}" for method in published]
    table = []
    for digit in range(10):
        cells = [f"{digit}{' tuned' if digit in tuned else ''}", f"{images[digit]:,}"]
        for _, rows in columns:
            cells.append(Sample(tuple(row["wrong_counts"][digit] for row in rows)).mean_sd(0))
        table.append(cells + [str(p.wrong_counts[digit]) for p in published.values()])
    matrices = [confusion_with(p.wrong_counts, images) for p in published.values()]
    for group in ("all", "tuned", "other"):
        key = "accuracy" if group == "all" else f"{group}_accuracy"
        chosen = [d for d in range(10) if group == "all" or (d in tuned) == (group == "tuned")]
        cells = [f"{group} %", f"{sum(images[d] for d in chosen):,}"]
        cells += [percent(tuple(row[key] for row in rows)) for _, rows in columns]
        table.append(cells + [f"{100 * accuracy(matrix, chosen):.2f}" for matrix in matrices])
    return Table(head, table)


@dataclass(frozen=True)
class Quantity:
    """A figure that is compared over seeds: its name with its unit, and its value in a source."""

    name: str
    digits: int
    of_row: Callable[[Row], float]
    of_published: Callable[[Published], float | None]


def quantities(run: RunDirectory) -> list[Quantity]:
    """Return the quantities that the table over seeds has for each method."""
    base, images, tuned = base_of(run), images_of(run), base_of(run)["tuned"]

    def of_confusion(name: str, value: Callable[[Any], float]) -> Quantity:
        return Quantity(
            name,
            2,
            lambda row: value(row["confusion"]),
            lambda published: value(confusion_with(published.wrong_counts, images)),
        )

    return [
        of_confusion("all digits, %", lambda c: 100 * accuracy(c)),
        of_confusion("tuned digits, %", lambda c: 100 * old_and_new(c, tuned)[1]),
        of_confusion("other digits, %", lambda c: 100 * old_and_new(c, tuned)[0]),
        of_confusion(
            "learned, points", lambda c: 100 * change(base["confusion"], c, tuned).learned
        ),
        of_confusion(
            "forgotten, points", lambda c: 100 * change(base["confusion"], c, tuned).forgotten
        ),
        Quantity("training loss, nats", 3, lambda row: row["train_loss"], lambda p: p.train_loss),
    ]


def seed_table(run: RunDirectory) -> Table:
    """Return each method's quantities over the adapter seeds, next to the published ones."""
    published = published_for(run)
    head = ["method", "quantity", "mean ± sd", "95 % interval\nof one run", "n"]
    head += ["published", "inside"] if published else []
    table = []
    for method in methods_in(run):
        rows = rows_of(run, method)
        for quantity in quantities(run):
            sample, digits = Sample(tuple(map(quantity.of_row, rows))), quantity.digits
            cells = [LABEL[method], quantity.name, sample.mean_sd(digits)]
            cells += [sample.interval(digits, of_one=True), str(len(rows))]
            if published:
                value = quantity.of_published(published[method]) if method in published else None
                cells += _published_cells(sample, value, digits)
            table.append(cells)
    return Table(head, table)


def _published_cells(sample: Sample, published: float | None, digits: int) -> list[str]:
    """Return a published value, and whether it lies within the interval of one run."""
    if published is None:
        return ["", ""]
    if sample.sd is None:
        return [f"{published:.{digits}f}", "-"]
    low, high = sample.bounds(of_one=True)
    return [f"{published:.{digits}f}", "yes" if low <= published <= high else "no"]
