"""The settings of the digit study and their presets; every field is a command-line option too."""

import math
import re
from dataclasses import dataclass
from typing import Any, ClassVar

from .options import Settings, StudyError, deciding, is_device, listed, option

__all__ = [
    "INITS",
    "PRESETS",
    "DigitSettings",
    "StudyError",
    "chosen_digits",
    "deciding",
    "listed",
    "preset",
]

INITS = ("kaiming", "gaussian", "gaussian/sqrt_r", "orthogonal")


_WITH_RELU: dict[str, Any] = {
    "mean": 0.1307,
    "activation": "relu",
    # A ReLU on the logits, after ReLUs inside, kills whole classes within an epoch.
    "relu_logits": False,
    "order": "seeded",
    "compat": "none",
}
_PRESETS: dict[str, dict[str, Any]] = {
    # A blog post of 2024-04-17; its mean is a slip for 0.1307, kept as its counts depend on it.
    "blog": {},
    "relu": _WITH_RELU,
    # The script that the blog starts from, hkproj/pytorch-lora.
    "nine": {**_WITH_RELU, "hidden": (1000, 2000), "digits": "9", "steps": 100, "rank": 1},
}


@dataclass(frozen=True)
class DigitSettings(Settings):
    """All settings of the digit study: what is learned first, what is tuned, where it goes.

    The defaults are the preset "blog"; `preset` makes the others.

    Raises:
        StudyError: a value that is not allowed, naming the option, the value and what is allowed.

    >>> DigitSettings(rank=4).alpha
    1.0
    """

    STUDY: ClassVar[str] = "digits"
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = _PRESETS

    preset: str = option("blog", "the settings to start from", choices=("blog", "relu", "nine"))
    seed: int = option(0, "seed of the base: its first weights and the order of its images")
    seeds: int = option(8, "number of adapter seeds, counted from 0; each is one fine-tuning")
    hidden: tuple[int, ...] = option((256, 128), "hidden layers, units of each, such as 256,128")
    activation: str = option("none", "between the layers", choices=("none", "relu"))
    relu_logits: bool = option(True, "a ReLU on the logits, as the blog's network has")
    mean: float = option(0.1301, "mean of the normalisation, pixels in 0 to 1 (MNIST's: 0.1307)")
    std: float = option(0.3081, "standard deviation of the normalisation, pixels in 0 to 1")
    base_steps: int = option(6000, "length of pre-training, optimizer steps")
    base_lr: float = option(1e-3, "learning rate of pre-training, Adam's step size")
    batch: int = option(10, "batch size, images")
    digits: str = option("2,3,5,8,9", "digits to tune: a list, or worst:K, the K worst of the base")
    order: str = option(
        "blog",
        "order of the tuned digits' images; blog: as its DataLoader drew them, the same for every "
        "adapter seed; seeded: a new one for each",
        choices=("blog", "seeded"),
    )
    steps: int = option(200, "length of fine-tuning, optimizer steps")
    lr: float = option(1e-3, "learning rate of fine-tuning, Adam's step size")
    rank: int = option(2, "rank r of the update, columns of B")
    alpha: float = option(1.0, "numerator of the update's scale alpha/r, a plain number")
    init: str = option("gaussian", "how A starts; B starts at zero", choices=INITS)
    compat: str = option(
        "blog",
        "blog: beside the correct update, also train the blog's scrambled one (its B A comes out "
        "in the transposed shape and is viewed into the weight's, so that its rank is not r)",
        choices=("none", "blog"),
    )
    data: str = option(
        "auto",
        "mnist; digits: the 8x8 ones inside scikit-learn, scaled to 28x28 pixels; auto: MNIST if "
        "it is on disk or a mirror answers within seconds, else digits",
        choices=("auto", "mnist", "digits"),
    )
    data_dir: str = option(
        "data", "folder with MNIST's archives, or to download them to", place=True
    )
    device: str = option("auto", "a torch device such as cpu or cuda:1; auto: a GPU if any, or cpu")
    threads: int = option(1, "CPU threads of training; a batch of 10 gains nothing from more")
    out: str = option(
        "", "folder of the run; else runs/digits-PRESET and what differs from it", place=True
    )
    bases: str = option("runs/bases", "folder of trained bases, which runs share", place=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("seeds", "base_steps", "batch", "steps", "rank", "threads"):
            self.require(name, getattr(self, name) >= 1, "a whole number of at least 1")
        for name in ("base_lr", "lr", "std"):
            self.require(name, 0 < getattr(self, name) < math.inf, "a finite number above 0")
        for name in ("mean", "alpha"):
            self.require(name, math.isfinite(getattr(self, name)), "a finite number")
        wide = self.hidden and all(type(units) is int and units >= 1 for units in self.hidden)
        self.require("seed", 0 <= self.seed < 2**63, "a whole number from 0 to 2^63 - 1")
        self.require("hidden", wide, "one or more whole numbers of at least 1")
        self.require("digits", _are_digits(self.digits), "1 to 9 different digits or worst:K")
        self.require("device", is_device(self.device), "auto or a device that torch knows")


PRESETS = DigitSettings.PRESETS


def preset(name: str, **changes: Any) -> DigitSettings:
    """Return the settings of a preset, with `changes` to its fields.

    >>> preset("nine").hidden
    (1000, 2000)
    """
    return DigitSettings.of_preset(name, **changes)


def chosen_digits(digits: str, wrong_counts: list[int]) -> list[int]:
    """Return the digits to tune, ascending: those listed, or the K of most wrong answers.

    Of two equally bad digits the smaller comes first.

    >>> chosen_digits("worst:2", [33, 12, 147, 115, 69, 196, 98, 91, 185, 148])
    [5, 8]
    """
    if not digits.startswith("worst:"):
        return sorted(int(digit) for digit in digits.split(","))
    worst_first = sorted(range(10), key=lambda digit: -wrong_counts[digit])
    return sorted(worst_first[: int(digits.removeprefix("worst:"))])


def _are_digits(text: str) -> bool:
    if re.fullmatch(r"worst:[1-9]", text):
        return True
    parts = text.split(",")
    single = all(re.fullmatch(r"[0-9]", part) for part in parts)
    return single and len(parts) == len(set(parts)) <= 9
