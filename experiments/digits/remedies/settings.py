"""The settings of the remedies against forgetting and of the validation images."""

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

# Options that change the fine-tuning of method `lora`. The other methods have no remedies.
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
    """Remedies against forgetting."""

    schedule: str = option(
        "constant",
        "learning-rate schedule; cosine: decay to zero over half a cosine",
        choices=("constant", "cosine"),
    )
    tune_batch: int = option(
        0, "batch size of fine-tuning, images; 0: the batch size of pre-training", NATURAL
    )
    average: float = option(
        0.0, "share of the steps, at the end, over which factors are averaged", SHARE
    )
    strength: float = option(
        1.0, "remedy: strength λ in W' = W + λ·ΔW at evaluation; 0: the base", FINITE
    )
    margin: float = option(
        0.0,
        "remedy: margin subtracted from the other digits' logits in the training loss; inf: mask "
        "them",
        NOT_NEGATIVE,
    )
    distill: float = option(0.0, "remedy: weight β of distillation from the base", NOT_NEGATIVE)
    temperature: float = option(2.0, "temperature T of distillation", POSITIVE)
    mass: float = option(
        0.0,
        "remedy: weight of distilling only the probability that the digit is a tuned one",
        NOT_NEGATIVE,
    )
    replay: int = option(
        0, "remedy: number of old images per digit to replay, one batch per step", NATURAL
    )
    replay_of: str = option(
        "old",
        "digits to replay; old: the digits that are not tuned; all: equally many images of each "
        "digit",
        choices=("old", "all"),
    )
    ewc: float = option(0.0, "remedy: weight of elastic weight consolidation on ΔW", NOT_NEGATIVE)
    null_space: float = option(
        0.0, "remedy: share of energy of the directions projected out of A, 0 to 1", SHARE
    )
    null_space_of: str = option(
        "weights",
        "source of the directions; weights: the singular vectors of the base's weights; old: those "
        "of the activations of the replayed images",
        choices=("weights", "old"),
    )
    route: str = option(
        "none",
        "remedy: use of the adapter's logits; base: for images that the base predicts as tuned; "
        "soft: p(tuned) of the base times p(digit | tuned) of the adapter; gate: by a logistic "
        "regression on the base's logits, fitted to tuned and replayed images",
        choices=("none", "base", "soft", "gate"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        old = self.route == "gate" or (self.null_space > 0 and self.null_space_of == "old")
        self.require(
            "replay", self.replay > 0 or not old, "above 0 for a remedy that uses old images"
        )


@dataclass(frozen=True)
class HoldoutSettings(SettingsGroup):
    """Validation images."""

    validation: int = option(
        0, "number of validation images per digit, not used in fine-tuning", NATURAL
    )
    patience: int = option(
        0,
        "remedy: stop early after this many evaluations on the validation images, one every 10 "
        "steps, without a new best accuracy; 0: never",
        NATURAL,
    )
    selection: bool = option(
        False,
        "for model selection: exclude the validation images from pre-training too, and evaluate "
        "on them instead of the test images",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("selection", "patience"):
            holds = self.validation > 0 or not getattr(self, name)
            self.require(name, holds, "used with --validation above 0")
