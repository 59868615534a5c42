"""y = x W'ᵀ + b for a low-rank W' = W + s · B A, by the path that costs the least.

    factored    y = x Wᵀ + b + s · (x Aᵀ) Bᵀ        dx = dy W + s · (dy B) A
    dense       y = x W'ᵀ + b                       dx = dy W'
    both        dA = s · (dy B)ᵀ x                  dB = s · dyᵀ (x Aᵀ)

    x: (n, k), A: (r, k), B: (m, r), W: (m, k), y: (n, m)

`choose` is the rule. Neither path computes the dense gradient of W', which is what makes a plain
parametrization half as fast again, and none keeps W': for the backward there are x itself, and
x Aᵀ where the forward had it.

`native` has the same compiled, as one node of the graph, for whoever has built it. `_plain` says it
in operations that autograd records, for small layers, where a Python Function costs more than it
saves, and under torch.compile, torch.func and double backward: a Function that reads
`ctx.needs_input_grad` loses gradients under the compiler, one without `setup_context` cannot be
transformed, and the compiler plans its own memory anyway.

Under torch.autocast the paths are the same, on casts made before. Of a frozen layer's W autocast
makes one a call, too; that of a trained one it caches, and the layer is left to it.
"""

import functools
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from . import native
from .adapters import LowRank

Path = Literal["plain", "factored", "dense"]


class Plan(NamedTuple):
    """The paths of one Linear; a plain forward brings its own backward.

    `native` says that the compiled twin takes them, not Python.
    """

    forward: Path
    backward: Path
    native: bool = False


_PLAIN = Plan("plain", "plain")
_SMALL_WEIGHT = Plan("dense", "dense")
_PATHS: tuple[Path, Path] = ("factored", "dense")

# So many elements, n (k + m), have to pass through a layer before more than plain operations pays;
# by device and by whether a gradient may be wanted.
_PLAIN_BELOW = {
    ("cpu", True): 2**18,
    ("cpu", False): 2**18,
    ("cuda", True): 2**24,
    ("cuda", False): 2**22,
}

# The types whose values are all that they are.
EXACT = {Tensor, nn.Parameter}

# Below this many elements a launch costs more than the traffic that a kernel saves.
_WORTH_A_KERNEL = 2**25


def choose(
    n: int, k: int, m: int, dtype: torch.dtype, device: str, grad: bool, native: bool = False
) -> Plan:
    """Return how to compute a Linear with a low-rank update, in the forward and in the backward.

    The compiled twin, where it is there, takes all that the Triton kernels do not. Without it,
    plain operations where what passes through the layer, n (k + m) elements, is so little that
    Python costs more than a pass over it.

    The update goes to the product, n rows, or to the weight, k rows of the transposed one in the
    forward and m in the backward: both read and write as many columns, so the fewer rows decide. On
    the CPU a weight costs more where its gradients are wanted, four times as much in Python and
    twice in the twin, for it is a new tensor and made twice, while the product is there in the
    cache; without gradients it saves x Aᵀ, too. Without gradients and without the twin a small
    weight is worth it on a GPU: two launches in place of three.

    Half precision stays with the product, though for n > k the weight would be cheaper: W' rounded
    to bfloat16 loses 32 % of an update of standard deviation 1e-4 to weights of 0.02, and 90 % of
    one of 1e-5, and what an adapter does must not hang on how many rows a batch has.

    Measured, as time over the frozen floor (r 16 but for the first line; P: by the product, W: by
    the weight; an EPYC in float32; an H100 in bfloat16, 4096 → 14336 → 4096 twice, one dtype):

        EPYC, MLP, r 4, training, n 10, 100, 1000    plain 2.78 1.91 1.52, Function 3.85 2.09 1.14
        EPYC, twin, training    784 → 256, n 1000    P 1.14  W 1.12        (inference 1.08  1.03)
                                256 → 128, n 1000    P 1.36  W 1.27                   1.28  1.03
                                1024 → 4096, n 512   P 1.06  W 1.11                   1.04  1.08
        H100, training          n 512                twin P 2.08  Python P 3.07  W 3.89
                                n 4096               twin P 1.19  Python P 1.19  W 1.22
                                n 16384              twin P 1.19  Python P 1.17  W 1.12
        H100, inference         n 512                twin P 1.30  Python P 1.68  W 1.92
                                n 4096               twin P 1.18  Python P 1.15  W 1.15
                                n 16384              twin P 1.15  Python P 1.12  W 1.04

    Args:
        n: the rows of x.
        k: the layer's inputs.
        m: its outputs.
        dtype: of the products.
        device: "cpu", or "cuda" for any accelerator.
        grad: whether a gradient may be wanted.
        native: whether the compiled twin is there.
    """
    half = dtype.itemsize <= 2
    if native and not (half and device != "cpu" and n * max(k, m) >= _WORTH_A_KERNEL):
        built = True
    elif n * (k + m) < _PLAIN_BELOW[device, grad]:
        small = device != "cpu" and k * m <= 2**20 and not half and not grad
        return _SMALL_WEIGHT if small else _PLAIN
    else:
        built = False
    if half:
        forward = backward = False
    elif device == "cpu" and not grad:
        forward = backward = n * (k + m) > k * m
    else:
        most = n / (2 if built else 4) if device == "cpu" else n
        forward, backward = most > k, most > m
    return Plan(_PATHS[forward], _PATHS[backward], built)


