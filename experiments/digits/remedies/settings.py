"""The settings of the remedies against forgetting, and of the images held out for them."""

from dataclasses import dataclass

from ...harness.settings import (
    FINITE,
    NATURAL,
    NOT_NEGATIVE,
    POSITIVE,
    SHARE,
    SettingsGroup,
    option,
)

# Options that change the fine-tuning of paramlora's own adapter; the other methods stay plain.
REMEDIES = (
    "schedule",
    "tune_batch",
    "average",
    "strength",
    "margin",
    "distill",
    "mass",
    "replay",
    "ewc",
    "null_space",
    "route",
    "patience",
)


@dataclass(frozen=True)
class RemedySettings(SettingsGroup):
    """Remedies against forgetting, and calmer fine-tuning."""

    schedule: str = option(
        "constant",
        "learning rate over the steps; cosine: falls to zero by half a cosine",
        choices=("constant", "cosine"),
    )
    tune_batch: int = option(
        0, "batch size of fine-tuning, images; 0: as that of pre-training", NATURAL
    )
    average: float = option(
        0.0, "share of the last steps over which the factors are averaged", SHARE
    )
    strength: float = option(
        1.0, "remedy: λ in W' = W + λ·ΔW when answering; 0 is the base", FINITE
    )
    margin: float = option(
        0.0,
        "remedy: by how much the other digits' logits are lowered in the training loss; inf masks "
        "them",
        NOT_NEGATIVE,
    )
    distill: float = option(
        0.0, "remedy: weight β of distillation from the switched-off model", NOT_NEGATIVE
    )
    temperature: float = option(2.0, "temperature T of distillation", POSITIVE)
    mass: float = option(
        0.0,
        "remedy: weight of distilling only whether an image shows a tuned digit at all",
        NOT_NEGATIVE,
    )
    replay: int = option(
        0, "remedy: old images a digit that are replayed, a batch of them a step", NATURAL
    )
    replay_of: str = option(
        "old",
        "which digits' images are replayed; all: as many of each tuned digit beside them, so that "
        "what is replayed is balanced",
        choices=("old", "all"),
    )
    ewc: float = option(0.0, "remedy: weight of elastic weight consolidation on ΔW", NOT_NEGATIVE)
    null_space: float = option(
        0.0, "remedy: share of energy of the directions that A may not read, 0 to 1", SHARE
    )
    null_space_of: str = option(
        "weights",
        "whose directions; weights: the base's, by their singular values; old: the activations of "
        "the replayed images",
        choices=("weights", "old"),
    )
    route: str = option(
        "none",
        "remedy: where the adapter answers; base: where the base answers a tuned digit; soft: "
        "the base says whether tuned, the adapter which; gate: by a logistic regression on the "
        "base's logits, learned from tuned and replayed images",
        choices=("none", "base", "soft", "gate"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        old = self.route == "gate" or (self.null_space > 0 and self.null_space_of == "old")
        self.require("replay", self.replay > 0 or not old, "above 0 for what needs old images")


@dataclass(frozen=True)
class HoldoutSettings(SettingsGroup):
    """Validation images."""

    validation: int = option(0, "training images a digit that fine-tuning does without", NATURAL)
    patience: int = option(
        0,
        "remedy: stop early, after so many looks, one every 10 steps, at the accuracy on the "
        "validation images without a new best; 0: never",
        NATURAL,
    )
    selection: bool = option(
        False,
        "for choosing settings: pre-train without the validation images too, and count wrong "
        "answers on them in place of the test images",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("selection", "patience"):
            holds = self.validation > 0 or not getattr(self, name)
            self.require(name, holds, "used with --validation above 0")
