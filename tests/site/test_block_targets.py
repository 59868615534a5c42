"""Targets with an index: which block they mean, and what is refused."""

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import paramlora as pl
from paramlora import LoRA
from paramlora.site.block import Block, split
from tests.support.helpers import LEAVE_OUT, refuses
from tests.support.models import QKV, layer


def bits(actual: object, expected: object) -> None:
    assert_close(actual, expected, rtol=0, atol=0)


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
def test_refused_blocks(target: Any, message: str) -> None:
    """An index that a tensor does not have is refused with its shape, and nothing changes."""
    refuses(layer(), lambda m: pl.attach(m, LoRA(2), target), pl.TargetError, message)


@pytest.mark.parametrize("index", ["", "[2:]"])
def test_refused_exclusions(index: str) -> None:
    """A block cannot be left out of a whole, nor of another block."""
    refuses(
        layer(),
        lambda m: pl.attach(m, LoRA(2), f"qkv{index}", exclude="qkv[:4]"),
        pl.TargetError,
        f"cannot leave 'qkv.weight[:4]' out of 'qkv.weight{index}': exclude= takes whole tensors, "
        "or a block that a target names; name the other blocks as targets",
    )


def test_brackets_of_a_glob() -> None:
    """Brackets that read as an index are one; elsewhere in a glob they are characters."""
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
    # A module that is called so is meant as it is called.
    assert pl.attach(model, LoRA(1), "fc[0]").sites[0].site == "fc[0].weight"


@pytest.mark.parametrize("text", ["[:, :3]", "[2]", "[1:-1, -1]", "[ 0 : 4 ,1: ]", "[:2, :, 1:2]"])
def test_an_index_is_read_as_python_reads_it(text: str) -> None:
    """A block is what Python's own index gives, and its text means the same block again."""
    x = torch.arange(60).view(5, 4, 3)
    index: Callable[[str], Any] = lambda text: eval(f"x{text}", {"x": x})  # noqa: E731
    path, parts = split(f"path{text}")
    block = Block.of(parts or (), x.shape)
    assert path == "path"
    assert block is not None
    bits(block.cut(x), index(text))
    bits(index(str(block)), index(text))
    written = block.put(x, -index(text))
    expected = x.clone()
    exec(f"x{text} *= -1", {"x": expected})
    bits(written, expected)


def test_the_first_target_counts() -> None:
    """A tensor of which blocks were named first is not adapted as a whole, nor the other way."""
    for specs, sites in (
        ({"qkv[:4]": LoRA(1), "*": LoRA(2)}, ["experts", "qkv.weight[:4]"]),
        ({"qkv.weight": LoRA(1), "qkv[:4]": LoRA(2)}, ["qkv.weight"]),
        ({"qkv[:4]": LoRA(1), "qkv[0:4, :]": LoRA(2)}, ["qkv.weight[:4]"]),
    ):
        summary = pl.attach(layer(), cast(Any, specs), exclude="*.bias")
        assert [row.site for row in summary.sites] == sites
        assert summary.sites[-1].rank == 1


def test_all_of_a_tensor_is_the_tensor() -> None:
    """An index that leaves nothing out means the whole."""
    model = layer()
    pl.attach(model, LoRA(2), "qkv[:, 0:4]")
    assert list(pl.state_dict(model)) == ["qkv.weight.A", "qkv.weight.B"]


def test_exclude_takes_tensors_and_blocks() -> None:
    """`exclude` leaves out a tensor with its blocks, before they are looked for, or one block."""
    model = nn.ModuleList([layer(), layer(), nn.Linear(2, 2)])
    targets = [*QKV, "*.weight[:3]"]
    with pytest.raises(pl.TargetError, match=r"'2\.weight', which has shape \(2, 2\)"):
        pl.attach(model, LoRA(2), "*.weight[:3]")
    summary = pl.attach(model, LoRA(2), targets[:3], exclude=["1.*", "0.qkv[4:8]", "2"])
    assert [row.site for row in summary.sites] == ["0.qkv.weight[:4]", "0.qkv.weight[8:]"]
    pl.detach(model)
    pl.attach(model, LoRA(2), "*.weight[:3]", exclude="2")
