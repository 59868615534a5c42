"""How an adapted layer is printed: its adapters beside its own settings, in one line."""

from collections.abc import Callable, Iterator

from torch import nn

from ..site.find import parametrization_lists
from ..stack.factors import Factors
from ..stack.stack import Stack


def with_adapters(plain: Callable[[nn.Module], str]) -> Callable[[nn.Module], str]:
    """Return a `__repr__` that names the adapters; `plain` is the one that the class has.

    A module that prints itself in another way than `nn.Module` does keeps its own way.
    """
    if plain is not nn.Module.__repr__:
        return plain

    def show(self: nn.Module) -> str:
        adapters = [line for tensor in parametrization_lists(self) for line in _lines(self, tensor)]
        children = [
            f"({key}): {child!r}"
            for key, child in self._modules.items()
            if key != "parametrizations"
        ]
        settings = self.extra_repr()
        if not children and "\n" not in settings:
            return f"{self._get_name()}({', '.join(filter(None, [settings, *adapters]))})"
        inside = "\n".join([*filter(None, [settings]), *adapters, *children])
        return f"{self._get_name()}(\n  " + inside.replace("\n", "\n  ") + "\n)"

    return show


def _lines(module: nn.Module, tensor: str) -> Iterator[str]:
    """Yield what is on a tensor: adapters, and the names of other parametrizations."""
    for one in parametrization_lists(module)[tensor].children():
        stack = getattr(one, "stack", one)  # of a tie
        if type(stack) is not Stack:
            yield f"{tensor}: {type(one).__name__}"
            continue
        for name in stack.named:
            for part in stack.parts(name):
                yield f"{tensor}{part.block or ''}: {_adapter(stack, name, part)}"


def _adapter(stack: Stack, name: str, part: Factors) -> str:
    """Return the name, the kind, the rank, the strength and the state of an adapter."""
    state = stack.seen()
    strength = part.at((state.strengths or {}).get(name))
    rank = "" if part.spec.rank is None else f" rank {part.spec.rank}"
    on = "active" if name in state.active else "off"
    now = "merged" if name in stack.merged else on
    return f"{name} ({type(part.spec).__name__}{rank}, strength {float(strength):g}, {now})"
