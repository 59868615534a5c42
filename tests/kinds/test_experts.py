"""Stacks of experts: tensors of three and four dimensions as matrices or batches of matrices."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import paramlora as pl
from paramlora import LoRA
from tests.support.helpers import LEAVE_OUT, refuses
from tests.support.models import CountingLoRA
from tests.support.reference import shake
from tests.support.versions import torch_before


class Experts(nn.Module):
    """Experts in two stacks of weights; row i uses expert i % 3."""

    def __init__(self, *, is_transposed: bool = False) -> None:
        super().__init__()
        self.is_transposed = is_transposed  # PEFT reads this attribute
        up, down = torch.randn(3, 8, 6), torch.randn(3, 6, 8)
        self.up = nn.Parameter(up.mT.contiguous() if is_transposed else up)
        self.down = nn.Parameter(down.mT.contiguous() if is_transposed else down)

    def forward(self, x: Tensor) -> Tensor:
        out = []
        for i, row in enumerate(x):
            up, down = self.up[i % 3], self.down[i % 3]
            if self.is_transposed:
                up, down = up.mT, down.mT
            out.append(down @ (up @ row).tanh())
        return torch.stack(out)


def experts(*, is_transposed: bool = False) -> Any:
    torch.default_generator.manual_seed(0)
    return nn.ModuleDict({"experts": Experts(is_transposed=is_transposed).double()})


def rows() -> Tensor:
    return torch.randn(5, 6, dtype=torch.float64)


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("stabilized", [False, True])
def test_equal_to_peft(is_transposed: bool, stabilized: bool) -> None:
    """With PEFT's factors, outputs and gradients equal those of its `target_parameters`."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=2,
        lora_alpha=5,
        use_rslora=stabilized,
        target_modules=[],
        target_parameters=["experts.up", "experts.down"],
        init_lora_weights=False,
    )
    x = rows()
    theirs = experts(is_transposed=is_transposed)
    theirs = peft.inject_adapter_in_model(config, theirs).double()
    ours = experts(is_transposed=is_transposed)
    spec = LoRA(2, 5, rank_stabilized=stabilized, batch_dims=1, transposed=is_transposed)
    pl.attach(ours, spec, ["experts.up", "experts.down"])
    factors = {
        f"experts.{wrapper.parameter_name}.{key}": getattr(wrapper, f"lora_{key}")["default"].weight
        for wrapper in theirs.modules()
        if isinstance(wrapper, peft.tuners.lora.layer.ParamWrapper)
        for key in "AB"
    }

    def split_experts(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return A: (E, r, in) and B: (E, out, r) from PEFT's A: (E·r, in) and B: (out, r·E)."""
        return {
            key: value.view(3, 2, -1)
            if key.endswith("A")
            else value.view(len(value), 2, 3).permute(2, 0, 1)
            for key, value in tensors.items()
        }

    pl.load_state_dict(ours, split_experts({key: f.detach() for key, f in factors.items()}))
    expected, found = theirs["experts"](x), ours["experts"](x)
    assert not torch.equal(found, experts(is_transposed=is_transposed)["experts"](x))
    assert_close(found, expected)
    gradients = torch.autograd.grad(expected.square().sum(), list(factors.values()))
    ours_by_key = dict(zip(pl.state_dict(ours), pl.parameters(ours), strict=True))
    our_gradients = torch.autograd.grad(found.square().sum(), list(ours_by_key.values()))
    expected_gradients = split_experts(dict(zip(factors, gradients, strict=True)))
    assert_close(
        dict(zip(ours_by_key, our_gradients, strict=True)), expected_gradients, check_stride=False
    )
    merged = theirs["experts"].unload_and_optionally_merge_module(True, False, None)
    pl.merge(ours)
    assert_close(ours["experts"].up.detach(), merged.up.detach())
    assert_close(ours["experts"].down.detach(), merged.down.detach())


@pytest.mark.parametrize("batch_dims", [0, 1, 2])
@pytest.mark.parametrize("transposed", [False, True])
def test_batch_dims(batch_dims: int, transposed: bool) -> None:
    """A 4-D tensor gets one update, or one for each index of its first one or two dimensions."""
    W = torch.randn(2, 3, 7, 5, dtype=torch.float64)
    spec = LoRA(2, 3, batch_dims=batch_dims, transposed=transposed)
    holder: Any = nn.ParameterDict({"W": W.clone()})
    summary = pl.attach(holder, spec, "W")
    shake(holder)
    factors = pl.state_dict(holder)
    A, B = factors["W.A"], factors["W.B"]
    rows, columns = W.shape[batch_dims], W.shape[batch_dims + 1 :].numel()
    out, into = (columns, rows) if transposed else (rows, columns)
    batch = W.shape[:batch_dims]
    assert A.shape == (*batch, 2, into)
    assert B.shape == (*batch, out, 2)
    assert summary.trainable == batch.numel() * 2 * (out + into)
    found = (holder["W"].detach() - W).reshape(-1, rows, columns)
    for i, update in enumerate(found):
        expected = 1.5 * B.reshape(-1, out, 2)[i] @ A.reshape(-1, 2, into)[i]
        assert_close(update, expected.T if transposed else expected)
        assert torch.linalg.matrix_rank(update, rtol=1e-9) == 2
    with pl.merged(holder):
        assert_close(holder["W"].detach() - W, found.view(W.shape))
    assert torch.equal(pl.base_state_dict(holder)["W"], W)


@pytest.mark.parametrize("init", ["kaiming", "orthogonal", nn.init.xavier_uniform_])
def test_init_of_each_expert(init: Any) -> None:
    """An init fills the A of each expert as it fills that of a single matrix."""
    W = torch.randn(3, 6, 4)
    torch.manual_seed(0)
    found = LoRA(2, init=init, batch_dims=1).create(W)["A"]
    torch.manual_seed(0)
    expected = [LoRA(2, init=init).create(one)["A"] for one in W]
    assert_close(found, torch.stack(expected), rtol=0, atol=0)


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("transposed", [False, True])
def test_init_from_the_weight_of_each_expert(init: str, transposed: bool) -> None:
    """PiSSA and OLoRA start each expert from its own matrix, and W' is W at the start."""
    W = torch.randn(3, 6, 4)
    spec = LoRA(2, 3, init=init, batch_dims=1, transposed=transposed)
    factors = spec.create(W)
    assert torch.equal(spec.apply(W, factors), W)
    for i, one in enumerate(W):
        expected = LoRA(2, 3, init=init).create(one.T if transposed else one)
        expert = {key: factor[i] for key, factor in factors.items()}
        assert_close(expert["B"] @ expert["A"], expected["B"] @ expected["A"])
        assert_close(expert["A0"], expert["A"], rtol=0, atol=0)


def test_loop_over_experts_builds_the_stack_once() -> None:
    """A forward that reads a stack of experts many times builds it once, with its gradient."""
    model = experts()["experts"]
    pl.attach(model, CountingLoRA(2, batch_dims=1), ["up", "down"])
    shake(model)
    CountingLoRA.built = 0
    x = rows()
    with torch.no_grad():
        before = model(x)
    assert CountingLoRA.built == 2
    model(x).square().sum().backward()
    assert CountingLoRA.built == 4
    assert all(p.grad is not None and p.grad.any() for p in pl.parameters(model))
    shake(model)
    assert not torch.allclose(model(x), before)


class Toggling(nn.Module):
    """A module that toggles its own adapters between its reads."""

    def __init__(self) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.randn(2, 3, 3))

    def forward(self, x: Tensor) -> list[Tensor]:
        with torch.no_grad():
            parts = [x @ self.W[0]]
        parts.append(x @ self.W[0])
        for strength in (2.0, 0.5):
            with pl.using(self, default=strength):
                parts.append(x @ self.W[0])
        with pl.disabled(self):
            parts.append(x @ self.W[0])
        return [*parts, x @ self.W[0]]


