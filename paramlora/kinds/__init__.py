"""The kinds of updates, one class per kind. They work on tensors only, not on modules.

`paramlora` exports the kinds themselves. To add a kind, derive a frozen dataclass from `Spec`, and
use `draw`, `factor_dtype` and `add_update`. A kind whose layers can compute their output without W'
also returns a `LowRank` or a `Rescaled` (docs/kinds.md).
"""

from .delta import Delta
from .dora import DoRA
from .hira import HiRA
from .ia3 import IA3
from .loha import LoHa
from .lokr import LoKr
from .lora import LoRA
from .lora_xs import LoRAXS
from .miss import MiSS
from .oft import OFT
from .spec import Factors, LowRank, Rescaled, Spec, Strength, add_update, factor_dtype
from .start import draw

__all__ = [
    "IA3",
    "OFT",
    "Delta",
    "DoRA",
    "Factors",
    "HiRA",
    "LoHa",
    "LoKr",
    "LoRA",
    "LoRAXS",
    "LowRank",
    "MiSS",
    "Rescaled",
    "Spec",
    "Strength",
    "add_update",
    "draw",
    "factor_dtype",
]
