"""A page on what one adapter of a digit run changed: predictions, layers, geometry.

    python -m experiments report runs/digits-blog --explain

The adapter is loaded and evaluated. Nothing is trained, unless the run's base is missing.
"""

from pathlib import Path
from typing import Any

from ...harness.adapters import load_adapter
from ...harness.rundir import RunDirectory, replace_file
from ...harness.settings import replace
from ...report.explanation import explanation
from ...report.page import page
from ..settings import DigitSettings
from ..shared import context_of, counted_images

DIGITS = list("0123456789")


def settings_of(run: RunDirectory, **places: Any) -> DigitSettings:
    """Return a run's settings. `places`: new values of the settings that are folders."""
    kept = {k: tuple(v) if isinstance(v, list) else v for k, v in run.settings.items()}
    return replace(DigitSettings(), **kept, **places)


def explain(folder: Path, seed: int | None = None, **places: Any) -> Path:
    """Write explain.html, on a run's adapter of one seed (default: the first), into its folder.

    Returns:
        The path of the page.
    """
    run = RunDirectory.read(folder)
    context = context_of(settings_of(run, **places))
    seed = context.settings.seed_from if seed is None else seed
    model, test = context.model(), [(context.test_inputs, context.test_labels)]
    load_adapter(model, folder, f"lora-{seed}", "lora")
    images = counted_images(context.settings)
    sections = explanation(model, test, DIGITS, tuned=context.tuned, images=images)
    title = f"What adapter {seed} of preset {context.settings.preset} changed"
    digits = ", ".join(map(str, context.tuned))
    lead = f"{run.environment['data']}, {len(images):,} images; tuned on {digits}."
    replace_file(folder / "explain.html", page(title, lead, sections).encode())
    return folder / "explain.html"
