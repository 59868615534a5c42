"""The settings of sequences of tasks, and their presets."""

from dataclasses import dataclass
from typing import Any, ClassVar

from ..harness.settings import (
    COUNT,
    NOT_NEGATIVE,
    POSITIVE,
    SHARE,
    Check,
    PlaceSettings,
    Settings,
    SettingsGroup,
    option,
)

STREAMS = ("split", "rotated", "permuted")
METHODS = ("one", "stacked", "merged", "routed", "full", "joint-lora", "joint")
FULL = ("full", "joint")  # they train all weights, without an adapter
RECIPES = ("pretrained", "three-types")
SCENARIOS = ("task", "domain", "class")
# The methods of the recipe three-types: five of the papers, experience replay, and adapters.
THREE_TYPES_METHODS = (
    *("none", "ewc", "si", "lwf", "er", "joint"),
    *("one", "routed", "o-lora", "inflora"),
)
# The hyperparameters of van de Ven and Tolias by stream and scenario, from their code:
# github.com/GMvandeVen/continual-learning, params/param_values.py.
EWC_LAMBDA = {
    "split": {"task": 1e5, "domain": 1e10, "class": 1e9},
    "permuted": {"task": 100.0, "domain": 100.0, "class": 100.0},
}
SI_C = {
    "split": {"task": 10.0, "domain": 5e4, "class": 5e3},
    "permuted": {"task": 10.0, "domain": 10.0, "class": 5.0},
}


def _list_of(names: tuple[str, ...]) -> Check:
    def holds(text: str) -> bool:
        given = text.split(",")
        return set(given) <= set(names) and len(set(given)) == len(given)

    return Check(f"a list of {', '.join(names)}, each at most once", holds)


ALL_METHODS = (*METHODS, *(name for name in THREE_TYPES_METHODS if name not in METHODS))
KNOWN_METHODS = _list_of(ALL_METHODS)


@dataclass(frozen=True)
class SequenceSettings(SettingsGroup):
    """The sequence of tasks."""

    recipe: str = option(
        "pretrained",
        "pretrained: a base is pre-trained on the first task, then each method learns the others; "
        "three-types: the experiments of van de Ven and Tolias",
        choices=RECIPES,
    )
    stream: str = option("split", "kind of tasks", choices=STREAMS)
    tasks: int = option(5, "number of tasks; the base is pre-trained on the first")
    scenario: str = option(
        "class",
        "task: the task of each test image is given; else it is not: class for split tasks, "
        "domain for rotated and permuted ones; three-types: a list of task, domain, class",
        _list_of(SCENARIOS),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        most = 5 if self.stream == "split" else 20
        self.require("tasks", 2 <= self.tasks <= most, f"a whole number from 2 to {most}")
        if self.recipe == "three-types":
            known = "split or permuted for the recipe three-types"
            self.require("stream", self.stream in EWC_LAMBDA, known)
            return
        untold = "class" if self.stream == "split" else "domain"
        known = f"task or {untold} for {self.stream} tasks"
        self.require("scenario", self.scenario in ("task", untold), known)

    @property
    def scenarios(self) -> list[str]:
        """The scenarios to run, in the order given."""
        return self.scenario.split(",")


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
class ContinualSettings(SettingsGroup):
    """The methods of the recipe three-types."""

    ewc_lambda: float = option(
        0.0, "weight λ of EWC's penalty; 0: that of the authors for the scenario", NOT_NEGATIVE
    )
    si_c: float = option(
        0.0, "weight c of SI's penalty; 0: that of the authors for the scenario", NOT_NEGATIVE
    )
    replay: int = option(100, "images of each class that er stores", COUNT)
    temperature: float = option(2.0, "temperature T of lwf's distillation", POSITIVE)
    lwf_weight: float = option(
        1.0,
        "weight of lwf's distillation; the authors' first code has T² / classes of a context",
        NOT_NEGATIVE,
    )
    units: str = option(
        "all",
        "scenario class: output units to classify among; so-far: those of the contexts so far",
        choices=("all", "so-far"),
    )
    energy: float = option(
        0.95, "share of the inputs' energy that inflora protects after each task", SHARE
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


THREE_TYPES: dict[str, Any] = {
    "recipe": "three-types",
    "scenario": ",".join(SCENARIOS),
    "methods": ",".join(THREE_TYPES_METHODS),
    "bases": 1,
    "hidden": (400, 400),
    "steps": 2000,
    "batch": 128,
    "lr": 1e-3,
    "full_lr": 1e-3,
    "orthogonal": 0.5,
}


@dataclass(frozen=True)
class TaskSettings(Settings):
    """All settings of a sequence of tasks. The defaults are the preset "split"."""

    STUDY: ClassVar[str] = "tasks"
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "split": {},
        "rotated": {"stream": "rotated", "scenario": "domain"},
        "permuted": {"stream": "permuted", "scenario": "domain"},
        "split-mnist": THREE_TYPES,
        "permuted-mnist": {
            **THREE_TYPES,
            "stream": "permuted",
            "tasks": 10,
            "hidden": (1000, 1000),
            "steps": 5000,
            "lr": 1e-4,
            "full_lr": 1e-4,
            "replay": 10,
        },
        # For a check in seconds.
        "split-small": {**THREE_TYPES, "data": "digits", "hidden": (32, 32), "steps": 40},
    }

    preset: str = option("split", "the settings to start from", choices=tuple(PRESETS))
    sequence: SequenceSettings = SequenceSettings()
    methods: str = option(
        ",".join(METHODS),
        f"comma-separated list of {', '.join(METHODS)}; "
        f"three-types: of {', '.join(THREE_TYPES_METHODS)}",
        KNOWN_METHODS,
    )
    seed: int = option(0, "seed of the first base and of its pixel permutations")
    bases: int = option(5, "number of bases; their seeds count on from --seed", COUNT)
    seeds: int = option(1, "number of adapter seeds on each base; three-types: of runs", COUNT)
    network: NetworkSettings = NetworkSettings()
    pretraining: PretrainingSettings = PretrainingSettings()
    finetuning: FinetuningSettings = FinetuningSettings()
    adapter: AdapterSettings = AdapterSettings()
    remedies: RemedySettings = RemedySettings()
    continual: ContinualSettings = ContinualSettings()
    dataset: DatasetSettings = DatasetSettings()
    place: TaskPlaceSettings = TaskPlaceSettings()

    def __post_init__(self) -> None:
        super().__post_init__()
        three_types = self.sequence.recipe == "three-types"
        known = _list_of(THREE_TYPES_METHODS if three_types else METHODS)
        allowed = f"{known.allowed}, in the recipe {self.sequence.recipe}"
        self.require("methods", known.holds(self.methods), allowed)
        self.require("bases", self.bases == 1 or not three_types, "1 in the recipe three-types")

    @property
    def chosen_methods(self) -> list[str]:
        """The methods to run, in the order given."""
        return self.methods.split(",")
