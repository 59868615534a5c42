"""Blocks of a tensor as sites; values and gradients are also in `test_conformance.py`."""

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
from tests.support.mixed import assert_bits
from tests.support.models import QKV, CountingLoRA, fused
from tests.support.reference import shake


@pytest.mark.parametrize(
    ("targets", "trainable"),
    [
        (["*.c_attn.weight[:, :768]", "*.c_attn[:, 768:1536]", "*.c_attn[:, -768:]"], 2_666_528),
        (["*.c_attn"], 2_371_616),
    ],
)
def test_parameter_counts_of_gpt2(targets: list[str], trainable: int) -> None:
    """GPT-2 small with a two-class head has the published counts, by block and by tensor."""
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
def test_elements_outside_the_block(spec: pl.kinds.Spec) -> None:
    """The update changes the elements of the block; all others keep the bits of W."""
    model = fused()
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
    assert_bits(model.qkv.weight.detach()[outside], W[outside])
    base = pl.base_state_dict(model)["experts"]
    assert_bits(model.experts.detach()[[0, 2]], base[[0, 2]])
    assert not torch.equal(model.experts[1], base[1])


def test_blocks_equal_separate_layers() -> None:
    """Adapted blocks for query, key and value equal three separately adapted Linears."""
    model, x = fused(), torch.randn(2, 5, 4)
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


def test_linear_does_not_build_the_weight() -> None:
    """A Linear with adapted blocks uses the factored form, forward and backward."""
    model, x = fused(), torch.randn(2, 5, 4)
    pl.attach(model, CountingLoRA(rank=2), QKV)
    pl.attach(model, CountingLoRA(rank=1), "qkv[:, 1:]", name="columns", activate="also")
    shake(model)
    CountingLoRA.built = 0
    model.qkv(x).sum().backward()
    assert CountingLoRA.built == 0
    assert_close(model.qkv(x), nn.functional.linear(x, model.qkv.weight, model.qkv.bias))
    assert CountingLoRA.built == 4


def test_mapping_of_blocks_to_specs() -> None:
    """Blocks of one tensor can have different kinds, ranks and scales, and a row each."""
    model = fused()
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


def test_overlapping_blocks_of_several_adapters() -> None:
    """Several adapters can have the whole tensor or overlapping blocks; they add up in order."""
    model = fused()
    W = model.qkv.weight.detach().clone()
    for name, target in (("a", "qkv[:8]"), ("b", "qkv"), ("c", "qkv[6:, :2]"), ("d", "qkv[0]")):
        pl.attach(model, Delta(), target, name=name, activate="also")
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


def test_verbs_on_blocks() -> None:
    """Toggling, freezing, scaling, merging and detaching work on blocks as on whole tensors."""
    model, x = fused(), torch.randn(2, 5, 4)
    with unchanged(model):
        base = model(x)
        pl.attach(model, LoRA(2), [*QKV, "experts[0]"])
        assert_bits(model(x), base)
        shake(model)
        adapted = model(x).detach()
        with pl.disabled(model):
            assert_bits(model(x), base)
        with pl.merged(model):
            assert_close(model(x), adapted)
        other = copy.deepcopy(model)
        shake(other)
        pl.detach(other)
        assert_bits(model(x).detach(), adapted)
        pl.freeze(model)
        assert not any(p.requires_grad for p in pl.parameters(model))
        with pl.using(model, default=0.0):
            assert_close(model(x), base)
        pl.detach(model)
        assert_bits(model(x), base)


def test_blocks_of_a_tied_tensor() -> None:
    """A block of one tied tensor appears in the other; both paths name the same site."""
    model: Any = nn.ModuleDict({"embed": nn.Embedding(7, 4), "head": nn.Linear(4, 7, bias=False)})
    model["head"].weight = model["embed"].weight
    pl.attach(model, LoRA(2), ["head[5:]", "embed[:2]", "embed[5:]"])
    shake(model)
    sites = [row.site for row in pl.summary(model).sites]
    assert sites == ["embed.weight[:2]", "embed.weight[5:]"]
    adapted = model["head"].weight.detach().clone()
    assert_close(model["embed"](torch.arange(7)), adapted)
    with pl.merged(model):
        assert_bits(model["embed"].weight.detach(), adapted)
    with pytest.raises(pl.TargetError, match="overlap"):
        pl.attach(model, LoRA(2), ["head[4:]", "embed[5:]"], name="other")


def test_blocks_on_weight_norm() -> None:
    """A block of a weight_norm weight is adapted on top of the norm, and merged into g and v."""
    model = nn.Linear(4, 6)
    weight_norm(model)
    before = model.weight.detach().clone()
    pl.attach(model, LoRA(2), "weight[:3]")
    shake(model)
    adapted = model.weight.detach().clone()
    assert_bits(adapted[3:], before[3:])
    with pl.merged(model):
        assert_close(model.weight.detach(), adapted)
    pl.detach(model)
    assert_bits(model.weight.detach(), before)


def test_vmap_and_compile() -> None:
    """vmap maps over the factors of blocks, and a model with blocks compiles to one graph."""
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
