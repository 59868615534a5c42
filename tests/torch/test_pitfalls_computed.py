"""What goes wrong around `torch.nn.utils.parametrize`, each by its number: what is computed.

Those on running statistics and on merging a tied head, 14 and 15, are in
`test_others_troubles.py`.
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.testing import assert_close

import paramlora as pl
from tests.support.mixed import assert_bits, small
from tests.support.reference import loss, shake


def test_09_toggling_compiles_two_graphs() -> None:
    """However often adapters are toggled, there are two graphs, and values and gradients agree."""
    torch._dynamo.reset()
    model, x = small(), torch.randn(4, 6)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for _ in range(3):
        for toggle in (pl.disable, pl.enable):
            toggle(model)
            assert_close(compiled(x), model(x))
    assert counter.frame_count == 2


def test_10_the_weight_is_no_subclass() -> None:
    """`.weight` holds W' also for code that goes past `__torch_function__`."""
    model = small()
    weight = model[0].weight
    assert type(weight) is Tensor
    factors = pl.state_dict(model)
    A, B = factors["0.weight.A"], factors["0.weight.B"]
    wanted = pl.base_state_dict(model)["0.weight"] + 1.5 * B @ A
    with torch._C.DisableTorchFunctionSubclass():
        assert_close(weight * 1, wanted)
    assert_close(torch.tensor(weight.tolist()), wanted)
    assert weight.untyped_storage().nbytes() == 4 * weight.numel()


@pytest.mark.usefixtures("as_large")
@pytest.mark.parametrize("needs_dx", [True, False])
def test_11_compiled_gradients(needs_dx: bool) -> None:
    """Under the compiler the gradients, dx too, are those of the dense reference."""
    torch._dynamo.reset()
    model, x = small(), torch.randn(4, 6)
    state, factors = pl.base_state_dict(model), pl.state_dict(model)
    leaves = {key: value.clone().requires_grad_() for key, value in factors.items()}
    ours, theirs = (x.clone().requires_grad_(needs_dx) for _ in range(2))
    hidden = theirs
    for i in (0, 2):
        weight = state[f"{i}.weight"]
        weight = weight + 1.5 * leaves[f"{i}.weight.B"] @ leaves[f"{i}.weight.A"]
        hidden = F.linear(torch.tanh(hidden) if i else hidden, weight, state[f"{i}.bias"])
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    inputs = [ours] if needs_dx else []
    actual = torch.autograd.grad(loss([compiled(ours)]), [*pl.parameters(model), *inputs])
    inputs = [theirs] if needs_dx else []
    assert_close(actual, torch.autograd.grad(loss([hidden]), [*leaves.values(), *inputs]))


@pytest.mark.usefixtures("as_large")
def test_12_transforms_go_through() -> None:
    """torch.func sees plain operations: per-sample gradients agree with a loop over samples."""
    model, x = small(), torch.randn(4, 6)
    params = {name: p.detach() for name, p in model.named_parameters() if "factors" in name}

    def one(params: dict[str, Tensor], row: Tensor) -> Tensor:
        return torch.func.functional_call(model, params, (row,)).square().sum()

    each = torch.func.vmap(torch.func.grad(one), in_dims=(None, 0))(params, x)
    for i, row in enumerate(x):
        grads = torch.autograd.grad(model(row).square().sum(), pl.parameters(model))
        assert_close([grad[i] for grad in each.values()], list(grads))


def test_16_unmerging_does_not_subtract() -> None:
    """Where subtracting a bfloat16 update would change a weight in ten, unmerging changes none."""
    layer = nn.Linear(100, 100, dtype=torch.bfloat16)
    W = layer.weight.detach().clone()
    pl.attach(layer, pl.LoRA(rank=4), "weight")
    shake(layer)
    factors = pl.state_dict(layer)
    update = (factors["weight.B"] @ factors["weight.A"]).bfloat16()
    subtracted = (W + update) - update
    assert (subtracted != W).float().mean() > 0.1
    pl.merge(layer)
    pl.unmerge(layer)
    pl.detach(layer)
    assert_bits(layer.weight.detach(), W)


@pytest.mark.parametrize(("size", "lost"), [(1e-5, 0.5), (1e-4, 0.1)])
def test_17_small_updates_survive_half_precision(size: float, lost: float) -> None:
    """A bfloat16 layer applies an update to 3 % that rounding W + ΔW loses to `lost` and more."""
    torch.default_generator.manual_seed(0)
    layer = nn.Linear(256, 256, bias=False, dtype=torch.bfloat16)
    with torch.no_grad():
        # Two equal halves, so that W maps (x, −x) to zero: its output then shows ΔW alone.
        layer.weight.copy_((torch.randn(256, 128) * 0.02).repeat(1, 2))
    W, x = layer.weight.detach().double(), torch.randn(8, 128).bfloat16()
    pl.attach(layer, pl.LoRA(rank=4), "weight")
    assert all(parameter.dtype == torch.float32 for parameter in pl.parameters(layer))
    with torch.no_grad():
        for parameter in pl.parameters(layer):
            parameter.normal_(std=(size / 2) ** 0.5)
        actual = layer(torch.cat([x, -x], dim=1)).double()
    factors = {key: value.double() for key, value in pl.state_dict(layer).items()}
    update = factors["weight.B"] @ factors["weight.A"]
    rounded = layer.weight.detach().double() - W
    assert float((rounded - update).norm() / update.norm()) > lost
    expected = torch.cat([x, -x], dim=1).double() @ update.T
    assert float((actual - expected).norm() / expected.norm()) < 0.03


def test_18_there_is_no_dropout() -> None:
    """Dropout on a layer's input cannot be said in weight space, so no spec takes one."""
    for spec in (pl.LoRA, pl.Delta):
        make: Callable[..., pl.Spec] = spec
        with pytest.raises(TypeError, match="unexpected keyword argument 'dropout'"):
            make(dropout=0.1)
