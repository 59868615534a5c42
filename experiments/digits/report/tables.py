"""Figures of a run as tables: numbers from rows, made into cells, set as text or as Markdown."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ...analysis.confusion import accuracy, change, old_and_new
from ...harness.rundir import Row, RunDirectory
from ...harness.settings import flattened, result_settings
from ...report.table import Band, Table, percent
from ..settings import preset

# A method's fine-tuned rows, by the stage that they have, and what tables and figures call it.
STAGE = {"lora": "on", "wrapped": "wrapped", "scrambled": "on"}
LABEL = {"base": "base", "lora": "on", "wrapped": "wrapped", "scrambled": "scrambled"}


@dataclass(frozen=True)
class Published:
    """Wrong answers to MNIST's test images, by digit, and the mean training loss where it is given.

    `train_loss` is the mean over all steps, in nats.
    """

    wrong_counts: tuple[int, ...]
    train_loss: float | None = None


# Published figures, to lay beside ours, by preset and then by method. Nothing here was measured by
# this project. "base" is the network before fine-tuning.
#
# "blog": a blog post of 2024-04-17 on low-rank adapters by parametrization; its "method 1" is
# `scrambled` here, its "method 2" `wrapped`. "nine": the script that it starts from,
# hkproj/pytorch-lora, run on a GPU. Each made with one adapter seed, and with another generator's
# A: fine-tuned figures can be met as a band over seeds only.
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
    """Return a method's rows of a stage, by default of the one that has it fine-tuned and on."""
    wanted = "base" if method == "base" else stage or STAGE[method]
    return [row for row in run.rows if row["method"] == method and row["stage"] == wanted]


def methods_in(run: RunDirectory) -> list[str]:
    """Return the methods that the run has fine-tuned rows of, in the order of the tables."""
    return [method for method in STAGE if rows_of(run, method)]


def base_of(run: RunDirectory) -> Row:
    """Return the row of the base."""
    return rows_of(run, "base")[0]


def published_for(run: RunDirectory) -> dict[str, Published]:
    """Return the published figures that this run can be laid beside, by method.

    There are none where the data are not MNIST, the preset has none, or its settings were changed.
    """
    usual = flattened(result_settings(preset(run.settings["preset"])))
    free = ("seeds", "compat", "data", "device", "threads")
    changed = any(run.settings[key] != usual[key] for key in usual if key not in free)
    if changed or run.environment["data"] != "MNIST":
        return {}
    return PUBLISHED.get(run.settings["preset"], {})


def images_of(run: RunDirectory) -> list[int]:
    """Return how many test images each digit has."""
    return [sum(counts) for counts in base_of(run)["confusion"]]


def confusion_like(wrong: Sequence[int], images: Sequence[int]) -> list[list[int]]:
    """Return a confusion matrix with these wrong counts, the wrong answers put anywhere.

    Accuracies ask for no more, and published figures say no more.
    """
    rows = [[0] * len(images) for _ in images]
    for digit, (count, total) in enumerate(zip(wrong, images, strict=True)):
        rows[digit][digit], rows[digit][digit - 1] = total - count, count
    return rows


def digit_table(run: RunDirectory) -> Table:
    """Return wrong answers by digit, and accuracies, for each stage, published ones beside them."""
    tuned, images = base_of(run)["tuned"], images_of(run)
    columns = [("base", rows_of(run, "base")), ("off", rows_of(run, "lora", "off"))]
    columns += [(LABEL[method], rows_of(run, method)) for method in methods_in(run)]
    published = published_for(run)
    known = {m: published[m] for m in ("base", *methods_in(run)) if m in published}
    head = ["digit", "images", *(label for label, _ in columns)]
    head += [f"published\n{LABEL[method]}" for method in known]
    rows = []
    for digit in range(10):
        cells = [f"{digit}{' tuned' if digit in tuned else ''}", f"{images[digit]:,}"]
        cells += [
            Band(tuple(row["wrong_counts"][digit] for row in its)).shown(0) for _, its in columns
        ]
        rows.append(cells + [str(p.wrong_counts[digit]) for p in known.values()])
    matrices = {method: confusion_like(p.wrong_counts, images) for method, p in known.items()}
    for name in ("all", "tuned", "other"):
        key = "accuracy" if name == "all" else f"{name}_accuracy"
        chosen = [d for d in range(10) if name == "all" or (d in tuned) == (name == "tuned")]
        cells = [f"{name} %", f"{sum(images[d] for d in chosen):,}"]
        cells += [percent(tuple(row[key] for row in its)) for _, its in columns]
        rows.append(cells + [f"{100 * accuracy(matrices[m], chosen):.2f}" for m in known])
    return Table(head, rows)


@dataclass(frozen=True)
class Figure:
    """A figure that is compared over seeds: its name with the unit, and how it is had."""

    name: str
    digits: int
    of_row: Callable[[Row], float]
    of_published: Callable[[Published], float | None]


def compared(run: RunDirectory) -> list[Figure]:
    """Return the figures of a fine-tuned network that are given as bands."""
    base, images, tuned = base_of(run), images_of(run), base_of(run)["tuned"]

    def both(name: str, digits: int, of: Callable[[Any], float]) -> Figure:
        return Figure(
            name,
            digits,
            lambda row: of(row["confusion"]),
            lambda p: of(confusion_like(p.wrong_counts, images)),
        )

    return [
        both("all digits, %", 2, lambda c: 100 * accuracy(c)),
        both("tuned digits, %", 2, lambda c: 100 * old_and_new(c, tuned)[1]),
        both("other digits, %", 2, lambda c: 100 * old_and_new(c, tuned)[0]),
        both("learned, points", 2, lambda c: 100 * change(base["confusion"], c, tuned).learned),
        both("forgotten, points", 2, lambda c: 100 * change(base["confusion"], c, tuned).forgotten),
        Figure("training loss, nats", 3, lambda row: row["train_loss"], lambda p: p.train_loss),
    ]


def band_table(run: RunDirectory) -> Table:
    """Return each method's figures as bands over the adapter seeds, published ones beside them."""
    known = published_for(run)
    head = ["method", "figure", "mean ± sd", "lowest to highest", "n"]
    head += ["published", "in the band"] if known else []
    rows = []
    for method in methods_in(run):
        its = rows_of(run, method)
        for figure in compared(run):
            band, places = Band(tuple(map(figure.of_row, its))), figure.digits
            cells = [LABEL[method], figure.name, band.shown(places), band.extent(places)]
            cells.append(str(len(its)))
            if known:
                theirs = figure.of_published(known[method]) if method in known else None
                cells += _beside(band, theirs, places)
            rows.append(cells)
    return Table(head, rows)


def _beside(band: Band, theirs: float | None, places: int) -> list[str]:
    if theirs is None:
        return ["", ""]
    inside = min(band.values) <= theirs <= max(band.values)
    return [f"{theirs:.{places}f}", "yes" if inside else "no"]
