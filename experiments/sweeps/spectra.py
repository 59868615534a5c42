"""The intruder dimensions of an adapter or of a full fine-tuning, and the effect of scaling them.

The top intruder of each weight is scaled down to λ in all weights that have one. The control scales
the nearest vector that is no intruder, with the intruder's singular value, so that the change of
the weight has the same norm.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.func import functional_call

from ..analysis.evaluate import score
from ..analysis.intruders import Spectrum, compared, scaled, spectrum
from ..digits.context import StudyContext
from ..digits.methods import lora_of
from ..digits.strengths import updates
from ..harness.rundir import Row
from .cells import Cell

EPSILON = 0.5  # a vector with a smaller similarity is an intruder
STRENGTHS = (0.0, 0.3, 0.7)


def by_path(deltas: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the updates of full fine-tuning by the path of their tensor."""
    return {
        re.sub(r"\.parametrizations\.(\w+)\..*", r".\1", name): delta
        for name, delta in deltas.items()
    }


def deltas(factors: Mapping[str, Tensor], cell: Cell) -> dict[str, Tensor]:
    """Return ΔW of each adapted tensor by path, from the factors of one training of a cell."""
    if cell.full:
        return by_path(factors)
    found = updates(factors, lora_of(cell.settings.adapter).scaling)
    return {f"{path}.weight": scale * (B @ A) for path, (A, B, scale) in found.items()}


@torch.no_grad()
def measured(context: StudyContext, deltas: Mapping[str, Tensor]) -> Row:
    """Return the figures of a training for its row.

        sizes         ‖ΔW‖ / ‖W‖ of each weight
        left, right   similarities of the ten leading singular vectors of each weight
        scaled        accuracies with the top intruder, or with its control, at a strength

    Args:
        context: the base and the test images.
        deltas: the updates by path.
    """
    base = dict(context.model().named_parameters())
    tuned = {path: base[path] + delta for path, delta in deltas.items()}
    weights = {path: weight for path, weight in tuned.items() if path.endswith("weight")}
    spectra = {path: spectrum(base[path], weight) for path, weight in weights.items()}
    return {**compared(base, weights), "scaled": _scaled(context, tuned, spectra)}


def _scaled(
    context: StudyContext, tuned: Mapping[str, Tensor], spectra: Mapping[str, Spectrum]
) -> list[Row]:
    """Return a row for each strength, of the top intruders and of their controls."""
    tops = {
        path: one.intruders(EPSILON)[0] for path, one in spectra.items() if one.intruders(EPSILON)
    }
    controls = {path: spectra[path].neighbour(top, EPSILON) for path, top in tops.items()}
    if not tops or None in controls.values():
        return []
    model, rows = context.model(), []
    for name, chosen in (("intruder", tops), ("neighbour", controls)):
        for strength in STRENGTHS:
            changed = dict(tuned)
            for path, index in chosen.items():
                one, norm = spectra[path], float(spectra[path].S[tops[path]])
                assert index is not None
                changed[path] = scaled(tuned[path], one, [index], strength, norm)
            logits = functional_call(model, changed, context.test_inputs)
            row = score(logits, context.test_labels, context.tuned)
            sides = {side: row[f"{side}_accuracy"] for side in ("tuned", "other")}
            rows.append({"of": name, "strength": strength, **sides})
    return rows
