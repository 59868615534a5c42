"""Penalties on the update, added to the loss: elastic weight consolidation (EWC) and O-LoRA."""

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import paramlora as pl

Penalty = Callable[[nn.Module], Tensor]


def fisher(
    model: nn.Module, paths: Sequence[str], inputs: Tensor, generator: torch.Generator
) -> dict[str, Tensor]:
    """Return the diagonal Fisher information of the base's weights, by path.

        F_ij = mean over x of (∂ log p(ŷ|x) / ∂W_ij)², ŷ ~ p(·|x)

    The labels ŷ are drawn from the model's predictions, so only images are needed. With true labels
    the mean would be the empirical Fisher, which differs. Gradients are per image, because the
    square of a batch's mean gradient is not the mean of the squares.

    Args:
        model: its adapters are switched off for the computation. The model does not change.
        paths: the paths of weights, such as `linear1.weight`.
        inputs: the images, (n, …).
        generator: the generator that draws ŷ, on the CPU.

    Source: Kirkpatrick et al. 2017, "Overcoming catastrophic forgetting" (EWC), arXiv 1612.00796;
    for true and drawn labels: Kunstner et al. 2019, arXiv 1905.12558.
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
    """Return the model's outputs with the base weights at these paths replaced."""
    return torch.func.functional_call(model, dict(weights), (inputs,))


def elastic(weights: Mapping[str, Tensor], fishers: Mapping[str, Tensor]) -> Penalty:
    """Return the penalty ½ Σ_ij F_ij · ΔW_ij² of elastic weight consolidation, ΔW = W' - W.

    The penalty is on ΔW and not on the factors A and B. B starts at zero, where the gradient and so
    the Fisher information of A are zero, and A would not be penalised.

    Source: Kirkpatrick et al. 2017 (EWC), eq. 3.

    Args:
        weights: W by path, from `base_weights`.
        fishers: F by path, from `fisher`.
    """

    def penalty(model: nn.Module) -> Tensor:
        terms = [
            (fishers[path] * (_read(model, path) - weight) ** 2).sum()
            for path, weight in weights.items()
        ]
        return torch.stack(terms).sum() / 2

    return penalty


def orthogonal(earlier: Mapping[str, Tensor], paths: Mapping[str, str]) -> Penalty:
    """Return the penalty Σ_sites ‖A_earlier Aᵀ‖₁ between an earlier A and this one.

    Source: Wang et al. 2023, "Orthogonal Subspace Learning" (O-LoRA), arXiv 2310.14152, eq. 8.

    Args:
        earlier: A of the earlier adapter by site, (r, in), with any keys.
        paths: the path of this adapter's A in the model, with the same keys.
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
    # nn.ParameterDict and nn.ModuleDict also provide their entries as attributes.
    return getattr(owner, tensor)
