"""Parameters that PEFT adapts by `target_parameters`, such as experts of shape (E, out, in).

    W: (out, in)        ΔW = s · B A                        A: (r, in), B: (out, r)
    W: (E, out, in)     ΔW[e] = s · B[e] A[e]               A: (E, r, in), B: (E, out, r)
    W: (E, in, out)     ΔW[e] = s · (B[e] A[e])ᵀ            if the module has `is_transposed`

PEFT stores A as (E·r, in), one expert after the other, and B as (out, r·E), the experts of one
column side by side.

Note [nested wrappers]
    PEFT wraps the module of a parameter. For a second parameter of the module it wraps the wrapper,
    in the order in which the module registers them, so the last one is outermost. The key has no
    name of a parameter, so that the number of `base_layer` tells which one it is:

        experts.gate_up_proj      experts.base_layer.lora_A.weight
        experts.down_proj         experts.lora_A.weight
        experts.fc.weight         experts.base_layer.base_layer.fc.lora_A.weight
"""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping

from torch import Tensor
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ..site.find import dotted, is_conv1d, parametrization_lists, stack_of
from .layout import Part, cannot_store, peft_key
from .modules import PeftView


class Parameter(Part):
    """A parameter of two or three dimensions that PEFT adapts by `target_parameters`."""

    __slots__ = ()

    @property
    def target(self) -> str:
        return self.site

    @property
    def output_dim(self) -> int:
        return 0

    @property
    def groups(self) -> int:
        return 1

    @property
    def as_matrices(self) -> dict[str, int | bool]:
        has_experts = self.place.value.dim() == 3
        transposed = has_experts and getattr(self.module, "is_transposed", False)
        return {"batch_dims": int(has_experts), "transposed": bool(transposed)}

    def shapes(self, weight: Tensor, rank: int) -> dict[str, tuple[int, ...]]:
        transposed, experts = self.as_matrices["transposed"], weight.shape[:-2].numel()
        out, inputs = weight.shape[-2:][:: -1 if transposed else 1]
        return {self.key("A"): (experts * rank, inputs), self.key("B"): (out, rank * experts)}

    def to_peft(self, weight: Tensor, A: Tensor, B: Tensor) -> dict[str, Tensor]:
        if self.as_matrices["transposed"]:  # matrices are stored as (in, out)
            A, B = B.mT, A.mT
        if weight.dim() == 3:
            A, B = A.flatten(0, 1), B.permute(1, 2, 0).flatten(1)
        return {self.key("A"): A, self.key("B"): B}

    def from_peft(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        experts = self.place.value.shape[:-2]
        if not experts:
            return A, B
        A, B = A.view(*experts, -1, A.shape[1]), B.view(len(B), -1, *experts)
        return A, B.permute(2, 0, 1)  # (E, r, in), (E, out, r)

    def refusal(self, use_dora: bool = False) -> str | None:
        lists, weight = parametrization_lists(self.module).values(), self.place.value
        if use_dora or weight.dim() not in (2, 3):
            return (
                "PEFT adapts the weights of Linear, Conv1d, Conv2d, Conv3d, Embedding and Conv1D "
                "submodules, the projections of a MultiheadAttention, and, without DoRA, other "
                "parameters of two or three dimensions"
            )
        if not self.module_path:
            return "PEFT cannot adapt a parameter of the model itself, only those of submodules"
        if isinstance(self.module, NonDynamicallyQuantizableLinear):
            return "an attention reads it without a call of its module, so PEFT has no effect"
        if any(len(plist) > (stack_of(plist) is not None) for plist in lists):
            return "PEFT adapts no raw parameter of a module that has other parametrizations"
        if self.as_matrices["transposed"] and len(weight) == 1:
            return "PEFT does not transpose the update of a single expert, as is_transposed needs"
        return None

    def key(self, letter: str) -> str:
        return dotted(self.peft_path, f"lora_{letter}.weight")


def with_parameters(
    seen: PeftView, modules: Iterable[Part], sites: Collection[str]
) -> tuple[list[Part], Mapping[str, int]]:
    """Return the parts of modules, and those of raw parameters, with PEFT's paths.

    Args:
        seen: the model as PEFT sees it.
        modules: the parts of modules.
        sites: the paths of the raw parameters.

    Returns:
        The parts, and the number of wrappers around each module that has raw parameters.
    """
    raw = [part for part in parameters(seen) if part.site in sites]
    depths, left = Counter(part.module_path for part in raw), Counter[str]()
    found = []
    for part in modules:
        around, _, name = part.module_path.rpartition(".")
        found.append(part._replace(peft_path=dotted(peft_key(around, depths), name)))
    for part in reversed(raw):  # the last one is outermost
        inner = ["base_layer"] * left[part.module_path]
        found.append(part._replace(peft_path=dotted(part.module_path, *inner)))
        left[part.module_path] += 1
    return found, depths


def conflicts(parts: Collection[Part]) -> Iterator[tuple[str, str]]:
    """Yield each raw parameter that PEFT cannot adapt beside the other parts, with the reason."""
    raw = [part for part in parts if isinstance(part, Parameter)]
    others = [part for part in parts if not isinstance(part, Parameter)]
    layers = {part.owner_path for part in others}
    wrapped = layers | {part.module_path for part in raw}
    for part in raw:
        names = part.module_path.split(".")
        if part.module_path in layers:
            yield part.site, "PEFT adapts its module as a layer, and then no raw parameter of it"
        elif any(".".join(names[:i]) in wrapped for i in range(1, len(names))):
            yield part.site, "PEFT adapts no raw parameter inside of a module that it wraps"
        elif any(is_conv1d(other.module) for other in others):
            yield part.site, "PEFT adapts no raw parameter beside a Conv1D"


def check_raw(raw: Collection[str], adapted: list[Part], seen: PeftView) -> None:
    """Raise a TargetError if PEFT would adapt other raw parameters than these, or refuse them."""
    for path, reason in conflicts(adapted):
        raise cannot_store(path, reason)
    for other in sorted({*selected(seen, raw)} - {*raw}):
        path = next(path for path in raw if other.endswith(f".{path}"))
        raise cannot_store(path, f"PEFT would adapt {other!r} too, whose path ends with it")


def selected(seen: PeftView, names: Collection[str]) -> list[str]:
    """Return the paths of the parameters that a list of `target_parameters` selects in PEFT."""
    ends = tuple(f".{name}" for name in names)
    return [p.site for p in parameters(seen) if p.site in names or p.site.endswith(ends)]


def parameters(seen: PeftView) -> Iterator[Parameter]:
    """Yield the parameters of a model, those of a module in their order."""
    for path, module in seen.modules.items():
        for name in module._parameters | parametrization_lists(module):
            yield Parameter(path, module, name)
