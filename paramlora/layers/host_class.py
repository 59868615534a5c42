"""The class that a module has while it hosts stacks.

Note [a class for each module]
    `parametrize` gives each host module a class of its own, a subclass of the module's class with
    one property for each parametrized tensor. It changes that class whenever a parametrization is
    registered or removed. `copy.deepcopy` copies the module but not the class, so two modules
    share it afterwards:

        other = copy.deepcopy(layer)                                 # type(other) is type(layer)
        parametrize.remove_parametrizations(other, "weight")         # deletes the shared property
        layer.weight                                                 # AttributeError

    Two things prevent this. The host's class gets a `__deepcopy__` that gives each copy a class of
    its own (`_deepcopy`). And a module that another parametrization had made a host before, and
    that may share its class with a copy already, gets a copy of that class first
    (`host.register`). The class that was there is kept and restored by `host.unregister`.

Each function below takes the class and returns a method for it, which calls the method that was
there before.
"""

from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from ..errors import StateError
from ..private_torch import TRACED_BY_ATTRIBUTES
from ..site.find import parametrization_lists, stack_of, stored_tensors
from ..site.marks import merged_twice
from ..site.quantized import is_wrapper, packed_tensor
from ..stack.storage import Written, is_sharded
from .dense import hold_stored
from .describe import with_adapters
from .forward import forward_for
from .quantized import check_quantizable, quantized_forward
from .readers import class_name, is_quantizing
from .site_list import StoredTensor, pack, taken_out

_LOADING = "_paramlora_loading"
# Where a module keeps the state that detach restores: see host.py.
BEFORE = "_paramlora_before"

# The descriptors that every class gets anew.
_NOT_COPIED = ("__dict__", "__weakref__")


def copied_class(cls: type) -> type:
    """Return a class with the same bases and attributes: see Note [a class for each module]."""
    copied = {key: value for key, value in vars(cls).items() if key not in _NOT_COPIED}
    return type(cls.__name__, cls.__bases__, copied)


def parametrized_tensors(cls: type) -> set[str]:
    """Return the names of the parametrized tensors, which are properties of the host's class."""
    return {key for key, value in vars(cls).items() if isinstance(value, property)}


def adopt(cls: type, alone: bool, quantized: bool = False) -> dict[str, Any]:
    """Give a host's own class its methods; return what they replace, None for what was not there.

    Args:
        cls: the class that `parametrize` has made for the module.
        alone: whether all parameters are the module's own, so that no module inside has any.
        quantized: whether the module is a quantized linear layer.
    """
    added = {key: made(getattr(cls, key, None)) for key, made in _METHODS.items()}
    # The compiler handles recurrent modules in a way of its own.
    if not issubclass(cls, nn.RNNBase):
        added[TRACED_BY_ATTRIBUTES] = True
    plain: Any = cls.__bases__[0]
    forward = quantized_forward(plain.forward) if quantized else forward_for(plain, alone=alone)
    if forward is not None:
        added["forward"] = forward
    replaced = {key: vars(cls).get(key) for key in added}
    for key, value in added.items():
        setattr(cls, key, value)
    return replaced


def _deepcopy(plain: Any) -> Callable[..., nn.Module]:
    """Without it the copy shares the class: see Note [a class for each module].

    torch's own (`plain`) runs first, for it copies the module; then the copy gets a copy of the
    class, which has this `__deepcopy__` as well, so copies of copies are independent, too.
    """

    def deepcopy(self: nn.Module, memo: dict[int, Any]) -> nn.Module:
        if id(self) in memo:
            return memo[id(self)]
        if isinstance(self, nn.RNNBase):
            # Its list of weights may hold a W' with a graph, which cannot be copied.
            hold_stored(self)
        copied = plain(self, memo)
        copied.__class__ = copied_class(type(copied))
        return copied

    return deepcopy


