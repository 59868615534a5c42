"""The backward of an adapted model: with checkpointing, and after changes to the adapters."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.checkpoint import CheckpointError, checkpoint

import paramlora as pl
from tests.support.helpers import EXACT, MLP, case_of
from tests.support.reference import Case, Host, dense, floats, loss, shake


class Backward:
    """A forward pass whose backward is still to run."""

    def __init__(self, case: Case, call: Callable[..., Any] | None = None) -> None:
        inputs = [x.detach().requires_grad_(x.is_floating_point()) for x in case.inputs]
        leaves = case.leaves() | {f"input {i}": x for i, x in enumerate(inputs)}
        self.leaves = {key: leaf for key, leaf in leaves.items() if leaf.requires_grad}
        self.total = loss(floats((case.model if call is None else call)(*inputs)))

    def check(self, expected: dict[str, Tensor]) -> None:
        """Run the backward and compare all gradients with the expected ones."""
        self.total.backward()
        found = {
            key: torch.zeros_like(leaf) if leaf.grad is None else dense(leaf.grad)
            for key, leaf in self.leaves.items()
        }
        assert_close(found, {key: expected[key] for key in found}, **EXACT)


EVERY_PATH = [
    MLP,
    # So many rows that W' is built.
    Host(lambda: nn.Linear(4, 3), lambda: (torch.randn(40, 4),)),
    "embedding",
    "bag_sum",
    "conv2d_groups",
    "bare_3d",
    "lstm",
    "attention",
    "encoder_layer",
]


@pytest.mark.usefixtures("as_large")
@pytest.mark.parametrize("host", EVERY_PATH, ids=["mlp", "many_rows", *map(str, EVERY_PATH[2:])])
class TestBackward:
    """The backward belongs to the forward that ran, whatever has changed since."""

    @pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
    @pytest.mark.parametrize("on", [True, False], ids=["on", "off"])
    def test_checkpoint(self, host: str | Host, on: bool, reentrant: bool) -> None:
        """Under `torch.utils.checkpoint`, gradients equal those of the dense reference."""
        case = case_of(host)
        if not on:
            pl.disable(case.model)
            case.model.requires_grad_()
        # Reentrant checkpointing needs an input that requires a gradient, and ignores tensors in
        # nested tuples.
        key = torch.ones((), requires_grad=True)

        def call(_: Tensor, *inputs: Tensor) -> Any:
            return tuple(floats(case.model(*inputs)))

        backward = Backward(case, lambda *x: checkpoint(call, key, *x, use_reentrant=reentrant))
        backward.check((case.expected("one") if on else case.expected()).gradients)

    def test_checkpoint_after_toggling(self, host: str | Host) -> None:
        """Toggling before the backward makes checkpoint raise, as the recomputation differs."""
        case = case_of(host)
        backward = Backward(case, lambda *x: checkpoint(case.model, *x, use_reentrant=False))
        pl.disable(case.model)
        with pytest.raises(CheckpointError, match="different"):
            backward.total.backward()

    @pytest.mark.parametrize("change", [pl.disable, lambda model: pl.scale(model, 5.0), pl.detach])
    def test_changed_before_the_backward(
        self, host: str | Host, change: Callable[[nn.Module], None]
    ) -> None:
        """Disabling, scaling or detaching before the backward does not change the gradients."""
        case = case_of(host)
        expected = case.expected("one").gradients
        backward = Backward(case)
        change(case.model)
        backward.check(expected)

    def test_off_in_the_forward_only(self, host: str | Host) -> None:
        """A forward with adapters off has the base's gradients, even if they are on again later."""
        case = case_of(host)
        case.model.requires_grad_()
        with pl.disabled(case.model):
            backward = Backward(case)
        backward.check(case.expected().gradients)

    @pytest.mark.parametrize("what", ["factors", "strength", "base", "merge"])
    def test_overwritten_before_the_backward(self, host: str | Host, what: str) -> None:
        """Changing a tensor that the backward needs raises RuntimeError, as elsewhere in torch.

        A tensor that the backward does not need may change; the gradients are then correct.
        """
        case = case_of(host)
        strength = torch.tensor(0.75, dtype=torch.float64)
        case.strengths["one"] = 0.75
        pl.scale(case.model, strength)
        expected = case.expected("one").gradients
        backward = Backward(case)
        with torch.no_grad():
            if what == "factors":
                shake(case.model)
            elif what == "strength":
                strength.fill_(5.0)
            elif what == "merge":
                pl.merge(case.model)
            else:
                for tensor in pl.base_state_dict(case.model).values():
                    tensor.mul_(2)
        try:
            backward.check(expected)
        except RuntimeError as error:
            assert re.search("changed in place|modified by an inplace operation", str(error))  # noqa: PT017
