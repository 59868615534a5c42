"""Every private name of torch that the library uses, under a descriptive name.

torch may change or remove these in any release, because they are not part of its interface. They
are gathered here, so that such a change is fixed in one place. `tests/test_private_torch.py` tests
the behaviour that the library relies on, and fails if torch changes it.

    any_autocast_enabled()      whether autocast is on for any device; cheaper than asking for one
    dispatch_modes_active()     how many `TorchDispatchMode`s are active
    tracing_state()             the state of torch.jit.trace; None outside of it
    functorch_active()          whether a transform of torch.func is active
    forward_ad_active()         whether forward-mode differentiation is active
    in_backward()               whether autograd runs a backward in the current thread
    saved_tensors_hooks()       the innermost (pack, unpack) of `saved_tensors_hooks`, or None
    flat_weight_names(rnn)      the names of an RNN's weights in the order of its list of weights
    set_flat_weights(rnn, ws)   set that list
    is_fsdp_managed(module)     whether `fully_shard` manages the parameters of a module
    parametrization_cache()     what `parametrize.cached` has computed; None outside of it
    READERS_OF_STORED           the modules whose code reads a parameter by name to handle it
    TRACED_BY_ATTRIBUTES        an attribute of a module's class: the compiler asks its properties
    NormWithStatistics          the base class of all layers with running statistics
    WRAPPED                     the keys under which torch.compile and activation checkpointing hold
                                the module that they wrap

Not here, because torch's documentation uses them: `Tensor._version`, and the dictionaries of
`nn.Module` (`_parameters`, `_buffers`, `_modules`).
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.modules import batchnorm
from torch.nn.utils import parametrize

NormWithStatistics = batchnorm._NormBase
WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module")

# Names for torch's own functions, not wrappers: small layers call them in every forward.
any_autocast_enabled: Callable[[], bool] = torch._C._is_any_autocast_enabled
dispatch_modes_active: Callable[[], int] = torch._C._len_torch_dispatch_stack
tracing_state: Callable[[], Any] = torch._C._get_tracing_state
functorch_active: Callable[[], bool] = torch._C._are_functorch_transforms_active

_top_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)

# Whether `saved_tensors_hooks` works; torch 2.6 does not have the private function.
KNOWS_HOOKS = _top_hooks is not None


def saved_tensors_hooks() -> tuple[Callable[..., Any], Callable[..., Any]] | None:
    """Return the innermost hooks (pack, unpack) of `torch.autograd.graph.saved_tensors_hooks`."""
    assert _top_hooks is not None
    return _top_hooks(False)


def forward_ad_active() -> bool:
    """Return whether forward-mode differentiation is active."""
    return forward_ad._current_level >= 0


def in_backward() -> bool:
    """Return whether autograd runs a backward in the current thread."""
    return torch._C._current_graph_task_id() != -1


def flat_weight_names(module: nn.RNNBase) -> list[str]:
    """Return the names of an RNN's weights, in the order in which its forward passes them."""
    return module._flat_weights_names


def set_flat_weights(module: nn.RNNBase, weights: list[Any]) -> None:
    """Set the list of weights that an RNN's forward passes to torch, and the references to them."""
    module._flat_weights = weights
    module._flat_weight_refs = [None if w is None else weakref.ref(w) for w in weights]


def is_fsdp_managed(module: nn.Module) -> bool:
    """Return whether `torch.distributed.fsdp.fully_shard` manages the parameters of a module."""
    return bool(vars(module).get("_is_fsdp_managed_module", False))


def parametrization_cache() -> dict[tuple[int, str], Any] | None:
    """Return what `parametrize.cached` keeps, by module and name; None outside of it."""
    return parametrize._cache if parametrize._cache_enabled else None


# In `nn.Module` itself: get_parameter, register_parameter. In torch.distributed: FSDP's
# reset_sharded_param, and the names of torch.distributed.checkpoint.
READERS_OF_STORED = ("torch.nn.modules.module", "torch.distributed.")

# Without it, a strict torch.export up to about 2.8 takes `layer.weight` from the parameters of the
# module, past the property of its class. The adapters would silently be missing.
TRACED_BY_ATTRIBUTES = "torchdynamo_force_dynamic"
