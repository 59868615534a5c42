"""Which path a Linear with a low-rank update takes: the rule, and the sizes that it compares."""

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
    if native and not (half and device != "cpu" and n * max(k, m) >= WORTH_A_KERNEL):
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
