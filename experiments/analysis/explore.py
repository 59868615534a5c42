"""What a report page lets its reader try out: answers at every strength and set of layers.

For any model with adapters, any loader and class list. The result is plain numbers, so that a page
needs no model; images are packed into one PNG beside their answers.
"""

import base64
import io
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import paramlora as pl

from ..harness.settings import StudyError
from .insight import Answers, Loader, answers_of, only_at, sites_of

STRENGTHS = (0.0, 0.125, 0.25, 0.375, 0.5, 0.75, 1.0, 1.25, 1.5)
COLUMNS = 32  # images side by side in the sprite
LogitsAt = Callable[[str, Sequence[str], Sequence[float]], Tensor]


def explore(
    model: nn.Module,
    loader: Loader,
    classes: Sequence[str],
    *,
    tuned: Sequence[int] = (),
    images: Tensor | None = None,
    strengths: Sequence[float] = STRENGTHS,
    every_layer: Sequence[str] = (),
    a_cell: int = 6,
    most: int = 6,
    logits: LogitsAt | None = None,
) -> dict[str, Any]:
    """Return a model's answers with each of its adapters, at each strength and set of layers.

    Args:
        model: with adapters; one at a time is switched on. It is left as it was.
        loader: batches of inputs and labels, in an order that does not change.
        classes: their names, by label.
        tuned: the labels of those that the adapters were trained on.
        images: uint8 (n, h, w) or (n, h, w, 3), in the loader's order, to be shown, or none.
        strengths: λ; 0, the base, is among them or is added.
        every_layer: the adapters that also get every set of layers, 2ⁿ for n sites.
        a_cell: images kept for each cell of a confusion matrix, at each state.
        most: sites for which every set is tried; with more, only all together.
        logits: what gives the logits with one adapter on, `(name, sites, strengths)` to (strengths,
            n, classes) on the CPU, where there is a faster way than the model's own passes.

    Raises:
        StudyError: no adapter, or class names and outputs that do not match.
    """
    batches = list(loader)
    names = list(dict.fromkeys(row.adapter for row in pl.summary(model).sites))
    if not names:
        raise StudyError("the model has no adapter: attach one, or load it, first")
    strengths, sites = sorted({0.0, *map(float, strengths)}), sites_of(model)
    whole = (1 << len(sites)) - 1
    labels = torch.cat([y.cpu() for _, y in batches])

    def at(name: str, mask: int) -> list[Answers]:
        its = [site for number, site in enumerate(sites) if mask >> number & 1]
        if logits is None:
            return _at(model, batches, name, its, strengths)
        return [Answers(one, labels) for one in logits(name, its, strengths)]

    found: dict[str, dict[str, list[Answers]]] = {}
    for name in names:
        masks = range(1, whole + 1) if name in every_layer and len(sites) <= most else [whole]
        found[name] = {str(mask): at(name, mask) for mask in masks}
    first = found[names[0]][str(whole)][0]
    if first.logits.shape[1] != len(classes):
        raise StudyError(f"{len(classes)} class names, but {first.logits.shape[1]} outputs")
    data: dict[str, Any] = {
        "classes": list(classes),
        "tuned": list(tuned),
        "sites": sites,
        "strengths": list(strengths),
        "base": first.confusion,
        "adapters": {
            name: {mask: [a.confusion for a in row] for mask, row in states.items()}
            for name, states in found.items()
        },
    }
    if images is not None:
        data["images"] = _pictures(images, first.labels, found, a_cell)
    return data


def _at(
    model: nn.Module, batches: Loader, name: str, sites: Sequence[str], strengths: Sequence[float]
) -> list[Answers]:
    """Return the answers with one adapter on at these sites, at each strength."""
    found = []
    for strength in strengths:
        with only_at(model, sites, name, strength=strength):
            found.append(answers_of(model, batches))
    return found


def _pictures(
    images: Tensor, labels: Tensor, found: Mapping[str, Mapping[str, list[Answers]]], a_cell: int
) -> dict[str, Any]:
    """Return a sprite of some images of every cell of every state, with all their answers."""
    states = [a for row in found.values() for its in row.values() for a in its]
    classes = states[0].logits.shape[1]
    picked: dict[int, None] = {}
    for answers in states:
        cells = labels * classes + answers.given
        sizes = torch.bincount(cells, minlength=classes**2).tolist()
        for its in cells.argsort(stable=True).split(sizes):
            here = its.tolist()
            # Those that are in already come first, so that a page needs few images.
            known = list(itertools.islice((row for row in here if row in picked), a_cell))
            new = itertools.islice((row for row in here if row not in picked), a_cell - len(known))
            picked.update(dict.fromkeys(new))
    rows = torch.tensor(sorted(picked))
    return {
        "sprite": sprite(images[rows]),
        "columns": COLUMNS,
        "width": images.shape[2],
        "height": images.shape[1],
        "labels": labels[rows].tolist(),
        "answers": {
            name: {mask: [a.given[rows].tolist() for a in its] for mask, its in row.items()}
            for name, row in found.items()
        },
    }


def sprite(images: Tensor, columns: int = COLUMNS) -> str:
    """Return images side by side, row by row, as the data URI of one PNG.

    Args:
        images: uint8 (n, h, w), grey, or (n, h, w, 3).
        columns: images in a row.
    """
    from PIL import Image

    n, h, w = images.shape[:3]
    lines = -(-n // columns)
    sheet = torch.zeros(lines * h, columns * w, *images.shape[3:], dtype=torch.uint8)
    for number, image in enumerate(images):
        y, x = divmod(number, columns)
        sheet[y * h : (y + 1) * h, x * w : (x + 1) * w] = image
    # Not optimize=True: ten times the time for 3 % of the bytes.
    return _data_uri(lambda file: Image.fromarray(sheet.numpy()).save(file, "PNG"))


def _data_uri(write: Callable[[io.BytesIO], object]) -> str:
    file = io.BytesIO()
    write(file)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
