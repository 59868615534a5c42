"""Hooks on the layers and tensors of an adapted model see the values of the dense model."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import paramlora as pl
from tests.support.helpers import (
    EXACT,
    MLP,
    case_of,
    factors,
    written_out,
)
from tests.support.reference import KINDS, Case, floats, loss


@pytest.mark.usefixtures("as_large")
class TestHooks:
    def test_values(self) -> None:
        """Hooks of all types see the dense values, registered before or after attach."""
        case = Case.of(MLP)
        seen: list[tuple[str, list[Tensor]]] = []

        def record(what: str) -> Callable[..., None]:
            return lambda module, *values: seen.append((what, floats(list(values))))

        def instrument(layer: nn.Module, when: str) -> None:
            layer.register_forward_pre_hook(record(f"{when}: forward pre"))
            layer.register_forward_hook(record(f"{when}: forward"))
            layer.register_full_backward_pre_hook(record(f"{when}: backward pre"))
            layer.register_full_backward_hook(record(f"{when}: backward"))

        def run(model: nn.Module) -> list[tuple[str, list[Tensor]]]:
            seen.clear()
            x = case.inputs[0].detach().requires_grad_()
            loss([model(x)]).backward()
            return list(seen)

        instrument(case.model[0], "before")
        case.attach(KINDS["lora"])
        plain = written_out(case)
        instrument(plain[0], "before")
        for model in (case.model, plain):
            instrument(model[2], "after")
        ours, theirs = run(case.model), run(plain)
        assert [what for what, _ in ours] == [what for what, _ in theirs]
        assert len(ours) == 8
        assert_close([values for _, values in ours], [values for _, values in theirs], **EXACT)

        pl.detach(case.model)  # and they all stay
        ours, theirs = run(case.model), run(plain)
        assert [what for what, _ in ours] == [what for what, _ in theirs]

    def test_hooks_that_change_values(self) -> None:
        """The value a hook returns replaces inputs, outputs or gradients, as on a dense model."""
        case = case_of(MLP)
        plain = written_out(case)
        for model in (case.model, plain):
            model[2].register_forward_pre_hook(lambda module, args: (args[0] * 2,))
            model[2].register_forward_hook(lambda module, args, out: out.sin())
            model[2].register_full_backward_hook(lambda module, dx, dy: (dx[0] * 3,))
        results = []
        for model in (case.model, plain):
            x = case.inputs[0].detach().requires_grad_()
            out = model(x)
            loss([out]).backward()
            results.append((out, x.grad))
        assert_close(results[0], results[1], **EXACT)

    def test_hooks_of_tensors(self) -> None:
        """A hook on a base weight that is trained too gets its gradient, attached or detached."""
        case = Case.of(MLP)
        seen: list[Tensor] = []
        case.model[0].weight.register_hook(seen.append)
        case.attach(KINDS["lora"], freeze=False)
        expected = [case.expected("one").gradients["0.weight"]]
        loss(floats(case.model(*case.inputs))).backward()
        pl.detach(case.model)
        case.kinds.clear()
        expected.append(case.expected().gradients["0.weight"])
        loss(floats(case.model(*case.inputs))).backward()
        assert_close(seen, expected, **EXACT)

    def test_optimizer_in_the_backward(self) -> None:
        """A hook that steps each factor when its gradient arrives gives the optimizer's result."""
        case = case_of(MLP)
        twin = copy.deepcopy(case.model)

        def step(parameter: Tensor) -> None:
            parameter.data -= 0.1 * parameter.grad

        for parameter in pl.parameters(case.model):
            parameter.register_post_accumulate_grad_hook(step)
        for model in (case.model, twin):
            loss(floats(model(*case.inputs))).backward()
        torch.optim.SGD(pl.parameters(twin), lr=0.1).step()
        assert_close(factors(case.model), factors(twin), **EXACT)
