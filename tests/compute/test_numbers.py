"""Every way to compute a layer agrees with float64 within a bound, also on extreme values.

The bound is derived, and no test widens it. ŷ is the computed y = x Wᵀ + b + s · (x Aᵀ) Bᵀ. With ε
and τ, the machine epsilon and the smallest normal number of the layer's dtype, and ε₊, the epsilon
of the sums (of float32 in half precision), each element has

    |ŷ − y| ≤ (4 ε + L ε₊) · M + L ε τ · U

    M = |x| |W|ᵀ + |b| + |s| · (|x| |A|ᵀ) |B|ᵀ        L = n + k + m + r + 8
    U = 1 + (1 + |s|) · the largest sum of a row or a column of |x|, |A|, |B| or |dy|

A sum of L terms has a relative error of L ε₊ / 2 in M, not in y: if terms cancel, y is smaller than
M. 4 ε covers the tensors that half precision rounds: A, B, h = x Aᵀ, W' or the base's part, y. ε τ
is the smallest denormal number: an intermediate result that underflows is rounded to a multiple of
it, and then multiplied by x or B. The same holds for dx, dA and dB, with their own M. The one
condition is that each intermediate result is in the dtype's range.
"""

import hashlib
import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import paramlora as pl

N, K, M, R, S = 9, 24, 16, 4, 2.0
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
CASES = [
    *("ordinary", "huge", "huge factors", "tiny", "tiny factors", "denormal", "mixed", "deficient"),
    *("cancels the base", "largest"),
]


class Numbers(NamedTuple):
    """The tensors of a layer: x (n, k), W (m, k), b (m,), A (r, k), B (m, r), dy (n, m)."""

    x: Tensor
    W: Tensor
    b: Tensor
    A: Tensor
    B: Tensor
    dy: Tensor

    def double(self) -> "Numbers":
        return Numbers(*(tensor.double() for tensor in self))

    def abs(self) -> "Numbers":
        return Numbers(*(tensor.abs() for tensor in self))


def numbers(case: str, dtype: torch.dtype) -> Numbers:
    """Return adversarial values, which are exact in the dtype."""
    generator = torch.Generator().manual_seed(CASES.index(case))
    shapes = (N, K), (M, K), (M,), (R, K), (M, R), (N, M)
    x, W, b, A, B, dy = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes
    )
    half = 7 if dtype is torch.float16 else 63  # 2^(2 half) is at the end of the range
    large, small = 2.0 ** (half - 5), 2.0**-half
    if case == "huge":
        x, W, A, dy, b = x * large, W * large, A * large, dy * small, b * large**2
    elif case == "huge factors":
        x, A, B, dy = x * small, A * large, B * large, dy * small
    elif case == "tiny":
        x, W, A, dy = x * small, W * small, A * small, dy * small
    elif case == "tiny factors":
        A, B, x = A * small, B * small, x * large
    elif case == "denormal":
        denormal = torch.finfo(dtype).smallest_normal / 8
        W, A, b, x = W * denormal, A * denormal, b * denormal, x * 8
    elif case == "mixed":  # each row and each column of another size
        spread = half // 4
        for tensor in (x, W, A, B, dy):
            tensor *= 2.0 ** torch.randint(
                -spread, spread, (len(tensor), 1), generator=generator
            ).to(torch.float64)
    elif case == "deficient":  # B A = 0, exactly
        A[1], A[3], B[:, 1], B[:, 3] = A[0], A[2], -B[:, 0], -B[:, 2]
    elif case == "cancels the base":  # W + s B A = 0 up to the rounding of W
        W = -S * B @ A
    elif case == "largest":
        W, A = (torch.finfo(dtype).max * T.clamp(-1, 1) * f for T, f in ((W, 1 / 4), (A, 1 / 64)))
        x, dy, b = x * small**2 * 2.0**4, dy * small**2 * 2.0**4, b * 0
    return Numbers(*(tensor.to(dtype) for tensor in (x, W, b, A, B, dy)))


