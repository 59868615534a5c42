"""Intruder dimensions: singular vectors of a tuned weight that its base does not have.

    W' = Σ_j σ_j u_j v_jᵀ, σ descending           W = Σ_i σ⁰_i u⁰_i v⁰_iᵀ
    similarity of u_j:   max_i |u_jᵀ u⁰_i|,  of v_j:   max_i |v_jᵀ v⁰_i|
    u_j with j ≤ k is an intruder if its similarity is below ε

Source: Shuttleworth et al. 2024, "LoRA vs Full Fine-tuning: An Illusion of Equivalence", arXiv
2410.21228, which counts left vectors, with k = 10, over ε. `m = min(out, in)` vectors of each side
are compared, as in PEFT's `reduce_intruder_dimension`.

Note [A complete basis]: The left vectors of a weight with out ≤ in are a basis of all outputs. A
unit vector then has |cos| ≥ 1/√out with one of them: at 10 outputs no similarity is below 0.316,
and a count with a smaller ε is always 0. The other side, here the right vectors, has no such bound.
So both sides are measured.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

import torch
from torch import Tensor

SIZE = "‖ΔW‖/‖W‖"  # the mean over the weights


@dataclass(frozen=True)
class Spectrum:
    """The k leading singular triplets of a tuned weight, and their similarity to the base's.

    U: (out, k), S: (k,), V: (in, k); `left` and `right`: similarities of their columns, (k,).
    """

    U: Tensor
    S: Tensor
    V: Tensor
    left: Tensor
    right: Tensor

    def intruders(self, epsilon: float, side: str = "left") -> list[int]:
        """Return the numbers j, from 0, of the intruders among the "left" or the "right" vectors.

        >>> W = torch.eye(3)
        >>> spectrum(W, W + 5 * torch.outer(W[0], torch.ones(3)), 1).intruders(0.9, "right")
        [0]
        """
        return (getattr(self, side) < epsilon).nonzero().squeeze(1).tolist()

    def neighbour(self, index: int, epsilon: float, side: str = "left") -> int | None:
        """Return the number of the nearest vector that is no intruder, the smaller one of two."""
        others = set(range(len(self.S))) - set(self.intruders(epsilon, side))
        return min(others, key=lambda other: (abs(other - index), other), default=None)


def spectrum(base: Tensor, tuned: Tensor, top: int = 10) -> Spectrum:
    """Return the `top` leading singular triplets of `tuned`, compared with those of `base`.

    Args:
        base: the weight W as a matrix, (out, in).
        tuned: the weight W', (out, in). Both are converted to float64.
        top: the number k of triplets; fewer if the weight has fewer.
    """
    U0, _, V0 = torch.linalg.svd(base.detach().double(), full_matrices=False)
    U, S, V = torch.linalg.svd(tuned.detach().double(), full_matrices=False)
    U, S, V = U[:, :top], S[:top], V[:top]  # (out, k), (k,), (k, in)
    left = (U.T @ U0).abs().amax(1)  # (k, out) @ (out, m) → (k,)
    right = (V @ V0.T).abs().amax(1)  # (k, in) @ (in, m) → (k,)
    return Spectrum(U, S, V.T, left, right)


def scaled(
    tuned: Tensor,
    found: Spectrum,
    indices: Sequence[int],
    strength: float,
    norm: float | None = None,
) -> Tensor:
    """Return W' + Σ_j (λ - 1) σ_j u_j v_jᵀ: some triplets at a strength λ, in W's dtype.

    Args:
        tuned: the weight W', (out, in).
        found: its spectrum.
        indices: the numbers j of the triplets.
        strength: λ; 0 removes them, and 1 changes nothing.
        norm: a number in place of each σ_j. A control that removes another triplet with the σ of an
            intruder changes the weight by the same norm.
    """
    chosen = list(indices)
    S = found.S[chosen] if norm is None else found.S.new_full((len(chosen),), norm)
    change = (found.U[:, chosen] * S) @ found.V[:, chosen].T  # (out, j) @ (j, in)
    return tuned + ((strength - 1) * change).to(tuned.dtype)


def count(similarities: Sequence[Sequence[float]], epsilon: float) -> int:
    """Return the number of similarities below ε, over the lists of several weights.

    >>> count([[0.4, 0.9], [0.2]], 0.5)
    2
    """
    return sum(value < epsilon for values in similarities for value in values)


def predictors(epsilons: Sequence[float]) -> dict[str, Callable[[Mapping[str, Any]], float]]:
    """Return what could predict forgetting, by name, as functions of a row with `compared`."""

    def counting(side: str, epsilon: float) -> Callable[[Mapping[str, Any]], float]:
        return lambda row: count(row[side], epsilon)

    pairs = [(side, epsilon) for side in ("left", "right") for epsilon in epsilons]
    counts = {f"{side}, ε = {epsilon:g}": counting(side, epsilon) for side, epsilon in pairs}
    return {SIZE: lambda row: mean(row["sizes"]), **counts}


def compared(base: Mapping[str, Tensor], tuned: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return how tuned weights, matrices by path, differ from those of the base, for a row.

    Returns:
        `sizes`, ‖ΔW‖ / ‖W‖ of each weight, and `left` and `right`, the similarities of its leading
        singular vectors; in the order of `tuned`.
    """
    spectra = [spectrum(base[path], weight) for path, weight in tuned.items()]
    sizes = [(weight - base[path]).norm() / base[path].norm() for path, weight in tuned.items()]
    return {
        "sizes": [float(size) for size in sizes],
        **{
            side: [[round(value, 4) for value in getattr(one, side).tolist()] for one in spectra]
            for side in ("left", "right")
        },
    }
