"""EWC, SI, LwF, ER and InfLoRA against references in float64, written as loops."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from experiments.digits.model import DigitNet
from experiments.tasks.regularizers import (
    PathIntegral,
    Quadratic,
    design,
    fisher,
    input_energy,
    lwf,
    outside,
    protect,
    stored_rows,
)


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return DigitNet((5, 4), "relu", inputs=6, outputs=4).double()


def inputs(count: int = 7) -> Tensor:
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(1)).double()


@pytest.mark.parametrize("active", [[True] * 4, [False, True, False, True]])
def test_fisher_is_the_exact_expectation_over_labels(active: list[bool]) -> None:
    """It is the mean over images of Σ_y p(y) g_y², one backward pass for each image and label."""
    model, x, units = network(), inputs(), [u for u in range(4) if active[u]]
    expected = [torch.zeros_like(p) for p in model.parameters()]
    for image in x:
        z = model(image[None])[0, units]
        for y in range(len(units)):
            log_p = z[y] - torch.log(torch.exp(z).sum())
            gradients = torch.autograd.grad(log_p, list(model.parameters()), retain_graph=True)
            for total, g in zip(expected, gradients, strict=True):
                total += torch.exp(log_p.detach()) * g**2 / len(x)
    for found, total in zip(fisher(model, x, torch.tensor(active), size=3), expected, strict=True):
        assert_close(found, total)


def test_one_quadratic_stands_for_the_penalties_of_all_contexts() -> None:
    """Value and gradient are those of Σ_j Σ_i F_ij (θ_i - θ_ij)², also where all F are zero."""
    torch.manual_seed(0)
    terms = [(torch.rand(3, 2).double(), torch.randn(3, 2).double()) for _ in range(3)]
    for strength, _ in terms:
        strength[0, 0] = 0
    terms[0][0][1, 1] = 0
    joined, theta = Quadratic(), torch.randn(3, 2).double().requires_grad_()
    for strength, center in terms:
        joined.add([strength], [center])
    expected = torch.zeros(()).double()
    for strength, center in terms:
        for i in range(3):
            for j in range(2):
                expected = expected + strength[i, j] * (theta[i, j] - center[i, j]) ** 2
    assert_close(joined([theta]), expected)
    ours, reference = (torch.autograd.grad(v, theta)[0] for v in (joined([theta]), expected))
    assert_close(ours, reference)


def test_si_adds_up_gradient_times_step() -> None:
    """The importance is Σ_t -g_t (θ_t - θ_{t-1}) / ((θ_T - θ_0)² + ξ), by a loop over the steps."""
    model, x, labels = network(), inputs(), torch.tensor([0, 1, 2, 3, 0, 1, 2])
    parameters = list(model.parameters())
    optimizer = torch.optim.Adam(parameters, 0.05)
    integral = PathIntegral(parameters, optimizer)
    states, gradients = [[p.detach().clone() for p in parameters]], []
    for _ in range(4):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), labels).backward()
        gradients.append([p.grad.clone() for p in parameters if p.grad is not None])
        optimizer.step()
        states.append([p.detach().clone() for p in parameters])
    for n, found in enumerate(integral.importance(0.1)):
        path = torch.zeros_like(found)
        for step in range(4):
            path -= gradients[step][n] * (states[step + 1][n] - states[step][n])
        assert_close(found, path / ((states[-1][n] - states[0][n]) ** 2 + 0.1))


def test_lwf_sums_the_soft_cross_entropy_of_each_earlier_context() -> None:
    """With temperature 2, without T², and the mean over images; image by image with math.exp."""
    torch.manual_seed(0)
    z, teacher = torch.randn(3, 4).double(), torch.randn(3, 4).double()
    for groups in ([[0, 1], [2, 3]], [[0, 1, 2, 3]] * 3, [[0, 1, 2, 3]]):
        expected = 0.0
        for image in range(3):
            for units in groups:
                soft = [math.exp(float(teacher[image, u]) / 2) for u in units]
                ours = [math.exp(float(z[image, u]) / 2) for u in units]
                for s, o in zip(soft, ours, strict=True):
                    expected -= s / sum(soft) * math.log(o / sum(ours)) / 3
        found = lwf(z, teacher, [torch.tensor(units) for units in groups], 2.0)
        assert float(found) == pytest.approx(expected, rel=1e-12)


def test_the_memory_has_as_many_images_of_each_class() -> None:
    """Each class has `each` different rows of the context, or all if there are fewer."""
    labels = torch.tensor([0, 1, 0, 1, 0, 1, 0, 2])
    rows = torch.tensor([0, 1, 2, 3, 4, 6])
    found = stored_rows(rows, labels, 3, torch.Generator().manual_seed(0)).tolist()
    assert len(set(found)) == 5
    assert set(found) <= set(rows.tolist())
    assert sorted(labels[found].tolist()) == [0, 0, 0, 1, 1]


def test_inflora_does_not_touch_protected_inputs() -> None:
    """A is orthonormal, orthogonal to M, and has the most energy outside of it."""
    model, x = network(), inputs(40)
    first = model.get_submodule("linear2")
    hidden = torch.relu(model.get_submodule("linear1")(x)).detach()
    (energy,) = input_energy(model, [first], x)
    assert_close(energy, sum(torch.outer(h, h) for h in hidden))
    M = protect(energy, energy.new_zeros(5, 0), 0.7)
    assert_close(M.T @ M, torch.eye(M.shape[1]).double())
    kept = [float((M[:, :n].T @ energy @ M[:, :n]).trace() / energy.trace()) for n in (1, 2, 3, 4)]
    width = M.shape[1]
    assert kept[width - 1] >= 0.7
    assert width == 1 or kept[width - 2] < 0.7
    A = design(energy, M, 2)
    assert_close(A @ A.T, torch.eye(2).double())
    assert_close(A @ M, torch.zeros(2, width).double(), rtol=0, atol=1e-12)
    P = torch.eye(5).double() - M @ M.T
    assert_close(outside(energy, M), P @ energy @ P)
    highest = torch.linalg.svdvals(hidden @ P)[:2] ** 2
    assert_close((A @ energy @ A.T).diagonal(), highest)
