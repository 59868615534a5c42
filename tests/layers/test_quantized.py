"""Quantized linear layers, in each form: y = module(x) + s · B (A x), and W is never read.

The reference is the dense float64 model whose weights were read off the layers' outputs.
"""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import paramlora as pl
from paramlora.site.quantized import packed_tensor
from tests.support.helpers import error
from tests.support.quantized import FORMS, dense, inputs, layers, quantized, randomize

# bitsandbytes computes 8 bits in half precision.
BOUND = {"bitsandbytes 8": 1e-3}
SPECS = (
    *(pl.DoRA(2), pl.LoRA(2, init="pissa"), pl.LoRA(2, init="olora"), pl.IA3(), pl.Delta()),
    *(pl.HiRA(2), pl.OFT(), pl.MiSS(2), pl.LoHa(2), pl.LoKr(2), pl.LoRAXS(2)),
)


def adapted(form: str, *, rank: int = 3) -> nn.Sequential:
    """Return quantized layers with an adapter that computes something."""
    model = quantized(form)
    pl.attach(model, pl.LoRA(rank, alpha=2))
    randomize(model)
    return model


@pytest.mark.parametrize("form", FORMS)
class TestForms:
    def test_values_and_gradients(self, form: str) -> None:
        """Outputs and the gradients of x, A and B are those of W + s·BA in float64."""
        model, x = quantized(form), inputs().requires_grad_()
        reference, x64 = dense(model), inputs().double().requires_grad_()
        pl.attach(model, pl.LoRA(3, alpha=2))
        randomize(model)
        y = model(x)
        factors = [p.detach().double().requires_grad_() for p in pl.parameters(model)]
        (A1, B1, A2, B2), (first, tanh, second) = factors, reference
        hidden = tanh(first(x64) + 2 / 3 * x64 @ A1.t() @ B1.t())
        y64 = second(hidden) + 2 / 3 * hidden @ A2.t() @ B2.t()
        found = torch.autograd.grad(y.square().sum(), [x, *pl.parameters(model)])
        wanted = torch.autograd.grad(y64.square().sum(), [x64, *factors])
        for ours, theirs in zip((y, *found), (y64, *wanted), strict=True):
            assert error(ours, theirs) < BOUND.get(form, 1e-5)

    def test_off_is_the_base(self, form: str) -> None:
        """New, switched off and detached, outputs and stored bytes are the base's."""
        model, x = quantized(form).requires_grad_(False), inputs()
        y, keys, bytes_ = model(x), list(model.state_dict()), pl.fingerprint(model)
        types = [(type(m), dict(vars(m)).keys(), list(m._parameters)) for m in model]
        stored = [id(p) for p in model.parameters()]
        pl.attach(model, pl.LoRA(3))
        assert torch.equal(model(x), y)
        optimizer = torch.optim.SGD(pl.parameters(model), lr=0.1)
        for _ in range(2):
            model(x).square().mean().backward()
            optimizer.step()
        assert not torch.equal(model(x), y)
        with pl.disabled(model):
            assert torch.equal(model(x), y)
        assert pl.fingerprint(model) == bytes_
        pl.detach(model)
        assert torch.equal(model(x), y)
        assert (list(model.state_dict()), pl.fingerprint(model)) == (keys, bytes_)
        assert [(type(m), dict(vars(m)).keys(), list(m._parameters)) for m in model] == types
        assert [id(p) for p in model.parameters()] == stored

    def test_dropout(self, form: str) -> None:
        """In training the update has the dropped-out input, also in routed rows."""
        model, x = quantized(form)[:1], inputs()
        pl.attach(model, pl.LoRA(3, alpha=2, dropout=0.5))
        randomize(model)
        A, B = pl.parameters(model)
        torch.manual_seed(3)
        mask = nn.functional.dropout(torch.ones_like(x), 0.5)
        with pl.disabled(model):
            base = model(x)
        model.train()
        expected = base + 2 / 3 * (mask * x) @ A.t() @ B.t()
        torch.manual_seed(3)
        assert error(model(x), expected.double()) < BOUND.get(form, 1e-5)
        torch.manual_seed(3)
        with pl.routed(model, [0] * len(x), "default"):
            assert error(model(x), expected.double()) < BOUND.get(form, 1e-5)
        with pl.disabled(model.eval()):
            base = model(x)
        assert error(model(x), (base + 2 / 3 * x @ A.t() @ B.t()).double()) < 1e-5

    def test_default_target(self, form: str) -> None:
        """The default target is the weight of each quantized layer, of shape (out, in)."""
        for targets in (None, "all-linear", ["0", "2"]):
            summary = pl.attach(quantized(form), pl.LoRA(3), targets)
            found = [(site.site, site.shape, site.parameters) for site in summary.sites]
            assert found == [("0.weight", (64, 64), 384), ("2.weight", (64, 64), 384)]

    def test_files(self, form: str, tmp_path: Path) -> None:
        """A file loads into another quantized model, and into the float model."""
        model, x = adapted(form), inputs()
        pl.scale(model, 0.5)
        pl.save(model, tmp_path / "file")
        other = quantized(form)
        pl.load(other, tmp_path / "file")
        assert torch.equal(other(x), model(x))
        other = layers()
        pl.load(other, tmp_path / "file")
        for ours, theirs in zip(pl.parameters(model), pl.parameters(other), strict=True):
            assert torch.equal(ours, theirs)
        pl.save(other, tmp_path / "float")
        other = quantized(form)
        pl.load(other, tmp_path / "float")
        assert torch.equal(other(x), model(x))

    def test_several_adapters(self, form: str) -> None:
        """Adapters are switched, scaled, summed and routed as on a float layer."""
        model, x = quantized(form), inputs()
        off = model(x)
        pl.attach(model, pl.LoRA(3), name="a")
        pl.attach(model, pl.LoRA(2), name="b", activate="also")
        randomize(model)
        alone = {}
        for name in "ab":
            with pl.using(model, name):
                alone[name] = model(x)
        with pl.routed(model, ["a", "b", None, "b", "a"]):
            routed = model(x)
        wanted = [alone["a"][0], alone["b"][1], off[2], alone["b"][3], alone["a"][4]]
        assert error(routed, torch.stack(wanted).double()) < 1e-5
        with pl.using(model, a=0.0):
            assert error(model(x), off.double()) < 1e-5
        pl.combine(model, {"a": 1.0, "b": 1.0}, name="sum")
        pl.activate(model, "a", "b")
        both = model(x)
        pl.activate(model, "sum")
        assert error(model(x), both.double()) < 1e-5

    def test_copies(self, form: str) -> None:
        """A deep copy is independent, if the library can copy its layers."""
        try:
            copy.deepcopy(quantized(form))
        except (AssertionError, RuntimeError):
            pytest.skip("the library cannot copy this layer")
        model, x = adapted(form), inputs()
        y, copied = model(x), copy.deepcopy(model)
        assert torch.equal(copied(x), y)
        pl.detach(copied)
        assert torch.equal(model(x), y)
        assert torch.equal(copied(x), quantized(form)(x))

    def test_merging_is_refused(self, form: str) -> None:
        """What needs the weight says so by name, and changes nothing."""
        model, x = adapted(form), inputs()
        y = model(x)
        for verb in (pl.merge, pl.bake, pl.merged_state_dict):
            with pytest.raises(pl.StateError, match=r"merge at '0\.weight': its layer is qua"):
                verb(model)
        assert torch.equal(model(x), y)
        pl.disable(model)
        assert list(pl.merged_state_dict(model)) == list(quantized(form).state_dict())

    def test_kinds_that_need_the_weight(self, form: str) -> None:
        """A kind or an init that needs W is refused at attach."""
        model = quantized(form)
        for spec in SPECS:
            with pytest.raises(pl.TargetError, match=r"'0\.weight' .*its layer is quantized, and"):
                pl.attach(model, spec, "weight")
        with pytest.raises(pl.StateError, match="no adapter is attached"):
            pl.enable(model)

    def test_audit_and_eva(self, form: str) -> None:
        """`audit` finds nothing to blame, and `eva` starts A from the inputs."""
        model = quantized(form).train()
        pl.attach(model, pl.LoRA(3))
        shares = pl.eva(model, [inputs(40)])
        assert list(shares) == ["0.weight", "2.weight"]
        assert not pl.audit(model, inputs())


