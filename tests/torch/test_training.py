"""Hooks on an adapted model, and optimizers of the base and of the factors."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import paramlora as pl
from tests.support.helpers import (
    EXACT,
    MLP,
    case_of,
    dense_copy,
    factors,
    host_name,
)
from tests.support.mixed import assert_bits
from tests.support.reference import HOSTS, KINDS, Case, Host, floats, loss


@pytest.mark.usefixtures("as_large")
class TestHooks:
    def test_values(self) -> None:
        """Hooks of all types see the dense values, registered before or after attach."""
        case = Case.of(MLP)
        seen: list[tuple[str, list[Tensor]]] = []

        def record(label: str) -> Callable[..., None]:
            return lambda module, *values: seen.append((label, floats(list(values))))

        def add_hooks(layer: nn.Module, when: str) -> None:
            layer.register_forward_pre_hook(record(f"{when}: forward pre"))
            layer.register_forward_hook(record(f"{when}: forward"))
            layer.register_full_backward_pre_hook(record(f"{when}: backward pre"))
            layer.register_full_backward_hook(record(f"{when}: backward"))

        def run(model: nn.Module) -> list[tuple[str, list[Tensor]]]:
            seen.clear()
            x = case.inputs[0].detach().requires_grad_()
            loss([model(x)]).backward()
            return list(seen)

        add_hooks(case.model[0], "before")
        case.attach(KINDS["lora"])
        plain = dense_copy(case)
        add_hooks(plain[0], "before")
        for model in (case.model, plain):
            add_hooks(model[2], "after")
        ours, theirs = run(case.model), run(plain)
        assert [label for label, _ in ours] == [label for label, _ in theirs]
        assert len(ours) == 8
        assert_close([values for _, values in ours], [values for _, values in theirs], **EXACT)

        pl.detach(case.model)  # all hooks stay
        ours, theirs = run(case.model), run(plain)
        assert [label for label, _ in ours] == [label for label, _ in theirs]

    def test_hooks_that_change_values(self) -> None:
        """The value a hook returns replaces inputs, outputs or gradients, as on a dense model."""
        case = case_of(MLP)
        plain = dense_copy(case)
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
        copied = copy.deepcopy(case.model)

        def step(parameter: Tensor) -> None:
            parameter.data -= 0.1 * parameter.grad

        for parameter in pl.parameters(case.model):
            parameter.register_post_accumulate_grad_hook(step)
        for model in (case.model, copied):
            loss(floats(model(*case.inputs))).backward()
        torch.optim.SGD(pl.parameters(copied), lr=0.1).step()
        assert_close(factors(case.model), factors(copied), **EXACT)


class TestOptimizer:
    @pytest.mark.parametrize(
        "host", [MLP, "lstm", "attention", "conv2d_groups", "encoder_layer"], ids=host_name
    )
    def test_of_the_base(self, host: str | Host) -> None:
        """An optimizer made before attach, and its state, continue after detach bit for bit."""
        case = Case.of(HOSTS[host] if isinstance(host, str) else host)
        copied = copy.deepcopy(case.model)

        def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
            optimizer.zero_grad()
            loss(floats(model(*case.inputs))).backward()
            optimizer.step()

        ours = torch.optim.Adam(case.model.parameters(), lr=0.01)
        theirs = torch.optim.Adam(copied.parameters(), lr=0.01)
        for _ in range(2):
            step(case.model, ours)
            step(copied, theirs)
        before = [id(p) for p in case.model.parameters()]
        case.attach(KINDS["lora"])
        step(case.model, torch.optim.Adam(pl.parameters(case.model), lr=0.01))
        pl.merge(case.model)
        pl.unmerge(case.model)
        pl.detach(case.model)
        assert [id(p) for p in case.model.parameters()] == before

        step(case.model, ours)
        step(copied, theirs)
        assert_bits(dict(case.model.state_dict()), dict(copied.state_dict()))
        # A new optimizer gives each moment to its own parameter, in the order of parameters.
        again = torch.optim.Adam(case.model.parameters(), lr=0.01)
        again.load_state_dict(copy.deepcopy(theirs.state_dict()))
        step(case.model, again)
        step(copied, theirs)
        assert_bits(dict(case.model.state_dict()), dict(copied.state_dict()))

    def test_of_the_base_while_attached(self) -> None:
        """Loading its state or stepping it while attached does not change the frozen base."""
        case = Case.of(MLP)
        optimizer = torch.optim.Adam(case.model.parameters(), lr=0.01)
        loss(floats(case.model(*case.inputs))).backward()
        optimizer.step()
        optimizer.zero_grad()
        digest = pl.fingerprint(case.model)
        case.attach(KINDS["lora"])
        loss(floats(case.model(*case.inputs))).backward()
        optimizer.load_state_dict(optimizer.state_dict())
        optimizer.step()
        assert pl.fingerprint(case.model) == digest

    def test_of_the_factors(self, tmp_path: Path) -> None:
        """Training continues bit for bit from a saved adapter and its optimizer's state."""
        case = case_of("encoder_layer")
        pl.scale(case.model, 1.0)

        def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
            for _ in range(2):
                optimizer.zero_grad()
                loss(floats(model(*case.inputs))).backward()
                optimizer.step()

        optimizer = torch.optim.Adam(pl.parameters(case.model), lr=0.01)
        train(case.model, optimizer)
        pl.save(case.model, tmp_path / "one.safetensors", "one")
        saved = copy.deepcopy(optimizer.state_dict())

        pl.load(case.plain, tmp_path / "one.safetensors")
        again = torch.optim.Adam(pl.parameters(case.plain), lr=0.01)
        again.load_state_dict(saved)
        train(case.model, optimizer)
        train(case.plain, again)
        assert_bits(pl.state_dict(case.plain, "one"), pl.state_dict(case.model, "one"))

    def test_of_one_adapter_among_others(self) -> None:
        """Detaching one adapter keeps the other's parameters, which its optimizer still trains."""
        case = case_of(MLP)
        case.attach(KINDS["lora_stabilized"], "two")
        optimizer = torch.optim.Adam(pl.parameters(case.model, "two"), lr=0.01)
        before = [id(p) for group in optimizer.param_groups for p in group["params"]]
        pl.detach(case.model, "one")
        assert [id(p) for p in pl.parameters(case.model)] == before
        values = factors(case.model)
        loss(floats(case.model(*case.inputs))).backward()
        optimizer.step()
        assert all(not torch.equal(*pair) for pair in zip(factors(case.model), values, strict=True))
