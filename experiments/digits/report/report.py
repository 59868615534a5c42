"""The report of a run: a pure function of its rows, settings and environment.

Nothing is trained here and no text is parsed: a report can be made again from the three files of
a run's directory, and comes out the same.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from ...analysis.confusion import accuracy
from ...harness.loggers import rows_to_csv
from ...harness.rundir import Row, RunDirectory, replace_file
from ...harness.settings import StudyError
from ...report.page import figure_html, list_html, page, paragraph, table_html
from ...report.table import Band, pairs, percent
from .plots import draw
from .tables import (
    band_table,
    base_of,
    confusion_like,
    digit_table,
    images_of,
    methods_in,
    published_for,
    rows_of,
)

# By how much a merged network's logits may differ, as a share of the largest: rounding.
CLOSE = 1e-5


def write_report(folder: Path) -> RunDirectory:
    """Write report.md and the figures of the run in `folder`, from its rows; return the run.

    Raises:
        StudyError: no run is there, or none that has a fine-tuned row yet.
    """
    run = RunDirectory.read(folder)
    if not rows_of(run, "base") or not rows_of(run, "lora"):
        raise StudyError(f"the run in {folder} has no fine-tuned network yet: go on with it first")
    captions = draw(run, folder)
    replace_file(folder / "report.md", markdown(run, captions).encode())
    replace_file(folder / "results.csv", rows_to_csv(run.rows).encode())
    replace_file(folder / "report.html", html(run, captions).encode())
    return run


def html(run: RunDirectory, captions: dict[str, str]) -> str:
    """Return report.html: what report.md says, and an explorer where the run left its results."""
    path = run.folder / "explore.json"
    bands = paragraph(bands_legend(run)) + table_html(band_table(run))
    parts = [
        (
            "Wrong answers by digit, and accuracy",
            table_html(digit_table(run)) + paragraph(legend(run)),
        ),
        ("Over the adapter seeds", bands),
    ]
    if "scrambled" in methods_in(run):
        parts.append(("What separates the blog's two methods", paragraph(scrambling(run))))
    figures = [figure_html((run.folder / n).read_bytes(), said) for n, said in captions.items()]
    parts += [
        ("Proofs", list_html(proofs(run))),
        ("Figures", "\n".join(figures)),
        ("Settings", table_html(pairs(run.settings))),
        ("Environment", table_html(pairs(run.environment))),
    ]
    explored = json.loads(path.read_text()) if path.exists() else None
    name = f"Digit study, preset {run.settings['preset']}"
    return page(name, f"{title(run)}. {where_from(run)}", parts, explored)


def terminal(run: RunDirectory) -> str:
    """Return what the terminal shows at the end of a run."""
    return "\n".join(["", title(run), "", digit_table(run).text(), "", *proofs(run)])


def markdown(run: RunDirectory, captions: dict[str, str]) -> str:
    """Return report.md. `captions`: what each figure shows, by its file name."""
    parts = [
        f"# Digit study, preset {run.settings['preset']}",
        title(run) + ".",
        where_from(run),
        "## Wrong answers by digit, and accuracy",
        digit_table(run).markdown(),
        legend(run),
        "## Over the adapter seeds",
        band_table(run).markdown(),
        bands_legend(run),
    ]
    if "scrambled" in methods_in(run):
        parts += ["## What separates the blog's two methods", scrambling(run)]
    parts += ["## Proofs", "\n".join(f"- {line}" for line in proofs(run)), "## Figures"]
    parts += [f"![{caption}]({name})\n\n{caption}" for name, caption in captions.items()]
    parts += [
        "## Settings",
        pairs(run.settings).markdown(),
        "## Environment",
        pairs(run.environment).markdown(),
    ]
    return "\n\n".join(parts) + "\n"


def title(run: RunDirectory) -> str:
    """Return in a line what was done."""
    settings, tuned = run.settings, base_of(run)["tuned"]
    return (
        f"{run.environment['data']}, preset {settings['preset']}: rank {settings['rank']}, tuned "
        f"on {', '.join(map(str, tuned))} for {settings['steps']} steps of {settings['batch']}; "
        f"mean ± sd over {len(rows_of(run, 'lora'))} adapter seeds"
    )


def where_from(run: RunDirectory) -> str:
    """Return which data were taken and why, and how much of the network is trained."""
    env, base, tuned = run.environment, base_of(run), rows_of(run, "lora")[0]
    share = tuned["trainable"] / base["parameters"]
    return (
        f"Data: {env['data']}, {env['data_why']}; {env['train_images']:,} training and "
        f"{env['test_images']:,} test images. The network has {base['parameters']:,} parameters; "
        f"the adapter trains {tuned['trainable']:,} beside them, {share:.2%}."
    )


def legend(run: RunDirectory) -> str:
    """Return what the columns of the first table are."""
    methods = methods_in(run)
    said = [
        "base: before fine-tuning. off, on: with paramlora's adapter attached and trained, "
        "switched off and on."
    ]
    if "wrapped" in methods:
        trained = rows_of(run, "wrapped")[0]["trainable"]
        said.append(
            f"wrapped: the layers wrapped instead, biases trained as well ({trained:,} parameters)."
        )
    if "scrambled" in methods:
        said.append("scrambled: as on, with the blog's scrambled update.")
    if silent := never_answered(run):
        said.append(
            f"The base answers {' or '.join(map(str, silent))} to no image: the ReLU on its logits "
            "has put out that output for good, which --no-relu-logits avoids."
        )
    if known := published_for(run):
        same = list(known["base"].wrong_counts) == base_of(run)["wrong_counts"]
        said.append(
            "published: with one adapter seed of another generator, so that fine-tuned figures "
            "can be met as a band only; the base's ten counts are "
            + ("all the same here." if same else "not the same here.")
        )
    return " ".join(said)


def never_answered(run: RunDirectory) -> list[int]:
    """Return the digits that a base with a ReLU on its logits gives as an answer to no image."""
    if not run.settings["relu_logits"]:
        return []
    return [d for d in range(10) if not any(row[d] for row in base_of(run)["confusion"])]


def bands_legend(run: RunDirectory) -> str:
    """Return what the figures of the second table are."""
    return (
        "Learned: accuracy on the tuned digits, less the base's. Forgotten: the base's accuracy on "
        "the other digits, less this one's. sd: the sample's. " + order(run)
    )


def order(run: RunDirectory) -> str:
    """Return what an adapter seed changes."""
    if run.settings["order"] == "blog":
        return "A seed draws A; the images and their order are the same for all, as in the blog."
    return "A seed draws A and the order of the images."


def scrambling(run: RunDirectory) -> str:
    """Return the paragraph on what the points between the blog's two methods really are."""
    on, wrapped, scrambled = (rows_of(run, m) for m in ("lora", "wrapped", "scrambled"))
    said = [_published_gap(run)] if published_for(run) else []
    said += [
        f"Here the blog's parametrization gives {_accuracy(scrambled)} %, wrapped layers give "
        f"{_accuracy(wrapped)} % and the correct parametrization gives {_accuracy(on)} % "
        f"(n = {len(on)}).",
        f"Seed by seed, wrapped layers are {_apart(wrapped, scrambled)} points above the blog's "
        f"parametrization: {_apart(on, scrambled)} of them are a bug in its update, as the correct "
        f"one shows, and {_apart(wrapped, on)} are what wrapping, and training the biases, adds to "
        "the correct one from the same A and the same images.",
        "The bug: A is shaped (r, out) and B (in, r), and B A, which is (in, out), is read row by "
        "row into the weight's (out, in). That is as many parameters, but another update: the "
        f"trained ones have ranks {_ranks(scrambled)} where the correct ones have {_ranks(on)} and "
        f"the wrapped ones {_ranks(wrapped)} (measured: {', '.join(on[0]['ranks'])}).",
        f"On the tuned digits it reaches {_accuracy(scrambled, 'tuned_accuracy')} %, the correct "
        f"one {_accuracy(on, 'tuned_accuracy')} %; on the other digits "
        f"{_accuracy(scrambled, 'other_accuracy')} % are left, and "
        f"{_accuracy(on, 'other_accuracy')} %.",
    ]
    return " ".join(said)