def test_blocks_and_biases() -> None:
    """A block of a quantized weight and its bias are adapted and routed together."""
    model, x = quantized("bytes"), inputs()
    reference: Any = dense(model)
    pl.attach(model, {"0.weight[:8, 4:]": pl.LoRA(2), "0.bias": pl.Delta()})
    randomize(model)
    A, B, D = (pl.state_dict(model)[key] for key in SITES)
    with torch.no_grad():
        reference[0].weight[:8, 4:] += B.double() @ A.double()
        reference[0].bias += D.double()
    assert error(model(x), reference(x.double())) < 1e-5
    y = model(x)
    with pl.routed(model, ["default", None, None, None, "default"]):
        routed = model(x)
    assert error(routed[[0, 4]], y[[0, 4]].double()) < 1e-5
    assert error(routed[1:4], quantized("bytes")(x)[1:4].double()) < 1e-5


SITES = ("0.weight[:8, 4:].A", "0.weight[:8, 4:].B", "0.bias.D")


def test_autocast_and_half_precision() -> None:
    """Under autocast, and for inputs in bfloat16, the output has the base's dtype."""
    model = adapted("codes")
    for kind, x in ((torch.float32, inputs()), (torch.bfloat16, inputs().bfloat16())):
        with torch.autocast("cpu", torch.bfloat16, enabled=kind is torch.float32):
            if kind is torch.bfloat16:
                model.to(torch.bfloat16)
            y = model(x)
        assert y.dtype == torch.bfloat16
        assert error(y, adapted("codes")(inputs()).double()) < 3e-2


