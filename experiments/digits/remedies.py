"""Remedies against forgetting: what is added to the loss, what is projected, what answers.

Letters: z the logits with the adapter on, z⁰ those with it off (the base's), C the tuned classes,
x: (n, …), y: (n,), λ the strength of `pl.scale`. Each remedy is one function; they add up in the
objective of the one training loop. Only replay, and what is said to take old images, sees examples
of other classes: the teacher z⁰ is the model itself, switched off, on the tuned images.

The strength needs no training and is `pl.scale`: W' = W + λ·ΔW. That weights between two trained
ones serve both tasks: Wortsman et al. 2022, "Robust fine-tuning of zero-shot models" (WiSE-FT),
arXiv 2109.01903.
"""

from collections.abc import Callable, Collection, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import paramlora as pl

Penalty = Callable[[nn.Module], Tensor]


def mask_or_shift_logits(logits: Tensor, tuned: Collection[int], margin: float) -> Tensor:
    """Return logits with those of the other classes lowered by `margin`: z_c - m for c not in C.

    In the training loss alone. At m = 0 it is the plain cross-entropy; at m = ∞ the masked one,
    softmax over C only, so that learning C against C pushes no other class down (Caccia et al.
    2022, "New insights on reducing abrupt representation change", ER-ACE, arXiv 2104.05025). In
    between, an image of a tuned digit need not beat the other digits by as much as it would: the
    margin is that of logit adjustment (Menon et al. 2021, arXiv 2007.07314, eq. 10) with a prior of
    the other classes e^-m times as large.

    >>> mask_or_shift_logits(torch.tensor([[1.0, 2.0, 3.0]]), [0, 2], 5.0)
    tensor([[ 1., -3.,  3.]])
    """
    if margin == 0:
        return logits
    shift = torch.full((logits.shape[-1],), -margin, dtype=logits.dtype, device=logits.device)
    shift[list(tuned)] = 0
    return logits + shift


