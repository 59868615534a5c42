"""CorDA and LoRA-Null: starts from data equal dense references, and the base stays untouched."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import paramlora as pl
from tests.support.helpers import refuses

START: dict[str, Any] = {
    "corda": lambda m, b: pl.corda(m, b, mode="knowledge"),
    "null": pl.lora_null,
}


def net(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 4)).to(dtype)


def data(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    torch.manual_seed(1)
    scales = torch.tensor([3.0, 2.0, 1.0, 1.0, 0.5, 0.1, 0.02])
    return [(torch.randn(2, n, 7) * scales).to(dtype) for n in (5, 9)]


def started_update(model: nn.Module, path: str, scale: float) -> Tensor:
    """Return s B A of the started factors."""
    state = pl.state_dict(model)
    return scale * state[f"{path}.B"] @ state[f"{path}.A"]


def covariance(inputs: Tensor) -> Tensor:
    """Return the mean of x xᵀ, summed row by row."""
    rows = inputs.flatten(0, -2)
    return sum(torch.outer(x, x) for x in rows) / len(rows)  # type: ignore[return-value]


@pytest.mark.parametrize("mode", ["knowledge", "instruction"])
def test_corda(mode: Any) -> None:
    """s B A is the part of U Σ Vᵀ C⁻¹ with the least or the largest singular values of W C."""
    model = net()
    pl.attach(model, pl.LoRA(rank=2, alpha=3, init="corda"))
    pl.corda(model, data(), mode=mode)
    inputs = torch.cat(data(), dim=1)
    for path, x in (("0", inputs), ("2", net()[:2](inputs).detach())):  # type: ignore[index]
        W, C = net().get_parameter(f"{path}.weight").detach(), covariance(x)
        C += 0.01 * C.trace() / len(C) * torch.eye(len(C), dtype=C.dtype)
        U, S, Vh = torch.linalg.svd(W @ C, full_matrices=False)
        kept = slice(-2, None) if mode == "knowledge" else slice(2)
        expected = U[:, kept] @ S[kept].diag() @ Vh[kept] @ torch.linalg.inv(C)
        assert_close(started_update(model, f"{path}.weight", 3 / 2), expected)


def test_corda_equals_peft() -> None:
    """For one batch the starting update equals PEFT's, which scales inputs by their maximum."""
    peft = pytest.importorskip("peft", reason="the oracle is PEFT")
    corda = pytest.importorskip("peft.tuners.lora.corda", reason="the oracle is PEFT")
    base, x = net(torch.float32), data(torch.float32)[0].flatten(0, 1)
    for mode, method in (("knowledge", "kpm"), ("instruction", "ipm")):
        ours, theirs = copy.deepcopy(base), copy.deepcopy(base)
        pl.attach(ours, pl.LoRA(rank=2, alpha=3, init="corda"), "0")
        pl.corda(ours, [x], mode=mode)  # type: ignore[arg-type]
        config = peft.LoraConfig(
            r=2,
            lora_alpha=3,
            target_modules=["0"],
            init_lora_weights="corda",
            corda_config=peft.tuners.lora.config.CordaConfig(corda_method=method),
        )
        corda.preprocess_corda(theirs, config, run_model=lambda: theirs(x))  # noqa: B023
        layer = peft.get_peft_model(theirs, config).base_model.model[0]
        expected = 3 / 2 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        assert_close(
            started_update(ours, "0.weight", 3 / 2), expected.detach(), rtol=1e-3, atol=1e-4
        )


def test_lora_null() -> None:
    """s B A is W on the r directions in which the inputs have the least energy."""
    model = net()
    pl.attach(model, pl.LoRA(rank=2, alpha=3, init="null"), "0")
    pl.lora_null(model, data())
    U, _, _ = torch.linalg.svd(torch.cat(data(), dim=1).flatten(0, 1).T)
    expected = net()[0].weight.detach() @ U[:, -2:] @ U[:, -2:].T  # type: ignore[index]
    assert_close(started_update(model, "0.weight", 3 / 2), expected)
    # Training A and B in these directions changes the outputs for the data little.
    A = pl.state_dict(model)["0.weight.A"]
    energy = torch.cat(data(), dim=1).flatten(0, 1)
    assert float((energy @ A.T).norm() / A.norm()) < 0.05 * float(energy.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("init", START)
def test_outputs_are_the_base_at_the_start(init: str, dtype: torch.dtype) -> None:
    """A start leaves the stored weights and outputs bitwise the base's, on and off, and trains."""
    base = net(dtype)
    model = copy.deepcopy(base)
    x = data(dtype)[0]
    pl.attach(model, pl.LoRA(rank=2, init=init))
    before = pl.fingerprint(model)
    START[init](model, data(dtype))
    assert pl.fingerprint(model) == before
    assert all(factor.any() for factor in pl.parameters(model))
    expected = base.requires_grad_(False)(x)
    assert torch.equal(model(x), expected)
    with pl.merged(model):
        assert torch.equal(model(x), expected)
    model(x).float().square().sum().backward()
    with torch.no_grad():
        for factor in pl.parameters(model):
            factor.sub_(factor.grad, alpha=0.1)  # type: ignore[arg-type]
    assert not torch.equal(model(x), expected)
    with pl.disabled(model):
        assert torch.equal(model(x), expected)


def with_init(init: str, target: str = "0") -> nn.Module:
    model = net()
    pl.attach(model, pl.LoRA(rank=2, init=init), target)
    return model


def trained(init: str) -> nn.Module:
    model = with_init(init)
    with torch.no_grad():
        for factor in pl.parameters(model):
            factor.add_(1)
    return model


@pytest.mark.parametrize("init", START)
def test_refused_starts(init: str) -> None:
    """Adapters that cannot start, and data that is missing, raise and change nothing."""
    start = START[init]
    refuses(
        with_init("pissa"),
        lambda m: start(m, data()),
        pl.TargetError,
        f"cannot start '0.weight': it needs a LoRA(init='{init}'), not transposed, at the whole "
        "weight of an nn.Linear, and this is LoRA(rank=2, [...]",
    )
    refuses(
        trained(init),
        lambda m: start(m, data()),
        pl.StateError,
        "cannot start '0.weight': it is trained already; attach a new adapter",
    )
    refuses(
        with_init(init),
        lambda m: start(m, []),
        pl.StateError,
        "cannot start '0.weight': its module received no inputs, or only zeros; give more batches, "
        "or leave it out",
    )


def test_unknown_mode() -> None:
    """A mode that does not exist raises ValueError."""
    refuses(
        with_init("corda"),
        lambda m: pl.corda(m, data(), mode="kpm"),  # type: ignore[arg-type]
        ValueError,
        "mode must be 'knowledge' or 'instruction', got 'kpm'",
    )


def test_a_weight_of_another_layer() -> None:
    """A start needs the weight of a Linear; the weight of a convolution is refused."""
    model = nn.Sequential(nn.Conv1d(6, 6, 1))
    pl.attach(model, pl.LoRA(rank=2, init="corda"), "0")
    message = (
        "cannot start '0.weight': it needs a LoRA(init='corda'), not transposed, at the whole "
        "weight of an nn.Linear, and this is LoRA(rank=2, [...]"
    )
    refuses(
        model,
        lambda m: pl.corda(m, [torch.randn(2, 6, 3)], mode="knowledge"),
        pl.TargetError,
        message,
    )
