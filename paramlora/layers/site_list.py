"""The list of parametrizations of an adapted tensor, whose stored tensor stays in its module.

Note [the stored tensor stays in its module]
    torch moves the tensor that it parametrizes into a list, which gives it another name and another
    place among the parameters:

        Linear            parametrized by torch                 adapted
        weight            bias                                  weight
        bias              parametrizations.weight.original      bias
                                                                parametrizations.weight.0.factors.…

    With adapters, W stays in the module's `_parameters` under its own name. So the state dict and
    `named_parameters` have the base's keys in the base's order, and what other libraries save from
    an adapted model loads into the plain one. The property of the module's class, `StoredTensor`,
    hides W from whoever reads `layer.weight`, and the list's `original` reads it there.

    Renaming the keys of a state dict by hooks would not do: torch.distributed matches them to the
    names of `named_parameters`.

    If another parametrization was there first, or one that stores several tensors (weight_norm) is
    registered later, the list has torch's layout, with `original` or `original0`, … in the list.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..errors import StateError
from ..private_torch import parametrization_cache
from ..site.find import parametrization_lists, stack_of
from ..site.quantized import UnreadWeight, packed_shape, packed_tensor
from .readers import class_name, for_reader, read_packed

_HOME = "_paramlora_home"
_NO_WEIGHT = nn.Parameter(torch.empty(0, device="meta"))


@dataclass
class _Home:
    """The dictionary of a module that has the stored tensor, and the tensor's key there.

    It is no tuple: torch.export rebuilds the tuples and dictionaries in a module's attributes, and
    a dictionary that it has rebuilt is not that of the module.
    """

    tensors: dict[str, Any]
    key: str


class SiteList(parametrize.ParametrizationList):
    """The parametrizations of a tensor whose first one is a stack; more can be registered on it.

    torch calls a parametrization that is registered on top of another one with a single tensor.
    One that needs several (weight_norm needs g and v) would fail at the next read. It goes below
    the stack instead: the stored weight is split, and the adapters stay on top.
    """

    # (out, in) for the weight of a quantized layer: see site/quantized.py.
    packed_shape: tuple[int, int] | None = None

    @property
    def original(self) -> Tensor:  # type: ignore[override]
        """The stored tensor, which is in the module: see Note [the stored tensor stays …]."""
        home = vars(self)[_HOME]
        return home.tensors[home.key]

    def forward(self, stored: Tensor | None = None) -> Tensor:
        if not self.is_tensor:
            return super().forward()
        if self.packed_shape is not None:
            raise StateError(UnreadWeight.refusal(None, "its value"))
        value: Any = self.original if stored is None else stored
        for parametrization in self._modules.values():
            value = parametrization(value)
        return value

    def append(self, module: nn.Module) -> "SiteList":
        parts = _several(module, self)
        if parts is None:
            return super().append(module)
        stack = stack_of(self)
        if stack is not None and stack.merged:
            raise StateError(
                f"{type(module).__name__} cannot take over a tensor into which adapter "
                f"{stack.merged[0]!r} is merged; unmerge first"
            )
        home = vars(self).pop(_HOME)
        requires_grad = home.tensors.pop(home.key).requires_grad
        for i, part in enumerate(parts):
            self.register_parameter(f"original{i}", nn.Parameter(part, requires_grad))
        self.is_tensor, self.ntensors = False, len(parts)
        self.insert(0, module)
        return self


class StoredTensor(property):
    """The property of an adapted tensor: it gives W', or W to those in Note [who reads the tensor].

    Args:
        tensor: the tensor's name.
        torchs: torch's property, to restore when the list gets torch's layout again.
    """

    def __init__(self, tensor: str, torchs: property) -> None:
        self.torchs = torchs

        def read(module: nn.Module) -> Tensor:
            if _list(module, tensor).packed_shape is not None:
                return read_packed(module, tensor, depth=2)
            if torch.compiler.is_compiling():
                return _list(module, tensor)(module._parameters.get(tensor))
            stored = for_reader(module, tensor, depth=2)
            if stored is not None:
                return stored
            try:
                return _cached(module, tensor)
            except AttributeError as error:
                # Python would ask nn.Module.__getattr__ next, which finds the stored tensor.
                raise RuntimeError(f"cannot compute {tensor!r} of an adapted module") from error

        def write(module: nn.Module, value: Tensor) -> None:
            _list(module, tensor).right_inverse(value)

        super().__init__(read, write)


def register_at_home(module: nn.Module, tensor: str, parametrization: nn.Module) -> None:
    """Parametrize a tensor, which stays in its module at its place among the parameters."""
    parameters, before = module._parameters, dict(module._parameters)
    packed = packed_tensor(module) if tensor == "weight" else None
    if packed is not None:
        # torch would write to the tensor, and the layer may have no parameter of that name.
        parameters[tensor] = _NO_WEIGHT
    parametrize.register_parametrization(module, tensor, parametrization, unsafe=True)
    plist: Any = parametrization_lists(module)[tensor]
    plist._parameters.pop("original")
    parameters.clear()
    parameters.update(before)
    plist.__class__ = SiteList
    # The dictionary and not the module, which would be a cycle and outlive its last user.
    vars(plist)[_HOME] = _Home(parameters, tensor)
    if packed is not None:
        pack(module, packed)
    cls = type(module)
    setattr(cls, tensor, StoredTensor(tensor, vars(cls)[tensor]))


def pack(module: Any, packed: Any) -> None:
    """Record that the weight of a host is that of a quantized layer."""
    plist: Any = parametrization_lists(module)["weight"]
    where = ((own, key) for own in (module._parameters, module._buffers) for key in own)
    vars(plist)[_HOME] = next(_Home(own, key) for own, key in where if own[key] is packed)
    vars(plist)["packed_shape"] = module.out_features, module.in_features


def unregister_from_home(module: Any, tensor: str) -> None:
    """Undo `register_at_home`."""
    plist: Any = parametrization_lists(module)[tensor]
    before = [(own, dict(own)) for own in (module._parameters, module._buffers)]
    parametrize.remove_parametrizations(module, tensor, leave_parametrized=False)
    if packed_shape(plist) is not None:
        # The layer may store its weight under another name, or as a buffer.
        for own, items in before:
            own.clear()
            own.update(items)


def leave_to_torch(module: nn.Module, tensor: str) -> None:
    """Give a list without a stack torch's layout: the stored tensor in the list."""
    plist: Any = parametrization_lists(module)[tensor]
    if not isinstance(plist, SiteList):
        return
    at_home = vars(plist).pop(_HOME, None) is not None
    plist.__class__ = parametrize.ParametrizationList  # type: ignore[assignment]
    if at_home:
        plist.register_parameter("original", module._parameters.pop(tensor))
    setattr(type(module), tensor, vars(type(module))[tensor].torchs)