def linear(x: Tensor, W: Tensor, b: Tensor | None, terms: list[LowRank]) -> Tensor:
    """Return x W'ᵀ + b, where W' = W + Σ s · B A over the terms.

    Args:
        x: (…, k).
        W: (m, k), of the dtype of x but under autocast.
        b: (m,) or None.
        terms: low-rank updates; their factors may be of another floating dtype, and are cast:
            x is shared with the layers beside this one, and not copied to their dtype.
    """
    if not terms:
        return F.linear(x, W, b)
    A, B, s = terms[0] if len(terms) == 1 else _together(terms)
    if isinstance(s, Tensor):
        B, s = B * s, 1.0
    grad = torch.is_grad_enabled()
    # Sizes first, which settles it for small layers. Those of a subclass must not be asked for: it
    # may be an exporter's fake tensor; nor the compiler's, which would compile for each outcome.
    if type(x) is Tensor and not torch.compiler.is_compiling():
        m, k = W.shape
        n, device = x.numel() // max(k, 1), "cpu" if x.is_cpu else "cuda"
        quiet = unseen()
        built = native.module() if quiet and {type(W), type(A), type(B)} <= EXACT else None
        dtype = autocast_dtype(x, W, b)
        plan = choose(n, k, m, dtype or W.dtype, device, grad, built is not None)
        cached = dtype and W.requires_grad and torch.is_autocast_cache_enabled()
        if plan is not _PLAIN and quiet and not cached and untransformed(x):
            if dtype is not None:
                x, W, A, B = (tensor.to(dtype) for tensor in (x, W, A, B))
                b = None if b is None else b.to(dtype)
            if built is not None and plan.native:
                dense = plan.forward == "dense", plan.backward == "dense"
                return built.linear(x, W, b, A, B, s, *dense)
            if grad:
                return _Linear.apply(x, W, b, A, B, s, plan)
            return _forward(x, W, b, A, B, s, plan.forward)[0]
    return _plain(x, W, b, A, B, s)


def update(C: Tensor, P: Tensor, Q: Tensor, s: float = 1.0, *, inplace: bool = False) -> Tensor:
    """Return C + s · P Q in the dtype of C, rounded once; C: (n, m), P: (n, r), Q: (r, m).

    P and Q may be of another floating dtype. `inplace` writes into C.
    """
    if _kernel_can(C, P.shape[1]):
        from .kernels import update as kernel

        return kernel(C, P, Q, s, C if inplace else torch.empty_like(C))
    P, Q = P.to(C.dtype), Q.to(C.dtype)
    return C.addmm_(P, Q, alpha=s) if inplace else torch.addmm(C, P, Q, alpha=s)


def products(dy: Tensor, B: Tensor, h: Tensor, s: float) -> tuple[Tensor, Tensor]:
    """Return s · dy B, (n, r), in the dtype of dy, and s · dyᵀ h, (m, r), in the dtype of B.

    dy: (n, m), B: (m, r), h: (n, r); in one pass over dy where that pays.
    """
    if _kernel_can(dy, B.shape[1]) and B.shape[1] <= 64:
        from .kernels import products as kernel

        return kernel(dy, B, h, s)
    dh = torch.mm(dy, B.to(dy.dtype))
    return _scaled(dh, s), _scaled(torch.mm(dy.t(), h), s).to(B.dtype)


