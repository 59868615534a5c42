"""Blocks of a tensor as sites of their own; their arithmetic is also in `test_conformance.py`."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.testing import assert_close

import paramlora as pl
from paramlora import Delta, LoRA
from tests.support.helpers import unchanged
from tests.support.models import QKV, layer
from tests.support.reference import shake


def bits(actual: object, expected: object) -> None:
    assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("targets", "trainable"),
    [
        (["*.c_attn.weight[:, :768]", "*.c_attn[:, 768:1536]", "*.c_attn[:, -768:]"], 2_666_528),
        (["*.c_attn"], 2_371_616),
    ],
)
def test_counts_of_gpt2(targets: list[str], trainable: int) -> None:
    """GPT-2 small with a head of two classes has the published counts, by block and by tensor."""
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        model = nn.ModuleDict(
            {
                "gpt2": transformers.GPT2Model(transformers.GPT2Config()),
                "head": nn.Linear(768, 2),
            }
        )
    summary = pl.attach(model, LoRA(rank=16), [*targets, "*.c_proj", "*.c_fc", "head"])
    assert summary.total == 124_441_346
    assert summary.trainable == trainable
    assert len(summary.sites) == 12 * (3 + len(targets)) + 1


@pytest.mark.parametrize("spec", [LoRA(rank=2), Delta()])
def test_only_the_block_is_updated(spec: pl.kinds.Spec) -> None:
    """The block of W' is the update of the block of W; the rest is W, bit for bit."""
    model = layer()
    W = model.qkv.weight.detach().clone()
    pl.attach(model, spec, ["qkv.weight[4:8, 1:3]", "experts[1]"])
    shake(model)
    factors = {key.rpartition(".")[2]: f for key, f in pl.state_dict(model).items() if "qkv" in key}
    update = factors["B"] @ factors["A"] if "B" in factors else factors["D"]
    expected = W.clone()
    expected[4:8, 1:3] += update
    assert_close(model.qkv.weight.detach(), expected, rtol=1e-6, atol=1e-6)
    outside = torch.ones(12, 4, dtype=torch.bool)
    outside[4:8, 1:3] = False
    bits(model.qkv.weight.detach()[outside], W[outside])
    base = pl.base_state_dict(model)["experts"]
    bits(model.experts.detach()[[0, 2]], base[[0, 2]])
    assert not torch.equal(model.experts[1], base[1])


def test_three_blocks_are_three_adapters_of_parts() -> None:
    """Query, key and value with a block each give what three separate Linears give."""
    model, x = layer(), torch.randn(2, 5, 4)
    pl.attach(model.qkv, LoRA(rank=2), [f"weight[{i}:{i + 4}]" for i in (0, 4, 8)])
    shake(model)
    parts: Any = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
    base = pl.base_state_dict(model.qkv)
    for part, weight, bias in zip(parts, *(base[k].chunk(3) for k in base), strict=True):
        part.load_state_dict(
            {"weight": weight, "bias": bias}
            if weight.dim() == 2
            else {"weight": bias, "bias": weight}
        )
    pl.attach(parts, LoRA(rank=2))
    for ours, theirs in zip(pl.parameters(model), pl.parameters(parts), strict=True):
        theirs.data.copy_(ours)
    found, expected = model.qkv(x), torch.cat([part(x) for part in parts], dim=-1)
    assert_close(found, expected)
    gradients = torch.autograd.grad(found.square().sum(), pl.parameters(model))
    assert_close(gradients, torch.autograd.grad(expected.square().sum(), pl.parameters(parts)))


class Seen(LoRA):
    """A LoRA that counts how often W' is built."""

    built = 0

    def apply(self, weight: Tensor, factors: Any, strength: Any = 1.0) -> Tensor:
        Seen.built += 1
        return super().apply(weight, factors, strength)


def test_a_fused_linear_never_builds_its_weight() -> None:
    """Blocks of a Linear are computed in factored form, forward and backward."""
    model, x = layer(), torch.randn(2, 5, 4)
    pl.attach(model, Seen(rank=2), QKV)
    pl.attach(model, Seen(rank=1), "qkv[:, 1:]", name="columns")
    shake(model)
    Seen.built = 0
    model.qkv(x).sum().backward()
    assert Seen.built == 0
    assert_close(model.qkv(x), nn.functional.linear(x, model.qkv.weight, model.qkv.bias))
    assert Seen.built == 4


def test_a_mapping_gives_each_block_its_spec() -> None:
    """Blocks of one tensor may have other kinds, ranks and scales, and are rows of their own."""
    model = layer()
    specs: Any = {"*.qkv[8:]": Delta(), "qkv[:4]": LoRA(3, 6), "experts[-1]": LoRA(1)}
    summary = pl.attach(model, specs)
    rows = [(row.site, row.shape, row.kind, row.rank, row.scale) for row in summary.sites]
    assert rows == [
        ("experts[2]", (4, 4), "LoRA", 1, 1.0),
        ("qkv.weight[:4]", (4, 4), "LoRA", 3, 2.0),
        ("qkv.weight[8:]", (4, 4), "Delta", None, 1.0),
    ]
    assert [row.share for row in summary.sites] == [8 / 16, 24 / 16, 1.0]
    pl.scale(model, 0.5)
    assert [row.scale for row in pl.summary(model).sites] == [0.5, 1.0, 0.5]


