"""The selection of remedies on validation images, and their measurement on the test images.

The best of many candidates is partly lucky, so the images that chose it overestimate its gain. A
second run therefore measures it on other images:

    run         bases pre-trained on             evaluated on         cells
    selection   training images − validation     validation images    every candidate × base
    test        all training images              test images          each family's choice × base

For example, a family with 5 candidates and 1 strength has 5 cells per base in the selection.
`choose` returns one of the 5. Only this one is trained in the test run, where no setting changes.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import mean

from ..digits.data import small_note
from ..digits.settings import DigitSettings
from ..digits.shared import shared_data
from ..harness.rundir import Row, RunDirectory, replace_file
from ..harness.settings import listed, replace, result_settings
from ..report.figures import Figure, plt, png
from ..report.style import GROUP_COLOUR
from ..report.table import Sample, Table
from .cells import Cell
from .families import Family, families
from .sweep import run_sweep

SIDES = (
    ("all", "#000000", 0.0),
    ("tuned", GROUP_COLOUR["tuned"], 0.2),
    ("other", GROUP_COLOUR["other"], -0.2),
)
VALIDATION = 500  # validation images per digit, at most a quarter of a digit's training images


def validation_images(settings: DigitSettings) -> int:
    """Return the number of validation images per digit; fewer than VALIDATION on small data."""
    labels = shared_data(settings.dataset.data, settings.dataset.data_dir).train.labels
    return min(VALIDATION, int(labels.bincount().min()) // 4)


def candidates(
    settings: DigitSettings, chosen: Sequence[Family], bases: Sequence[int], seeds: int
) -> Iterator[Cell]:
    """Yield the cells of the selection: every candidate on every base, without the test images."""
    held = validation_images(settings)
    for family in chosen:
        for number, changes in enumerate(family.candidates):
            for base in bases:
                tried = {"validation": held, "selection": True, "seed": base, "seeds": seeds}
                cell_settings = replace(settings, **{**changes, **tried})
                yield Cell(f"{family.name} #{number}", cell_settings, family.strengths)


def choose(run: RunDirectory, family: Family, floor: tuple[float, float]) -> tuple[int, float]:
    """Return the number of the best candidate and its strength, by the rows of the selection.

    The best candidate has the highest mean gain over its bases among the candidates that gain at
    least `floor` on tuned and on other digits, in points. If no candidate does, it is the best of
    all. Python compares the tuples (meets the floor, gain) in this order, as True > False.
    """

    def merit(candidate: tuple[int, float]) -> tuple[bool, float]:
        number, strength = candidate
        every, tuned, other = gains(run, f"{family.name} #{number}", strength)
        meets = mean(tuned) >= floor[0] and mean(other) >= floor[1]
        return meets, mean(every)

    tried = [(n, λ) for n in range(len(family.candidates)) for λ in family.strengths]
    return max(tried, key=merit)


def gains(run: RunDirectory, cell: str, strength: float) -> tuple[list[float], ...]:
    """Return each adapter's gain over its base in points, on all, tuned and other digits."""
    rows = [row for row in run.rows if row["cell"] == cell]
    base = {row["base_seed"]: row for row in rows if row["stage"] == "base"}
    on = [row for row in rows if row["stage"] == "on" and row["strength"] == strength]
    keys = ("accuracy", "tuned_accuracy", "other_accuracy")
    return tuple([100 * (row[key] - base[row["base_seed"]][key]) for row in on] for key in keys)


def measured(
    settings: DigitSettings,
    selection: RunDirectory,
    chosen: Sequence[Family],
    bases: Sequence[int],
    floor: tuple[float, float],
) -> Iterator[Cell]:
    """Yield the cells of the measurement: each family's choice on every base."""
    held = validation_images(settings)
    for family in chosen:
        number, strength = choose(selection, family, floor)
        changes = dict(family.candidates[number])
        # Early stopping monitors validation images, so its bases do not train on them.
        changes |= {"validation": held} if changes.get("patience") else {}
        for base in bases:
            cell_settings = replace(settings, **{**changes, "seed": base})
            yield Cell(family.name, cell_settings, (strength,))


def run_remedies(
    settings: DigitSettings,
    folder: Path,
    *,
    chosen: Sequence[Family] | None = None,
    base_seeds: int = 5,
    selection_seeds: int = 2,
    selection_bases: int = 0,
    floor: tuple[float, float] = (0.0, 0.0),
    jobs: int = 1,
    say: Callable[[str], None] = print,
) -> tuple[RunDirectory, RunDirectory]:
    """Select and measure remedies, write `remedies.md`, and return the two runs.

    Args:
        settings: the preset, with the number of adapter seeds of the measurement.
        folder: the folder of both runs; existing rows are kept.
        chosen: the remedies to compare; all `families` by default.
        base_seeds: number of bases, counted from the settings' seed.
        selection_seeds: number of adapter seeds per base in the selection.
        selection_bases: number of bases in the selection; 0: as many as `base_seeds`.
        floor: least gains of a chosen candidate on tuned and on other digits, in points.
        jobs: parallel processes.
        say: called with each line of progress.
    """
    chosen = families(validation_images(settings)) if chosen is None else chosen
    bases = range(settings.seed, settings.seed + base_seeds)
    asked = result_settings(settings) | {
        "base_seeds": base_seeds,
        "floor": list(floor),
        "selection_seeds": selection_seeds,
        "selection_bases": selection_bases or base_seeds,
    }
    few = bases[: selection_bases or base_seeds]
    todo = list(candidates(settings, chosen, few, selection_seeds))
    selection = run_sweep(todo, folder / "selection", asked, jobs, say)
    final = list(measured(settings, selection, chosen, bases, floor))
    test = run_sweep(final, folder / "test", asked, jobs, say)
    replace_file(folder / "remedies.png", png(figure(selection, test, chosen, floor)))
    text = markdown(settings, selection, test, chosen, floor)
    replace_file(folder / "remedies.md", text.encode())
    return selection, test


