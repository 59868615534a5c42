"""The report of a digit run: a pure function of its rows, settings and environment.

Nothing is trained here and no text is parsed. The same files give the same report again.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from ...analysis.confusion import accuracy
from ...harness.loggers import rows_to_csv
from ...harness.rundir import Row, RunDirectory, read_json, replace_file
from ...harness.settings import StudyError
from ...report.checks import Check, any_failed, check_lines
from ...report.document import Block, Picture, Sections
from ...report.document import markdown as as_markdown
from ...report.page import page
from ...report.table import Sample, Table, key_value_table, percent
from ..data import small_note
from .findings import findings
from .plots import draw
from .tables import (
    base_of,
    confusion_with,
    digit_table,
    images_of,
    methods_in,
    published_for,
    rows_of,
    seed_table,
)

# Logits after merging may differ by this much from those with the adapter on, relative to the
# largest logit. The difference is rounding.
CLOSE = 1e-5


def write_report(folder: Path) -> RunDirectory:
    """Write report.md, report.html, results.csv and the figures into a run's folder.

    Returns:
        The run, read from the folder's rows.

    Raises:
        StudyError: the folder has no run, or the run has no fine-tuned row yet.
    """
    run = RunDirectory.read(folder)
    if not rows_of(run, "base") or not rows_of(run, "lora"):
        raise StudyError(f"the run in {folder} has no fine-tuned network yet: continue it first")
    pictures = draw(run)
    for picture in pictures:
        replace_file(folder / picture.file, picture.png)
    replace_file(folder / "report.md", markdown(run, pictures).encode())
    replace_file(folder / "results.csv", rows_to_csv(run.rows).encode())
    replace_file(folder / "report.html", html(run, pictures).encode())
    return run


def terminal(run: RunDirectory) -> str:
    """Return the text that the terminal shows at the end of a run."""
    lines = [title(run), "", digit_table(run).text(), "", *check_lines(checks(run)), ""]
    return "\n".join(["", *lines, *findings(run, failed(run)), ""])


def markdown(run: RunDirectory, pictures: Sequence[Picture]) -> str:
    """Return report.md."""
    return as_markdown(heading(run), lead(run), sections(run, pictures))


def html(run: RunDirectory, pictures: Sequence[Picture]) -> str:
    """Return report.html: the same content, with the explorer if the run kept its data."""
    path = run.folder / "explore.json"
    advice = "run the command of the run again, which makes it again"
    explored = read_json(path, advice) if path.exists() else None
    if explored:
        explored |= {"mean": True, "scope": scope(run, len(explored["adapters"]))}
    return page(heading(run), lead(run), sections(run, pictures), explored)


def scope(run: RunDirectory, explored: int) -> str:
    """Return a sentence on the adapters that the explorer has, if the run has more.

    Runs of earlier versions have the first three.
    """
    count = len(rows_of(run, "lora"))
    if explored >= count:
        return ""
    return (
        f"The explorer has the first {explored} of {count} adapter seeds. The tables below have "
        f"all {count}. Run the command of the run again, and the explorer has them too."
    )


def sections(run: RunDirectory, pictures: Sequence[Picture]) -> Sections:
    """Return the report's tables, texts and figures, by heading."""
    explained = "scrambled" in methods_in(run)
    return {
        "Findings": findings(run, failed(run)),
        "Wrong answers by digit, and accuracy": [digit_table(run), columns_legend(run)],
        "Over the adapter seeds": [seed_table(run), seeds_legend(run)],
        **({"Why the blog's two methods differ": methods_compared(run)} if explained else {}),
        "Checks": [check_lines(checks(run))],
        "Figures": list(pictures),
        "Settings": [key_value_table(run.settings)],
        "Environment": [key_value_table(run.environment)],
    }


def heading(run: RunDirectory) -> str:
    """Return the report's title."""
    return f"Digit study, preset {run.settings['preset']}"


def lead(run: RunDirectory) -> str:
    """Return the report's first paragraph: what was done, the data, the number of parameters."""
    env, base, tuned = run.environment, base_of(run), rows_of(run, "lora")[0]
    share = tuned["trainable"] / base["parameters"]
    return (
        f"{title(run)}. Data: {env['data']} ({env['data_why']}), {env['train_images']:,} training "
        f"and {env['test_images']:,} test images{credit_of(env)}. The network has "
        f"{base['parameters']:,} parameters. The adapter adds {tuned['trainable']:,} trainable "
        f"ones ({share:.2%}).{small_note(env['data'])}"
    )


