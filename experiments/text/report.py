"""The report of a text run: a pure function of its rows, settings and environment."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..harness.rundir import Row, RunDirectory, replace_file
from ..harness.settings import StudyError
from ..report.checks import Check, check_lines
from ..report.document import Block, Picture, Sections, markdown
from ..report.page import write_page
from ..report.style import looks
from ..report.table import Sample, Table, key_value_table, percent

# The allowed difference of a merged model's logits, relative to the largest logit, by the dtype of
# products.
CLOSE = {"fp32": 1e-4, "bf16": 0.1}
TUNED = ("tuned", "on")


def write_text_report(folder: Path) -> RunDirectory:
    """Write report.md, report.html and the figure of a text run's folder, and return the run.

    Raises:
        StudyError: the folder has no run, or the run has no fine-tuned model yet.
    """
    run = RunDirectory.read(folder)
    if not tuned_rows(run):
        raise StudyError(f"the run in {folder} has no fine-tuned model yet: resume it first")
    pictures = [strengths_picture(run)] if strength_rows(run) else []
    for picture in pictures:
        replace_file(folder / picture.file, picture.png)
    content = heading(run), title(run) + ".", sections(run, pictures)
    replace_file(folder / "report.md", markdown(*content).encode())
    write_page(folder / "report.html", *content)
    return run


def terminal(run: RunDirectory) -> str:
    """Return the summary that the terminal shows at the end of a run."""
    tables = [method_table(run).text(), ""]
    if run.settings.get("retention"):
        tables += [f"kept of {run.settings['retention']}", "", kept_table(run).text(), ""]
    return "\n".join(["", title(run), "", *tables, *check_lines(checks(run))])


def heading(run: RunDirectory) -> str:
    """Return the report's title."""
    return f"Text study, preset {run.settings['preset']}"


def sections(run: RunDirectory, pictures: Sequence[Picture] = ()) -> Sections:
    """Return the report's tables, texts and figures, by heading."""
    found: dict[str, Sequence[Block]] = {"Methods": [method_table(run), LEGEND]}
    if run.settings.get("retention"):
        found[f"What is kept of {run.settings['retention']}"] = [kept_table(run), KEPT]
    if strength_rows(run):
        found["What is forgotten"] = [strength_table(run), FORGETTING, *pictures]
    return found | {
        "Checks": [check_lines(checks(run))],
        "Settings": [key_value_table(run.settings)],
        "Environment": [key_value_table(run.environment)],
    }


LEGEND = (
    "Accuracies in %, mean ± sample sd over the seeds. Each training keeps the parameters with the "
    "highest accuracy on the validation rows; test rows are not used for choices. Seconds: time of "
    "training without evaluations. Peak GB: the GPU's peak memory during training. Majority: "
    "always the most frequent label of the training rows."
)
KEPT = (
    "Mean ± sample sd over the seeds, on the other data set's test texts. Probe: balanced accuracy "
    "of a linear probe on the checkpoint's mean embeddings, unchanged by the fine-tuning. "
    "Retrieval and agreement: as below, with the other texts. `experiments/text/retention.py` "
    "defines them."
)
FORGETTING = (
    "λ: strength in W + λ·ΔW. Up to 1,000 test texts are cut into halves. Retrieval: the share of "
    "first halves whose nearest second half, by the backbone's embeddings, is from the same text. "
    "Agreement: Spearman's rank correlation of all cosines between halves with the checkpoint's "
    "cosines. Both are proxies, not a benchmark of sentence similarity. This page has no slider "
    "for λ, unlike that of the digit study: a run keeps accuracies at each λ, not predictions, and "
    "each seed has its own untrained classifier, so that there is no common base."
)
CAPTION = (
    "Accuracy on the task against the checkpoint's remaining ability, by strength λ: the mean over "
    "the seeds as a line, each seed as a dot"
)


def title(run: RunDirectory) -> str:
    """Return a line that names the checkpoint, the data and the number of seeds."""
    settings, env = run.settings, run.environment
    seeds = len({row["seed"] for row in tuned_rows(run)})
    return (
        f"{settings['model']} on {env['data']}, {env['train_texts']:,} training, "
        f"{env['validation_texts']:,} validation and {env['test_texts']:,} test texts of "
        f"{settings['max_length']} tokens at most; n = {seeds} seed{'s' * (seeds != 1)}"
    )


def tuned_rows(run: RunDirectory, method: str | None = None) -> list[Row]:
    """Return the rows of fine-tuned models, or those of one method if it is given."""
    rows = [row for row in run.rows if row["stage"] in TUNED]
    return [row for row in rows if method in (None, row["method"])]


def strength_rows(run: RunDirectory) -> list[Row]:
    """Return the rows with the results at each strength."""
    return [row for row in run.rows if row["stage"] == "strengths"]


def methods_in(run: RunDirectory) -> list[str]:
    """Return the methods that have rows, in the order of `--methods`."""
    finished = {row["method"] for row in tuned_rows(run)}
    return [method for method in run.settings["methods"].split(",") if method in finished]


