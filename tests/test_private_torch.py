"""The private names of torch do what the library relies on, and no others are used.

A failure here means that torch has changed: mend `paramlora/private_torch.py` first.
"""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils._python_dispatch import TorchDispatchMode

from paramlora import private_torch

PACKAGE = Path(private_torch.__file__).parent


def test_autocast_is_noticed() -> None:
    """`any_autocast_enabled` is true inside of torch.autocast only."""
    assert not private_torch.any_autocast_enabled()
    with torch.autocast("cpu", torch.bfloat16):
        assert private_torch.any_autocast_enabled()


def test_dispatch_modes_are_noticed() -> None:
    """`dispatch_modes_active` counts the dispatch modes that are active."""
    assert private_torch.dispatch_modes_active() == 0
    with TorchDispatchMode():
        assert private_torch.dispatch_modes_active() == 1


def test_backwards_are_noticed() -> None:
    """`in_backward` is true in the hooks of a backward only."""
    seen: list[bool] = [private_torch.in_backward()]
    x = torch.zeros(1, requires_grad=True)
    x.register_hook(lambda grad: seen.append(private_torch.in_backward()))
    x.sum().backward()
    assert seen == [False, True]


def test_tracing_is_noticed() -> None:
    """`tracing_state` is None except inside of torch.jit.trace."""
    seen: list[Any] = []

    def function(x: Tensor) -> Tensor:
        seen.append(private_torch.tracing_state())
        return x + 1

    function(torch.zeros(1))
    torch.jit.trace(function, torch.zeros(1), check_trace=False)
    assert seen[0] is None
    assert seen[1] is not None


def test_transforms_of_functions_are_noticed() -> None:
    """`functorch_active` is true inside of torch.func's transforms only."""
    seen: list[bool] = []

    def function(x: Tensor) -> Tensor:
        seen.append(private_torch.functorch_active())
        return x.sum()

    function(torch.zeros(1))
    torch.func.grad(function)(torch.zeros(1))
    torch.func.vmap(function)(torch.zeros(2, 1))
    assert seen == [False, True, True]


def test_forward_mode_is_noticed() -> None:
    """`forward_ad_active` is true inside of a dual level only."""
    assert not private_torch.forward_ad_active()
    with forward_ad.dual_level():
        assert private_torch.forward_ad_active()


@pytest.mark.skipif(not private_torch.KNOWS_HOOKS, reason="this torch cannot tell the hooks")
def test_hooks_of_saved_tensors_are_found() -> None:
    """`saved_tensors_hooks` returns the innermost pair of hooks, and None if there is none."""

    def pack(tensor: Tensor) -> Tensor:
        return tensor

    def unpack(tensor: Tensor) -> Tensor:
        return tensor

    assert private_torch.saved_tensors_hooks() is None
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        assert private_torch.saved_tensors_hooks() == (pack, unpack)


@pytest.mark.parametrize("cls", [nn.RNN, nn.GRU, nn.LSTM])
def test_weights_of_recurrent_modules_are_found(cls: Any) -> None:
    """The list of an RNN's weights has `flat_weight_names`, and a forward renews a stale one."""
    module, x = cls(3, 3), torch.ones(2, 1, 3)
    expected = module(x)[0]
    assert private_torch.flat_weight_names(module) == [n for n, _ in module.named_parameters()]
    private_torch.set_flat_weights(module, [torch.zeros_like(p) for p in module.parameters()])
    assert torch.equal(module(x)[0], expected)
    held = module._flat_weights
    assert all(a is b for a, b in zip(held, module.parameters(), strict=True))
    private_torch.set_flat_weights(module, list(module.parameters()))
    module(x)
    assert module._flat_weights is not held


def test_fsdp_marks_modules_by_name() -> None:
    """FSDP marks the modules that it manages by the attribute that `is_fsdp_managed` reads.

    tests/torch/test_distributed.py shards modules for real.
    """
    module = nn.Linear(1, 1)
    assert not private_torch.is_fsdp_managed(module)
    source = Path(torch.distributed.fsdp.__file__).parent
    assert any("_is_fsdp_managed_module" in path.read_text() for path in source.rglob("*.py"))


def test_cache_of_parametrizations_is_found() -> None:
    """`parametrization_cache` is what `parametrize.cached` keeps, and None outside of it."""
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
    assert private_torch.parametrization_cache() is None
    with nn.utils.parametrize.cached():
        weight = layer.weight
        assert private_torch.parametrization_cache() == {(id(layer), "weight"): weight}
    assert private_torch.parametrization_cache() is None


def test_the_compiler_asks_properties() -> None:
    """Dynamo looks for the attribute TRACED_BY_ATTRIBUTES, on which test_export.py relies."""
    guard = Path(torch.__file__).parent / "_dynamo" / "mutation_guard.py"
    assert f'"{private_torch.TRACED_BY_ATTRIBUTES}"' in guard.read_text()


def test_readers_of_stored_parameters_are_where_they_were() -> None:
    """torch's code that reads parameters by name is in the modules of READERS_OF_STORED.

    tests/layers/test_readers.py and tests/torch/test_distributed.py run it.
    """
    module, distributed = private_torch.READERS_OF_STORED
    assert nn.Module.get_parameter.__module__ == nn.Module.register_parameter.__module__ == module
    source = Path(torch.distributed.fsdp.__file__).parent
    found = [path for path in source.rglob("*.py") if "def reset_sharded_param" in path.read_text()]
    assert len(found) == 1
    assert torch.distributed.fsdp.__name__.startswith(distributed)


@pytest.mark.parametrize(
    "cls", [nn.BatchNorm1d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.InstanceNorm2d, nn.LazyBatchNorm2d]
)
def test_layers_with_statistics_share_a_base_class(cls: Any) -> None:
    """Every layer of torch with running statistics derives from `NormWithStatistics`."""
    assert issubclass(cls, private_torch.NormWithStatistics)


@pytest.mark.parametrize(
    ("wrap", "key"),
    [
        (lambda model: torch.compile(model, backend="eager"), "_orig_mod"),
        (checkpoint_wrapper, "_checkpoint_wrapped_module"),
    ],
)
def test_wrappers_hold_one_child_under_a_known_key(wrap: Any, key: str) -> None:
    """What torch.compile and activation checkpointing return holds the module under its key."""
    module = nn.Linear(1, 1)
    assert key in private_torch.WRAPPED
    assert dict(wrap(module)._modules) == {key: module}


def test_no_other_file_uses_private_names() -> None:
    """Only private_torch.py names `torch._…`, `torch.…._…` or imports a private name of torch."""
    private = re.compile(
        r"\b(torch(\.\w+)*|forward_ad)\._(?!_)|from torch[\w.]* import .*\b_[a-zA-Z]"
    )
    found = [
        f"{path.name}: {line.strip()}"
        for path in PACKAGE.rglob("*.py")
        if path.name != "private_torch.py"
        for line in path.read_text(encoding="utf-8").splitlines()
        if private.search(line)
    ]
    assert found == []