def test_starts_that_read_the_weight() -> None:
    """CorDA needs W and is refused; the factors stay."""
    model = quantized("bytes")
    pl.attach(model, pl.LoRA(2, init="corda"))
    before = [p.clone() for p in pl.parameters(model)]
    with pytest.raises(pl.StateError, match="the weight of a quantized layer is never read"):
        pl.corda(model, [inputs()], mode="knowledge")
    assert all(map(torch.equal, before, pl.parameters(model)))


def test_what_is_no_quantized_layer() -> None:
    """A layer with plain integers, or with integers that are no matrix, is what it was."""

    class Counting(nn.Linear):
        calls: Any

        def __init__(self) -> None:
            super().__init__(4, 3)
            self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

        def forward(self, input: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return super().forward(input)

    model = Counting()
    pl.attach(model, pl.LoRA(2))
    randomize(model)
    merged = model.weight.detach().clone()
    pl.bake(model)
    assert torch.equal(model.weight, merged)


def test_a_forward_of_the_instance() -> None:
    """A layer whose forward was replaced on the instance is refused: it would not call ours."""
    model = quantized("codes")
    model[0].forward = model[0].forward
    with pytest.raises(pl.TargetError, match=r"'0\.weight' .* has a forward of the instance"):
        pl.attach(model, pl.LoRA(2))


def test_hooks_of_accelerate() -> None:
    """accelerate's hooks replace the forward too, and call the adapted one."""
    hooks = pytest.importorskip("accelerate.hooks", reason="accelerate is not installed")
    model, x = quantized("codes"), inputs()
    hooks.add_hook_to_module(model[0], hooks.ModelHook())
    off, below = model(x), model[0]._old_forward
    pl.attach(model, pl.LoRA(2))
    randomize(model)
    y, copied = model(x), copy.deepcopy(model)
    assert not torch.equal(y, off)
    randomize(copied, seed=3)
    assert torch.equal(model(x), y)
    assert not torch.equal(copied(x), y)
    hooks.remove_hook_from_module(copied[0])
    pl.disable(copied)
    assert torch.equal(copied(x), off)
    pl.detach(model)
    assert model[0]._old_forward == below
    assert torch.equal(model(x), off)


class Table(nn.Module):
    """A layer with features, without a weight, and with tensors that are no matrix of integers."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features = 4, 3
        self.register_buffer("calls", torch.zeros(4, dtype=torch.int64))
        self.register_buffer("mask", torch.ones(3, 4, dtype=torch.bool))
        self.rows = nn.Parameter(torch.ones(3, 4))


def test_bias_of_a_layer_without_a_weight() -> None:
    """The bias of a layer that stores codes can be adapted."""
    summary = pl.attach(quantized("codes"), pl.Delta(), "0.bias")
    assert [row.site for row in summary.sites] == ["0.bias"]


def test_tensors_that_are_no_packed_weight() -> None:
    """Only a matrix of integers counts as packed: no vector, no mask, no floating matrix."""
    assert packed_tensor(Table()) is None
    table = Table()
    table.register_buffer("codes", torch.zeros(3, 4, dtype=torch.int32))
    assert packed_tensor(table) is table.codes


def test_readers_of_other_packages() -> None:
    """Code that handles parameters gets the stored bytes, also if it is not of the layer's package.

    Other code gets a stand-in without values while an adapter is live.
    """
    layer = adapted("bytes")[0]
    for reader, is_stored in (("accelerate.utils", True), ("somewhere.else", False)):
        found = eval("layer.weight", {"__name__": reader, "layer": layer})
        assert (found is layer._parameters["weight"]) == is_stored
