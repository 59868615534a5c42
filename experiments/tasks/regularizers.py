"""The methods of continual learning as functions of tensors: EWC, SI, LwF, ER, InfLoRA's subspaces.

θ are the trained parameters, k is the number of the current context, counted from 1.

    EWC   CE + λ/2 · Σ_{j<k} Σ F_j (θ - θ_j)²    Kirkpatrick et al. 2017, arXiv 1612.00796, eq. 3
    SI    CE + c · Σ Ω (θ - θ_{k-1})²            Zenke et al. 2017, arXiv 1703.04200, eqs. 4 and 5
    LwF   CE + distillation of the model after context k - 1, on the images of context k
                                                 Li and Hoiem 2016, arXiv 1606.09282
    ER    CE/k + (1 - 1/k) · CE of stored images Rolnick et al. 2019, arXiv 1811.11682

The weights of the terms are those of van de Ven and Tolias; see contexts.py for the sources.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Tensors = list[Tensor]


def fisher(model: nn.Module, inputs: Tensor, active: Tensor, size: int = 2000) -> Tensors:
    """Return the exact diagonal Fisher information of a network of linear layers, per parameter.

        F_i = mean over x of Σ_y p(y|x) · (∂ log p(y|x) / ∂θ_i)²

    The sum has all active units y. For a linear layer with inputs h and output gradients δ the
    gradient of one example is δ hᵀ, so the sum of its squares over examples is (δ²)ᵀ (h²), one
    product per y.

    Args:
        model: parameters are read only. All of them are those of `nn.Linear`.
        inputs: (n, …).
        active: the active units, bool (units,).
        size: examples that are computed at once.
    """
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    total = [torch.zeros_like(p) for p in model.parameters()]
    for x in inputs.split(size):
        seen, outputs, log_p = _recorded(model, layers, x, active)
        for unit in active.nonzero().flatten().tolist():
            gradients = torch.autograd.grad(log_p[:, unit].sum(), outputs, retain_graph=True)
            p = log_p[:, unit].detach().exp().unsqueeze(1)  # (n, 1)
            for number, (h, delta) in enumerate(zip(seen, gradients, strict=True)):
                squares = p * delta**2  # (n, out)
                total[2 * number] += squares.T @ h**2 / len(inputs)  # (out, in)
                total[2 * number + 1] += squares.sum(0) / len(inputs)
    return total


def _recorded(
    model: nn.Module, layers: Sequence[nn.Module], x: Tensor, active: Tensor
) -> tuple[Tensors, Tensors, Tensor]:
    """Return the inputs and the outputs of each layer, and log p(y|x), (n, units)."""
    seen: Tensors = []
    outputs: Tensors = []

    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen.append(inputs[0].detach())
        outputs.append(output)

    handles = [layer.register_forward_hook(hook) for layer in layers]
    try:
        with torch.enable_grad():
            log_p = model(x).masked_fill(~active, -torch.inf).log_softmax(1)
    finally:
        for handle in handles:
            handle.remove()
    return seen, outputs, log_p


class Quadratic:
    """The sum of penalties Σ_j Σ F_j (θ - θ_j)², which takes as long as a single one.

    The sum over j is S (θ - c)² + constant with S = Σ F_j and c = Σ F_j θ_j / S.
    """

    def __init__(self) -> None:
        self.strengths: Tensors = []
        self.centers: Tensors = []
        self.constant = 0.0

    def add(self, strengths: Tensors, centers: Tensors) -> None:
        """Add a penalty with the F and the θ of each parameter."""
        if not self.strengths:
            self.strengths = [torch.zeros_like(F_j) for F_j in strengths]
            self.centers = [torch.zeros_like(F_j) for F_j in strengths]
        for S, c, F_j, theta in zip(self.strengths, self.centers, strengths, centers, strict=True):
            both = S + F_j
            share = torch.where(both > 0, F_j / both, 0.0)  # in (0, 1], or 0 without any strength
            self.constant += float((S * share * (theta - c) ** 2).sum())
            c += share * (theta - c)
            S.copy_(both)

    def __call__(self, parameters: Sequence[Tensor]) -> Tensor:
        """Return the penalty at these parameters, a scalar."""
        terms = zip(self.strengths, self.centers, parameters, strict=True)
        return torch.stack([(S * (p - c) ** 2).sum() for S, c, p in terms]).sum() + self.constant


class PathIntegral:
    """SI's W = -Σ over steps of g · Δθ, by an optimizer's hook; g is the gradient of the loss.

    Zenke et al. take the gradient of the task's loss alone. The code of van de Ven and Tolias takes
    that of the loss with its penalty, as here.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer
    ) -> None:
        self.parameters = list(parameters)
        self.start = [p.detach().clone() for p in self.parameters]
        self.before = [p.detach().clone() for p in self.parameters]
        self.path = [torch.zeros_like(p) for p in self.parameters]
        self.handle = optimizer.register_step_post_hook(lambda *_: self._step())

    @torch.no_grad()
    def _step(self) -> None:
        for p, before, W in zip(self.parameters, self.before, self.path, strict=True):
            assert p.grad is not None
            W.addcmul_(p.grad, before - p)
            before.copy_(p)

    def importance(self, damping: float = 0.1) -> Tensors:
        """End the path; return W / ((θ - θ at the start)² + ξ) for each parameter."""
        self.handle.remove()
        ends = zip(self.path, self.parameters, self.start, strict=True)
        return [W / ((p.detach() - start) ** 2 + damping) for W, p, start in ends]