def is_at_home(plist: nn.Module) -> bool:
    """Return whether the stored tensor of a list of parametrizations is in its module."""
    return _HOME in vars(plist)


def taken_out(module: nn.Module, tensor: str) -> StateError:
    """Return the error for a library that takes a tensor, or its adapters, out of its module."""
    return StateError(
        f"{tensor!r} of this {class_name(module)} has adapters and cannot be taken out of its "
        "module; detach first. FullyShardedDataParallel (FSDP1) does that, so shard an adapted "
        "model by torch.distributed.fsdp.fully_shard instead"
    )


def _list(module: nn.Module, tensor: str) -> Any:
    try:
        return module._modules["parametrizations"]._modules[tensor]  # type: ignore[union-attr]
    except KeyError:  # FSDP1 has wrapped the adapters by themselves
        raise taken_out(module, tensor) from None


def _cached(module: nn.Module, tensor: str) -> Tensor:
    """Return W', inside of `parametrize.cached` computed once for each module."""
    plist = _list(module, tensor)
    stored = module._parameters.get(tensor)
    if stored is None and plist.is_tensor:
        raise StateError(
            f"{tensor!r} was taken out of its module, which an adapted one needs; detach the "
            "adapters before you prune the module or give its tensors to another library"
        )
    cache = parametrization_cache()
    if cache is None:
        return plist(stored)
    key = id(module), tensor
    if key not in cache:
        cache[key] = plist(stored)
    return cache[key]


def _several(module: nn.Module, plist: SiteList) -> Sequence[Tensor] | None:
    """Return the tensors into which `module` splits the list's tensor; None if it does not."""
    if not plist.is_tensor or not hasattr(module, "right_inverse"):
        return None
    with torch.no_grad():
        try:
            parts = module.right_inverse(plist.original)  # type: ignore[operator]
        except NotImplementedError:
            return None
    return None if isinstance(parts, Tensor) else parts