def _published_gap(run: RunDirectory) -> str:
    """Return what the blog publishes for its two methods."""
    one, two = (
        100 * accuracy(confusion_like(published_for(run)[method].wrong_counts, images_of(run)))
        for method in ("scrambled", "wrapped")
    )
    return (
        f"The blog publishes {one:.1f} % for its parametrization (method 1) and {two:.1f} % for "
        f"wrapped layers (method 2): {two - one:.1f} points apart."
    )


def proofs(run: RunDirectory) -> list[str]:
    """Return a line for each thing that is proved, with how many fine-tunings hold it."""
    return [
        f"{'holds' if sum(held) == len(held) else 'FAILS'} in {sum(held)} of {len(held)}: {claim}"
        for claim, held in checks(run)
    ]


def failed(run: RunDirectory) -> bool:
    """Whether anything that is to be proved does not hold."""
    return any(not all(held) for _, held in checks(run))


def checks(run: RunDirectory) -> Iterator[tuple[str, list[bool]]]:
    """Yield what is proved, and for each fine-tuning whether it holds."""

    def each(stage: str, key: str) -> list[bool]:
        return [row[key] for row in run.rows if row["stage"] == stage]

    distances = [row["distance_from_on"] for row in run.rows if row["stage"] == "merged"]
    far = f"largest distance {max(distances):.1g} of the largest logit" if distances else "no row"
    yield "off, the base's fingerprint is the base's", each("off", "same_fingerprint")
    yield "off, the logits are bitwise the base's", each("off", "same_logits")
    yield f"merged, the logits are those of on to rounding, {far}", [d < CLOSE for d in distances]
    yield "unmerged and off, the fingerprint is the base's", each("unmerged", "same_fingerprint")
    yield "unmerged and off, the logits are bitwise the base's", each("unmerged", "same_logits")
    yield "unmerged and on, the logits are bitwise those before", each("unmerged", "same_on_logits")


def _accuracy(rows: list[Row], key: str = "accuracy") -> str:
    return percent(tuple(row[key] for row in rows))


def _apart(upper: list[Row], lower: list[Row]) -> str:
    """Return by how many points two methods differ, seed by seed."""
    below = {row["seed"]: row["accuracy"] for row in lower}
    differences = (row["accuracy"] - below[row["seed"]] for row in upper if row["seed"] in below)
    return Band(tuple(100 * difference for difference in differences)).shown(1)


def _ranks(rows: list[Row]) -> str:
    """Return the ranks at each site over all seeds, such as 128, 4 and 10, or 9 to 10."""
    sites = [[row["ranks"][site] for row in rows] for site in rows[0]["ranks"]]
    cells = [str(r[0]) if len(set(r)) == 1 else f"{min(r)} to {max(r)}" for r in sites]
    return f"{', '.join(cells[:-1])} and {cells[-1]}"
