"""The settings of RL's Razor on ParityMNIST, and their presets."""

import re
from dataclasses import dataclass
from typing import Any, ClassVar

from ..harness.settings import (
    COUNT,
    POSITIVE,
    Check,
    PlaceSettings,
    Settings,
    SettingsGroup,
    option,
)

METHODS = ("sft-1", "sft-2", "oracle", "grpo")
USUAL = ("full", "lora-1", "lora-8", "lora-64")
CONTROLS = (
    *USUAL,
    *("weights", "lora-8-biases"),
    *(f"{kind}-layer{number}" for kind in ("full", "lora-8") for number in (1, 2, 3)),
)
ARM = re.compile(
    r"(?P<kind>full|weights|lora-(?P<rank>[1-9]\d*))(?P<biases>-biases)?(-layer(?P<layer>[1-9]))?"
)
ARM_NAMES = (
    "full, weights (all but the biases), lora-RANK or lora-RANK-biases, each for all layers or "
    "with -layerN for one"
)


@dataclass(frozen=True)
class Arm:
    """What is trained: all weights or an adapter, with or without biases, in all layers or one.

    Attributes:
        name: such as "full", "weights-layer2", "lora-8" or "lora-64-biases".
        rank: the rank of the LoRA, or None if the weights are trained.
        biases: whether the biases are trained.
        layer: the number of the only layer that is trained, or None for all layers.
    """

    name: str
    rank: int | None
    biases: bool
    layer: int | None

    @classmethod
    def of(cls, name: str) -> "Arm":
        """Return the arm of a name.

        >>> Arm.of("lora-8-layer2")
        Arm(name='lora-8-layer2', rank=8, biases=False, layer=2)
        """
        found = ARM.fullmatch(name)
        assert found is not None
        rank, layer = (int(found[key]) if found[key] else None for key in ("rank", "layer"))
        return cls(name, rank, found["kind"] == "full" or bool(found["biases"]), layer)


def _floats(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        return []


def _are_rates(text: str) -> bool:
    rates = _floats(text)
    return bool(rates) and min(rates) > 0 and len(set(rates)) == len(rates)


def _are_arms(text: str) -> bool:
    names = text.split(",")
    return all(map(ARM.fullmatch, names)) and len(set(names)) == len(names)


def _are_methods(text: str) -> bool:
    names = text.split(",")
    return set(names) <= set(METHODS) and len(set(names)) == len(names)


RATES = Check("a list of different numbers above 0", _are_rates)
ARMS = Check(f"a list of {ARM_NAMES}", _are_arms)
KNOWN_METHODS = Check(f"a list of {', '.join(METHODS)}, each at most once", _are_methods)


@dataclass(frozen=True)
class NetworkSettings(SettingsGroup):
    """The network."""

    hidden: tuple[int, ...] = option((512, 256), "units of each hidden layer")


@dataclass(frozen=True)
class PretrainingSettings(SettingsGroup):
    """Pre-training, on both data sets."""

    base_images: int = option(500, "number of images of each data set", COUNT)
    base_epochs: int = option(50, "length of pre-training, epochs", COUNT)
    base_lr: float = option(1e-3, "highest learning rate of pre-training, AdamW", POSITIVE)


@dataclass(frozen=True)
class FinetuningSettings(SettingsGroup):
    """Fine-tuning, on parity."""

    methods: str = option(",".join(METHODS), f"list of {', '.join(METHODS)}", KNOWN_METHODS)
    arms: str = option(",".join(USUAL), f"list of {ARM_NAMES}", ARMS)
    rates: str = option(
        "3e-6,1e-5,3e-5,1e-4,3e-4,1e-3", "learning rates if weights are trained, Adam", RATES
    )
    lora_rates: str = option(
        "3e-6,1e-5,3e-5,1e-4,3e-4,1e-3,3e-3", "learning rates of the adapters, Adam", RATES
    )
    alpha: float = option(32.0, "numerator of LoRA's scale alpha/r", POSITIVE)
    epochs: int = option(2, "length of fine-tuning, epochs", COUNT)
    checkpoints: int = option(4, "evaluations in each epoch", COUNT)
    batch: int = option(64, "batch size, images; also of pre-training", COUNT)
    samples: int = option(8, "answers that GRPO samples for each image", COUNT)

    def rates_of(self, arm: Arm) -> list[float]:
        """Return the learning rates of an arm."""
        return _floats(self.lora_rates if arm.rank else self.rates)


@dataclass(frozen=True)
class DatasetSettings(SettingsGroup):
    """Data."""

    data: str = option(
        "mnist",
        "mnist: MNIST and Fashion-MNIST; synthetic: noisy copies of random images",
        choices=("mnist", "synthetic"),
    )
    data_dir: str = option("data", "folder with the archives", affects_results=False)


@dataclass(frozen=True)
class RazorPlaceSettings(PlaceSettings):
    """Device and folder."""

    threads: int = option(1, "number of CPU threads for training", COUNT)
    together: int = option(
        1,
        "number of bases whose fine-tunings train at once; on a GPU, all of them are the fastest",
        COUNT,
        affects_results=False,
    )


@dataclass(frozen=True)
class RazorSettings(Settings):
    """All settings of the study. The defaults are the preset "parity"."""

    STUDY: ClassVar[str] = "razor"
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "parity": {},
        # With what could explain a difference: biases, one layer alone.
        "controls": {"arms": ",".join(CONTROLS)},
        # For a check in seconds, without any data set.
        "small": {
            "data": "synthetic",
            "hidden": (24, 16),
            "base_images": 200,
            "base_epochs": 15,
            "arms": "full,lora-1,lora-4",
            "rates": "3e-4,1e-3,3e-3",
            "lora_rates": "1e-3,3e-3,1e-2",
            "epochs": 1,
            "seeds": 2,
        },
    }

    preset: str = option("parity", "the settings to start from", choices=tuple(PRESETS))
    seed: int = option(0, "seed of the first base, of its images and of its fine-tunings")
    seeds: int = option(5, "number of bases; their seeds count on from --seed", COUNT)
    network: NetworkSettings = NetworkSettings()
    pretraining: PretrainingSettings = PretrainingSettings()
    finetuning: FinetuningSettings = FinetuningSettings()
    dataset: DatasetSettings = DatasetSettings()
    place: RazorPlaceSettings = RazorPlaceSettings()

    def __post_init__(self) -> None:
        super().__post_init__()
        layers = len(self.network.hidden) + 1
        fitting = all(arm.layer is None or arm.layer <= layers for arm in self.arms)
        self.require("arms", fitting, f"of at most {layers} layers")

    @property
    def arms(self) -> list[Arm]:
        """The arms to train, in the order given."""
        return [Arm.of(name) for name in self.finetuning.arms.split(",")]

    @property
    def methods(self) -> list[str]:
        """The methods to train with, in the order given."""
        return self.finetuning.methods.split(",")

    @property
    def base_seeds(self) -> range:
        """The seeds of the bases."""
        return range(self.seed, self.seed + self.seeds)