def affine(t: Numbers, s: float = S) -> Tensor:
    return t.x @ t.W.T + t.b + s * (t.x @ t.A.T) @ t.B.T


def gradients(t: Numbers, s: float = S) -> dict[str, Tensor]:
    dh = s * t.dy @ t.B
    return {
        "dx": t.dy @ t.W + dh @ t.A,
        "dA": dh.T @ t.x,
        "dB": s * t.dy.T @ (t.x @ t.A.T),
    }


def bound(magnitude: Tensor, t: Numbers) -> Tensor:
    """Return the bound that opens this file; `magnitude` is M."""
    info = torch.finfo(t.x.dtype)
    sums = max(torch.float32, t.x.dtype, key=lambda dtype: dtype.itemsize)
    length = N + K + M + R + 8
    # The largest sums of a row or of a column, since each tensor is summed along either.
    size = t.double().abs()
    sums_of = [T.sum(dim).max() for T in (size.x, size.A, size.B, size.dy) for dim in (0, 1)]
    U = 1 + (1 + S) * float(max(sums_of))
    relative = 4 * info.eps + length * torch.finfo(sums).eps
    return relative * magnitude + length * info.smallest_normal * info.eps * U


def check(found: Tensor, expected: Tensor, limit: Tensor) -> None:
    error = (found.double() - expected).abs()
    worst = (error / limit).max()
    assert worst <= 1, f"an error of {worst:.3g} times the bound"


def layer_of(t: Numbers) -> nn.Linear:
    """Return a layer with a LoRA of these values."""
    layer = nn.Linear(K, M, dtype=t.W.dtype)
    pl.attach(layer, pl.LoRA(rank=R, alpha=S * R))
    with torch.no_grad():
        layer.load_state_dict({"weight": t.W, "bias": t.b}, strict=False)
        A, B = pl.parameters(layer)
        A.copy_(t.A)
        B.copy_(t.B)
    return layer


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_factored_layer_keeps_the_bound(implementation: str, dtype: torch.dtype) -> None:
    """Output and gradients, by plain operations, our Function and the native extension."""
    for case in CASES:
        t = numbers(case, dtype)
        layer, exact, sizes = layer_of(t), t.double(), t.double().abs()
        x = t.x.clone().requires_grad_()
        y = layer(x)
        check(y, affine(exact), bound(affine(sizes), t))
        found = torch.autograd.grad(y, [x, *pl.parameters(layer)], t.dy)
        expected, magnitudes = gradients(exact), gradients(sizes)
        for gradient, key in zip(found, expected, strict=True):
            check(gradient, expected[key], bound(magnitudes[key], t))


@contextmanager
def merged(layer: nn.Linear) -> Iterator[None]:
    with torch.no_grad(), pl.merged(layer):
        yield


