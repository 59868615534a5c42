"""How factors start: distributions, scale, dtype, and the random numbers used."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import paramlora as pl
from paramlora.kinds.start import truncated_svd
from tests.support.reference import HOSTS

INITS = ["kaiming", "gaussian", "gaussian/sqrt_r", "uniform/sqrt_r", "orthogonal"]
RANK, IN, OUT = 25, 400, 300
COUNT = RANK * IN


def factors(
    spec: pl.kinds.Spec, shape: tuple[int, ...] = (OUT, IN), seed: int = 0
) -> dict[str, Tensor]:
    return spec.create(torch.zeros(shape), torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("init", INITS)
def test_shapes(init: str) -> None:
    """With every init A is (r, in), B is (out, r), and B is zero."""
    found = factors(pl.LoRA(rank=RANK, init=init), (OUT, 8, 5, 10))
    assert found["A"].shape == (RANK, 400)
    assert found["B"].shape == (OUT, RANK)
    assert not found["B"].any()
    assert found["A"].all()


@pytest.mark.parametrize(("init", "bound"), [("kaiming", IN**-0.5), ("uniform/sqrt_r", RANK**-0.5)])
def test_uniform(init: str, bound: float) -> None:
    """Kaiming with a = √5 is uniform on ±1/√in, and the other uniform init on ±1/√r."""
    A = factors(pl.LoRA(rank=RANK, init=init))["A"]
    assert float(A.abs().max()) <= bound
    # The largest of n values exceeds (1 − 20/n)·bound with probability 1 − e⁻²⁰.
    assert float(A.abs().max()) >= bound * (1 - 20 / COUNT)
    assert_uniform((A / bound + 1) / 2)


@pytest.mark.parametrize(("init", "std"), [("gaussian", 1.0), ("gaussian/sqrt_r", RANK**-0.5)])
def test_gaussian(init: str, std: float) -> None:
    """A Gaussian init has mean 0, deviation 1 or 1/√r, and the deciles of a Gaussian."""
    A = factors(pl.LoRA(rank=RANK, init=init))["A"]
    # Five standard errors of a mean and of a deviation.
    assert abs(float(A.mean())) <= 5 * std / math.sqrt(COUNT)
    assert abs(float(A.std()) - std) <= 5 * std / math.sqrt(2 * COUNT)
    assert_uniform(torch.special.ndtr(A / std))


def assert_uniform(values: Tensor) -> None:
    """Assert that values are uniform on [0, 1] and that rows do not correlate.

    Each tenth holds n/10 of them to five standard errors, √(0.09 n).
    """
    tenths = torch.histc(values, 10, 0, 1)
    assert float((tenths - COUNT / 10).abs().max()) <= 5 * math.sqrt(0.09 * COUNT)
    correlations = torch.corrcoef(values) - torch.eye(RANK)
    assert float(correlations.abs().max()) <= 6 / math.sqrt(IN)


@pytest.mark.parametrize("rank", [1, RANK, IN])
def test_orthogonal(rank: int) -> None:
    """With the orthogonal init A has orthonormal rows."""
    A = factors(pl.LoRA(rank=rank, init="orthogonal"))["A"]
    assert_close(A @ A.T, torch.eye(rank), rtol=0, atol=1e-5)


def test_orthogonal_with_a_large_rank() -> None:
    """If the rank exceeds the input size, A has orthonormal columns."""
    A = factors(pl.LoRA(rank=9, init="orthogonal"), (OUT, 4))["A"]
    assert_close(A.T @ A, torch.eye(4), rtol=0, atol=1e-5)


def test_callable() -> None:
    """A callable init fills A, (r, in), in place, and no gradient is recorded."""
    shapes = []

    def init(A: Tensor) -> None:
        shapes.append(tuple(A.shape))
        A.fill_(0.25)

    found = factors(pl.LoRA(rank=3, init=init), (5, 2, 4))
    assert shapes == [(3, 8)]
    assert_close(found["A"], torch.full((3, 8), 0.25))
    torch.manual_seed(0)
    found = factors(pl.LoRA(rank=RANK, init=nn.init.xavier_normal_))
    std = math.sqrt(2 / (RANK + IN))
    assert abs(float(found["A"].std()) - std) <= 5 * std / math.sqrt(2 * COUNT)


def test_delta() -> None:
    """A Delta starts as zeros in the shape of the tensor."""
    assert_close(factors(pl.Delta(), (3, 2))["D"], torch.zeros(3, 2))


@pytest.mark.parametrize(
    ("spec", "scaling"),
    [
        (pl.LoRA(), 1.0),
        (pl.LoRA(rank=4), 1.0),
        (pl.LoRA(rank=4, alpha=1), 0.25),
        (pl.LoRA(rank=4, alpha=-6.0), -1.5),
        (pl.LoRA(rank=4, alpha=1, rank_stabilized=True), 0.5),
        (pl.LoRA(rank=4, rank_stabilized=True), 2.0),
    ],
)
def test_scaling(spec: pl.LoRA, scaling: float) -> None:
    """The scale is alpha/r, or alpha/√r if rank-stabilized; alpha=None means the rank."""
    assert spec.scaling == scaling
    A, B = torch.randn(spec.rank, 3).double(), torch.randn(5, spec.rank).double()
    found = spec.apply(torch.zeros(5, 3).double(), {"A": A, "B": B}, 2.0)
    assert_close(found, 2 * scaling * B @ A)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
)
@pytest.mark.parametrize("spec", [*(pl.LoRA(rank=2, init=init) for init in INITS), pl.Delta()])
def test_dtype(spec: pl.kinds.Spec, dtype: torch.dtype, expected: torch.dtype) -> None:
    """Factors have the dtype of the tensor, but float32 for half precision, and are trained."""
    model = nn.Linear(6, 4, dtype=dtype)
    pl.attach(model, spec)
    assert all(p.dtype == expected and p.requires_grad for p in pl.parameters(model))


def host() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), nn.Conv2d(2, 3, 2), HOSTS["encoder_layer"].make())


@pytest.mark.parametrize("init", INITS)
def test_generator(init: str) -> None:
    """With a generator, attaching does not advance the global generator."""
    model = host()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    generator = torch.Generator().manual_seed(2)
    state = generator.get_state()
    pl.attach(model, pl.LoRA(rank=2, init=init), generator=generator)
    assert_close(torch.get_rng_state(), before)
    assert not torch.equal(generator.get_state(), state)


@pytest.mark.parametrize("init", INITS)
def test_seed(init: str) -> None:
    """Equal seeds give equal factors, and factors of two sites differ."""

    def attached(seed: int | None) -> dict[str, Tensor]:
        model = host()
        torch.manual_seed(2)
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        pl.attach(model, pl.LoRA(rank=2, init=init), generator=generator)
        return pl.state_dict(model)

    first = attached(2)
    assert_close(attached(2), first, rtol=0, atol=0)
    assert_close(attached(None), first, rtol=0, atol=0)
    same_shape = [key for key, A in first.items() if key.endswith(".A") and A.shape == (2, 8)]
    assert not torch.equal(first[same_shape[0]], first[same_shape[1]])
    other = attached(3)
    assert all(not torch.equal(other[key], A) for key, A in first.items() if key.endswith(".A"))


@pytest.mark.parametrize("smallest", [False, True])
def test_a_rank_above_the_smaller_side(smallest: bool) -> None:
    """A truncated SVD whose rank is larger than the matrix is the whole matrix, from both ends."""
    W = torch.randn(5, 3, dtype=torch.float64)
    A, B, values = truncated_svd(W, 7, smallest)
    assert (A.shape, B.shape, values.shape) == ((3, 3), (5, 3), (3,))
    assert_close(B @ A, W)