def method_table(run: RunDirectory) -> Table:
    """Return one line per method: trained parameters, accuracy, time and memory."""
    head = ["method", "trained", "share", "validation", "test", "n", "seconds", "peak GB"]
    rows = []
    if majority := run.environment.get("majority"):
        shares = [f"{100 * majority[split]:.2f}" for split in ("validation", "test")]
        rows.append(["majority", "0", "", *shares, "", "", ""])
    for method in methods_in(run):
        these = tuned_rows(run, method)
        first, peaks = these[0], [row["peak_bytes"] for row in these]
        rows.append(
            [
                method,
                f"{first['trainable']:,}",
                f"{first['trainable'] / first['parameters']:.2%}",
                percent2([row["validation_accuracy"] for row in these]),
                percent2([row["accuracy"] for row in these]),
                str(len(these)),
                Sample(tuple(row["seconds"] for row in these)).mean_sd(1),
                "-" if None in peaks else Sample(tuple(p / 1e9 for p in peaks)).mean_sd(2),
            ]
        )
    return Table(head, rows)


def kept_table(run: RunDirectory) -> Table:
    """Return one line per method: what is kept of the second data set, and by the checkpoint."""
    first = tuned_rows(run)[0]
    base = [percent((first[f"base_{key}"],)) for key in ("probe", "probe", "retrieval")]
    rows = [["checkpoint", *base, "1.000", ""]]
    for method in methods_in(run):
        these = tuned_rows(run, method)
        cells = [
            percent(tuple(row[f"kept_{key}"] for row in these))
            for key in ("probe", "refit", "retrieval")
        ]
        agreement = Sample(tuple(row["kept_agreement"] for row in these)).mean_sd(3)
        rows.append([method, *cells, agreement, str(len(these))])
    head = ["method", "probe, %", "probe fitted again, %", "retrieval, %", "agreement", "n"]
    return Table(head, rows)


def percent2(fractions: list[float]) -> str:
    """Return the mean ± sd of fractions, in % with two decimals."""
    return Sample(tuple(100 * value for value in fractions)).mean_sd(2)


def strength_table(run: RunDirectory) -> Table:
    """Return one line per method and strength: accuracy, retrieval and agreement."""
    head = ["method", "λ", "validation", "test", "retrieval", "agreement", "n"]
    rows = []
    for method in methods_in(run):
        these = [row for row in strength_rows(run) if row["method"] == method]
        if these:
            base = percent(tuple(row["base_retrieval"] for row in these))
            rows.append([method, "off", "", "", base, "1.000", str(len(these))])
        for i, strength in enumerate(these[0]["strengths"] if these else []):
            rows.append(
                [
                    method,
                    f"{strength:g}",
                    percent2([row["validation"][i] for row in these]),
                    percent2([row["accuracy"][i] for row in these]),
                    percent(tuple(row["retrieval"][i] for row in these)),
                    Sample(tuple(row["agreement"][i] for row in these)).mean_sd(3),
                    str(len(these)),
                ]
            )
    return Table(head, rows)


def checks(run: RunDirectory) -> list[Check]:
    """Return the checks that have rows: each claim with one result per adapter."""

    def each(stage: str, key: str) -> list[bool]:
        return [row[key] for row in run.rows if row["stage"] == stage]

    found: list[Check] = [
        ("before training, logits are bit-for-bit the base's", each("off", "same_at_first")),
        ("adapter off, logits are bit-for-bit the base's", each("off", "same_logits")),
        ("adapter off, base weights unchanged", each("off", "same_fingerprint")),
        (
            "adapter off, embeddings are bit-for-bit the base's",
            each("strengths", "same_embeddings"),
        ),
    ]
    distances = [row["distance_from_on"] for row in run.rows if row["stage"] == "merged"]
    close = CLOSE["bf16" if run.environment["autocast"] else "fp32"]
    far = f"largest distance {max(distances, default=0):.1g} of the largest logit"
    merged = f"merged, logits equal those with the adapter on up to rounding, {far}"
    found.append((merged, [d < close for d in distances]))
    return [(claim, passed) for claim, passed in found if passed]


def strengths_picture(run: RunDirectory) -> Picture:
    """Draw accuracy against agreement and retrieval: one curve per method, one point per λ."""
    from ..report.figures import plt, png

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    _strengths(run, axes)
    return Picture(png(figure), CAPTION, "strengths.png")


def _strengths(run: RunDirectory, axes: Any) -> None:
    found = {row["method"] for row in strength_rows(run)}
    drawn = [method for method in methods_in(run) if method in found]
    for axis, key, name in zip(
        axes,
        ("agreement", "retrieval"),
        ("agreement with the checkpoint's similarities", "retrieval of a text's other half, %"),
        strict=True,
    ):
        for method, look in looks(drawn).items():
            these = [row for row in strength_rows(run) if row["method"] == method]
            scale = 100 if key == "retrieval" else 1
            count = range(len(these[0]["strengths"]))
            x = [scale * sum(row[key][i] for row in these) / len(these) for i in count]
            y = [100 * sum(row["accuracy"][i] for row in these) / len(these) for i in count]
            axis.plot(x, y, marker="o", label=f"{method}, n = {len(these)}", **look)
            for row in these if len(these) > 1 else []:
                seed_x = [scale * value for value in row[key]]
                seed_y = [100 * value for value in row["accuracy"]]
                axis.plot(seed_x, seed_y, ".", color=look["color"], alpha=0.6)
            for i in count:
                # Rotated, above and below in turn, so that labels of close points do not overlap.
                up = i % 2 == 0
                axis.annotate(f"{these[0]['strengths'][i]:g}", (x[i], y[i]), fontsize=7,
                              xytext=(0, 5 if up else -5), textcoords="offset points",
                              rotation=90, ha="center", va="bottom" if up else "top")  # fmt: skip
        axis.margins(y=0.12)
        axis.set_xlabel(name)
        axis.set_ylabel("accuracy on the task, test rows, %")
        axis.legend(loc="lower left")