def soft_cross_entropy(logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return -Σ softmax(z⁰/T) · log softmax(z/T), the mean over examples, without a factor T²."""
    return (
        -(F.softmax(teacher / temperature, 1) * F.log_softmax(logits / temperature, 1))
        .sum(1)
        .mean()
    )


def lwf(logits: Tensor, teacher: Tensor, earlier: Sequence[Tensor], temperature: float) -> Tensor:
    """Return LwF's distillation: the sum over groups of units of the soft cross-entropy in each.

    Args:
        logits: z, (n, units).
        teacher: z⁰, (n, units), with -∞ at units whose target is 0.
        earlier: the units of each group: in the scenario task the units of each earlier context, in
            the others all active units.
        temperature: T.
    """
    groups = [soft_cross_entropy(logits[:, u], teacher[:, u], temperature) for u in earlier]
    return torch.stack(groups).sum()


def replayed(current: Tensor, stored: Tensor, context: int) -> Tensor:
    """Return ER's loss from those of the current and the stored images; `context` from 1."""
    return current / context + (1 - 1 / context) * stored


def stored_rows(rows: Tensor, labels: Tensor, each: int, generator: torch.Generator) -> Tensor:
    """Return the rows of `each` random examples of every label, or of all if there are fewer."""
    shuffled = rows[torch.randperm(len(rows), generator=generator).to(rows.device)]
    parts = [shuffled[labels[shuffled] == label][:each] for label in labels[rows].unique()]
    return torch.cat(parts)


def input_energy(model: nn.Module, layers: Sequence[nn.Module], inputs: Tensor) -> Tensors:
    """Return X ᵀX of the inputs X of each layer, (in, in)."""
    found: dict[int, Tensor] = {}

    def hook(number: int) -> Callable[..., None]:
        def add(module: nn.Module, given: tuple[Tensor, ...]) -> None:
            x = given[0].detach()
            found[number] = found.get(number, 0) + x.T @ x

        return add

    handles = [layer.register_forward_pre_hook(hook(n)) for n, layer in enumerate(layers)]
    try:
        with torch.no_grad():
            for x in inputs.split(2000):
                model(x)
    finally:
        for handle in handles:
            handle.remove()
    return [found[n] for n in range(len(layers))]


def outside(energy: Tensor, basis: Tensor) -> Tensor:
    """Return P C P with P = I - M Mᵀ: the energy C, (in, in), outside the span of M, (in, m)."""
    left = energy - basis @ (basis.T @ energy)
    return left - (left @ basis) @ basis.T


def design(energy: Tensor, basis: Tensor, rank: int) -> Tensor:
    """Return InfLoRA's A, (r, in): the strongest input directions of a task outside the span of M.

    Source: Liang and Li 2024, "InfLoRA", arXiv 2404.00228, section 3.2. Only B trains, so the
    update does not change the outputs for inputs in the span.
    """
    return torch.linalg.eigh(outside(energy, basis)).eigenvectors[:, -rank:].T.flip(0)


def protect(energy: Tensor, basis: Tensor, share: float) -> Tensor:
    """Return M, (in, m'), extended by the strongest directions to a share of C's energy.

    Source: Saha et al. 2021, "Gradient Projection Memory", arXiv 2103.09762, eqs. 8 and 9. InfLoRA
    uses DualGPM, a form of it that needs less memory, and a share that rises with the tasks.
    """
    values, vectors = torch.linalg.eigh(outside(energy, basis))
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    missing = share * energy.trace() - (energy.trace() - values.sum())
    needed = int((values.cumsum(0) < missing).sum()) + 1 if missing > 0 else 0
    return torch.linalg.qr(torch.cat([basis, vectors[:, :needed]], 1)).Q
