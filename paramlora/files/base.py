"""The base's tensors under their original keys, with adapters attached or merged.

The keys that PyTorch reports for the base are the original ones, for adapted tensors stay in their
modules; the factors are beside them, and `Base` leaves them out:

    without adapters    with adapters
    fc.weight           fc.weight
    fc.bias             fc.bias
                        fc.parametrizations.weight.0.factors.digits.A

Only where an adapted tensor has other parametrizations as well, a few keys are translated.
"""

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..errors import CheckpointError, StateError, some
from ..layers.site_list import is_at_home
from ..site.find import dotted, index_of, stack_of
from ..site.names import check_unmerged
from ..site.quantized import is_wrapper, packed_tensor
from ..stack.stack import Stack
from ..stack.storage import check_real, check_settled, in_parts
from ..wrappers import check_model, inner, without_wrappers
from .digest import checksum, digest
from .state import compare


def base_state_dict(model: nn.Module) -> dict[str, Any]:
    """Return the base's state dict under its original keys, with adapters attached or merged.

    It loads into the same model without paramlora, and has the order of that model's state dict.

    Args:
        model: any module.

    Returns:
        The tensors by key. They share memory with the model's, as in `nn.Module.state_dict`.

    >>> import paramlora as pl
    >>> model = nn.Sequential(nn.Linear(4, 3))
    >>> _ = pl.attach(model, pl.LoRA(rank=2))
    >>> list(pl.base_state_dict(model))
    ['0.weight', '0.bias']
    """
    model = inner(check_model(model))
    base, state = Base(model), model.state_dict()
    found: OrderedDict[str, Any] = OrderedDict()
    for key, original in base.ordered(state):
        found[original] = base.original_value(key, state[key])
    # The versions of the modules, which `nn.Module.load_state_dict` reads.
    found._metadata = state._metadata  # type: ignore[attr-defined]
    return found


