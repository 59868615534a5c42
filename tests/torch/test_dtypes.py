"""Dtypes: autocast, half precision, casts, and models with several dtypes."""

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

import paramlora as pl
from tests.support.helpers import (
    MLP,
    case_of,
    dense_copy,
    factors,
    host_name,
    outputs,
)
from tests.support.mixed import assert_bits
from tests.support.reference import Host, dense, floats, loss, shake


def error(found: list[Tensor], expected: list[Tensor]) -> float:
    """Return ‖found − expected‖ / ‖expected‖ over all tensors."""
    pairs = [(x.detach().double(), y.detach()) for x, y in zip(found, expected, strict=True)]
    difference = sum(float((one - two).square().sum()) for one, two in pairs)
    return (difference / sum(float(two.square().sum()) for _, two in pairs)) ** 0.5


class TestAutocast:
    @pytest.mark.parametrize(
        "host",
        [MLP, "embedding", "conv2d_groups", "gru", "attention", "encoder_layer"],
        ids=host_name,
    )
    def test_autocast(self, host: str | Host) -> None:
        """Under bfloat16 autocast, dtypes are the plain model's and errors at most twice as large.

        Gradients of the factors are float32, and about as accurate as the gradients of the plain
        model's weights. With the adapter off, outputs are bit-for-bit the plain model's.
        """
        case = case_of(host, dtype=torch.float32)
        plain = dense_copy(case)

        def run(model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
            with torch.autocast("cpu", torch.bfloat16):
                out = floats(model(*case.inputs))
            loss(out).backward()
            return [x.detach() for x in out], [
                p.grad for p in model.parameters() if p.requires_grad
            ]

        ours, grads = run(case.model)
        theirs, weights = run(plain)
        expected = case.expected("one")
        assert [x.dtype for x in ours] == [x.dtype for x in theirs]
        assert error(ours, expected.outputs) <= 2 * error(theirs, expected.outputs)
        names = [f"one {key}" for key in pl.state_dict(case.model, "one")]
        exact = [expected.gradients[key] for key, _ in plain.named_parameters()]
        grads = [p.grad for p in pl.parameters(case.model)]
        assert {grad.dtype for grad in grads} == {torch.float32}
        bound = error([dense(w) for w in weights], exact)
        assert (
            error(grads, [expected.gradients[name] for name in names])
            <= 4 * bound + 4 * torch.finfo(torch.float32).eps
        )

        pl.disable(case.model)
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            assert_bits(floats(case.model(*case.inputs)), floats(case.plain(*case.inputs)))

    def test_reading_a_weight(self) -> None:
        """A weight read under autocast is float32, with the same bits as outside."""
        case = case_of(MLP, dtype=torch.float32)
        outside = case.model[0].weight
        with torch.autocast("cpu", torch.bfloat16):
            assert_bits(case.model[0].weight, outside)


HALVES = [torch.bfloat16, torch.float16]


class TestDtypes:
    @pytest.mark.parametrize("dtype", HALVES)
    def test_half_precision(self, dtype: torch.dtype) -> None:
        """In a half-precision model, factors are float32, W' is rounded once, and both train."""
        case = case_of(MLP, dtype=dtype)
        assert {p.dtype for p in pl.parameters(case.model)} == {torch.float32}
        A, B = (pl.state_dict(case.model, "one")[f"0.weight.{f}"].double() for f in "AB")
        exact = case.plain[0].weight.double() + 0.7 * 1.5 * B @ A
        # Besides the rounding to half precision there is that of float32, 2⁻¹³ of it or less.
        rounding = 1.01 * torch.finfo(dtype).eps / 2
        assert_close(case.model[0].weight.double(), exact, rtol=rounding, atol=1e-7)
        assert case.model[0].weight.dtype == dtype
        (out,) = outputs(case)
        assert out.dtype == dtype
        (plain,) = outputs(case, dense_copy(case))
        expected = case.expected("one").outputs
        assert error([out], expected) <= 2 * error([plain], expected)

        before = factors(case.model)
        loss(floats(case.model(*case.inputs))).backward()
        torch.optim.SGD(pl.parameters(case.model), lr=1e-4).step()
        steps = [p.grad * 1e-4 for p in pl.parameters(case.model)]
        expected_factors = [old - step for old, step in zip(before, steps, strict=True)]
        assert_close(factors(case.model), expected_factors)

    @pytest.mark.parametrize("merged", [False, True], ids=["attached", "merged"])
    @pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
    def test_cast(self, dtype: torch.dtype, merged: bool) -> None:
        """Casting an attached or merged model casts base, factors and the kept original bits."""
        case = case_of(MLP)
        state = pl.state_dict(case.model, "one")
        expected = {key: value.to(dtype) for key, value in state.items()}
        if merged:
            pl.merge(case.model)
        case.model.to(dtype)
        x = case.inputs[0].to(dtype)
        with torch.no_grad():
            out = case.model(x)
        assert out.dtype == dtype
        wanted = case.expected("one").outputs
        assert error([out], wanted) <= 16 * torch.finfo(dtype).eps
        pl.unmerge(case.model)
        assert_bits(pl.state_dict(case.model, "one"), expected)
        case.plain.to(dtype)
        assert_bits(dict(pl.base_state_dict(case.model)), dict(case.plain.state_dict()))
        pl.disable(case.model)
        with torch.no_grad():
            assert_bits(case.model(x), case.plain(x))
        pl.detach(case.model)
        assert_bits(dict(case.model.state_dict()), dict(case.plain.state_dict()))

    def test_layers_of_several_dtypes(self, tmp_path: Path) -> None:
        """Each layer's factors follow its dtype and device when the layers of a model differ."""
        torch.manual_seed(0)
        kinds: list[tuple[torch.dtype, str]] = [
            (torch.float32, "cpu"),
            (torch.float64, "cpu"),
            (torch.bfloat16, "cpu"),
            (torch.float32, "meta"),
        ]
        model = nn.ModuleList(nn.Linear(4, 3, dtype=d, device=where) for d, where in kinds)
        plain = copy.deepcopy(model)
        pl.attach(model, pl.LoRA(rank=2))
        shake(model)
        found = [(p.dtype, p.device.type) for p in pl.parameters(model)[::2]]
        wide = [torch.promote_types(dtype, torch.float32) for dtype, _ in kinds]
        assert found == list(zip(wide, ["cpu", "cpu", "cpu", "meta"], strict=True))
        x = torch.randn(5, 4, dtype=torch.float64)
        state = pl.state_dict(model)
        for i, (dtype, where) in enumerate(kinds):
            out = model[i](x.to(where, dtype))
            assert (out.dtype, out.device.type) == (dtype, where)
            if where == "cpu":
                A, B = (state[f"{i}.weight.{f}"].double() for f in "AB")
                weight = plain[i].weight.double() + B @ A
                expected = F.linear(x, weight, plain[i].bias.double())
                assert error([out], [expected]) <= 4 * torch.finfo(dtype).eps
        pl.merge(model)
        assert [layer.weight.dtype for layer in model] == [dtype for dtype, _ in kinds]
        pl.unmerge(model)

        on_cpu = model[:3]
        pl.save(on_cpu, tmp_path / "mixed.safetensors")
        pl.detach(model)
        pl.load(on_cpu, tmp_path / "mixed.safetensors")
        assert_bits(pl.state_dict(on_cpu), {key: state[key] for key in pl.state_dict(on_cpu)})

    @pytest.mark.parametrize(("size", "lost"), [(1e-5, 0.5), (1e-4, 0.1)])
    def test_small_updates_survive_half_precision(self, size: float, lost: float) -> None:
        """A bfloat16 layer applies a small ΔW to 3 %; rounding W + ΔW loses over `lost` of it."""
        torch.default_generator.manual_seed(0)
        layer = nn.Linear(256, 256, bias=False, dtype=torch.bfloat16)
        with torch.no_grad():
            # Two equal halves, so that W maps (x, −x) to zero: its output then shows ΔW alone.
            layer.weight.copy_((torch.randn(256, 128) * 0.02).repeat(1, 2))
        W, x = layer.weight.detach().double(), torch.randn(8, 128).bfloat16()
        pl.attach(layer, pl.LoRA(rank=4), "weight")
        assert all(parameter.dtype == torch.float32 for parameter in pl.parameters(layer))
        with torch.no_grad():
            for parameter in pl.parameters(layer):
                parameter.normal_(std=(size / 2) ** 0.5)
            actual = layer(torch.cat([x, -x], dim=1)).double()
        factors = {key: value.double() for key, value in pl.state_dict(layer).items()}
        update = factors["weight.B"] @ factors["weight.A"]
        rounded = layer.weight.detach().double() - W
        assert float((rounded - update).norm() / update.norm()) > lost
        expected = torch.cat([x, -x], dim=1).double() @ update.T
        assert float((actual - expected).norm() / expected.norm()) < 0.03

    def test_unmerging_does_not_subtract(self) -> None:
        """Unmerging in bfloat16 changes no weight; subtracting ΔW would change one in ten."""
        layer = nn.Linear(100, 100, dtype=torch.bfloat16)
        W = layer.weight.detach().clone()
        pl.attach(layer, pl.LoRA(rank=4), "weight")
        shake(layer)
        factors = pl.state_dict(layer)
        update = (factors["weight.B"] @ factors["weight.A"]).bfloat16()
        subtracted = (W + update) - update
        assert (subtracted != W).float().mean() > 0.1
        pl.merge(layer)
        pl.unmerge(layer)
        pl.detach(layer)
        assert_bits(layer.weight.detach(), W)