def distillation(logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return T² · KL(softmax(z⁰/T) ‖ softmax(z/T)), the mean over examples, nats.

    Sources: Hinton et al. 2015, arXiv 1503.02531; on new images only, as here: Li and Hoiem 2016,
    "Learning without Forgetting", arXiv 1606.09282.
    """
    student, target = (F.log_softmax(z / temperature, -1) for z in (logits, teacher))
    return temperature**2 * divergence(target, student)


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return KL(p ‖ q) from log-probabilities, the mean over examples, nats.

    Written out: torch's `kl_div` knows no vmap, and is one by one inside it.
    """
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def kept_mass(logits: Tensor, teacher: Tensor, tuned: Collection[int]) -> Tensor:
    """Return KL(q⁰ ‖ q) of the two-way answer q = (Σ_C softmax(z), 1 - it), mean, nats.

    Distils only whether an image shows a tuned class at all, and leaves which one free.
    """
    chosen = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
    chosen[list(tuned)] = True

    def groups(z: Tensor) -> Tensor:
        minus = torch.tensor(-torch.inf, dtype=z.dtype, device=z.device)
        sides = (torch.where(chosen, z, minus), torch.where(chosen, minus, z))
        return F.log_softmax(torch.stack([side.logsumexp(-1) for side in sides], -1), -1)

    return divergence(groups(teacher), groups(logits))


@torch.no_grad()
def switched_off(model: nn.Module, inputs: Tensor, *names: str) -> Tensor:
    """Return the logits of the model with adapters off, (n, classes): the teacher, without a copy.

    The base does not change while adapters train, so once before training is enough.
    """
    with pl.disabled(model, *names):
        return model(inputs)


def fisher(
    model: nn.Module, paths: Sequence[str], inputs: Tensor, generator: torch.Generator
) -> dict[str, Tensor]:
    """Return the diagonal of the base's Fisher information at each weight, by its path.

        F_ij = mean over x of (∂ log p(ŷ|x) / ∂W_ij)², ŷ ~ p(·|x)

    with the labels drawn from the model itself, so that it needs images only, and any will do.

    Args:
        model: adapters are switched off inside; all is left as it was.
        paths: of weights, such as `linear1.weight`.
        inputs: the images, (n, …).
        generator: where ŷ is drawn from.

    Source: Kirkpatrick et al. 2017, "Overcoming catastrophic forgetting" (EWC), arXiv 1612.00796;
    on true and drawn labels: Kunstner et al. 2019, arXiv 1905.12558.
    """
    weights = base_weights(model, paths)
    total = {path: torch.zeros_like(weight) for path, weight in weights.items()}
    with pl.disabled(model) if pl.summary(model).sites else torch.enable_grad():
        for x in inputs.split(1):
            with torch.enable_grad():
                leaves = {path: weight.requires_grad_() for path, weight in weights.items()}
                log_p = F.log_softmax(with_weights(model, leaves, x), -1)
                drawn = torch.multinomial(log_p.detach().exp().cpu(), 1, generator=generator)
                loss = log_p.gather(1, drawn.to(log_p.device)).sum()
                gradients = torch.autograd.grad(loss, list(leaves.values()))
            for path, gradient in zip(leaves, gradients, strict=True):
                total[path] += gradient**2 / len(inputs)
    return total


def base_weights(model: nn.Module, paths: Sequence[str]) -> dict[str, Tensor]:
    """Return copies of the weights at these paths with adapters off."""
    state = pl.base_state_dict(model)
    return {path: state[path].detach().clone() for path in paths}


def with_weights(model: nn.Module, weights: Mapping[str, Tensor], inputs: Tensor) -> Tensor:
    """Return the model's outputs with other base weights at these paths."""
    named = dict(model.named_parameters())
    stored = {
        path if path in named else _original(path): weight for path, weight in weights.items()
    }
    return torch.func.functional_call(model, stored, (inputs,))


def _original(path: str) -> str:
    """Return where parametrize keeps the tensor at a path."""
    module, _, tensor = path.rpartition(".")
    return f"{module}.parametrizations.{tensor}.original".lstrip(".")


def elastic(weights: Mapping[str, Tensor], fishers: Mapping[str, Tensor]) -> Penalty:
    """Return the penalty ½ Σ_ij F_ij · ΔW_ij² of elastic weight consolidation, on ΔW = W' - W.

    Not on the factors one by one: B starts at zero, and where it is zero the Fisher information of
    A is too. Source: Kirkpatrick et al. 2017 (EWC), eq. 3.

    Args:
        weights: W by path, `base_weights`.
        fishers: F by path, `fisher`.
    """

    def penalty(model: nn.Module) -> Tensor:
        terms = [
            (fishers[path] * (_read(model, path) - weight) ** 2).sum()
            for path, weight in weights.items()
        ]
        return torch.stack(terms).sum() / 2

    return penalty


def orthogonal(earlier: Mapping[str, Tensor], paths: Mapping[str, str]) -> Penalty:
    """Return the penalty Σ_sites ‖A_earlier Aᵀ‖₁ between row spaces of an earlier A and this one.

    Source: Wang et al. 2023, "Orthogonal Subspace Learning" (O-LoRA), arXiv 2310.14152, eq. 8.

    Args:
        earlier: the earlier adapter's A, (r, in), by any key.
        paths: by the same key, the dotted path of this adapter's A in the model.
    """

    def penalty(model: nn.Module) -> Tensor:
        overlaps = [
            (A @ _read(model, paths[key]).transpose(-1, -2)).abs().sum()
            for key, A in earlier.items()
        ]
        return torch.stack(overlaps).sum()

    return penalty


def _read(model: nn.Module, path: str) -> Tensor:
    module, _, tensor = path.rpartition(".")
    owner = model.get_submodule(module)
    # An nn.ParameterDict or ModuleDict of factors has its tensors as attributes all the same.
    return getattr(owner, tensor)


def principal(rows: Tensor, energy: float) -> Tensor:
    """Return the fewest right-singular vectors of `rows` with that share of energy, (k, in).

    k is the least with Σ_{i≤k} σ_i² ≥ energy · Σ σ_i². Source: Saha et al. 2021, "Gradient
    Projection Memory", arXiv 2103.09762, eq. 5.

    Args:
        rows: activations, one example a row, (n, in), or a weight, (out, in).
        energy: from 0 (none) to 1 (all that is not zero).

    >>> principal(torch.tensor([[3.0, 0.0, 0.0], [0.0, 1.0, 0.0]]), 0.9).abs()
    tensor([[1., 0., 0.]])
    """
    _, sizes, right = torch.linalg.svd(rows, full_matrices=False)
    share = (sizes**2).cumsum(0) / (sizes**2).sum()
    # As torch's matrix_rank: what is smaller than that is the rounding of zero.
    rank = int((sizes > sizes[0] * max(rows.shape) * torch.finfo(rows.dtype).eps).sum())
    kept = int((share < energy).sum()) + 1 if energy > 0 else 0
    return right[: min(kept, rank)]


@torch.no_grad()
def project_away(A: Tensor, directions: Tensor) -> None:
    """Take the span of `directions` out of the rows of A, in place: A ← A - A Dᵀ D.

    The update B A then leaves inputs in that span alone, x ∈ span(D) ⇒ B A x = 0. Sources: Saha et
    al. 2021 (GPM, as gradients); Wang et al. 2021, "Training networks in null space", arXiv
    2103.07113.

    Args:
        A: (…, r, in).
        directions: orthonormal rows, (k, in).
    """
    A -= A @ directions.T @ directions


def routed(on: Tensor, off: Tensor, tuned: Collection[int]) -> Tensor:
    """Return z where the base answers a tuned class, else z⁰: argmax z⁰ ∈ C ? z : z⁰.

    >>> on, off = torch.tensor([[0.0, 9.0], [0.0, 9.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    >>> routed(on, off, [1]).tolist()
    [[1.0, 0.0], [0.0, 9.0]]
    """
    classes = torch.tensor(list(tuned), device=off.device)
    return torch.where(torch.isin(off.argmax(1), classes).unsqueeze(1), on, off)


def grouped(on: Tensor, off: Tensor, tuned: Collection[int]) -> Tensor:
    """Return logits by the chain rule: the base says whether C, the adapter says which of C.

        p(c) = p⁰(C) · p(c | C) for c ∈ C, p⁰(c) for all others

    A soft `routed`: the tuned logits keep the base's log-sum-exp over C, and the other classes'
    logits are the base's, so that no other class loses an image but to a tuned one that sharpens.
    """
    out, columns = off.clone(), list(tuned)
    mass = off[:, columns].logsumexp(1, keepdim=True)
    out[:, columns] = F.log_softmax(on[:, columns], 1) + mass
    return out


class Gate:
    """A learned gate: whether an image shows a tuned class, from the base's logits.

        g(x) = σ(w · z⁰(x) + b): the adapter answers where g > ½

    A logistic regression on z⁰, with weight decay, by Newton's method (20 steps). Old images
    are what it takes: without them it has one class only. Source: the task classifiers of Aljundi
    et al. 2017, "Expert Gate", arXiv 1611.06194, as small as they come.

    Args:
        off: the base's logits of tuned and of old images, (n, classes).
        is_tuned: bool (n,).
        decay: of the weights' squares.
    """

    def __init__(self, off: Tensor, is_tuned: Tensor, decay: float = 1e-2) -> None:
        x = F.pad(off.double(), (0, 1), value=1.0)
        y = is_tuned.double()
        # Both sides weigh the same, however many images each has.
        weight = torch.where(is_tuned, 0.5 / y.sum(), 0.5 / (1 - y).sum())
        w = torch.zeros(x.shape[1], dtype=x.dtype, device=x.device)
        ridge = decay * torch.eye(len(w), dtype=x.dtype, device=x.device)
        for _ in range(20):
            p = torch.sigmoid(x @ w)
            gradient = x.T @ (weight * (p - y)) + ridge @ w
            curvature = (x * (weight * p * (1 - p)).unsqueeze(1)).T @ x + ridge
            w = w - torch.linalg.solve(curvature, gradient)
        self.w = w

    def __call__(self, on: Tensor, off: Tensor) -> Tensor:
        """Return z where the gate is open, else z⁰."""
        score = off.double() @ self.w[:-1] + self.w[-1]
        return torch.where((score > 0).unsqueeze(1), on, off)


class Average:
    """A hook that averages parameters over the steps after the first `start`.

    Source: Izmailov et al. 2018, "Averaging weights leads to wider optima" (SWA), arXiv 1803.05407.
    """

    def __init__(self, parameters: Sequence[Tensor], start: int) -> None:
        self.parameters, self.start, self.count = list(parameters), start, 0
        self.means = [torch.zeros_like(p, requires_grad=False) for p in self.parameters]

    @torch.no_grad()
    def __call__(self, step: int, model: nn.Module, loss: Tensor) -> None:
        if step > self.start:
            self.count += 1
            for mean, parameter in zip(self.means, self.parameters, strict=True):
                mean += (parameter - mean) / self.count

    @torch.no_grad()
    def restore(self) -> None:
        """Give the parameters their means, if any step was averaged."""
        for mean, parameter in zip(self.means, self.parameters, strict=True):
            if self.count:
                parameter.copy_(mean)