def markdown(
    settings: DigitSettings,
    selection: RunDirectory,
    test: RunDirectory,
    chosen: Sequence[Family],
    floor: tuple[float, float],
) -> str:
    """Return the report of both runs."""
    base = Sample(tuple(100 * row["accuracy"] for row in bases_of(test)))
    count = len(base.values)
    seeds = f"{settings.seeds} adapter seeds on each of {count} bases"
    points = f"{floor[0]} and {floor[1]} points"
    held = selection.rows[0]["n"] // 10
    parts = [
        f"# Remedies, preset {settings.preset}",
        f"{test.environment['data']}; accuracy of the bases: {base.mean_sd(2)} % (n = {count}, "
        f"lowest to highest {base.min_max(2)}). Gains over each adapter's base in points, mean ± "
        f"sd over {seeds}, test images. `needs`: the images of other digits that a remedy needs."
        f"{small_note(test.environment['data'])}",
        table(selection, test, chosen, floor).markdown(),
        f"Chosen by {held} validation images per digit, on bases pre-trained without them, "
        f"over {selection.settings['selection_seeds']} adapter seeds on each of "
        f"{selection.settings['selection_bases']} bases. "
        f"The choice has the highest gain among the candidates that gain at least {points} on "
        "tuned and on other digits. If no candidate does, it is the best of all. `validation`: its "
        "gain on the validation images; `of`: the number of candidates.",
    ]
    return "\n\n".join(parts) + "\n"


def figure(
    selection: RunDirectory,
    test: RunDirectory,
    chosen: Sequence[Family],
    floor: tuple[float, float],
) -> Figure:
    """Draw each remedy's gains on all, tuned and other digits of the test images, mean ± sd."""
    made, axes = plt.subplots(figsize=(8.5, 0.36 * len(chosen) + 1.2), layout="constrained")
    for line, family in enumerate(reversed(chosen)):
        _, strength = choose(selection, family, floor)
        for values, (name, colour, up) in zip(
            gains(test, family.name, strength), SIDES, strict=True
        ):
            band = Sample(tuple(values))
            label = name if line == 0 else None
            axes.errorbar(
                band.mean, line + up, xerr=band.sd, fmt="o", ms=4, color=colour, label=label, lw=1
            )
    axes.axvline(0, color="#333333", linewidth=0.8)
    names = [f.name if f.old == "nothing" else f"{f.name}  [{f.old}]" for f in reversed(chosen)]
    axes.set_yticks(range(len(chosen)), names, fontsize=8)
    axes.set_xlabel("gain over each adapter's base, points, test images")
    axes.set_xscale("symlog", linthresh=3)
    low, high = axes.get_xlim()
    ticks = [
        tick for tick in (-50, -20, -10, -5, -3, -2, -1, 0, 1, 2, 3, 10) if low <= tick <= high
    ]
    axes.set_xticks(ticks, [f"{tick:+d}" if tick else "0" for tick in ticks])
    axes.grid(axis="x", color="#eeeeee")
    axes.spines[["top", "right"]].set_visible(False)
    made.legend(frameon=False, ncols=3, loc="outside upper center")
    return made


def bases_of(run: RunDirectory) -> list[Row]:
    """Return one row per base."""
    return list({r["base_seed"]: r for r in run.rows if r["stage"] == "base"}.values())


def table(
    selection: RunDirectory, test: RunDirectory, chosen: Sequence[Family], floor: tuple
) -> Table:
    """Return each remedy's gains on the test images and its chosen settings."""
    head = ["remedy", "needs", "all", "tuned", "other", "n", "validation", "of", "chosen"]
    rows = []
    for family in chosen:
        number, strength = choose(selection, family, floor)
        bands = [Sample(tuple(values)) for values in gains(test, family.name, strength)]
        validation = mean(gains(selection, f"{family.name} #{number}", strength)[0])
        shown = [f"{band.mean:+.2f} ± {band.sd or 0:.2f}" for band in bands]
        changes = dict(family.candidates[number])
        changes |= {"strength": strength} if len(family.strengths) > 1 else {}
        tried = len(family.candidates) * len(family.strengths)
        cells = [family.name, family.old, *shown]
        cells += [str(len(bands[0].values)), f"{validation:+.2f}", str(tried)]
        rows.append(
            [*cells, ", ".join(f"{k} {listed(v)}" for k, v in changes.items()) or "as preset"]
        )
    return Table(head, rows)
