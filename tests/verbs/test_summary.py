"""The summary: sites, skipped tensors with the reason, and gradients after a backward."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import paramlora as pl
from paramlora import Delta, LoRA
from tests.support.helpers import refuses, unchanged
from tests.support.models import Net, attached, half_merged, plain


def skipped(summary: pl.Summary) -> dict[str, tuple[str, bool]]:
    return {one.tensor: (one.reason, one.trainable) for one in summary.skipped}


def test_skipped_tensors() -> None:
    """Each tensor of the base is a site, or is listed as skipped with the reason."""
    model: Any = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 2))
    specs: Any = {"0[:2]": LoRA(2), "*.weight": LoRA(1), "2.bias": Delta()}
    summary = pl.attach(model, specs, exclude="1", freeze=False)
    assert [row.site for row in summary.sites] == ["0.weight[:2]", "2.weight", "2.bias"]
    assert skipped(summary) == {
        "0.bias": ("matching no target", True),
        "1.weight": ("left out by exclude=", True),
        "1.bias": ("matching no target", True),
        "0.weight": ("decided by an earlier target", True),
    }
    assert summary.skipped[-1].shape == (3, 4)
    again = pl.attach(model, LoRA(1), ["0"], name="again")
    assert skipped(again)["2.weight"] == ("matching no target", False)
    assert str(again).splitlines()[-3:] == [
        "active: again; switched off by this call: default",
        "skipped, frozen: 5 matching no target (0.bias, 1.weight, 1.bias, 2.weight, 2.bias)",
        "trainable 7 of the base's 29 (24.14%)",
    ]
    bare = ("0.bias", "1.weight", "1.bias")
    assert skipped(pl.summary(model)) == dict.fromkeys(bare, ("without an adapter", False))


def test_tied_tensor_is_not_skipped() -> None:
    """A tensor that is adapted under another path is not listed as skipped."""
    model: Any = nn.ModuleDict({"embed": nn.Embedding(7, 4), "head": nn.Linear(4, 7)})
    model["head"].weight = model["embed"].weight
    assert set(skipped(pl.attach(model, LoRA(2), "head"))) == {"head.bias"}


class Half(nn.Module):
    """A model with a layer that it never calls and a layer with zero gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused, self.zero = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x) + 0 * self.zero(x)


def gradients(model: nn.Module) -> dict[str, tuple[bool | None, str]]:
    return {f"{r.site} {r.adapter}": (r.gradient, r.note) for r in pl.summary(model).sites}


def test_sites_without_gradients() -> None:
    """After a backward, sites whose factors got no gradient are listed with the reason."""
    model = Half()
    pl.attach(model, LoRA(2), name="a")
    assert {row.gradient for row in pl.summary(model).sites} == {None}
    model(torch.ones(3, 4)).sum().backward()
    assert gradients(model) == {
        "used.weight a": (True, ""),
        "unused.weight a": (False, "no gradient"),
        "zero.weight a": (False, "the gradient is zero"),
    }
    lines = str(pl.summary(model)).splitlines()
    assert [line.split()[0] for line in lines if line.endswith("no gradient")] == ["unused.weight"]
    fresh = pl.attach(model, Delta(), "used", name="b", activate="no")
    assert [(row.adapter, row.gradient) for row in fresh.sites[:2]] == [("a", True), ("b", None)]
    pl.attach(model, LoRA(2), "used.weight[:2]", name="c", activate="no")
    pl.enable(model, "c")
    pl.merge(model, "c")
    pl.freeze(model, "a")
    model.zero_grad()
    pl.parameters(model.used, "a")[0].grad = torch.ones(2, 4)
    pl.unfreeze(model, "a")
    found = gradients(model)
    assert found["used.weight a"] == (True, "no gradient in B")
    assert found["used.weight b"] == (False, "no gradient, it is switched off")
    assert found["used.weight[:2] c"] == (False, "no gradient, it is merged")


