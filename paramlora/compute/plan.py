"""The rule that chooses the path of a Linear with a low-rank update, and its limits of size."""

from typing import Literal, NamedTuple

import torch

Path = Literal["plain", "factored", "dense"]


class Plan(NamedTuple):
    """The paths of one Linear in the forward and in the backward (see lowrank.py).

    If one of them is "plain", so is the other: autograd derives the backward of plain operations.
    `native` is whether the native extension computes the layer.
    """

    forward: Path
    backward: Path
    native: bool = False


PLAIN = Plan("plain", "plain")
_SMALL_WEIGHT = Plan("dense", "dense")
_PATHS: tuple[Path, Path] = ("factored", "dense")

# A layer uses plain operations if fewer elements than this pass through it, n (k + m). The limit
# depends on the device, and on whether a gradient may be wanted.
PLAIN_BELOW = {
    ("cpu", True): 2**18,
    ("cpu", False): 2**18,
    ("cuda", True): 2**24,
    ("cuda", False): 2**22,
}

# A Triton kernel processes matrices of at least this many elements. For smaller ones its launch
# costs more time than the memory traffic that it saves.
WORTH_A_KERNEL = 2**25

# The native extension computes a layer with fewer multiplications than this, n k m, even if its
# matrices are that large. Python takes longer to launch such kernels than the GPU to run them.
WORTH_PYTHON = 2**36


def worth_a_kernel(n: int, k: int, m: int) -> bool:
    """Return whether a product (n, k) (k, m) has matrices that a Triton kernel should process."""
    return n * max(k, m) >= WORTH_A_KERNEL


def choose(
    n: int, k: int, m: int, dtype: torch.dtype, device: str, grad: bool, native: bool = False
) -> Plan:
    """Return the plan for computing a Linear with a low-rank update, forward and backward.

    The code: the native extension if it is built, except at sizes where the Triton kernels are
    faster. Without it, plain operations if so few elements pass through the layer, n (k + m), that
    a Function in Python costs more than it saves. Otherwise that Function (lowrank.py).

    The path: the update is added to the product x Wᵀ, which has n rows, or to the weight, which
    has k rows in the forward (transposed) and m in the backward. Both have the same number of
    columns, so the smaller number of rows decides. Four exceptions:

    - On a CPU with gradients, W' costs more than the product: it is a new tensor and built twice,
      while the product is still in the cache. So the rows of W' count twice, and four times
      without the extension.
    - On a CPU without gradients, W' is built if n (k + m) > k m: it saves x Aᵀ as well.
    - Without gradients and without the extension, a small layer on a GPU builds W': two launches
      instead of three.
    - Half precision always takes the product, although W' would be cheaper for n > k. W' rounded to
      bfloat16 has a relative error of 32 % in an update of standard deviation 1e-4 on weights of
      0.02, and of 90 % in one of 1e-5. The effect of an adapter must not depend on the number of
      rows of a batch.

    The measurements behind this rule are in docs/data/path-choice-cpu.csv and -gpu.csv.

    Args:
        n: the rows of x.
        k: the layer's inputs.
        m: its outputs.
        dtype: of the products.
        device: "cpu", or "cuda" for any accelerator.
        grad: whether a gradient may be wanted.
        native: whether the native extension is built.
    """
    half = dtype.itemsize <= 2
    gpu_half = half and device != "cpu"
    if native and not (gpu_half and worth_a_kernel(n, k, m) and n * k * m >= WORTH_PYTHON):
        built = True
    elif n * (k + m) < PLAIN_BELOW[device, grad]:
        small = device != "cpu" and k * m <= 2**20 and not half and not grad
        return _SMALL_WEIGHT if small else PLAIN
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