@contextmanager
def routed(layer: nn.Linear) -> Iterator[None]:
    with torch.no_grad(), pl.routed(layer, torch.zeros(N, dtype=torch.long), "default"):
        yield


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("way", [merged, routed, torch.no_grad, torch.inference_mode])
def test_merged_and_routed_layers_keep_the_bound(way, dtype: torch.dtype) -> None:
    """As does a layer without gradients, which builds W' for many rows."""
    for case in CASES:
        t = numbers(case, dtype)
        layer = layer_of(t)
        with way(layer) if way in (merged, routed) else way():
            y = layer(t.x)
            many = layer(t.x.repeat(8, 1)) if way not in (merged, routed) else y
        limit = bound(affine(t.double().abs()), t)
        check(y, affine(t.double()), limit)
        check(many[:N], affine(t.double()), limit)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_weight_keeps_the_bound(dtype: torch.dtype) -> None:
    """layer.weight is W + s·B A, rounded in its own dtype; so is a convolution's."""
    for case in CASES:
        t = numbers(case, dtype)
        exact, sizes = t.double(), t.double().abs()
        expected = exact.W + S * exact.B @ exact.A
        limit = bound(sizes.W + S * sizes.B @ sizes.A, t)
        check(layer_of(t).weight, expected, limit)
        conv = nn.Conv1d(K // 3, M, 3, dtype=dtype)
        pl.attach(conv, pl.LoRA(rank=R, alpha=S * R), "weight")
        with torch.no_grad():
            conv.load_state_dict({"weight": t.W.view_as(conv.weight), "bias": t.b}, strict=False)
            for factor, value in zip(pl.parameters(conv), (t.A, t.B), strict=True):
                factor.copy_(value.view_as(factor))
            check(conv.weight.flatten(1), expected, limit)
            y = conv(t.x.view(N, K // 3, 3)).flatten(1)
            check(y, affine(exact), bound(affine(sizes), t))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_embedding_keeps_the_bound(dtype: torch.dtype) -> None:
    """Each looked-up row is a row of W + s·B A."""
    ids = torch.arange(M).flip(0)
    for case in CASES:
        t = numbers(case, dtype)
        exact, sizes = t.double(), t.double().abs()
        layer = nn.Embedding(M, K, dtype=dtype)
        pl.attach(layer, pl.LoRA(rank=R, alpha=S * R), "weight")
        with torch.no_grad():
            layer.load_state_dict({"weight": t.W}, strict=False)
            for factor, value in zip(pl.parameters(layer), (t.A, t.B), strict=True):
                factor.copy_(value)
        expected = (exact.W + S * exact.B @ exact.A)[ids]
        check(layer(ids), expected, bound((sizes.W + S * sizes.B @ sizes.A)[ids], t))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [0, 1])
def test_a_rescaled_layer_keeps_the_bound(dim: int, dtype: torch.dtype) -> None:
    """IA3: M has (1 + |l − 1|) |W| for |W|, since an l near 0 is computed as 1 + (l − 1)."""
    for case in CASES:
        t = numbers(case, dtype)
        layer = layer_of(t)
        pl.attach(layer, pl.IA3(dim=dim), name="ia3")
        change = torch.linspace(-1, 3, (M, K)[dim]).to(dtype)
        with torch.no_grad():
            pl.parameters(layer, "ia3")[0].copy_(change)
        exact, sizes = t.double(), t.double().abs()
        by = change.double().unsqueeze(1 - dim)
        y = exact.x @ (by * exact.W).T + exact.b
        size = sizes.x @ ((1 + (by - 1).abs()) * sizes.W).T + 2 * (by.abs().max() + 1) * sizes.b
        check(layer(t.x), y, bound(size, t))
        check(layer.weight, by * exact.W, bound((1 + (by - 1).abs()) * sizes.W, t))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ["ordinary", "mixed", "deficient", "tiny factors"])
def test_dora_keeps_the_bound_times_the_cancellation(case: str, dtype: torch.dtype) -> None:
    """M is times κ², κ = ‖|W| + |s||B||A|‖ / ‖V‖ of the row: the norm of a V that cancels is lost.

    The squares of W must be in the range of float32.
    """
    t = numbers(case, dtype)
    layer = nn.Linear(K, M, dtype=dtype)
    pl.attach(layer, pl.DoRA(rank=R, alpha=S * R))
    with torch.no_grad():
        layer.load_state_dict({"weight": t.W, "bias": t.b}, strict=False)
        for factor, value in zip(pl.parameters(layer), (t.A, t.B), strict=False):
            factor.copy_(value)
    exact, sizes = t.double(), t.double().abs()
    V, size = exact.W + S * exact.B @ exact.A, sizes.W + S * sizes.B @ sizes.A
    c = exact.W.norm(dim=1) / V.norm(dim=1)
    kappa = size.norm(dim=1) / V.norm(dim=1)
    magnitude = (sizes.x @ size.T * (1 + c) + sizes.b) * kappa**2
    check(layer(t.x), exact.x @ (c[:, None] * V).T + exact.b, bound(magnitude, t))


Values = dict[str, Tensor]


class Kind(NamedTuple):
    """A kind whose update is a polynomial with positive coefficients, for which M is that of |t|.

    Args:
        spec: the kind, with s = 2 if it has an s.
        values: its factors, from the tensors of a case and (A₂, B₂), for which |B₂ A₂| ≤ 1.
        update: ΔW of factors and W, with the formula of the kind.
        between: the tensors that an underflowed part of ΔW is multiplied by, within ΔW.
        through: for a layer that does not build W', the tensors that its parts are multiplied by.
    """

    spec: pl.kinds.Spec
    values: Callable[[Numbers, Tensor, Tensor], Values]
    update: Callable[[Values, Tensor], Tensor]
    between: Callable[[Values, Tensor], list[Tensor]]
    through: Callable[[Values], list[Tensor]] = lambda _: []


def shards(inputs: int) -> Tensor:
    """Return E, (r, in), of MiSS: 1 where the input is of the shard's row."""
    return (torch.arange(inputs) % R == torch.arange(R)[:, None]).double()


OTHERS = {
    "loha": Kind(
        pl.LoHa(R, S * R),
        lambda t, A, B: {"A1": t.A, "B1": t.B, "A2": A, "B2": B},
        lambda f, _: S * (f["B1"] @ f["A1"]) * (f["B2"] @ f["A2"]),
        lambda f, _: [f["B1"] @ f["A1"], f["B2"] @ f["A2"]],
    ),
    "lokr": Kind(
        pl.LoKr(1, S, decompose_both=True),
        lambda t, A, B: {"A1": t.A[:1, :4], "B1": t.B[:4, :1], "A2": A[:1, :6], "B2": B[:4, :1]},
        lambda f, _: S * torch.kron(f["B1"] @ f["A1"], f["B2"] @ f["A2"]),
        # A gradient sums over all elements of the other matrix.
        lambda f, _: [(f["B1"] @ f["A1"]).sum(), (f["B2"] @ f["A2"]).sum()],
    ),
    "hira": Kind(
        pl.HiRA(R),
        # W and A must not both be huge.
        lambda t, A, _: {"A": A if t.W.abs().max() > 100 else t.A, "B": t.B},
        lambda f, W: W * (f["B"] @ f["A"]),
        lambda _, W: [W],
    ),
    "miss": Kind(
        pl.MiSS(R),
        lambda t, *_: {"D": t.B.T},
        lambda f, W: f["D"].T @ shards(W.shape[1]),
        lambda *_: [],
        lambda f: [f["D"], shards(K)],
    ),
    "lora_xs": Kind(
        pl.LoRAXS(R, S * R),
        lambda t, A, _: {"R": A[:, :R], "A": t.A, "B": t.B},
        lambda f, _: S * f["B"] @ f["R"] @ f["A"],
        lambda f, _: [f["B"].sum(0), f["A"].sum(1)],
        lambda f: [f["A"], f["B"] @ f["R"], f["B"]],
    ),
}


def largest_sum(*tensors: Tensor) -> float:
    """Return the largest sum of a row or of a column, at least 1."""
    return 1 + max(float(T.sum(dim).max()) for T in tensors for dim in (0, T.dim() - 1))


def layer_with(spec: pl.kinds.Spec, t: Numbers, values: Values) -> nn.Linear:
    """Return a layer with an adapter of these factors at its weight."""
    layer = nn.Linear(K, M, dtype=t.W.dtype)
    pl.attach(layer, spec, "weight")
    with torch.no_grad():
        layer.load_state_dict({"weight": t.W, "bias": t.b}, strict=False)
        held = layer.parametrizations.weight[0].factors["default"].tensors  # type: ignore[union-attr, index]
        assert held.keys() == values.keys()
        for key, value in values.items():
            held[key].copy_(value)
    return layer


def computed(kind: Kind, t: Numbers, values: Values) -> tuple[Tensor, Tensor, Values]:
    """Return W', y and the gradients in float64: of x, and of each factor."""
    leaves = {key: v.double().clone().requires_grad_() for key, v in values.items()}
    x = t.x.double().clone().requires_grad_()
    W = t.W.double() + kind.update(leaves, t.W.double())
    y = x @ W.T + t.b.double()
    found = torch.autograd.grad(y, [x, *leaves.values()], t.dy.double())
    return W.detach(), y.detach(), dict(zip(["x", *leaves], found, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", OTHERS.values(), ids=OTHERS)
def test_other_kinds_keep_the_bound(kind: Kind, dtype: torch.dtype) -> None:
    """LoHa, LoKr, HiRA, MiSS and LoRA-XS: weight, output and gradients.

    ΔW is computed with the epsilon ε₊ and the smallest normal number τ₊ of the factors, float32 at
    least. A part of it that underflows is then multiplied by `between`, and as a part of W' by x or
    dy. dW', which underflows in the layer's dtype, is multiplied by the derivatives of ΔW.

        L ε τ · U + L ε₊ τ₊ · U · C        C = 1 + s · the largest of `between`
    """
    draw = torch.Generator().manual_seed(0)
    A2 = (torch.randn(R, K, generator=draw).clamp(-2, 2) / 16).to(dtype)
    B2 = torch.randn(M, R, generator=draw).clamp(-2, 2).to(dtype)
    eps, tiny = torch.finfo(dtype).eps, torch.finfo(dtype).smallest_normal
    wide = torch.finfo(torch.promote_types(dtype, torch.float32))
    length = N + K + M + R + 8
    for case in CASES:
        t = numbers(case, dtype)
        values = kind.values(t, A2, B2)
        if case == "cancels the base":
            doubles = {key: value.double() for key, value in values.items()}
            t = t._replace(W=-kind.update(doubles, t.W.double()).to(dtype))
        layer, x = layer_with(kind.spec, t, values), t.x.clone().requires_grad_()
        W, y, gradients = computed(kind, t, values)
        sizes, size = {key: v.double().abs() for key, v in values.items()}, t.double().abs()
        W_size, y_size, gradients_size = computed(kind, t.abs(), sizes)
        # U for results, and for the gradients of factors.
        through = largest_sum(size.x, size.dy, *kind.through(sizes))
        deep = largest_sum(size.x, size.dy, *sizes.values(), *kind.through(sizes))
        between = [float(T.max()) for T in kind.between(sizes, size.W)]
        deep *= 1 + S * max([0.0, *between])
        ones = t.abs()._replace(x=torch.ones(1, K), dy=torch.ones(1, M), b=t.b * 0)
        _, _, derivatives = computed(kind, ones, sizes)

        def limit(magnitude: Tensor, U: Tensor | float, deep: float = deep) -> Tensor:
            relative = (4 * eps + length * wide.eps) * magnitude
            underflow = eps * tiny * (1 + S) * U + wide.eps * wide.smallest_normal * deep
            return relative + length * underflow

        check(layer.weight, W, limit(W_size, 1.0))
        found = layer(x)
        check(found, y, limit(y_size, through))
        trained = [key for key in values if key not in kind.spec.constants]
        tensors = layer.parametrizations.weight[0].factors["default"].tensors  # type: ignore[union-attr, index]
        leaves = [x, *(tensors[key] for key in trained)]
        for key, gradient in zip(
            ["x", *trained], torch.autograd.grad(found, leaves, t.dy), strict=True
        ):
            U = through if key == "x" else through + derivatives[key]
            check(gradient, gradients[key], limit(gradients_size[key], U))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_oft_keeps_the_bound_times_the_condition(dtype: torch.dtype) -> None:
    """M has |W| + 4 κ ‖Q‖ ‖w‖ for |W|, with κ = √(1 + ‖Q‖²) and the row w of W in a block.

    κ is the condition of I + Q, whose singular values are between 1 and κ. Its inverse by
    elimination, (b, b), has a relative error of at most 2 b · 2^(b − 1) · κ · ε₊ / 2, that is
    32 κ ε₊ < L κ ε₊ for b = 4. −2 Q and W are multiplied with it. Q is at most 4 here.
    """
    b = 4
    for case in CASES:
        t = numbers(case, dtype)
        Q = t.A.double().flatten()[: K * (b - 1) // 2]
        Q = (Q / max(1.0, float(Q.abs().max()) / 4)).to(dtype).view(-1, b * (b - 1) // 2)
        layer = layer_with(pl.OFT(b), t, {"Q": Q})
        exact, sizes = t.double(), t.double().abs()
        skew = torch.zeros(K // b, b, b, dtype=torch.float64)
        for i, (row, column) in enumerate(itertools.combinations(range(b), 2)):
            skew[:, row, column], skew[:, column, row] = Q.double()[:, i], -Q.double()[:, i]
        eye = torch.eye(b, dtype=torch.float64)
        R_of = torch.block_diag(*((eye - q) @ torch.linalg.inv(eye + q) for q in skew))
        norm = torch.linalg.matrix_norm(skew, 2)  # (n,)
        largest = exact.W.abs().amax().clamp_min(1e-300)  # so that squares do not overflow
        rows = (exact.W / largest).view(M, -1, b).norm(dim=2) * largest  # (m, n)
        change = (4 * norm * (1 + norm**2).sqrt() * rows).repeat_interleave(b, dim=1)
        W, size = exact.W @ R_of.T, sizes.W + change
        # The blocks underflow in the dtype of the factors, before they are multiplied by W.
        deep = float(size.sum(1).max()) * torch.finfo(torch.float32).smallest_normal
        check(layer.weight, W, bound(size + deep, t))
        y = exact.x @ W.T + exact.b
        check(layer(t.x), y, bound(sizes.x @ (size + deep).T + sizes.b, t))


def trained(device: str = "cpu") -> str:
    """Return a digest of all bits after a training with several kinds of adapters."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(8, 16), nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
    kinds: dict[Any, pl.kinds.Spec] = {
        "0": pl.LoRA(rank=2),
        "1": pl.DoRA(rank=2),
        "3": pl.LoRA(rank=4, dropout=0.5),
    }
    pl.attach(model, kinds)
    pl.attach(model, {"1": pl.LoHa(rank=2)}, name="other", activate="also")
    pl.unfreeze(model, "default")
    model.to(device)
    ids = torch.arange(64, device=device) % 8
    for _ in range(3):
        # Without an optimizer of torch, which takes seconds to import in a new process.
        factors = pl.parameters(model)
        loss = nn.functional.cross_entropy(model(ids), ids)
        for factor, gradient in zip(factors, torch.autograd.grad(loss, factors), strict=True):
            factor.data -= 0.1 * gradient
    bits = b"".join(tensor.cpu().numpy().tobytes() for tensor in model.state_dict().values())
    return hashlib.sha256(bits + model(ids).detach().cpu().numpy().tobytes()).hexdigest()


def trained_elsewhere(device: str) -> str:
    """Return `trained` of a new process with as many threads."""
    code = (
        f"import torch; torch.set_num_threads({torch.get_num_threads()}); "
        f"torch.use_deterministic_algorithms({device != 'cpu'}); "
        f"from tests.compute.test_numbers import trained; print(trained({device!r}))"
    )
    root = Path(__file__).parents[2]
    # cuBLAS is deterministic only with a workspace of a fixed size.
    settings = {"PYTHONPATH": str(root), "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    command = [sys.executable, "-c", code]
    return subprocess.check_output(command, cwd=root, env=os.environ | settings, text=True).strip()


def test_the_same_seed_gives_the_same_bits() -> None:
    """Twice in a process, and in another process with the same number of threads."""
    assert trained() == trained() == trained_elsewhere("cpu")


@pytest.mark.gpu
def test_the_same_seed_gives_the_same_bits_on_a_gpu() -> None:
    """In two processes that use deterministic algorithms only; torch promises no more."""
    assert trained_elsewhere("cuda") == trained_elsewhere("cuda")
