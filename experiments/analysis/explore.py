"""The data of the report page's explorer: predictions at every strength and subset of layers.

It works for any model with adapters, any loader and any class list. The result is plain numbers,
so that the page needs no model. Images are packed into one PNG next to their predictions.
"""

import base64
import io
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..harness.settings import StudyError
from .insight import Loader, Predictions, names_of, only_at, predict, sites_of

STRENGTHS = (0.0, 0.125, 0.25, 0.375, 0.5, 0.75, 1.0, 1.25, 1.5)
COLUMNS = 32  # images per row of the sprite sheet
LogitsFunction = Callable[[str, Sequence[str], Sequence[float]], Tensor]
# Predictions by adapter name, then by the bit mask of active sites, then one per strength.
States = Mapping[str, Mapping[str, Sequence[Predictions]]]


def explore(
    model: nn.Module,
    loader: Loader,
    classes: Sequence[str],
    *,
    tuned: Sequence[int] = (),
    images: Tensor | None = None,
    strengths: Sequence[float] = STRENGTHS,
    all_subsets: Sequence[str] = (),
    pictured: Sequence[str] | None = None,
    mean: bool = False,
    per_cell: int = 6,
    max_sites: int = 6,
    logits: LogitsFunction | None = None,
) -> dict[str, Any]:
    """Return a model's predictions with each adapter, by strength and by subset of layers.

    Args:
        model: with adapters. They are activated one at a time; the model is left unchanged.
        loader: batches of inputs and labels, in the same order every time.
        classes: their names, by label.
        tuned: the labels that the adapters were trained on.
        images: uint8 (n, h, w) or (n, h, w, 3) in the loader's order, to show on the page.
        pictured: adapters whose cells show images, by default all. Images are most of the result.
        strengths: values of λ; 0, the base, is added if it is missing.
        all_subsets: adapters that are also evaluated at every subset of the n sites, 2ⁿ of them.
        mean: the adapters differ in their seeds only, so that the page opens on their mean.
        per_cell: images kept for each cell of a confusion matrix, in each state.
        max_sites: with more sites than this, only the full set is evaluated.
        logits: a faster replacement for the model's own forward passes. It takes an adapter's
            name, sites and strengths, and returns logits (strengths, n, classes) on the CPU.

    Raises:
        StudyError: the model has no adapter, or the class names do not match its outputs.
    """
    batches = list(loader)
    names = names_of(model)
    if not names:
        raise StudyError("the model has no adapter: attach one, or load it, first")
    strengths, sites = sorted({0.0, *map(float, strengths)}), sites_of(model)
    labels = torch.cat([y.cpu() for _, y in batches])
    # A subset of the n sites is a bit mask, as a string: bit i says whether site i is active.
    # With three sites "5" is 0b101, the first and the third, and "7" is the full set.
    full = (1 << len(sites)) - 1

    def at(name: str, mask: int) -> list[Predictions]:
        active = [site for i, site in enumerate(sites) if mask >> i & 1]
        if logits is None:
            return _predict_at(model, batches, name, active, strengths)
        return [Predictions(one, labels) for one in logits(name, active, strengths)]

    confusion: dict[str, dict[str, list[list[list[int]]]]] = {}
    states: dict[str, dict[str, list[Predictions]]] = {}  # of the adapters with images
    for name in names:
        every = name in all_subsets and len(sites) <= max_sites
        found = {str(mask): at(name, mask) for mask in range(1 if every else full, full + 1)}
        confusion[name] = {mask: [p.confusion for p in row] for mask, row in found.items()}
        if images is not None and (pictured is None or name in pictured):
            states[name] = found
    base = confusion[names[0]][str(full)][strengths.index(0.0)]
    if len(base) != len(classes):
        raise StudyError(f"{len(classes)} class names, but {len(base)} outputs")
    data: dict[str, Any] = {
        "classes": list(classes),
        "tuned": list(tuned),
        "sites": sites,
        "strengths": list(strengths),
        "mean": mean,
        "base": base,
        "adapters": confusion,
    }
    if images is not None and states:
        data["images"] = _image_data(images, labels, states, per_cell)
    return data


def _predict_at(
    model: nn.Module, batches: Loader, name: str, sites: Sequence[str], strengths: Sequence[float]
) -> list[Predictions]:
    """Return the predictions with one adapter active at these sites, at each strength."""
    result = []
    for strength in strengths:
        with only_at(model, sites, name, strength=strength):
            result.append(predict(model, batches))
    return result


def _image_data(images: Tensor, labels: Tensor, states: States, per_cell: int) -> dict[str, Any]:
    """Return a sprite sheet with images for every cell of every state, and their predictions."""
    chosen = torch.tensor(sorted(_choose_images(labels, states, per_cell)))
    return {
        "sprite": sprite(images[chosen]),
        "columns": COLUMNS,
        "width": images.shape[2],
        "height": images.shape[1],
        "labels": labels[chosen].tolist(),
        "answers": {
            name: {mask: [p.predicted[chosen].tolist() for p in row] for mask, row in masks.items()}
            for name, masks in states.items()
        },
    }


def _choose_images(labels: Tensor, states: States, per_cell: int) -> set[int]:
    """Return rows of the data set such that each cell of each state has up to `per_cell` images.

    A cell prefers images that were chosen for earlier cells, and adds new ones if those are too
    few. Most images stay in one cell in most states, so hundreds of states need few images.
    """
    chosen: set[int] = set()
    for predictions in (p for masks in states.values() for row in masks.values() for p in row):
        classes = predictions.logits.shape[1]
        cells = labels * classes + predictions.predicted  # (n,): each image's cell
        sizes = torch.bincount(cells, minlength=classes**2).tolist()
        # Sorted by cell, the images of one cell are neighbours; `sizes` cuts them apart.
        for cell in cells.argsort(stable=True).split(sizes):
            rows = cell.tolist()
            known = list(itertools.islice((row for row in rows if row in chosen), per_cell))
            new = (row for row in rows if row not in chosen)
            chosen.update(list(itertools.islice(new, per_cell - len(known))))
    return chosen


def sprite(images: Tensor, columns: int = COLUMNS) -> str:
    """Return a sprite sheet, the images row by row, as the data URI of one PNG.

    Args:
        images: uint8 (n, h, w), grey, or (n, h, w, 3).
        columns: images per row.
    """
    from PIL import Image

    n, h, w = images.shape[:3]
    rows = -(-n // columns)
    sheet = torch.zeros(rows * h, columns * w, *images.shape[3:], dtype=torch.uint8)
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        sheet[row * h : (row + 1) * h, column * w : (column + 1) * w] = image
    file = io.BytesIO()
    # Without optimize=True, which takes ten times as long for a file 3 % smaller.
    Image.fromarray(sheet.numpy()).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
