"""The settings of sequences of tasks, and their presets."""

from dataclasses import dataclass
from typing import Any, ClassVar

from ..harness.settings import (
    COUNT,
    NOT_NEGATIVE,
    Check,
    PlaceSettings,
    Settings,
    SettingsGroup,
    option,
)

STREAMS = ("split", "rotated", "permuted")
METHODS = ("one", "stacked", "merged", "routed", "full", "joint-lora", "joint")
FULL = ("full", "joint")  # they train all weights, without an adapter


def _known_methods(text: str) -> bool:
    names = text.split(",")
    return set(names) <= set(METHODS) and len(set(names)) == len(names)


KNOWN_METHODS = Check(f"a list of {', '.join(METHODS)}, each at most once", _known_methods)


@dataclass(frozen=True)
class SequenceSettings(SettingsGroup):
    """The sequence of tasks."""

    stream: str = option("split", "kind of tasks", choices=STREAMS)
    tasks: int = option(5, "number of tasks; the base is pre-trained on the first")
    scenario: str = option(
        "class",
        "task: the task of each test image is given; else it is not: class for split tasks, "
        "domain for rotated and permuted ones",
        choices=("class", "domain", "task"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        most = 5 if self.stream == "split" else 20
        untold = "class" if self.stream == "split" else "domain"
        known = f"task or {untold} for {self.stream} tasks"
        self.require("scenario", self.scenario in ("task", untold), known)
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
    lr: float = option(3e-3, "learning rate of the adapters, Adam's step size")
    full_lr: float = option(3e-4, "learning rate of full and joint, which train all weights")
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
        name: {"stream": name, "scenario": "domain"} if name != "split" else {} for name in STREAMS
    }

    preset: str = option("split", "the settings to start from", choices=STREAMS)
    sequence: SequenceSettings = SequenceSettings()
    methods: str = option(
        ",".join(METHODS), f"comma-separated list of {', '.join(METHODS)}", KNOWN_METHODS
    )
    seed: int = option(0, "seed of the first base and of its pixel permutations")
    bases: int = option(5, "number of bases; their seeds count on from --seed", COUNT)
    seeds: int = option(1, "number of adapter seeds on each base, counted from 0", COUNT)
    network: NetworkSettings = NetworkSettings()
    pretraining: PretrainingSettings = PretrainingSettings()
    finetuning: FinetuningSettings = FinetuningSettings()
    adapter: AdapterSettings = AdapterSettings()
    remedies: RemedySettings = RemedySettings()
    dataset: DatasetSettings = DatasetSettings()
    place: TaskPlaceSettings = TaskPlaceSettings()

    @property
    def chosen_methods(self) -> list[str]:
        """The methods to run, in the order given."""
        return self.methods.split(",")
