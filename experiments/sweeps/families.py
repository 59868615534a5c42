"""The remedies that are compared: crossed with what is trained and with two schedules.

Everything but the remedy is the same within a comparison: the rank, the initial A, the number of
steps and images, and the number of candidates among which the validation images choose. A remedy
without an option of its own chooses among eight learning rates. A remedy with one chooses among two
values of it at four of these rates.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from ..digits.settings import DigitSettings
from ..harness.rundir import Row

INF = math.inf
FULL = "full"
# What is trained, its settings, and its usual learning rate. A has PEFT's initialisation.
ARMS: Mapping[str, Row] = {"LoRA": {"init": "kaiming"}, FULL: {}}
USUAL: Mapping[str, float] = {"LoRA": 1e-3, FULL: 1e-4}
BOTH = tuple(ARMS)
EIGHT = (0.03, 0.1, 0.2, 0.3, 0.6, 1.0, 3.0, 10.0)  # learning rates to choose from / the usual one
FOUR = (0.1, 0.3, 1.0, 3.0)  # the same for a remedy with an option
NO_REMEDY, MASKED = "no remedy", "masked cross-entropy"


@dataclass(frozen=True)
class Family:
    """A remedy, and its candidates.

    Attributes:
        name: the remedy.
        old: the images of the other digits that it needs.
        changes: the settings that all of its candidates change.
        option: the option of the remedy whose value is chosen; "" if only the rate is.
        values: the two values of the option, each at four rates.
        arms: what it is compared on.
    """

    name: str
    old: str = "none"
    changes: Row = field(default_factory=dict)
    option: str = ""
    values: tuple[float, ...] = ()
    arms: tuple[str, ...] = ("LoRA",)

    def candidates(self, arm: str) -> list[Row]:
        """Return the settings to choose from, by option name."""
        of_option = [{self.option: value} for value in self.values] if self.option else [{}]
        rates = [float(f"{times * USUAL[arm]:g}") for times in (FOUR if self.option else EIGHT)]
        return [{**changes, "lr": rate} for changes in of_option for rate in rates]


@dataclass(frozen=True)
class Contender:
    """A remedy applied to one arm with one schedule; `changes` are the settings of all three."""

    family: Family
    arm: str
    schedule: str
    changes: Row

    @property
    def name(self) -> str:
        return f"{self.family.name}, {self.arm}, {self.schedule}"


def families(validation: int = 500) -> tuple[Family, ...]:
    """Return the remedies to compare; the first is plain fine-tuning.

    Args:
        validation: number of validation images per digit, which early stopping is named after.
    """
    hundred = "100 per digit"
    return (
        Family(NO_REMEDY, arms=BOTH),
        Family(f"{NO_REMEDY}, A ~ N(0, 1)", changes={"init": "gaussian"}),
        Family("strength λ", option="strength", values=(0.25, 0.5), arms=BOTH),
        Family("distillation", option="distill", values=(0.3, 1.0)),
        Family("kept mass", option="mass", values=(1.0, 3.0)),
        Family(MASKED, changes={"margin": INF}, arms=BOTH),
        Family("margin", option="margin", values=(5.0, 10.0), arms=BOTH),
        Family("EWC", option="ewc", values=(1e3, 1e4)),
        Family("null space of the weights", option="null_space", values=(0.9, 0.99)),
        Family("routed by the base", changes={"route": "base"}),
        Family("base says whether, adapter which", changes={"route": "soft"}),
        Family("replay of 10", "10 per digit", {"replay": 10}),
        Family("replay of 100", hundred, {"replay": 100}, arms=BOTH),
        Family("replay of 100 with a margin", hundred, {"replay": 100}, "margin", (1.0, 2.0)),
        Family(
            "masked, balanced replay of 100 (ER-ACE)",
            hundred,
            {"margin": INF, "replay": 100, "replay_of": "all"},
        ),
        Family("replay of 100, learned gate", hundred, {"replay": 100, "route": "gate"}),
        Family(
            "replay of 100, null space of their activations",
            hundred,
            {"replay": 100, "null_space_of": "old"},
            "null_space",
            (0.6, 0.8),
        ),
        Family("early stopping", f"{validation} per digit, to stop", {"patience": 3}),
    )


def schedules(settings: DigitSettings) -> dict[str, Row]:
    """Return the schedules by name: the preset's, and ten times as many images.

    >>> schedules(DigitSettings())["longer"]
    {'steps': 500, 'tune_batch': 40}
    """
    batch = settings.remedies.tune_batch or settings.pretraining.batch
    longer = {"steps": settings.finetuning.steps * 5 // 2, "tune_batch": 4 * batch}
    return {"short": {}, "longer": longer}


def contenders(settings: DigitSettings, chosen: Sequence[Family]) -> Iterator[Contender]:
    """Yield each remedy in each arm with each schedule, in the order of the tables."""
    for arm, changes in ARMS.items():
        for family in chosen:
            for schedule, timing in schedules(settings).items():
                if arm in family.arms:
                    merged = {**changes, **timing, **family.changes}
                    yield Contender(family, arm, schedule, merged)
