"""Targets with an index, such as `qkv[:, :768]`: which block they mean, and their errors."""

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import nn

import paramlora as pl
from paramlora import LoRA
from paramlora.stack.block import Block, split
from tests.support.helpers import LEAVE_OUT, refuses
from tests.support.mixed import assert_bits
from tests.support.models import QKV, fused


def cannot(shape: tuple[int, ...], reason: str, path: str = "qkv.weight") -> str:
    return f"cannot take a block of {path!r}, which has shape {shape}: {reason}"


REFUSED: dict[str, tuple[Any, str]] = {
    "outside": (
        "qkv[:13]",
        cannot((12, 4), ":13 reaches outside of dimension 0, which has size 12"),
    ),
    "outside, negative": (
        "qkv[:, -5:]",
        cannot((12, 4), "-5: reaches outside of dimension 1, which has size 4"),
    ),
    "a place outside": (
        "experts[3]",
        cannot((3, 4, 4), "3 is outside of dimension 0, which has size 3", "experts"),
    ),
    "empty": ("qkv[4:4]", cannot((12, 4), "4:4 takes nothing of dimension 0, which has size 12")),
    "backwards": ("qkv[5:-9]", cannot((12, 4), "5:-9 takes nothing of dimension 0[...]12")),
    "too many": ("qkv[:2, :, 1:]", cannot((12, 4), "it has 2 dimensions, the index 3")),
    "a step": (
        "qkv[::2]",
        "target 'qkv[::2]': [::2] is not a block: give an integer or a slice without a step for "
        "each leading dimension, such as [:, :768]",
    ),
    "an ellipsis": ("qkv[..., :2]", "target 'qkv[..., :2]': [..., :2] is not a block[...]"),
    "overlapping": (
        ["qkv[:4]", "qkv[3:]"],
        "'qkv.weight[:4]' and 'qkv.weight[3:]' overlap; give one adapter blocks that do not, or "
        "attach another adapter under a name of its own",
    ),
    "a vector": (
        "qkv[3]",
        "cannot adapt 'qkv.weight[3]' with LoRA: a low-rank update needs two dimensions, it has 1; "
        f"use Delta() {LEAVE_OUT}",
    ),
    "a glob": (
        "qk[ab]",
        "no tensor matches 'qk[ab]'; there are qkv, experts, qkv.weight, qkv.bias",
    ),
    "nothing": ("qvk[:4]", "no tensor matches 'qvk[:4]'; did you mean qkv[...]"),
}


@pytest.mark.parametrize(("target", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_invalid_index(target: Any, message: str) -> None:
    """An index that does not fit the tensor raises TargetError with its shape."""
    refuses(fused(), lambda m: pl.attach(m, LoRA(2), target), pl.TargetError, message)


@pytest.mark.parametrize("index", ["", "[2:]"])
def test_exclude_part_of_a_target(index: str) -> None:
    """Excluding a part of a targeted tensor or block raises TargetError."""
    refuses(
        fused(),
        lambda m: pl.attach(m, LoRA(2), f"qkv{index}", exclude="qkv[:4]"),
        pl.TargetError,
        f"cannot leave 'qkv.weight[:4]' out of 'qkv.weight{index}': exclude= takes whole tensors, "
        "or a block that a target names; name the other blocks as targets",
    )


def test_brackets_of_a_glob() -> None:
    """Brackets at the end of a target are an index; elsewhere they are a set of characters."""
    model = nn.ModuleDict(
        {"fc1": nn.Linear(2, 2), "fc2": nn.Linear(2, 2), "fc[0]": nn.Linear(2, 2)}
    )
    for target, count in (("fc[12].weight", 2), ("fc[a-z1]", 1), ("fc[[]0].weight", 1)):
        assert len(pl.attach(model, LoRA(1), target, name=target[:3] + str(count)).sites) == count
        pl.detach(model)
    refuses(
        model,
        lambda m: pl.attach(m, LoRA(1), "fc[12]"),
        pl.TargetError,
        "no tensor matches 'fc', of which 'fc[12]' would be a block; for characters of a glob, "
        "name the tensor as well: 'fc[12].weight'",
    )
    # A module whose name ends in brackets is matched by its name.
    assert pl.attach(model, LoRA(1), "fc[0]").sites[0].site == "fc[0].weight"


@pytest.mark.parametrize("text", ["[:, :3]", "[2]", "[1:-1, -1]", "[ 0 : 4 ,1: ]", "[:2, :, 1:2]"])
def test_index_means_what_it_means_in_python(text: str) -> None:
    """A block equals Python's own indexing, and its text parses to the same block."""
    x = torch.arange(60).view(5, 4, 3)
    index: Callable[[str], Any] = lambda text: eval(f"x{text}", {"x": x})  # noqa: E731
    path, parts = split(f"path{text}")
    block = Block.of(parts or (), x.shape)
    assert path == "path"
    assert block is not None
    assert_bits(block.cut(x), index(text))
    assert_bits(index(str(block)), index(text))
    written = block.put(x, -index(text))
    expected = x.clone()
    exec(f"x{text} *= -1", {"x": expected})
    assert_bits(written, expected)


def test_first_target_wins() -> None:
    """If targets name a tensor and its blocks, the first one wins."""
    for specs, sites in (
        ({"qkv[:4]": LoRA(1), "*": LoRA(2)}, ["experts", "qkv.weight[:4]"]),
        ({"qkv.weight": LoRA(1), "qkv[:4]": LoRA(2)}, ["qkv.weight"]),
        ({"qkv[:4]": LoRA(1), "qkv[0:4, :]": LoRA(2)}, ["qkv.weight[:4]"]),
    ):
        summary = pl.attach(fused(), cast(Any, specs), exclude="*.bias")
        assert [row.site for row in summary.sites] == sites
        assert summary.sites[-1].rank == 1


def test_index_of_everything() -> None:
    """An index that covers the whole tensor means the tensor."""
    model = fused()
    pl.attach(model, LoRA(2), "qkv[:, 0:4]")
    assert list(pl.state_dict(model)) == ["qkv.weight.A", "qkv.weight.B"]


def test_exclude() -> None:
    """`exclude` leaves out a tensor with all its blocks, or a single block."""
    model = nn.ModuleList([fused(), fused(), nn.Linear(2, 2)])
    targets = [*QKV, "*.weight[:3]"]
    with pytest.raises(pl.TargetError, match=r"'2\.weight', which has shape \(2, 2\)"):
        pl.attach(model, LoRA(2), "*.weight[:3]")
    summary = pl.attach(model, LoRA(2), targets[:3], exclude=["1.*", "0.qkv[4:8]", "2"])
    assert [row.site for row in summary.sites] == ["0.qkv.weight[:4]", "0.qkv.weight[8:]"]
    pl.detach(model)
    pl.attach(model, LoRA(2), "*.weight[:3]", exclude="2")