def test_toggling_within_a_forward() -> None:
    """Toggling between two reads takes effect, and later reads after no_grad have gradients."""
    model, x = Toggling(), torch.eye(3)
    W = model.W.detach().clone()[0]
    pl.attach(model, LoRA(1, batch_dims=1), "W")
    shake(model)
    D = model.W.detach()[0] - W
    found = model(x)
    assert [part.requires_grad for part in found] == [False, True, True, True, False, True]
    assert_close([p.detach() for p in found], [W + k * D for k in (1, 1, 2, 0.5, 0, 1)])


def test_transposed_on_conv1d_of_transformers() -> None:
    """On transformers' Conv1D, (in, out), A is (r, in) and acts on the input, as on a Linear."""
    utils = pytest.importorskip("transformers.pytorch_utils")
    conv, linear = utils.Conv1D(6, 4).double(), nn.Linear(4, 6).double()
    linear.load_state_dict({"weight": conv.weight.detach().T, "bias": conv.bias.detach()})
    x = torch.randn(3, 4, dtype=torch.float64)
    for model, spec in ((conv, LoRA(2, 3, transposed=True)), (linear, LoRA(2, 3))):
        pl.attach(model, spec, "weight", generator=torch.Generator().manual_seed(0))
    factors = pl.state_dict(linear)
    assert_close(pl.state_dict(conv), factors, rtol=0, atol=0)
    shake(linear)
    pl.load_state_dict(conv, pl.state_dict(linear))
    assert_close(conv(x), linear(x))
    assert_close(
        torch.autograd.grad(conv(x).square().sum(), pl.parameters(conv)),
        torch.autograd.grad(linear(x).square().sum(), pl.parameters(linear)),
    )


