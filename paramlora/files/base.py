"""The base beneath the adapters: its tensors and their keys, whatever is attached or merged."""

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..site.find import stack_of
from ..site.names import check_unmerged, select
from ..site.storage import check_real, check_settled, in_parts
from .compare import compare
from .digest import digest


def base_state_dict(model: nn.Module) -> dict[str, Any]:
    """Return the base's state dict under its original keys, whatever is attached or merged.

    It loads into a model of the same code without paramlora. Tensors are shared, as in
    `nn.Module.state_dict`; the adapted ones come after the others of their module.
    """
    keys, state = _Keys(model), model.state_dict()
    base: OrderedDict[str, Any] = OrderedDict()
    for key, value in state.items():
        original = keys.original(key)
        if original is not None:
            base[original] = keys.bits(key, value)
    base._metadata = state._metadata  # type: ignore[attr-defined]  # versions, for loading code
    return base


def load_base_state_dict(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Load the base's tensors from a state dict with original keys; adapters stay as they are.

    Where the model is sharded all processes call it, with whole tensors or with parts.

    Raises:
        CheckpointError: missing or unexpected keys, all of them listed, or other shapes; the
            model is then as it was.
        StateError: an adapter is merged, or the model is on the meta device.
    """
    check_unmerged(select(model, ()), "load a base under")
    keys, own = _Keys(model), model.state_dict()
    actual = {name: key for key in own if (name := keys.original(key)) is not None}
    expected = {original: own[key] for original, key in actual.items()}
    compare(state, expected, "the state for the base")
    for key, own_value in expected.items():
        check_real(key, own_value)
    _check_settled(model)
    fitting = {
        actual[key]: in_parts(value, expected[key]) if isinstance(value, Tensor) else value
        for key, value in state.items()
    }
    model.load_state_dict(fitting, strict=False)


def _check_settled(model: nn.Module) -> None:
    """Raise a StateError where a parameter is a gathered copy, which a write would be lost in."""
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            check_settled(module, parameter, f"{path}.{name}")


def fingerprint(model: nn.Module) -> str:
    """Return a digest of the base's parameters and buffers, adapters not counted.

    It is the same before adapters are attached, while they train, are switched, scaled or merged,
    and after they are gone: two equal ones prove that a base is untouched.

    Returns:
        SHA-256 over names, dtypes, shapes and bytes, as 64 hexadecimal digits.

    Raises:
        ValueError: a tensor is on the meta device and has no bytes.
    """
    return digest(_tensors(model))


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the base's parameters and buffers, tied ones each, under their original keys."""
    named: list[tuple[str, Tensor]] = [*model.named_parameters(remove_duplicate=False)]
    named += model.named_buffers(remove_duplicate=False)
    keys = _Keys(model)
    for key, tensor in named:
        original = keys.original(key)
        if original is not None:
            yield original, keys.bits(key, tensor)


class _Keys:
    """What the base's tensors were called before adapters were attached.

    Keys are those of `state_dict`, or names of parameters and buffers.
    """

    def __init__(self, model: nn.Module) -> None:
        # By every path, not only the first: state_dict names a shared module under each.
        self._lists = {
            path: (plist, stack)
            for path, plist in model.named_modules(remove_duplicate=False)
            if isinstance(plist, parametrize.ParametrizationList)
            for stack in [stack_of(plist)]
            if stack is not None
        }

    def original(self, key: str) -> str | None:
        """Return the key before attaching, None for what belongs to adapters."""
        path, rest = self._split(key)
        if path is None:
            return key
        plist, stack = self._lists[path]
        first, *more = rest
        if first.startswith("original"):
            host, tensor = path.rsplit("parametrizations.", 1)
            return host + tensor if len(plist) == 1 else key
        modules = list(plist)
        index = modules.index(stack)
        if int(first) == index:
            return None
        return ".".join([path, str(int(first) - (int(first) > index)), *more])

    def bits(self, key: str, tensor: Tensor) -> Tensor:
        """Return the base's tensor at a key: the original bits where an adapter is merged."""
        path, rest = self._split(key)
        if path is None or not rest[0].startswith("original"):
            return tensor
        originals = self._lists[path][1].stored
        return originals[int(rest[0][len("original") :] or 0)] if originals else tensor

    def _split(self, key: str) -> tuple[str | None, list[str]]:
        parts = key.split(".")
        if "parametrizations" in parts:
            end = parts.index("parametrizations") + 2
            path = ".".join(parts[:end])
            if path in self._lists:
                return path, parts[end:]
        return None, parts