def _getstate(plain: Any) -> Callable[[nn.Module], Any]:
    def getstate(self: nn.Module) -> Any:
        raise StateError(
            "a model with adapters cannot be pickled as a whole, as torch.save(model) does: its "
            "layers have classes that exist in this process only. Save torch.save(model.state_dict"
            "(), path), or the adapter by paramlora.save, or the plain model by paramlora."
            "base_state_dict; or detach or bake first"
        )

    return getstate


def _apply(plain: Any) -> Callable[..., nn.Module]:
    """Moving or casting a module writes to its parameters; that is no change to a merged weight."""

    def apply(self: nn.Module, fn: Any, recurse: bool = True) -> nn.Module:
        held = list(_merged_lists(self))
        result = plain(self, fn, recurse)
        for plist in held:
            stack: Any = stack_of(plist)
            vars(stack)["written"] = tuple(map(Written, stored_tensors(plist)))
        return result

    return apply


def _register_parameter(plain: Any) -> Callable[..., None]:
    def register_parameter(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        replaces = _is_held(self, name) and param is not self._parameters[name]
        # FSDP replaces the parameter by its shard, and by the whole tensor for each forward.
        allowed = _LOADING in vars(self) or (param is not None and is_sharded(self, param))
        packs = replaces and param is not None and is_wrapper(param)
        packs = packs and (allowed or packed_tensor(self) is not None or is_quantizing(depth=2))
        if packs:
            check_quantizable(self, name, param)
        elif replaces and not allowed:
            raise StateError(
                f"{name!r} of this {class_name(self)} has adapters, and assigning another "
                "parameter would replace the base's tensor below them: write to the base with "
                "load_base_state_dict, or detach first"
            )
        plain(self, name, param)
        if packs:
            pack(self, param)
            vars(self)[BEFORE].frozen.pop(name, None)  # its flag is the library's from now on
            cls: Any = type(self)
            cls.forward = quantized_forward(cls.__bases__[0].forward)

    return register_parameter


def _delattr(plain: Any) -> Callable[..., None]:
    def delattr_(self: nn.Module, name: str) -> None:
        if _is_held(self, name):
            raise taken_out(self, name)
        plain(self, name)

    return delattr_


def _load_from_state_dict(plain: Any) -> Callable[..., None]:
    """Refuse to load a merged weight below adapters that are not merged: it has them already."""

    def load(self: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        *_, errors = rest  # torch's list of messages
        for tensor, plist in parametrization_lists(self).items():
            stack = stack_of(plist)
            keys = f"{prefix}parametrizations.{tensor}."
            twice = merged_twice(state, keys, stack) if stack is not None else []
            if twice:
                errors.append(
                    f"{prefix}{tensor} was saved while {', '.join(map(repr, twice))} was merged "
                    "into it, and would get the adapter twice. Load it into the plain model, or "
                    "merge the adapter here first and load it then; or unmerge before you save, "
                    "or save base_state_dict(model)"
                )
                return
        vars(self)[_LOADING] = True
        try:
            plain(self, state, prefix, *rest)
        finally:
            del vars(self)[_LOADING]

    return load


_METHODS: dict[str, Callable[[Any], Any]] = {
    "__deepcopy__": _deepcopy,
    "__delattr__": _delattr,
    "__getstate__": _getstate,
    "_apply": _apply,
    "_load_from_state_dict": _load_from_state_dict,
    "__repr__": with_adapters,
    "register_parameter": _register_parameter,
}


def _is_held(module: nn.Module, name: str) -> bool:
    """Return whether a parameter is a stored tensor that an adapted module keeps."""
    held = isinstance(getattr(type(module), name, None), StoredTensor)
    return held and name in module._parameters


def _merged_lists(module: nn.Module) -> Iterator[parametrize.ParametrizationList]:
    """Yield the lists with merged adapters whose stored tensors were not written to since."""
    for plist in parametrization_lists(module).values():
        stack = stack_of(plist)
        if stack is not None and stack.written:
            pairs = zip(stack.written, stored_tensors(plist), strict=True)
            if all(written.is_in(parameter) for written, parameter in pairs):
                yield plist
