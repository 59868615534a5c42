"""OFT: the inputs rotated by an orthogonal matrix of blocks, by Cayley's transform.

    W' = W Rᵀ        R = diag(R₁, …, Rₙ),  Rᵢ = (I − λQᵢ) (I + λQᵢ)⁻¹,  Qᵢ = −Qᵢᵀ

Rᵢ and Qᵢ: (b, b), n = in / b. The factor Q: (n, b (b − 1) / 2) holds the elements above the
diagonals. λ is the strength (`pl.scale`), which scales Q, so that R is orthogonal at any strength.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .fields import check_whole_number
from .spec import Factors, Spec, Strength, add_update, factor_dtype, is_finite


@dataclass(frozen=True)
class OFT(Spec):
    """Orthogonal fine-tuning, W' = W Rᵀ, of a tensor seen as (out, in). R starts as I.

    Norms of the rows of W and the angles between them do not change.

    Args:
        block_size: b, at least 2; it must divide the number of inputs.
        eps: the constrained form, COFT. Blocks with ‖Qᵢ‖ > eps/√n are scaled back to that norm.
            PEFT also overwrites its factors with the scaled ones. Here they stay, and the gradient
            passes through the scaling.
        terms: None, or at least 4 to replace the transform by a series that needs no inverse and is
            orthogonal up to rounding only for small Q. As in PEFT, whose default is 5, it turns the
            other way: Rᵢ = I + 2Q + 2Q² + … + 2Qᵗ⁻² + Qᵗ⁻¹ ≈ (I + Q) (I − Q)⁻¹.

    Raises:
        ValueError: a field has an invalid value.

    >>> W, quarter_turn = torch.tensor([[3.0, 4.0]]), {"Q": torch.tensor([[1.0]])}
    >>> OFT(block_size=2).apply(W, quarter_turn)
    tensor([[-4.,  3.]])

    Source: Qiu et al. 2023, "Controlling Text-to-Image Diffusion by Orthogonal Finetuning", arXiv
    2306.07280, section 3. terms: Qiu et al. 2025, arXiv 2506.19847. The rotation is that of the
    inputs, as in PEFT.
    """

    block_size: int = 32
    eps: float | None = field(default=None, kw_only=True)
    terms: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        check_whole_number(self, "block_size", 2)
        if self.terms is not None:
            check_whole_number(self, "terms", 4)
        if self.eps is not None and not (is_finite(self.eps) and self.eps > 0):
            raise ValueError(f"eps must be a finite number above 0 or None, got {self.eps!r}")

    def create(self, weight: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        b = self.block_size
        shape = (weight.shape[1:].numel() // b, b * (b - 1) // 2)
        return {"Q": torch.zeros(shape, dtype=factor_dtype(weight), device=weight.device)}

    def apply(self, weight: Tensor, factors: Factors, strength: Strength = 1.0) -> Tensor:
        # W (R − I)ᵀ is added to W, because it is exactly zero for Q = 0, and W Iᵀ may be rounded.
        # In float32 at least: half precision has no inverse.
        Q = factors["Q"].to(torch.promote_types(factors["Q"].dtype, torch.float32))
        change = self._change(strength * self._blocks(Q))  # (n, b, b)
        W = weight.reshape(weight.shape[0], -1, self.block_size).to(change.dtype)  # (out, n, b)
        update = torch.einsum("onc,nbc->onb", W, change)
        return add_update(weight, update.reshape(weight.shape))

    def refusal(self, weight: Tensor) -> str | None:
        if weight.dim() < 2:
            return f"a rotation of the inputs needs two dimensions, it has {weight.dim()}"
        inputs = weight.shape[1:].numel()
        if inputs % self.block_size:
            fitting = [b for b in range(2, inputs + 1) if inputs % b == 0]
            nearest = min(fitting, key=lambda b: abs(b - self.block_size), default=None)
            hint = "" if nearest is None else f"; the nearest that does is {nearest}"
            return f"block_size={self.block_size} does not divide its {inputs} inputs{hint}"
        return None

    def _blocks(self, Q: Tensor) -> Tensor:
        """Return the skew-symmetric blocks, (n, b, b), scaled back to the norm that eps allows."""
        b = self.block_size
        rows, columns = torch.triu_indices(b, b, 1, device=Q.device)
        upper = Q.new_zeros(len(Q), b, b)
        upper[:, rows, columns] = Q
        blocks = upper - upper.mT
        if self.eps is None:
            return blocks
        largest = self.eps / len(Q) ** 0.5
        norms = torch.linalg.matrix_norm(blocks, keepdim=True)  # (n, 1, 1)
        return blocks * (largest / norms.clamp_min(largest))

    def _change(self, Q: Tensor) -> Tensor:
        """Return R − I for blocks Q."""
        if self.terms is None:
            eye = torch.eye(self.block_size, dtype=Q.dtype, device=Q.device)
            # (I − Q) (I + Q)⁻¹ − I = −2Q (I + Q)⁻¹. The singular values of I + Q are at least 1.
            return -2 * Q @ torch.linalg.inv(eye + Q)
        change, power = 2 * Q, Q
        for _ in range(self.terms - 3):
            power = power @ Q
            change = change + 2 * power
        return change + power @ Q
