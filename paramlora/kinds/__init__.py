"""What is learned at a tensor: one class a kind, on tensors only.

The kinds themselves are also names of `paramlora`. Authors of a new kind derive a frozen dataclass
from `Spec` and need `draw`, `add_update` and `factor_dtype`; a kind with a fast forward returns a
`LowRank` or a `Rescaled` (docs/kinds.md).
"""

from .delta import Delta
from .dora import DoRA
from .ia3 import IA3
from .loha import LoHa
from .lokr import LoKr
from .lora import LoRA
from .spec import Factors, LowRank, Rescaled, Spec, Strength, add_update, factor_dtype
from .start import draw

__all__ = [
    "IA3",
    "Delta",
    "DoRA",
    "Factors",
    "LoHa",
    "LoKr",
    "LoRA",
    "LowRank",
    "Rescaled",
    "Spec",
    "Strength",
    "add_update",
    "draw",
    "factor_dtype",
]
