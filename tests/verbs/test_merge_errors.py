"""Errors of `merge`, `unmerge`, `bake` and `detach`, word by word."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import paramlora as pl
from paramlora import LoRA
from tests.support.helpers import Row, enter, refuses
from tests.support.models import Tied, attached, half_merged, plain, tied_on_one_side


def tied() -> nn.Module:
    model = Tied()
    pl.attach(model, LoRA(rank=2), "emb")
    return model


def overwritten() -> nn.Module:
    """Return the model of `half_merged` after a write to a merged weight."""
    model = half_merged()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key == "fc1.weight":
                parameter.add_(1)
    return model


def spectral() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(parametrizations.spectral_norm(nn.Linear(5, 4)), nn.Linear(4, 3))
    pl.attach(model, LoRA(rank=2, init="gaussian"))
    with torch.no_grad():
        for parameter in pl.parameters(model):
            parameter.normal_()
    return model


MERGING: dict[str, Row] = {
    "merging an adapter that is off": (
        attached,
        lambda m: pl.merge(m, "digits", "letters"),
        pl.StateError,
        "adapter 'letters' is switched off, so merging it would change what the model computes; "
        "enable it first",
    ),
    "merging without adapters": (
        plain,
        lambda m: pl.merge(m),
        pl.StateError,
        "no adapter is attached here; attach or load one first, or call this on the model that "
        "has adapters",
    ),
    "merging all when all are off or merged": (
        half_merged,
        lambda m: pl.merge(m),
        pl.StateError,
        "nothing to merge: of the adapters here ('digits', 'letters') each is merged already or "
        "switched off; unmerge or enable first",
    ),
    "merging a tie with an adapter on one side": (
        tied_on_one_side,
        lambda m: pl.merge(m),
        pl.StateError,
        "'emb.weight' and 'head.weight' are tied, and adapters were attached to one side alone, "
        "through a part of the model; detach those, and attach to the whole",
    ),
    "unmerging after a write": (
        overwritten,
        lambda m: pl.unmerge(m),
        pl.StateError,
        "'fc1.weight' was written to since the merge, and unmerging would lose that; bake keeps it",
    ),
    "weight_norm on a merged weight": (
        half_merged,
        lambda m: parametrizations.weight_norm(m.fc1),
        pl.StateError,
        "_WeightNorm cannot take over a tensor into which adapter 'digits' is merged; unmerge "
        "first",
    ),
    "merging in a block of merged": (
        half_merged,
        lambda m: enter(pl.merged(m, "letters")),
        pl.StateError,
        "cannot merge adapter 'digits' while it is merged; unmerge first",
    ),
    "merging over spectral_norm": (
        spectral,
        lambda m: pl.merge(m),
        pl.StateError,
        "cannot merge at '0.weight': _SpectralNorm below the adapter cannot store the merged "
        "weight; remove it first, or leave the adapter unmerged",
    ),
    "baking with an adapter off": (
        attached,
        lambda m: pl.bake(m),
        pl.StateError,
        "adapter 'letters' is switched off and would be lost; enable it, or detach it",
    ),
    "baking one side of a tie": (
        tied,
        lambda m: pl.bake(m.head),
        pl.StateError,
        "'weight' shares its adapter with a tensor outside of this module: emb.weight, head.weight "
        "are tied; call it on a module that holds them all",
    ),
    "detaching one side of a tie": (
        tied,
        lambda m: pl.detach(m.emb),
        pl.StateError,
        "'weight' shares its adapter with a tensor outside of this module: emb.weight, head.weight "
        "are tied; call it on a module that holds them all",
    ),
}


@pytest.mark.parametrize("row", MERGING.values(), ids=MERGING.keys())
def test_invalid_call(row: Row) -> None:
    """A call that cannot be carried out raises, says what to do, and changes nothing."""
    make, call, error, message = row
    refuses(make(), call, error, message)
