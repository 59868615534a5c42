"""The state dict of one adapter, with keys `<site>.<factor>`, and `compare` for any state dict.

Note [keys of factors]
    adapted by `digits`                        keys
    `fc1.weight`                               fc1.weight.A, fc1.weight.B
    the block `[0:4]` of `qkv.weight`          qkv.weight[:4].A, qkv.weight[:4].B
    `embed.weight`, to which `head.weight`     embed.weight.A, embed.weight.B
    is tied

    The index of a block is part of the key, in its shortest form, so that a block has one key
    however the user wrote its index. Tied tensors share one stack and thus one set of factors.
    Their keys have only the first path in module order. Keys for a second path could have other,
    conflicting values. Loading finds the tensor by the first path and adapts all modules with it.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..site.names import check_unmerged
from ..site.survey import Part, Survey
from ..stack.storage import check_real, check_settled, fill, settle


def state_dict(model: nn.Module, name: str | None = None) -> dict[str, Tensor]:
    """Return the factors of an adapter by `<site>.<factor>`, such as `fc1.weight.A`.

    Args:
        model: a module with adapters.
        name: the adapter; by default the only one.

    Returns:
        The factors, detached. They share memory with the model's, as in `nn.Module.state_dict`.
        If FSDP has sharded the model, they are DTensors.

    Raises:
        AdapterNameError: the model has no adapter of this name; or no name is given, and the model
            has several adapters or none.

    >>> import paramlora as pl
    >>> model = nn.Sequential(nn.Linear(4, 3))
    >>> _ = pl.attach(model, pl.LoRA(rank=2), name="digits")
    >>> {key: tuple(factor.shape) for key, factor in pl.state_dict(model, "digits").items()}
    {'0.weight.A': (2, 4), '0.weight.B': (3, 2)}
    """
    settle(model)
    survey = Survey(model)
    return tensors_of(survey.parts([survey.one(name)]))


@torch.no_grad()
def load_state_dict(model: nn.Module, state: Mapping[str, Tensor], name: str | None = None) -> None:
    """Copy factors into an adapter that is attached; nothing else changes.

    If FSDP has sharded the model, all processes call it, with whole tensors or with DTensors.

    Args:
        model: a module with adapters.
        state: all factors of the adapter by key, as `state_dict` returns them.
        name: the adapter; by default the only one.

    Raises:
        AdapterNameError: the model has no adapter of this name; or no name is given, and the model
            has several adapters or none.
        CheckpointError: keys are missing or unexpected, or shapes differ; the message lists all
            differences, and nothing is copied.
        StateError: the adapter is merged, or the model is on the meta device.

    >>> import paramlora as pl
    >>> model = nn.Sequential(nn.Linear(4, 3))
    >>> _ = pl.attach(model, pl.LoRA(rank=2))
    >>> pl.load_state_dict(model, {"0.weight.A": torch.ones(2, 4), "0.weight.B": torch.ones(3, 2)})
    >>> pl.state_dict(model)["0.weight.A"].sum()
    tensor(8.)
    """
    survey = Survey(model)
    name = survey.one(name)
    parts = survey.parts([name])
    check_unmerged([part.site.stack for part in parts], [name], "load")
    settle(model)
    compare(state, tensors_of(parts), f"the state for adapter {name!r}")
    write(model, parts, state)


def tensors_of(parts: Iterable[Part]) -> dict[str, Tensor]:
    """Return an adapter's tensors, detached, by `<site>.<factor>`; see Note [keys of factors]."""
    return {
        f"{part.path}.{key}": tensor.detach()
        for part in parts
        for key, tensor in part.factors.tensors.items()
    }


def write(model: nn.Module, parts: Sequence[Part], values: Mapping[str, Tensor]) -> None:
    """Copy values into an adapter's tensors, by `<site>.<factor>`.

    Raises:
        StateError: the values would be lost, because a tensor is a copy that FSDP has gathered, or
            is on the meta device.
    """
    settle(model)
    for path, _, site, factors in parts:
        # Only parameters: constants are buffers, which FSDP does not shard.
        for key, parameter in factors.named_parameters():
            check_settled(site.module, parameter, path)
            check_real(f"{path}.{key}", parameter)
    for key, tensor in tensors_of(parts).items():
        fill(tensor, values[key])


def compare(state: Mapping[str, Any], expected: Mapping[str, Any], what: str) -> None:
    """Raise a CheckpointError that lists every difference in keys and shapes.

    One message has all missing keys, then all unexpected keys, then each tensor of another shape:

        … does not fit: missing fc1.weight.A; unexpected fc1.A; fc2.weight.B: expected (3, 2), found
        (3, 4)

    Shapes are compared for tensors in `expected` only, because a state dict may also have other
    entries (a module's extra state). Dtypes may differ: values are cast when they are copied.

    Args:
        state: the given values, by key.
        expected: the values that the model needs, by key. Tensors may be on the meta device.
        what: a description of the given state, for the message.
    """
    missing = [key for key in expected if key not in state]
    unexpected = [key for key in state if key not in expected]
    problems = [f"missing {', '.join(missing)}"] if missing else []
    problems += [f"unexpected {', '.join(unexpected)}"] if unexpected else []
    for key, tensor in expected.items():
        if key in state and isinstance(tensor, Tensor):
            found, shape = _shape_or_problem(state[key], tensor), tuple(tensor.shape)
            if found != shape:
                problems.append(f"{key}: expected {shape}, found {found}")
    if problems:
        raise CheckpointError(f"{what} does not fit: {'; '.join(problems)}")


def _shape_or_problem(value: Any, expected: Tensor) -> tuple[int, ...] | str:
    """Return a value's shape, or a description of it if it has nothing to copy."""
    if not isinstance(value, Tensor):
        return f"{type(value).__name__} instead of a tensor"
    if value.is_meta and not expected.is_meta:
        return "a tensor on the meta device, which has no data"
    return tuple(value.shape)
