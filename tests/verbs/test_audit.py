"""`audit` finds what trains nothing and what moves by mistake, and has no false alarms."""

from collections.abc import Callable
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import paramlora as pl
from tests.support.helpers import unchanged
from tests.support.models import Tied, Wrapped

Made = tuple[Any, Any]


def mlp() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 3))


def vectors(n: int = 8) -> Tensor:
    return torch.randn(n, 6, generator=torch.Generator().manual_seed(1))


def trained(model: nn.Module, std: float = 0.1) -> None:
    """Fill the factors of a model, as training would."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in pl.parameters(model):
            parameter.normal_(std=std, generator=generator)


def found(model: nn.Module, batch: Any, **options: Any) -> list[tuple[str, str, str]]:
    """Return the findings of an audit, which must leave the model and the random state alone."""
    state = torch.get_rng_state()
    with unchanged(model):
        report = pl.audit(model, batch, **options)
    assert torch.equal(torch.get_rng_state(), state)
    assert bool(report) == (len(report) > 0)
    return [(finding.kind, finding.site, finding.name) for finding in report]


# Healthy models: new and trained adapters of many kinds on many layers.


def fresh() -> Made:
    model = mlp()
    pl.attach(model, pl.LoRA(rank=2), nn.Linear)
    return model, vectors()


def after_training() -> Made:
    model, x = fresh()
    optimizer = torch.optim.SGD(pl.parameters(model), lr=0.1)
    for _ in range(2):
        model(x).square().sum().backward()
        optimizer.step()
    return model, x


def held() -> Made:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())
    pl.attach(model, pl.LoRA(rank=2), "0", hold_statistics=True)
    return model, torch.randn(2, 1, 6, 6)


def encoder() -> Made:
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    pl.attach(model, pl.LoRA(rank=2), ["linear1", "linear2", "self_attn.in_proj_weight"])
    return model, torch.randn(2, 3, 8)


def recurrent() -> Made:
    torch.manual_seed(0)
    model = nn.LSTM(4, 5)
    pl.attach(model, pl.DoRA(rank=2), "weight_*")
    return model, torch.randn(3, 2, 4)


def tied() -> Made:
    torch.manual_seed(0)
    model = Tied()
    pl.attach(model, pl.LoRA(rank=2), "emb")
    return model, {"ids": torch.arange(6).view(2, 3)}


def on_top() -> Made:
    """Train an adapter on top of a trained one that stays active, beside one that is off."""
    model, x = fresh()
    trained(model)
    pl.attach(model, pl.LoRA(rank=1), "0", name="off", activate="no")
    pl.attach(model, {"2": pl.IA3(), "0.bias": pl.Delta()}, name="new", activate="also")
    pl.disable(model, "off")
    return model, (x,)


def half() -> Made:
    model = mlp().bfloat16()
    pl.attach(model, pl.LoRA(rank=2), nn.Linear)
    trained(model, std=0.3)
    return model, vectors().bfloat16()


def everything_trained() -> Made:
    """Train the base together with the adapter, statistics included."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5, affine=False), nn.Linear(5, 3))
    pl.attach(model, pl.LoHa(rank=2), "0", freeze=False)
    return model, vectors()


def classifier() -> Made:
    """Outputs whose plain sum is constant, with dropout."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.Dropout(), nn.LayerNorm(9), nn.Softmax(-1))
    pl.attach(model, pl.LoKr(rank=2), "0")
    return model, vectors()


HEALTHY = [
    fresh,
    after_training,
    held,
    encoder,
    recurrent,
    tied,
    on_top,
    half,
    everything_trained,
    classifier,
]


@pytest.mark.parametrize("make", HEALTHY, ids=lambda make: make.__name__)
def test_healthy_model(make: Callable[[], Made]) -> None:
    """A healthy model has no finding, and is bit-identical after the audit."""
    model, batch = make()
    model.train()
    assert found(model, batch) == []
    assert str(pl.audit(model, batch)) == "nothing found"


# Planted faults.


class Unused(nn.Module):
    """A model with a layer that its forward does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


def test_layer_that_is_not_used() -> None:
    """Factors that the batch does not reach get no gradient."""
    model = Unused()
    pl.attach(model, pl.LoRA(rank=2), nn.Linear)
    assert found(model, vectors()) == [("gradient", "unused.weight", "default")]


def test_layer_behind_a_detach() -> None:
    """Factors whose gradient is cut off or multiplied by zero are found."""
    model, x = fresh()

    def loss(output: Tensor) -> Tensor:
        return (output * 0).sum()

    trained(model)
    kinds = [("gradient", site, "default") for site in ("0.weight", "2.weight")]
    assert found(model, x, loss=loss) == kinds
    assert found(model, x, loss=lambda output: torch.ones(())) == kinds
    assert found(model, x, loss=lambda output: output.sum() / 0) == kinds


@pytest.mark.parametrize("verb", [pl.merge, pl.disable])
def test_trained_adapter_that_does_not_contribute(verb: Callable[[nn.Module], None]) -> None:
    """The factors of a merged adapter, and of one that is switched off, get no gradient."""
    model, x = fresh()
    trained(model)
    verb(model)
    assert {kind for kind, *_ in found(model, x)} == {"gradient"}


def test_update_that_stays_zero() -> None:
    """Two factors of zero never learn; nor does an adapter of strength zero contribute."""
    model, x = fresh()
    with torch.no_grad():
        for parameter in pl.parameters(model)[:2]:
            parameter.zero_()
    assert found(model, x) == [("update", "0.weight", "default")]
    trained(model)
    pl.scale(model, 0.0)
    assert {kind for kind, *_ in found(model, x)} == {"update"}
    with pl.using(model, default=1.0):
        assert found(model, x) == []