def test_other_adapters_may_have_other_blocks() -> None:
    """Adapters may have the same tensor's whole, or blocks that overlap; they add up in order."""
    model = layer()
    W = model.qkv.weight.detach().clone()
    for name, target in (("a", "qkv[:8]"), ("b", "qkv"), ("c", "qkv[6:, :2]"), ("d", "qkv[0]")):
        pl.attach(model, Delta(), target, name=name)
    shake(model)
    D = {name: next(iter(pl.state_dict(model, name).values())) for name in "abcd"}
    W[:8] += D["a"]
    W += D["b"]
    W[6:, :2] += D["c"]
    W[0] += D["d"]
    assert_close(model.qkv.weight.detach(), W)
    with pl.using(model, "a", c=2.0):
        expected = pl.base_state_dict(model)["qkv.weight"].clone()
        expected[:8] += D["a"]
        expected[6:, :2] += 2 * D["c"]
        assert_close(model.qkv.weight.detach(), expected)
    assert_close(model.qkv.weight.detach(), W)
    pl.detach(model, "b")
    assert [row.adapter for row in pl.summary(model).sites] == ["a", "c", "d"]


def test_verbs_act_on_all_blocks_of_an_adapter() -> None:
    """Toggling, freezing, scaling, merging and detaching blocks are as for whole tensors."""
    model, x = layer(), torch.randn(2, 5, 4)
    with unchanged(model):
        base = model(x)
        pl.attach(model, LoRA(2), [*QKV, "experts[0]"])
        bits(model(x), base)
        shake(model)
        adapted = model(x).detach()
        with pl.disabled(model):
            bits(model(x), base)
        with pl.merged(model):
            assert_close(model(x), adapted)
        other = copy.deepcopy(model)
        shake(other)
        pl.detach(other)
        bits(model(x).detach(), adapted)
        pl.freeze(model)
        assert not any(p.requires_grad for p in pl.parameters(model))
        with pl.using(model, default=0.0):
            assert_close(model(x), base)
        pl.detach(model)
        bits(model(x), base)


def test_blocks_of_a_tied_tensor() -> None:
    """A block of one side is seen on the other; the same tensor by two paths is one tensor."""
    model: Any = nn.ModuleDict({"embed": nn.Embedding(7, 4), "head": nn.Linear(4, 7, bias=False)})
    model["head"].weight = model["embed"].weight
    pl.attach(model, LoRA(2), ["head[5:]", "embed[:2]", "embed[5:]"])
    shake(model)
    sites = [row.site for row in pl.summary(model).sites]
    assert sites == ["embed.weight[:2]", "embed.weight[5:]"]
    adapted = model["head"].weight.detach().clone()
    assert_close(model["embed"](torch.arange(7)), adapted)
    with pl.merged(model):
        bits(model["embed"].weight.detach(), adapted)
    with pytest.raises(pl.TargetError, match="overlap"):
        pl.attach(model, LoRA(2), ["head[4:]", "embed[5:]"], name="other")


def test_blocks_above_weight_norm() -> None:
    """Of a tensor that weight_norm computes, a block is adapted on top, and merged into g and v."""
    model = nn.Linear(4, 6)
    weight_norm(model)
    before = model.weight.detach().clone()
    pl.attach(model, LoRA(2), "weight[:3]")
    shake(model)
    adapted = model.weight.detach().clone()
    bits(adapted[3:], before[3:])
    with pl.merged(model):
        assert_close(model.weight.detach(), adapted)
    pl.detach(model)
    bits(model.weight.detach(), before)


def test_transforms_and_the_compiler() -> None:
    """torch.func maps over the factors of blocks, and the compiler makes one graph of them."""
    model, x = nn.Sequential(nn.Linear(4, 6), nn.Conv1d(2, 6, 3)), torch.randn(2, 4)
    pl.attach(model, LoRA(2), ["0[:3]", "0[4:, 1:]", "1[2:, :, 1:]"])
    shake(model)
    names = {n: p.detach() for n, p in model.named_parameters() if "factors" in n}
    many = {n: torch.stack([p, -p, 2 * p]) for n, p in names.items()}

    def call(factors: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, factors, (x,)).sum(1)

    found = torch.func.vmap(call)(many)
    each = [call({n: p[i] for n, p in many.items()}) for i in range(3)]
    assert_close(found, torch.stack(each))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_close(compiled(x), model(x))
    gradients = torch.autograd.grad(compiled(x).sum(), pl.parameters(model))
    assert_close(gradients, torch.autograd.grad(model(x).sum(), pl.parameters(model)))