def credit_of(environment: Row) -> str:
    """Return the authors and the licence of a run's data set in brackets, if it recorded them."""
    return f" ({environment['data_credit']})" if environment.get("data_credit") else ""


def title(run: RunDirectory) -> str:
    """Return one line that says what the run did."""
    settings, tuned = run.settings, base_of(run)["tuned"]
    return (
        f"{run.environment['data']}, preset {settings['preset']}: rank {settings['rank']}, tuned "
        f"on {', '.join(map(str, tuned))} for {settings['steps']} steps of {settings['batch']}; "
        f"mean ± sd over {len(rows_of(run, 'lora'))} adapter seeds"
    )


def columns_legend(run: RunDirectory) -> list[str]:
    """Return an explanation of each column of the table of wrong answers."""
    methods = methods_in(run)
    lines = [
        "base: the network before fine-tuning",
        "off, on: paramlora's adapter, attached and trained, switched off and on",
    ]
    if "wrapped" in methods:
        trained = rows_of(run, "wrapped")[0]["trainable"]
        lines.append(
            f"wrapped: layers replaced by wrappers, with trained biases ({trained:,} parameters)"
        )
    if "scrambled" in methods:
        lines.append("scrambled: as on, with the blog's scrambled update")
    lines += full_legend(run)
    if dead := dead_outputs(run):
        lines.append(
            f"The base never answers {' or '.join(map(str, dead))}, because the ReLU on its logits "
            "holds these logits at zero. --no-relu-logits avoids this."
        )
    if published := published_for(run):
        same = list(published["base"].wrong_counts) == base_of(run)["wrong_counts"]
        lines.append(
            "published: measured with one adapter seed of another random generator, so only the "
            "base can agree exactly. A fine-tuned figure can only lie within the range over our "
            f"seeds. The base's ten counts are {'all' if same else 'not'} the same here."
        )
    return lines


def full_legend(run: RunDirectory) -> list[str]:
    """Return an explanation of full fine-tuning and joint training, if the run has them."""
    if not (rows := rows_of(run, "full")):
        return []
    lines = [
        f"full: all {rows[0]['trainable']:,} weights and biases fine-tuned, without an adapter, at "
        f"the learning rate {rows[0]['lr']:g}, which was not chosen by its results",
        "joint: as full, but on the images of all digits, for as many steps",
    ]
    if rows[0]["seed"] is None:
        lines.append(
            "full and joint have n = 1: they draw no initial factors, and with --order blog "
            "all adapter seeds have the same images."
        )
    return lines


def dead_outputs(run: RunDirectory) -> list[int]:
    """Return the digits that a base with a ReLU on its logits never answers."""
    if not run.settings["relu_logits"]:
        return []
    return [d for d in range(10) if not any(row[d] for row in base_of(run)["confusion"])]


def seeds_legend(run: RunDirectory) -> list[str]:
    """Return an explanation of the quantities in the table over the adapter seeds."""
    same_order = run.settings["order"] == "blog"
    return [
        "learned: accuracy on the tuned digits − the base's",
        "forgotten: the base's accuracy on the other digits − this accuracy",
        "sd: sample standard deviation",
        "95 % interval of one run: one further adapter seed lies there with a probability of 95 % "
        "(mean ± t · sd · √(1 + 1/n))",
        "An adapter seed draws A. All seeds see the same images in the same order, as in the blog."
        if same_order
        else "An adapter seed draws A and the order of the images.",
    ]


