"""Blocks of a tensor as sites of their own; their arithmetic is also in `test_conformance.py`."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.testing import assert_close

import paramlora as pl
from paramlora import Delta, LoRA
from paramlora.files.digest import digest
from paramlora.site.block import Block, split
from tests.support.helpers import LEAVE_OUT, refuses, unchanged
from tests.support.reference import shake

QKV = ["*.qkv.weight[:4]", "*.qkv.weight[4:8]", "*.qkv.weight[8:]"]


class Layer(nn.Module):
    """A layer with a fused projection of three blocks, and a stack of three experts."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(4, 12)
        self.experts = nn.Parameter(torch.randn(3, 4, 4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        x = (q @ k.mT).softmax(-1) @ v
        return torch.einsum("eoi,bni->bno", self.experts, x)


def layer() -> Any:
    torch.default_generator.manual_seed(0)
    return Layer()


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


def test_files_of_blocks(tmp_path: Path) -> None:
    """State dicts and files have the index in their keys, and load bit for bit, again and again."""
    model, path = layer(), tmp_path / "a.safetensors"
    specs: Any = {"qkv[:4]": LoRA(2), "qkv[8:, 1:3]": Delta(), "experts[1]": LoRA(1)}
    pl.attach(model, specs, name="a")
    shake(model)
    keys = [f"{site}.{key}" for site in ("experts[1]", "qkv.weight[:4]") for key in "AB"]
    assert list(pl.state_dict(model, "a")) == [*keys, "qkv.weight[8:, 1:3].D"]
    pl.scale(model, 0.7)
    pl.save(model, path, "a")
    other = layer()
    assert pl.load(other, path) == pl.summary(model)
    bits(pl.state_dict(other, "a"), pl.state_dict(model, "a"))
    bits(other.qkv.weight, model.qkv.weight)
    shake(model)
    pl.scale(model, 0.2)
    pl.load(model, path)
    assert pl.summary(other) == pl.summary(model)
    bits(other.experts, model.experts)
    pl.load_state_dict(other, pl.state_dict(model, "a"), "a")
    pl.load(other, path, name="b")
    third = layer()
    pl.attach(third, LoRA(2), "qkv[:4]", name="a")
    with (
        unchanged(third),
        pytest.raises(pl.AdapterNameError, match="its sites, kinds or ranks differ"),
    ):
        pl.load(third, path)


def rename(path: Path, old: str, new: str) -> None:
    """Give a site of a file another name, digest and all."""
    with safe_open(path, framework="pt") as file:
        content = json.loads(file.metadata()["paramlora"])
        tensors = {k.replace(old, new): file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    content["sites"] = {k.replace(old, new): v for k, v in content["sites"].items()}
    del content["digest"]
    content["digest"] = digest(tensors.items(), json.dumps(content))
    save_file(tensors, path, {"paramlora": json.dumps(content)})


@pytest.mark.parametrize(
    ("new", "message"),
    [
        (
            "[0:4]",
            "[...] is damaged: the site 'qkv.weight[0:4]' must be written 'qkv.weight[:4]'; save "
            "the adapter again",
        ),
        (
            "[:13]",
            "[...] is damaged: cannot take a block of 'qkv.weight'[...]:13 reaches outside[...]",
        ),
        ("[:5]", "[...] does not fit: qkv.weight[:5].B: expected (5, 2), found (4, 2)"),
        ("[::2]", "[...] belongs to another model: it adapts qkv.weight[::2], which this [...]"),
        (
            "[4:9]",
            "[...] does not fit this model, in which 'qkv.weight[4:9]' and 'qkv.weight[8:]' share "
            "elements",
        ),
        (
            "",
            "[...] does not fit this model, in which 'qkv.weight' and 'qkv.weight[8:]' share "
            "elements",
        ),
    ],
)
def test_files_of_other_blocks(tmp_path: Path, new: str, message: str) -> None:
    """A file with blocks that are none, or overlap, or are of other shapes is refused by name."""
    path = tmp_path / "a.safetensors"
    model = layer()
    pl.attach(model, LoRA(2), ["qkv[:4]", "qkv[8:]"])
    pl.save(model, path)
    rename(path, "[:4]", new)
    refuses(layer(), lambda model: pl.load(model, path), pl.CheckpointError, message)


def test_files_for_an_untied_model(tmp_path: Path) -> None:
    """A file with adapters of two tensors is refused where these are tied, and so one."""
    model: Any = nn.ModuleDict({"embed": nn.Embedding(7, 4), "head": nn.Linear(4, 7, bias=False)})
    pl.attach(model, LoRA(2), ["embed[:4]", "head[2:]"])
    pl.save(model, tmp_path / "a")
    pl.detach(model)
    model["head"].weight = model["embed"].weight
    message = (
        "[...] does not fit this model, in which 'embed.weight[:4]' and 'head.weight[2:]' share "
        "elements"
    )
    refuses(model, lambda m: pl.load(m, tmp_path / "a"), pl.CheckpointError, message)


def test_files_for_a_larger_tensor(tmp_path: Path) -> None:
    """A block belongs to a tensor of one shape: that of another is refused, where it fits too."""
    model = nn.Sequential(nn.Linear(4, 6))
    pl.attach(model, LoRA(2), "0[:3]")
    pl.save(model, tmp_path / "a")
    words = (
        "belongs to another model: '0.weight' has shape [6, 4] in the file and [9, 4] in this model"
    )
    refuses(
        nn.Sequential(nn.Linear(4, 9)),
        lambda model: pl.load(model, tmp_path / "a"),
        pl.CheckpointError,
        f"{tmp_path / 'a'} {words}",
    )


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