def load_base_state_dict(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Load the base's tensors from a state dict with original keys; adapters do not change.

    If FSDP has sharded the model, all processes call it, with whole tensors or with DTensors.

    Args:
        model: any module.
        state: all tensors of the base by key, as `base_state_dict` returns them.

    Raises:
        CheckpointError: keys are missing or unexpected, or shapes differ; the message lists all
            differences, and nothing is loaded.
        StateError: an adapter is merged, or the model is on the meta device, or a quantized layer
            stores a part of the base outside of its parameters.

    >>> import paramlora as pl
    >>> model, other = nn.Sequential(nn.Linear(4, 3)), nn.Sequential(nn.Linear(4, 3))
    >>> _ = pl.attach(model, pl.LoRA(rank=2))
    >>> pl.load_base_state_dict(model, other.state_dict())
    >>> pl.fingerprint(model) == pl.fingerprint(other)
    True
    """
    model = inner(check_model(model))
    base, current = Base(model), model.state_dict()
    check_unmerged([stack for _, stack in base.lists.values()], (), "load a base under")
    present = {name: key for key in current if (name := base.original_key(key)) is not None}
    expected = {original: current[key] for original, key in present.items()}
    compare(state, expected, "the state for the base")
    for key, tensor in expected.items():
        check_real(key, tensor)
    base.check_settled()
    base.check_whole_layers()
    fitting = {
        present[key]: in_parts(value, expected[key]) if isinstance(value, Tensor) else value
        for key, value in state.items()
    }
    model.load_state_dict(fitting, strict=False)


def fingerprint(model: nn.Module) -> str:
    """Return a digest of the base's parameters and buffers; adapters do not affect it.

    It stays the same while adapters are attached, trained, switched, scaled, merged or detached.
    Equal fingerprints prove that the base is unchanged.

    Args:
        model: any module.

    Returns:
        The SHA-256 of names, dtypes, shapes and bytes, as 64 hexadecimal digits.

    Raises:
        ValueError: a tensor is on the meta device and has no bytes.

    >>> import paramlora as pl
    >>> model = nn.Sequential(nn.Linear(4, 3))
    >>> before = pl.fingerprint(model)
    >>> _ = pl.attach(model, pl.LoRA(rank=2))
    >>> pl.fingerprint(model) == before
    True
    """
    return digest(Base(inner(check_model(model))).tensors())


def checksums(model: nn.Module) -> dict[str, str]:
    """Return the dtype and checksum of each tensor in the base's state dict, by key.

    Return none if a tensor is on the meta device, as of a base that is offloaded to disk. Leave out
    tensors that have no bytes to read, such as nested ones.
    """
    state = base_state_dict(model)
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    if any(tensor.is_meta for tensor in tensors.values()):
        return {}
    found = {}
    for key, tensor in tensors.items():
        with suppress(RuntimeError, NotImplementedError):
            found[without_wrappers(key)] = checksum(tensor)
    return found


def check_base(model: nn.Module, expected: Mapping[str, str], path: object) -> None:
    """Raise a CheckpointError if the base is not the one of a file, given by its checksums."""
    if not expected:
        raise CheckpointError(
            f"{path} has no checksums of its base: an older paramlora wrote it, or the base was on "
            "the meta device or sharded; save it again, or pass check_base=False"
        )
    found, different = checksums(model), []
    for key in dict.fromkeys((*expected, *found)):
        there, here = expected.get(key, "missing"), found.get(key, "missing")
        dtypes = there.partition(" ")[0], here.partition(" ")[0]
        said = f" ({dtypes[0]} in the file, {dtypes[1]} here)" if len({*dtypes}) > 1 else ""
        different += [f"{key}{said}"] if there != here else []
    if different:
        raise CheckpointError(
            f"{path} was saved with another base: {some(different)} differ. A base that was cast, "
            "quantized, resized or trained since differs too; load the adapter into the base that "
            "it was saved with, or pass check_base=False"
        )


class Base:
    """The tensors of the base in a model, and their original keys.

    A key is a key of `state_dict`, or the name of a parameter or buffer. For the list of
    parametrizations L, `fc.parametrizations.weight`:

        L holds              key                      belongs to           original key
        the stack alone      fc.weight                the base             unchanged
                             L.0.factors.digits.A     an adapter           none
        P, the stack, Q      L.original, L.original1  the base             unchanged
                             L.0.scale                P                    unchanged
                             L.1.factors.digits.A     an adapter           none
                             L.2.scale                Q                    L.1.scale
        the stack, Q         fc.weight                the base             L.original
    """

    def __init__(self, model: nn.Module) -> None:
        # With duplicates: `state_dict` has the tensors of a shared module under all its paths.
        self.modules = dict(model.named_modules(remove_duplicate=False))
        # Under two paths if wrapped: `state_dict` leaves some wrappers out of its keys.
        self.lists: dict[str, tuple[parametrize.ParametrizationList, Stack]] = {
            name: (module, stack)
            for path, module in self.modules.items()
            if isinstance(module, parametrize.ParametrizationList)
            if (stack := stack_of(module)) is not None
            for name in (path, without_wrappers(path))
        }
        # The key of each stored tensor, with its original key, its stack, and its number there.
        self.stored = {
            now: (original, stack, i)
            for path, (plist, stack) in self.lists.items()
            for i, (now, original) in enumerate(_stored_keys(path, plist))
        }

    def original_key(self, key: str) -> str | None:
        """Return the key of a tensor before attaching, or None if it belongs to an adapter."""
        if key in self.stored:
            return self.stored[key][0]
        path, rest = self._split(key)
        if path is None:
            return key
        index, stack_index = int(rest[0]), index_of(*self.lists[path])
        if index == stack_index:
            return None
        # Without the stack, the parametrizations after it move up by one.
        return ".".join([path, str(index - (index > stack_index)), *rest[1:]])

    def ordered(self, keys: Iterable[str]) -> Iterator[tuple[str, str]]:
        """Yield each key of the base with its original key, in the order of the original ones."""
        # The keys that are now a module's own and were in a list, by the path of the list.
        moved: dict[str, tuple[str, str]] = {}
        for key in keys:
            path, original = self._split(key)[0], self.original_key(key)
            if path in moved:
                yield moved.pop(path)
            if original is not None and path is None and original != key:
                moved[original.rpartition(".")[0]] = key, original
            elif original is not None:
                yield key, original
        yield from moved.values()

    def original_value(self, key: str, tensor: Tensor) -> Tensor:
        """Return the base's tensor for a key; while an adapter is merged, the original tensor."""
        if key not in self.stored:
            return tensor
        _, stack, number = self.stored[key]
        return stack.stored[number] if stack.stored else tensor

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the parameters and buffers by original key, tied ones once per key."""
        for path, module in self.modules.items():
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                key = dotted(path, name)
                original = self.original_key(key)
                if tensor is not None and original is not None:
                    yield original, self.original_value(key, tensor)
            if packed_tensor(module) is not None:
                yield from _beside(path, module)

    def check_settled(self) -> None:
        """Raise a StateError if FSDP has gathered a parameter: writes to the copy are lost."""
        for path, module in self.modules.items():
            for name, parameter in module.named_parameters(recurse=False):
                check_settled(module, parameter, f"{path}.{name}")

    def check_whole_layers(self) -> None:
        """Raise a StateError if loading would leave a part of a quantized layer as it was."""
        for path, module in self.modules.items():
            packed = packed_tensor(module)
            beside = [] if packed is None or is_wrapper(packed) else list(_beside(path, module))
            if beside:
                raise StateError(
                    f"cannot load {beside[0][0]!r}, which a quantized layer stores outside of its "
                    "parameters: make the quantized model anew, and load the adapter into it"
                )

    def _split(self, key: str) -> tuple[str | None, list[str]]:
        """Split a key into the path of a list in `lists` (or None) and the parts after it."""
        parts = key.split(".")
        if "parametrizations" in parts:
            end = parts.index("parametrizations") + 2
            path = ".".join(parts[:end])
            if path in self.lists:
                return path, parts[end:]
        return None, parts


def _beside(path: str, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield what a quantized layer saves and keeps elsewhere, such as the scales of its blocks."""
    for key, value in module.state_dict().items():
        own = key in module._parameters or key in module._buffers
        if isinstance(value, Tensor) and not own and not key.startswith("parametrizations."):
            yield dotted(path, key), value


def _stored_keys(path: str, plist: parametrize.ParametrizationList) -> list[tuple[str, str]]:
    """Return the keys of the tensors that a list stores, each with its original key."""
    host, tensor = path.rsplit("parametrizations.", 1)
    if not plist.is_tensor:
        keys = [f"{path}.original{i}" for i in range(plist.ntensors)]
        return [(key, key) for key in keys]
    in_list, in_host = f"{path}.original", host + tensor
    now = in_host if is_at_home(plist) else in_list
    return [(now, in_host if len(plist) == 1 else in_list)]