def methods_compared(run: RunDirectory) -> list[Block]:
    """Return the explanation of the accuracy gap between the blog's two methods."""
    on, wrapped, scrambled = (rows_of(run, m) for m in ("lora", "wrapped", "scrambled"))
    rows = [
        [
            name,
            _ranks(rows),
            *(_accuracy(rows, key) for key in ("accuracy", "tuned_accuracy", "other_accuracy")),
        ]
        for name, rows in (
            ("scrambled (the blog's method 1)", scrambled),
            ("on (method 1, corrected)", on),
            ("wrapped (the blog's method 2)", wrapped),
        )
    ]
    text = [_published_gap(run)] if published_for(run) else []
    head = [
        "accuracy, points",
        "digits",
        "mean ± sd",
        "95 % interval",
        "95 % interval\nof one pair",
        "n",
    ]
    differences = Table(
        head,
        [
            _difference(name, group, upper, lower)
            for name, upper, lower in (
                ("wrapped − scrambled", wrapped, scrambled),
                ("corrected − scrambled", on, scrambled),
                ("wrapped − corrected", wrapped, on),
            )
            for group in ("all", "tuned", "other")
        ],
    )
    text += [
        "The gap has two parts. A bug in the blog's update costs corrected − scrambled. Wrapping "
        "the layers and training their biases adds wrapped − corrected. Each difference is between "
        "two fine-tunings with the same A and the same images. The first interval is that of the "
        "mean over seeds, the second that of a single pair.",
    ]
    bug = (
        "The bug: the blog's A has shape (r, out) and its B (in, r). Their product B A has shape "
        "(in, out) and is read row by row, with view, into the weight's shape (out, in). This is "
        "not a transpose. The number of parameters is the same, but the update is no longer of "
        "rank r, as the ranks in the table show."
    )
    columns = [
        "method",
        "ranks of ΔW, by layer",
        "all digits, %",
        "tuned digits, %",
        "other digits, %",
    ]
    return [" ".join(text), differences, Table(columns, rows), bug]


def _published_gap(run: RunDirectory) -> str:
    """Return the accuracies that the blog publishes for its two methods, as a sentence."""
    first, second = (
        100 * accuracy(confusion_with(published_for(run)[method].wrong_counts, images_of(run)))
        for method in ("scrambled", "wrapped")
    )
    return (
        f"The blog publishes {first:.1f} % for its parametrization (method 1) and {second:.1f} % "
        f"for wrapped layers (method 2): {second - first:.1f} points apart."
    )


def failed(run: RunDirectory) -> bool:
    """Return whether any check of the run failed."""
    return any_failed(checks(run))


def checks(run: RunDirectory) -> Iterator[Check]:
    """Yield each check: the claim, and for each fine-tuning whether it is true."""

    def each(stage: str, key: str) -> list[bool]:
        return [row[key] for row in run.rows if row["stage"] == stage]

    distances = [row["distance_from_on"] for row in run.rows if row["stage"] == "merged"]
    largest = f"{max(distances):.1g}" if distances else "none measured"
    yield "adapter off, base weights unchanged", each("off", "same_fingerprint")
    yield "adapter off, logits bit-for-bit the base's", each("off", "same_logits")
    yield (
        f"merged, logits within {CLOSE:g} of those with the adapter on, relative to the largest "
        f"logit (largest difference: {largest})",
        [distance < CLOSE for distance in distances],
    )
    yield "unmerged and off, base weights unchanged", each("unmerged", "same_fingerprint")
    yield "unmerged and off, logits bit-for-bit the base's", each("unmerged", "same_logits")
    yield (
        "unmerged and on, logits bit-for-bit those before merging",
        each("unmerged", "same_on_logits"),
    )


def _accuracy(rows: list[Row], key: str) -> str:
    return percent(tuple(row[key] for row in rows))


def _difference(name: str, group: str, upper: list[Row], lower: list[Row]) -> list[str]:
    """Return a line on the difference of two methods' accuracies in points, paired by seed."""
    key = "accuracy" if group == "all" else f"{group}_accuracy"
    below = {row["seed"]: row[key] for row in lower}
    pairs = Sample(
        tuple(100 * (row[key] - below[row["seed"]]) for row in upper if row["seed"] in below)
    )
    cells = [pairs.mean_sd(1), pairs.interval(1), pairs.interval(1, of_one=True)]
    return [name, group, *cells, str(len(pairs.values))]


def _ranks(rows: list[Row]) -> str:
    """Return the ranks of a method's updates by site, such as "128, 4, 9 to 10" over all seeds."""
    by_site = [[row["ranks"][site] for row in rows] for site in rows[0]["ranks"]]
    return ", ".join(
        str(ranks[0]) if len(set(ranks)) == 1 else f"{min(ranks)} to {max(ranks)}"
        for ranks in by_site
    )