class _Linear(torch.autograd.Function):
    """The eager path in training: see the formulas that open this file."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, s: float, plan: Plan
    ) -> Tensor:
        y, h = _forward(x, W, b, A, B, s, plan.forward)
        # Under autocast W and b are casts, which nothing else would keep.
        needs = ctx.needs_input_grad
        kept = W if needs[0] or needs[1] else None, b if needs[2] else None
        ctx.save_for_backward(x, *kept, A, B, h)
        ctx.s, ctx.path = s, plan.backward
        # Not a view, which nn.ReLU(inplace=True) could not change behind a Function.
        return y.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, h = ctx.saved_tensors
        needs = ctx.needs_input_grad
        if torch.is_grad_enabled():  # a graph of the backward is wanted: say it in plain operations
            return _differentiable(needs, grads[0], tuple(inputs), ctx.s)
        x, W, _, A, B = inputs
        x2, dy = x.reshape(-1, x.shape[-1]), grads[0].reshape(-1, B.shape[0])
        dx = dW = db = dA = dB = None
        if needs[4]:
            h = torch.mm(x2, A.to(x2.dtype).t()) if h is None else h
            dh, dB = products(dy, B, h, ctx.s)  # dh = s · dy B
        elif needs[0] or needs[3]:
            dh = _scaled(torch.mm(dy, B.to(dy.dtype)), ctx.s)
        if needs[3]:
            dA = torch.mm(dh.t(), x2).to(A.dtype)
        if needs[0]:
            if ctx.path == "dense":
                dx = torch.mm(dy, update(W, B, A, ctx.s))
            else:
                dx = update(torch.mm(dy, W), dh, A, inplace=True)
            dx = dx.view(x.shape)
        if needs[1]:
            dW = torch.mm(dy.t(), x2)
        if needs[2]:
            db = dy.sum(0)
        return dx, dW, db, dA, dB, None, None


def _forward(
    x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, s: float, path: Path
) -> tuple[Tensor, Tensor | None]:
    """Return y, and h = x Aᵀ where it was computed; x: (…, k), h: (n, r)."""
    if path == "dense":
        return F.linear(x, update(W, B, A, s), b), None
    x2 = x.reshape(-1, x.shape[-1])
    h = torch.mm(x2, A.to(x.dtype).t())
    # Of x as it is: a strided one is rounded otherwise than its copy, and B = 0 must be the base.
    y = F.linear(x, W, b).contiguous()
    update(y.view(-1, W.shape[0]), h, B.t(), s, inplace=True)
    return y, h


def _plain(x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, s: float) -> Tensor:
    if torch.compiler.is_compiling():
        # It fuses the scale with the cast, and the sum with an activation that may follow.
        return F.linear(x, W, b) + F.linear(F.linear(x, _scaled(A, s).to(x.dtype)), B.to(x.dtype))
    if A.dtype is not x.dtype:
        A, B = A.to(x.dtype), B.to(x.dtype)
    # The fewest operations: the scale and the sum ride in the last product.
    if x.dim() == 2:
        return torch.addmm(F.linear(x, W, b), F.linear(x, A), B.t(), alpha=s)
    return F.linear(x, W, b) + F.linear(_scaled(F.linear(x, A), s), B)


def _differentiable(
    needs: tuple[bool, ...], dy: Tensor, tensors: tuple[Any, ...], s: float
) -> tuple[Tensor | None, ...]:
    """Return the gradients of `_plain`, themselves with a graph."""
    x, W, b, A, B = tensors
    if W is None:  # no gradient that is wanted depends on it
        W = x.new_zeros(()).expand(B.shape[0], A.shape[1])
    y = _plain(x, W, b, A, B, s)
    wanted = [tensor for tensor, needed in zip(tensors, needs, strict=False) if needed]
    grads = iter(torch.autograd.grad(y, wanted, dy, create_graph=True))
    return tuple(next(grads) if needed else None for needed in needs)


def _together(terms: list[LowRank]) -> LowRank:
    """Return several updates as one of their ranks' sum, the scales in B."""
    A = torch.cat([term.A for term in terms])
    B = torch.cat([term.B * term.scale for term in terms], dim=1)
    return LowRank(A, B, 1.0)


def _scaled(tensor: Tensor, s: float) -> Tensor:
    return tensor if s == 1.0 else tensor * s


def autocast_dtype(*tensors: Tensor | None) -> torch.dtype | None:
    """Return what torch.autocast has a product of these in, None where it leaves one as it is."""
    if not torch._C._is_any_autocast_enabled():
        return None
    there = [tensor for tensor in tensors if tensor is not None]
    device = there[0].device.type
    if device == "meta":
        return None
    cast = all(t.is_floating_point() and t.dtype is not torch.float64 for t in there)
    return torch.get_autocast_dtype(device) if cast and torch.is_autocast_enabled(device) else None


def untransformed(x: Tensor) -> bool:
    """Return whether x is a common tensor and nothing looks on that only knows plain operations."""
    common = x.dim() > 1 and not x.is_meta and x.layout is torch.strided and not x.is_nested
    return common and not transformed()


def unseen() -> bool:
    """Return whether nothing records operations.

    To a recorder those of the twin do not exist, a Function in Python cannot be exported, and an
    output that it has kept must not be written to.
    """
    return torch._C._len_torch_dispatch_stack() == 0 and torch._C._get_tracing_state() is None


def transformed() -> bool:
    """Return whether the compiler, torch.func or forward-mode differentiation is looking on."""
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


def _kernel_can(C: Tensor, rank: int) -> bool:
    return (
        C.is_cuda
        and C.numel() >= _WORTH_A_KERNEL
        and C.dtype in (torch.bfloat16, torch.float16)
        and rank <= 128
        and C.is_contiguous()
        and _has_triton()
    )


@functools.cache
def _has_triton() -> bool:
    return find_spec("triton") is not None