def test_save_and_load(tmp_path: Path) -> None:
    """`batch_dims` and `transposed` are saved, and one expert can be a site of its own."""
    model, other = experts(), experts()
    specs: Any = {"*.up": LoRA(2, batch_dims=1), "*.down[1]": LoRA(1, transposed=True)}
    pl.attach(model, specs)
    shake(model)
    pl.save(model, tmp_path / "a")
    assert pl.load(other, tmp_path / "a") == pl.summary(model)
    x = rows()
    assert_close(other["experts"](x), model["experts"](x), rtol=0, atol=0)


def test_too_few_dimensions() -> None:
    """A tensor with too few dimensions for `batch_dims` raises TargetError."""
    refuses(
        nn.Linear(3, 2),
        lambda model: pl.attach(model, LoRA(2, batch_dims=1), "weight"),
        pl.TargetError,
        "cannot adapt 'weight' with LoRA: with batch_dims=1 it needs 3 dimensions, it has 2 "
        f"{LEAVE_OUT}",
    )


@pytest.mark.parametrize("how", ["eager", "grouped_mm"])
def test_mixtral(how: str) -> None:
    """The experts of transformers' Mixtral are trained in place, and merging keeps the outputs."""
    transformers = pytest.importorskip("transformers", "5", reason="experts were lists before 5")
    if how == "grouped_mm" and torch_before("2.9"):
        pytest.skip("this torch has no grouped product on the CPU")
    torch.default_generator.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=11,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
        experts_implementation=how,
    )
    model, ids = transformers.MixtralForCausalLM(config), torch.randint(11, (2, 6))
    base = model(ids).logits.detach()
    pl.attach(model, LoRA(2, batch_dims=1), ["*.gate_up_proj", "*.down_proj"])
    assert_close(model(ids).logits.detach(), base, rtol=0, atol=0)
    shake(model)
    adapted = model(ids).logits
    assert not torch.allclose(adapted, base)
    adapted.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in pl.parameters(model))
    with pl.merged(model):
        assert_close(model(ids).logits, adapted)
    with pl.disabled(model):
        assert_close(model(ids).logits, base, rtol=0, atol=0)
