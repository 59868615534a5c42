"""`routed` in training: several adapters learn in one pass what each learns by itself."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

import paramlora as pl
from paramlora.routing import rows

ALPHA, RANKS = 2.0, {"small": 1, "wide": 4, "plain": 2}
SPECS = {name: pl.LoRA(rank, ALPHA) for name, rank in RANKS.items()}
STEPS, BATCH, RATE = 5, 4, 1e-2


Batches = list[tuple[Tensor, Tensor]]


def model_with(specs: dict[str, pl.LoRA]) -> nn.Sequential:
    """Return a model in float64 with adapters of these names, each from a seed of its own."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    for seed, (name, spec) in enumerate(specs.items()):
        generator = torch.Generator().manual_seed(seed)
        pl.attach(model, spec, "?.weight", name=name, activate="no", generator=generator)
    pl.unfreeze(model)
    return model


def values_of(model: nn.Module, name: str) -> dict[str, Tensor]:
    return {key: value.detach().clone() for key, value in pl.state_dict(model, name).items()}


def batches(count: int) -> Batches:
    """Return for each step inputs, (adapters, batch, 6), and labels, (adapters, batch)."""
    torch.manual_seed(1)
    shape = (count, BATCH)
    return [
        (torch.randn(*shape, 6, dtype=torch.float64), torch.randint(3, shape)) for _ in range(STEPS)
    ]