def test_gradients_of_the_base() -> None:
    """Gradients of the base from before attaching do not count as a backward of adapters."""
    model = Half()
    model(torch.ones(3, 4)).sum().backward()
    pl.attach(model, LoRA(2))
    assert {row.gradient for row in pl.summary(model).sites} == {None}


def tied() -> nn.Module:
    model: Any = nn.ModuleDict({"embed": nn.Embedding(7, 4), "head": nn.Linear(4, 7)})
    model["head"].weight = model["embed"].weight
    return model


def normed() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    weight_norm(model[0])
    return model


def failing(A: Tensor) -> None:
    raise AssertionError("a dry run drew")


DRY: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "all": (plain, {"spec": Delta(), "targets": "*"}),
    "a mapping": (plain, {"spec": {"fc?": LoRA(2), "rnn.weight*[:5]": LoRA(9, 3)}}),
    "blocks": (plain, {"spec": LoRA(2, 4), "targets": ["fc1[3:]", "fc1[:2]", "emb"]}),
    "excluded": (plain, {"spec": LoRA(2), "exclude": "fc2"}),
    "not frozen": (plain, {"spec": LoRA(2), "freeze": False}),
    "beside others": (attached, {"spec": LoRA(2), "targets": ["fc2", "emb"]}),
    "on top of others": (attached, {"spec": LoRA(2), "targets": "fc2", "activate": "also"}),
    "switched off": (attached, {"spec": LoRA(2), "targets": "fc2", "activate": "no"}),
    "beside merged ones": (
        half_merged,
        {"spec": Delta(), "targets": "*", "freeze": False, "activate": "also"},
    ),
    "tied": (tied, {"spec": LoRA(2), "targets": ["head[2:]", "embed[:1]"]}),
    "weight_norm": (normed, {"spec": LoRA(2), "targets": ["0", "1"]}),
    "a batch": (lambda: nn.ParameterDict({"w": torch.ones(5, 4, 3)}), {"targets": "w"}),
}


@pytest.mark.parametrize(("make", "options"), DRY.values(), ids=DRY.keys())
def test_dry_run(
    make: Callable[[], nn.Module], options: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """A dry run prints and returns the summary of the real attach, and changes nothing."""
    options = {"spec": LoRA(2, 3, batch_dims=1), "name": "new", **options}
    model, generator = make(), torch.Generator().manual_seed(3)
    state, own = torch.get_rng_state(), generator.get_state()
    with unchanged(model):
        dry = pl.attach(model, **options, generator=generator, dry_run=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(generator.get_state(), own)
    printed = capsys.readouterr().out
    assert printed == f"{dry}\n"
    real = pl.attach(model, **options, generator=generator)
    assert dry == dataclasses.replace(real, dry_run=True)
    assert printed == f"dry run: nothing is changed; after attach it would be\n{real}\n"
    assert capsys.readouterr().out == ""


def test_dry_run_calls_no_init() -> None:
    """A dry run calls no init."""
    pl.attach(plain(), LoRA(2, init=failing), dry_run=True)


def test_dry_run_raises() -> None:
    """A dry run raises the errors of the real attach."""
    refuses(
        Net(),
        lambda model: pl.attach(model, LoRA(2), "fc9", dry_run=True),
        pl.TargetError,
        "no tensor matches 'fc9'; did you mean fc2, fc1?",
    )


def test_rank_above_the_smaller_side() -> None:
    """A rank above the smaller side of the matrix is allowed, and the summary marks it."""
    model = plain()
    rows = pl.attach(model, LoRA(rank=4), name="wide").sites
    assert [(row.site, row.note) for row in rows] == [
        ("fc1.weight", ""),
        ("fc2.weight", "rank above the smaller side"),
    ]
    assert "rank above the smaller side" in str(pl.summary(model)).splitlines()[2]
    assert [row.parameters for row in rows] == [4 * (5 + 4), 4 * (4 + 3)]
