"""Loading files of several ranks into one attached LoRA, the slot."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import paramlora as pl
from paramlora.integrations.diffusers import load_diffusers, save_diffusers
from tests.support.helpers import pattern, unchanged
from tests.support.reference import shake

Save = Callable[..., Any]


def base() -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 6), nn.Tanh(), nn.Conv1d(1, 4, 3), nn.Linear(4, 3))
    return model.double()


def saved(path: Path, spec: Any, targets: Any = "*.weight", save: Save = pl.save) -> Path:
    """Save an adapter of random factors, whose strength is not 1."""
    model = base()
    pl.attach(model, spec, targets, name="file")
    shake(model)
    pl.scale(model, 0.75)
    save(model, path)
    return path


def slotted(rank: int = 16, **settings: Any) -> Any:
    model = base()
    pl.attach(model, pl.LoRA(rank, **settings), "*.weight", name="slot")
    shake(model)
    return model


@pytest.mark.parametrize(
    "slot", [{}, {"alpha": 5, "rank_stabilized": True}, {"transposed": True}], ids=str
)
@pytest.mark.parametrize(
    ("save", "load"),
    [(pl.save, pl.load), (pl.save_peft, pl.load_peft), (save_diffusers, load_diffusers)],
)
def test_ranks_up_to_the_slot(tmp_path: Path, slot: dict[str, Any], save: Save, load: Save) -> None:
    """Each file in turn gives the weights that it gives as an adapter of its own."""
    model = slotted(**slot)
    for i, (spec, targets) in enumerate(
        [
            (pl.LoRA(2, alpha=3), "*.weight"),
            (pl.LoRA(16, rank_stabilized=True), "*.weight"),
            (pl.LoRA(8), ["0.weight", "3.weight"]),
            (pl.LoRA(2, init="pissa"), "0.weight"),  # of rank 4, as a product of two factors
        ]
    ):
        path = saved(tmp_path / str(i), spec, targets, save)
        alone = base()
        load(alone, path, name="alone")
        load(model, path, into="slot")
        assert_close(pl.merged_state_dict(model), pl.merged_state_dict(alone))
        again = base()
        pl.save(model, tmp_path / "again")  # a file of the slot's rank
        pl.load(again, tmp_path / "again")
        assert_close(pl.merged_state_dict(again), pl.merged_state_dict(alone))


def test_the_slot_keeps_its_settings(tmp_path: Path) -> None:
    """Spec, strength, activity and factors' identity stay; another adapter does not change."""
    model = slotted()
    pl.attach(model, pl.LoRA(2), "0.weight", name="other")
    pl.scale(model, 0.5, "slot")
    before = copy.deepcopy(pl.state_dict(model, "other"))
    pointers = [p.data_ptr() for p in pl.parameters(model)]
    was = [(row.adapter, row.rank, row.scale, row.active) for row in pl.summary(model).sites]
    pl.load(model, saved(tmp_path / "file", pl.LoRA(4)), into="slot")
    now = [(row.adapter, row.rank, row.scale, row.active) for row in pl.summary(model).sites]
    assert now == was
    assert pointers == [p.data_ptr() for p in pl.parameters(model)]
    assert_close(pl.state_dict(model, "other"), before, rtol=0, atol=0)
    pl.load(model, tmp_path / "file", into="slot", activate="only")
    assert pl.summary(model).active == ("slot",)


def test_training_a_slot(tmp_path: Path) -> None:
    """A slot trains as the file does alone: the padding has no gradient and stays zero."""
    path = saved(tmp_path / "file", pl.LoRA(2, alpha=2))
    model, alone = slotted(4, alpha=4), base()
    pl.load(model, path, into="slot")
    pl.load(alone, path)
    pl.scale(alone, 1.0)
    with torch.no_grad():  # the slot has the strength of the file in its B
        for key, factor in pl.state_dict(alone).items():
            factor.mul_(0.75 if key.endswith("B") else 1)
    for one in (model, alone):
        optimizer = torch.optim.AdamW(pl.parameters(one), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            one(torch.linspace(-1, 1, 7).double()[None]).square().sum().backward()
            optimizer.step()
    assert_close(pl.merged_state_dict(model), pl.merged_state_dict(alone))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            {"0.weight": pl.LoRA(5)},
            "[...] has rank 5 at '0.weight', and the slot has rank 4; attach a slot of rank 5 or "
            "more",
        ),
        ({"0.weight": pl.DoRA(2)}, "[...] has DoRA([...]) at '0.weight', which no LoRA [...]"),
        (
            {"0.weight": pl.LoRA(2), "0.bias": pl.Delta()},
            "[...] adapts 0.bias, and the slot 'slot' does not; attach a slot that adapts the "
            "tensors of all files",
        ),
    ],
)
def test_files_that_do_not_fit(tmp_path: Path, spec: Any, message: str) -> None:
    """A file that does not fit is refused, and the model is bit-identical afterwards."""
    path, model = saved(tmp_path / "file", spec, None), slotted(4)
    with unchanged(model), pytest.raises(pl.CheckpointError, match=pattern(message)):
        pl.load(model, path, into="slot")


def test_slots_that_take_no_files(tmp_path: Path) -> None:
    """A slot must be attached, unmerged, and a LoRA whose values are its factors'."""
    path, model = saved(tmp_path / "file", pl.LoRA(2), "0.weight"), slotted(4)
    with unchanged(model), pytest.raises(pl.AdapterNameError, match=r"'slto'.*'slot'"):
        pl.load(model, path, into="slto")
    with unchanged(model), pytest.raises(ValueError, match=r"into='slot' .* pass no name"):
        pl.load(model, path, name="other", into="slot")
    pl.merge(model)
    with unchanged(model), pytest.raises(pl.StateError, match="'slot' while it is merged"):
        pl.load(model, path, into="slot")
    for spec in (pl.LoRA(2, init="pissa"), pl.LoRA(2, alpha=0), pl.IA3()):
        model = base()
        pl.attach(model, spec, "0.weight", name="slot")
        with unchanged(model), pytest.raises(pl.StateError, match="a slot is a LoRA without"):
            pl.load(model, path, into="slot")
