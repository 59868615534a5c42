"""Many fine-tunings of one architecture at once: stacked parameters under `torch.func.vmap`.

A step of a network this small is mostly overhead on a GPU: 280 trainings at once take little
longer than one. All trainings of a stack train the same parameters (an `Arm`), and differ in
learning rate, base and method:

    stacked parameter                 (rates, bases, methods, *shape)
    parameters that are not trained   (bases, *shape)
    inputs of a batch                 (bases, n, 785)
    logits                            (rates, bases, methods, n, 10)

The gradient of the sum of all losses is, for each training, that of its own loss. Adam works
element by element. So the trainings equal separate ones up to rounding; a test compares them.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

import paramlora as pl

from .settings import Arm

ADAPTER = "parity"
Weights = Mapping[str, Tensor]


def network(hidden: Sequence[int], inputs: int = 785, outputs: int = 10) -> nn.Sequential:
    """Return a multilayer perceptron with ReLUs and linear layers `layer1`, `layer2`, …."""
    model = nn.Sequential()
    sizes = [inputs, *hidden, outputs]
    for number in range(1, len(sizes)):
        if number > 1:
            model.add_module(f"relu{number - 1}", nn.ReLU())
        model.add_module(f"layer{number}", nn.Linear(sizes[number - 1], sizes[number]))
    return model


def layers(model: nn.Module) -> list[str]:
    """Return the names of the linear layers."""
    return [name for name, module in model.named_modules() if re.fullmatch(r"layer\d", name)]


def prepared(arm: Arm, model: nn.Module, alpha: float, generator: torch.Generator) -> list[str]:
    """Attach the adapter of an arm, if it has one; return the names of the trained parameters."""
    chosen = [name for name in layers(model) if arm.layer in (None, int(name[-1]))]
    if arm.rank:
        spec = pl.LoRA(arm.rank, alpha)
        pl.attach(model, spec, targets=chosen, name=ADAPTER, generator=generator)
    names = []
    for name, _ in model.named_parameters():
        factor, weight, bias = (part in name for part in (f".{ADAPTER}.", "weight", "bias"))
        trained = factor if arm.rank else weight
        if name.partition(".")[0] in chosen and (trained or (bias and arm.biases)):
            names.append(name)
    return names


class Stack:
    """Fine-tunings of one arm at several learning rates, from several bases, by several methods.

    Args:
        arm: what is trained.
        bases: the weights of each base.
        hidden: the units of each hidden layer.
        rates: the learning rates.
        methods: the number of methods.
        alpha: the numerator of LoRA's scale.
        seeds: the seed of each base's initial factors.
    """

    def __init__(
        self,
        arm: Arm,
        bases: Sequence[Weights],
        hidden: Sequence[int],
        rates: Sequence[float],
        methods: int,
        alpha: float,
        seeds: Sequence[int],
    ) -> None:
        device, dtype = bases[0]["layer1.bias"].device, bases[0]["layer1.bias"].dtype
        starts: list[dict[str, Tensor]] = []
        for base, seed in zip(bases, seeds, strict=True):
            self.model = network(hidden).to(device, dtype)
            self.model.load_state_dict(base)
            generator = torch.Generator().manual_seed(seed)
            self.names = prepared(arm, self.model, alpha, generator)
            starts.append({name: p.detach() for name, p in self.model.named_parameters()})
        self.fixed = {
            name: torch.stack([start[name] for start in starts])
            for name in starts[0]
            if name not in self.names
        }
        self.trained = {}
        for name in self.names:
            values = torch.stack([start[name] for start in starts])  # (bases, *shape)
            shape = (len(rates), len(bases), methods, *values.shape[1:])
            wide = values.unsqueeze(1).unsqueeze(0).expand(shape).contiguous()
            self.trained[name] = wide.clone().requires_grad_()
        self.bases = {name: torch.stack([base[name] for base in bases]) for name in bases[0]}
        self.sizes = _Weights(self.model)
        # One group of Adam for each rate. Its parameters are views of the stacked ones.
        self.views = [[p.detach()[i] for p in self.trained.values()] for i in range(len(rates))]
        groups: list[dict[str, Any]] = [
            {"params": views, "lr": rate} for views, rate in zip(self.views, rates, strict=True)
        ]
        self.optimizer = torch.optim.Adam(groups, fused=True)

    def logits(self, inputs: Tensor) -> Tensor:
        """Return the logits, (rates, bases, methods, n, 10), of inputs ([bases,] n, 785)."""
        return self._call(self.model, inputs, 0 if inputs.dim() == 3 else None)

    def _call(self, module: nn.Module, inputs: Tensor, dim: int | None) -> Any:
        def one(trained: Weights, fixed: Weights, x: Tensor) -> Any:
            return functional_call(module, {**fixed, **trained}, (x,))

        by_method = vmap(one, in_dims=(0, None, None))
        by_base = vmap(by_method, in_dims=(0, 0, dim))
        return vmap(by_base, in_dims=(0, None, None))(self.trained, self.fixed, inputs)

    def step(self, losses: Tensor) -> None:
        """Make one step of each training with its loss, (rates, bases, methods)."""
        gradients = torch.autograd.grad(losses.sum(), list(self.trained.values()))
        # On the CPU, fused Adam reads the memory of a gradient in order, whatever its strides
        # (torch 2.14), and vmap returns transposed gradients.
        gradients = tuple(gradient.contiguous() for gradient in gradients)
        for i, views in enumerate(self.views):
            for view, gradient in zip(views, gradients, strict=True):
                view.grad = gradient[i]
        self.optimizer.step()

    @torch.no_grad()
    def base_logits(self, inputs: Tensor) -> Tensor:
        """Return the bases' logits, (bases, n, 10), of inputs (bases, n, 785) or (n, 785)."""
        model = network([p.shape[1] for name, p in self.bases.items() if "bias" in name][:-1])
        return vmap(
            lambda weights, x: functional_call(model, weights, (x,)),
            in_dims=(0, 0 if inputs.dim() == 3 else None),
        )(self.bases, inputs)

    @torch.no_grad()
    def relative_sizes(self) -> Tensor:
        """Return ‖W' - W‖ / ‖W‖ of each layer, (rates, bases, methods, layers)."""
        weights = self._call(self.sizes, self.bases["layer1.bias"][0], None)
        found = []
        for name, tuned in zip(layers(self.model), weights, strict=True):
            base = self.bases[f"{name}.weight"].unsqueeze(1)  # (bases, 1, out, in)
            found.append((tuned - base).flatten(-2).norm(dim=-1) / base.flatten(-2).norm(dim=-1))
        return torch.stack(found, -1)


class _Weights(nn.Module):
    """A module whose forward returns the weights of a model's layers, adapters included."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        for name in layers(model):
            self.add_module(name, model.get_submodule(name))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(layer.weight for layer in self.children())  # type: ignore[misc]