def train_alone(
    base: Any, start: dict[str, Tensor], scale: float, data: Batches
) -> dict[str, Tensor]:
    """Train one adapter with dense weights W + s · B A and return its factors."""
    factors = {key: value.clone().requires_grad_() for key, value in start.items()}
    optimizer = torch.optim.Adam(factors.values(), RATE)
    for x, labels in data:
        first, second = (
            layer.weight + scale * factors[f"{i}.weight.B"] @ factors[f"{i}.weight.A"]
            for i, layer in zip((0, 2), (base[0], base[2]), strict=True)
        )
        hidden = torch.tanh(x @ first.T + base[0].bias)
        loss = F.cross_entropy(hidden @ second.T + base[2].bias, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {key: value.detach() for key, value in factors.items()}


@pytest.mark.parametrize("order", ["side by side", "mixed"])
def test_equal_to_separate_trainings(order: str) -> None:
    """Adapters of different ranks, trained at once with Adam, equal those trained one by one."""
    model = model_with(SPECS)
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    base.requires_grad_(False)
    data = batches(len(SPECS))
    expected = [
        train_alone(
            base,
            values_of(model, name),
            ALPHA / RANKS[name],
            [(x[i], labels[i]) for x, labels in data],
        )
        for i, name in enumerate(SPECS)
    ]
    ids = torch.arange(len(SPECS)).repeat_interleave(BATCH)
    mixed = torch.randperm(len(ids)) if order == "mixed" else torch.arange(len(ids))
    optimizer = torch.optim.Adam(pl.parameters(model), RATE)
    with pl.routed(model, ids[mixed]):
        for x, labels in data:
            logits = model(x.flatten(0, 1)[mixed])
            optimizer.zero_grad()
            loss = F.cross_entropy(logits, labels.flatten()[mixed], reduction="sum") / BATCH
            loss.backward()
            optimizer.step()
    for name, factors in zip(SPECS, expected, strict=True):
        assert_close(values_of(model, name), factors)
        assert all(factor.abs().sum() > 0 for factor in factors.values())


def even_rows(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the outputs with equally many rows for each adapter: at once, and one by one."""
    ids = torch.arange(len(SPECS)).repeat_interleave(len(x) // len(SPECS))
    with pl.routed(model, ids):
        found = model(x)
    parts = []
    for name, part in zip(SPECS, x.chunk(len(SPECS)), strict=True):
        with pl.using(model, name):
            parts.append(model(part))
    return found, torch.cat(parts)


def with_values(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in pl.parameters(model):
            parameter.normal_(std=0.5)
    return model


@pytest.mark.parametrize("shape", [(6, 6), (6, 2, 6)])
@pytest.mark.parametrize(
    "change",
    [
        lambda model: None,
        lambda model: pl.scale(model, 0.5, "wide"),
        lambda model: pl.scale(model, torch.tensor(0.5, dtype=torch.float64), "wide"),
        lambda model: pl.detach(model[0], "wide"),
    ],
    ids=["as attached", "strength", "strength as a tensor", "not at every site"],
)
def test_values_and_gradients_of_even_batches(
    change: Callable[[nn.Module], object], shape: tuple[int, ...]
) -> None:
    """With equally many rows for each adapter, outputs and gradients are those of each alone."""
    model = with_values(model_with(SPECS))
    change(model)
    found, expected = even_rows(model, torch.randn(shape, dtype=torch.float64))
    assert_close(found, expected)
    parameters = pl.parameters(model)
    gradients = [torch.autograd.grad(y.square().sum(), parameters) for y in (found, expected)]
    assert_close(*gradients)


def test_gradient_of_a_strength() -> None:
    """A strength that is a tensor gets its gradient from the rows of its adapter."""
    model = with_values(model_with(SPECS))
    strength = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    pl.scale(model, strength, "wide")
    outputs = even_rows(model, torch.randn(6, 6, dtype=torch.float64))
    found, expected = (torch.autograd.grad(y.square().sum(), strength) for y in outputs)
    assert_close(found, expected)


def test_new_adapters_keep_the_bits_of_the_base() -> None:
    """With B = 0 the outputs of an even batch are bit for bit the base's."""
    model, x = model_with(SPECS).float(), torch.randn(6, 6)
    with pl.disabled(model):
        expected = model(x)
    with pl.routed(model, [0, 0, 1, 1, 2, 2]):
        assert torch.equal(model(x), expected)


def test_infinity_in_another_adapter_of_an_even_batch() -> None:
    """Infinite factors of one adapter do not affect the rows of others."""
    model, x = with_values(model_with(SPECS)), torch.randn(6, 6, dtype=torch.float64)
    expected, _ = even_rows(model, x)
    with torch.no_grad():
        for factor in pl.parameters(model, "wide"):
            factor.fill_(torch.inf)
    found, _ = even_rows(model, x)
    assert_close(found[[0, 1, 4, 5]], expected[[0, 1, 4, 5]])


def test_compiled_even_batch() -> None:
    """An even batch compiles to one graph, with the values and gradients of the eager one."""
    model, x = with_values(model_with(SPECS)), torch.randn(6, 6, dtype=torch.float64)
    parameters = pl.parameters(model)
    with pl.routed(model, [0, 0, 1, 1, 2, 2]):
        expected = model(x)
        found = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    assert_close(found, expected)
    gradients = [torch.autograd.grad(y.square().sum(), parameters) for y in (found, expected)]
    assert_close(*gradients)


@pytest.mark.parametrize(
    ("ids", "even"),
    [([0, 0, 1, 1], True), ([0, 1, 0, 1], False), ([0, 1, 1], False), ([1, 1, 0, 0], False)],
)
def test_which_batches_are_even(ids: list[int], even: bool) -> None:
    """One batched product needs equally many rows for each adapter, in ascending order."""
    assert rows.Route(torch.tensor(ids), ("a", "b"), {}).even is even


def test_different_numbers_of_rows() -> None:
    """With each row's loss over the number of rows of its adapter, gradients are those alone."""
    model, x = with_values(model_with(SPECS)), torch.randn(6, 6, dtype=torch.float64)
    counts = [1, 2, 3]
    ids = torch.arange(3).repeat_interleave(torch.tensor(counts))
    with pl.routed(model, ids):
        losses = model(x).square().sum(1)
        found = torch.autograd.grad(
            (losses / torch.tensor(counts)[ids]).sum(), pl.parameters(model)
        )
    means = []
    for name, part in zip(SPECS, x.split(counts), strict=True):
        with pl.using(model, name):
            means.append(model(part).square().sum(1).mean())
    assert_close(found, torch.autograd.grad(torch.stack(means).sum(), pl.parameters(model)))


@pytest.mark.parametrize("ids", [[0, 0, 2, 2], [0, 2, 2, -1]], ids=["even", "uneven"])
def test_an_adapter_without_rows_stays(ids: list[int]) -> None:
    """An adapter without rows gets no gradient, so Adam leaves it, even with momentum."""
    model = with_values(model_with(SPECS))
    optimizer = torch.optim.Adam(pl.parameters(model), RATE)
    for chosen in ([0, 1, 2, 2], ids):
        before = {name: values_of(model, name) for name in SPECS}
        with pl.routed(model, chosen):
            optimizer.zero_grad()
            model(torch.randn(4, 6, dtype=torch.float64)).square().sum().backward()
            optimizer.step()
    assert_close(values_of(model, "wide"), before["wide"], rtol=0, atol=0)
    assert not torch.equal(values_of(model, "small")["0.weight.B"], before["small"]["0.weight.B"])
