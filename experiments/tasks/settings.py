"""The settings of sequences of tasks, and their presets."""

from dataclasses import dataclass
from typing import Any, ClassVar

from ..harness.settings import (
    COUNT,
    NOT_NEGATIVE,
    PlaceSettings,
    Settings,
    SettingsGroup,
    option,
)

STREAMS = ("split", "rotated", "permuted")


@dataclass(frozen=True)
class SequenceSettings(SettingsGroup):
    """The sequence of tasks."""

    stream: str = option("split", "kind of tasks", choices=STREAMS)
    tasks: int = option(5, "number of tasks; the base is pre-trained on the first")
    scenario: str = option(
        "class",
        "task: the task of each test image is given; class: it is not",
        choices=("class", "task"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        most = 5 if self.stream == "split" else 20
        self.require("tasks", 2 <= self.tasks <= most, f"a whole number from 2 to {most}")


@dataclass(frozen=True)
class NetworkSettings(SettingsGroup):
    """The network."""

    hidden: tuple[int, ...] = option((256, 128), "units of each hidden layer")


@dataclass(frozen=True)
class PretrainingSettings(SettingsGroup):
    """Pre-training."""

    base_steps: int = option(1000, "length of pre-training, optimizer steps", COUNT)
    base_lr: float = option(1e-3, "learning rate of pre-training, Adam's step size")


@dataclass(frozen=True)
class FinetuningSettings(SettingsGroup):
    """Fine-tuning, one stage for each later task."""

    steps: int = option(200, "length of each stage, optimizer steps", COUNT)
    lr: float = option(3e-3, "learning rate of the stages, Adam's step size")
    batch: int = option(32, "batch size, images", COUNT)


@dataclass(frozen=True)
class AdapterSettings(SettingsGroup):
    """The adapters."""

    rank: int = option(8, "rank r of each update", COUNT)
    alpha: float = option(8.0, "numerator of the update's scale alpha/r")


@dataclass(frozen=True)
class RemedySettings(SettingsGroup):
    """Remedies against forgetting."""

    margin: float = option(
        0.0, "remedy: subtract this from other tasks' logits in training", NOT_NEGATIVE
    )
    orthogonal: float = option(
        0.0, "remedy: weight of the penalty on overlap with the A of earlier adapters", NOT_NEGATIVE
    )


@dataclass(frozen=True)
class DatasetSettings(SettingsGroup):
    """Data."""

    data: str = option(
        "auto",
        "mnist; fashion: Fashion-MNIST; digits: scikit-learn's; auto: MNIST if any, or digits",
        choices=("auto", "mnist", "fashion", "digits"),
    )
    data_dir: str = option("data", "folder with the archives", affects_results=False)


@dataclass(frozen=True)
class TaskPlaceSettings(PlaceSettings):
    """Device and folder."""

    threads: int = option(1, "number of CPU threads for training", COUNT)


@dataclass(frozen=True)
class TaskSettings(Settings):
    """All settings of a sequence of tasks. The defaults are the preset "split"."""

    STUDY: ClassVar[str] = "tasks"
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        name: {"stream": name} if name != "split" else {} for name in STREAMS
    }

    preset: str = option("split", "the settings to start from", choices=STREAMS)
    sequence: SequenceSettings = SequenceSettings()
    seed: int = option(0, "seed of the base and of the pixel permutations")
    seeds: int = option(3, "number of adapter seeds, counted from 0", COUNT)
    network: NetworkSettings = NetworkSettings()
    pretraining: PretrainingSettings = PretrainingSettings()
    finetuning: FinetuningSettings = FinetuningSettings()
    adapter: AdapterSettings = AdapterSettings()
    remedies: RemedySettings = RemedySettings()
    dataset: DatasetSettings = DatasetSettings()
    place: TaskPlaceSettings = TaskPlaceSettings()
