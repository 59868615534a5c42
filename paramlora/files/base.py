"""The base's tensors under their original keys, with adapters attached or merged.

An adapter at `fc.weight` changes the keys that PyTorch reports, and `_Base` translates them back:

    without adapters    with adapters
    fc.bias             fc.bias
    fc.weight           fc.parametrizations.weight.original
                        fc.parametrizations.weight.0.factors.digits.A
"""

import itertools
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..site.find import dotted, stack_of
from ..site.names import check_unmerged
from ..site.stack import Stack
from ..site.storage import check_real, check_settled, in_parts
from ..site.wrappers import check_model, inner
from .compare import compare
from .digest import digest


def base_state_dict(model: nn.Module) -> dict[str, Any]:
    """Return the base's state dict under its original keys, with adapters attached or merged.

    It loads into the same model without paramlora. Adapted tensors come after the other tensors of
    their module.

    Args:
        model: any module.

    Returns:
        The tensors by key. They share memory with the model's, as in `nn.Module.state_dict`.

    >>> import paramlora as pl
    >>> model = nn.Sequential(nn.Linear(4, 3))
    >>> _ = pl.attach(model, pl.LoRA(rank=2))
    >>> list(pl.base_state_dict(model))
    ['0.bias', '0.weight']
    """
    model = inner(check_model(model))
    base, state = _Base(model), model.state_dict()
    found: OrderedDict[str, Any] = OrderedDict()
    for key, value in state.items():
        original = base.original_key(key)
        if original is not None:
            found[original] = base.original_value(key, value)
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
        StateError: an adapter is merged, or the model is on the meta device.

    >>> import paramlora as pl
    >>> model, other = nn.Sequential(nn.Linear(4, 3)), nn.Sequential(nn.Linear(4, 3))
    >>> _ = pl.attach(model, pl.LoRA(rank=2))
    >>> pl.load_base_state_dict(model, other.state_dict())
    >>> pl.fingerprint(model) == pl.fingerprint(other)
    True
    """
    model = inner(check_model(model))
    base, current = _Base(model), model.state_dict()
    check_unmerged([stack for _, stack in base.lists.values()], (), "load a base under")
    present = {name: key for key in current if (name := base.original_key(key)) is not None}
    expected = {original: current[key] for original, key in present.items()}
    compare(state, expected, "the state for the base")
    for key, tensor in expected.items():
        check_real(key, tensor)
    base.check_settled()
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
    return digest(_Base(inner(check_model(model))).tensors())


class _Base:
    """The tensors of the base in a model, and their original keys.

    A key is a key of `state_dict`, or the name of a parameter or buffer. Keys in a list of
    parametrizations with a stack are translated. For the list L, `fc.parametrizations.weight`:

        L holds              key                     belongs to           original key
        the stack alone      L.original              the base             fc.weight
                             L.0.factors.digits.A    an adapter           none
        P, the stack, Q      L.original, L.original1 the base             unchanged
                             L.0.scale               P                    unchanged
                             L.1.factors.digits.A    an adapter           none
                             L.2.scale               Q                    L.1.scale
    """

    def __init__(self, model: nn.Module) -> None:
        # With duplicates: `state_dict` has the tensors of a shared module under all its paths.
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.lists: dict[str, tuple[parametrize.ParametrizationList, Stack]] = {
            path: (module, stack)
            for path, module in self.modules.items()
            if isinstance(module, parametrize.ParametrizationList)
            if (stack := stack_of(module)) is not None
        }

    def original_key(self, key: str) -> str | None:
        """Return the key of a tensor before attaching, or None if it belongs to an adapter."""
        path, rest = self._split(key)
        if path is None:
            return key
        plist, stack = self.lists[path]
        first, *others = rest
        if first.startswith("original"):
            host, tensor = path.rsplit("parametrizations.", 1)
            return host + tensor if len(plist) == 1 else key
        index, stack_index = int(first), list(plist).index(stack)
        if index == stack_index:
            return None
        # Without the stack, the parametrizations after it move up by one.
        return ".".join([path, str(index - (index > stack_index)), *others])

    def original_value(self, key: str, tensor: Tensor) -> Tensor:
        """Return the base's tensor for a key; while an adapter is merged, the original tensor."""
        path, rest = self._split(key)
        if path is None or not rest[0].startswith("original"):
            return tensor
        _, stack = self.lists[path]
        return stack.stored[int(rest[0][len("original") :] or 0)] if stack.stored else tensor

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the parameters and buffers by original key, tied ones once per key."""
        for path, module in self.modules.items():
            for name, tensor in itertools.chain(
                module._parameters.items(), module._buffers.items()
            ):
                key = dotted(path, name)
                original = self.original_key(key)
                if tensor is not None and original is not None:
                    yield original, self.original_value(key, tensor)

    def check_settled(self) -> None:
        """Raise a StateError if FSDP has gathered a parameter: writes to the copy are lost."""
        for path, module in self.modules.items():
            for name, parameter in module.named_parameters(recurse=False):
                check_settled(module, parameter, f"{path}.{name}")

    def _split(self, key: str) -> tuple[str | None, list[str]]:
        """Split a key into the path of a list in `lists` (or None) and the parts after it."""
        parts = key.split(".")
        if "parametrizations" in parts:
            end = parts.index("parametrizations") + 2
            path = ".".join(parts[:end])
            if path in self.lists:
                return path, parts[end:]
        return None, parts