def test_frozen_adapter_without_an_update() -> None:
    """An active adapter that was never trained and is frozen now changes nothing."""
    model, x = fresh()
    pl.freeze(model)
    kinds = [("update", site, "default") for site in ("0.weight", "2.weight")]
    assert found(model, x) == kinds


def test_base_that_moves() -> None:
    """A parameter of the base that is trained although attach froze it moves the base."""
    model, x = fresh()
    model[2].bias.requires_grad_(True)
    assert found(model, x) == [("base", "2.bias", "")]


def test_base_that_an_optimizer_moves() -> None:
    """A frozen parameter with a gradient from before is moved by an optimizer that holds it."""
    model, x = mlp(), vectors()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(x).sum().backward()
    pl.attach(model, pl.LoRA(rank=2), "0")
    assert found(model, x) == []
    expected = [("base", path, "") for path in ("0.weight", "0.bias", "2.weight", "2.bias")]
    by_path = sorted(found(model, x, optimizer=optimizer))
    assert by_path == sorted([*expected, ("optimizer", "0.weight", "default")])
    optimizer.zero_grad()
    assert found(model, x, optimizer=optimizer) == [("optimizer", "0.weight", "default")]
    optimizer = torch.optim.SGD(pl.parameters(model), lr=0.1)
    assert found(model, x, optimizer=optimizer) == []


def test_embedding_that_renormalises_itself() -> None:
    """An embedding with max_norm writes to the frozen base in its forward."""
    torch.manual_seed(0)
    model = nn.Sequential(Wrapped(nn.Embedding(5, 4, max_norm=0.1)), nn.Linear(4, 2))
    pl.attach(model, pl.LoRA(rank=2), "1")
    assert found(model, torch.arange(5)) == [("base", "0.layer.weight", "")]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_merge_that_is_rounded_away(dtype: torch.dtype) -> None:
    """An update far below the precision of the base would be lost in a merge."""
    model = mlp().to(dtype)
    pl.attach(model, pl.LoRA(rank=2), "0")
    trained(model, std=1e-3)
    x = vectors().to(dtype)
    assert found(model, x) == [("rounding", "0.weight", "default")]
    # Factors in the base's precision lose as much.
    assert found(model.to(dtype), x) == [("rounding", "0.weight", "default")]
    model.float()
    assert found(model, x.float()) == []


def test_statistics_that_drift() -> None:
    """BatchNorm and spectral_norm move in training mode under a frozen base."""
    torch.manual_seed(0)
    model = nn.Sequential(
        parametrizations.spectral_norm(nn.Linear(6, 5)), nn.BatchNorm1d(5), nn.Linear(5, 3)
    )
    pl.attach(model, pl.LoRA(rank=2), "2")
    assert found(model, vectors()) == [
        ("statistics", "0.parametrizations.weight.0", ""),
        ("statistics", "1", ""),
    ]
    model.eval()
    assert found(model, vectors()) == []
    report = str(pl.audit(model, vectors()))
    assert report.startswith("nothing found\nthe model is in evaluation mode; call model.train()")


def test_report() -> None:
    """A report groups alike findings, and prints as a table."""
    model, x = fresh()
    trained(model)
    pl.merge(model)
    model[0].bias.requires_grad_(True)
    assert str(pl.audit(model, x)) == (
        "kind      adapter  finding\n"
        "gradient  default  it is merged, so its factors get no gradient; unmerge it, or freeze "
        "it: 2 (0.weight, 2.weight)\n"
        "base      -        it is trained, although attach froze the base. No adapter's file "
        "contains it. Freeze it, or attach a Delta to it: 1 (0.bias)"
    )


# Inputs and losses.


def test_loss_of_the_output() -> None:
    """A loss that the output contains is used, as transformers' models give it."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 3)

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            logits = self.fc(x)
            return {"loss": F.cross_entropy(logits, labels), "logits": logits / 0}

    model, labels = Model(), torch.arange(8) % 3
    pl.attach(model, pl.LoRA(rank=2))
    for batch in ({"x": vectors(), "labels": labels}, (vectors(), labels), [vectors(), labels]):
        assert found(model, batch) == []
    with pytest.raises(ValueError, match=r"loss must return a scalar tensor, got \(8, 3\)"):
        pl.audit(model, (vectors(), labels), lambda output: output["logits"])


def test_output_without_a_loss() -> None:
    """An output without a floating tensor raises, and says to pass a loss."""
    model = nn.Sequential(nn.Linear(6, 3), nn.Flatten())
    pl.attach(model, pl.LoRA(rank=2), "0")
    model.append(Wrapped(nn.Softmax(-1)))
    model.register_forward_hook(lambda _, args, output: output.argmax(-1))
    with pytest.raises(TypeError, match=r"output, a Tensor, has no floating tensor; pass loss="):
        pl.audit(model, vectors())


def test_audit_under_no_grad() -> None:
    """An audit computes gradients wherever it is called."""
    model, x = fresh()
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            assert not pl.audit(model, x)


def test_audit_of_a_model_without_adapters() -> None:
    """A model without adapters is refused."""
    with pytest.raises(pl.StateError, match="no adapter is attached here"):
        pl.audit(mlp(), vectors())


def test_audit_of_a_sharded_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is refused, as a part of each tensor is elsewhere."""
    model, x = fresh()
    monkeypatch.setattr("paramlora.stack.storage.is_fsdp_managed", lambda m: m is model[0])
    with pytest.raises(pl.StateError, match=r"'0\.weight' is sharded over processes"):
        pl.audit(model, x)


def test_report_is_frozen() -> None:
    """The findings of a report cannot be replaced."""
    report: Any = pl.audit(*fresh())
    with pytest.raises(FrozenInstanceError, match="findings"):
        report.findings = ()
