"""The remedies that are compared, and the candidate settings of each."""

import math
from dataclasses import dataclass

from ..harness.rundir import Row

INF = math.inf
# A longer training with larger batches, a cosine schedule, and PEFT's initial A.
LONG: Row = {
    "init": "kaiming",
    "schedule": "cosine",
    "tune_batch": 64,
    "steps": 600,
    "lr": 3e-3,
}
# Experience replay with asymmetric cross-entropy.
ACE: Row = {"margin": INF, "replay": 100, "replay_of": "all"}
WIDE: Row = {**LONG, "rank": 8, "alpha": 8.0}


@dataclass(frozen=True)
class Family:
    """A remedy, its candidate settings, and the strengths λ to try with each.

    `old` says which images of the other digits the remedy needs: nothing, a number per digit for
    training, or labelled validation images for early stopping.
    """

    name: str
    old: str
    candidates: tuple[Row, ...]
    strengths: tuple[float, ...] = (1.0,)


def families(validation: int = 500) -> tuple[Family, ...]:
    """Return the remedies to compare; the first is plain fine-tuning.

    Args:
        validation: number of validation images per digit, which early stopping is named after.
    """
    short: Row = {"init": "kaiming"}
    replay: Row = {"replay": 100}
    return (
        Family("no remedy", "nothing", ({},)),
        Family("strength λ", "nothing", (short,), (0.125, 0.25, 0.5, 0.75)),
        Family("routed by the base", "nothing", (short | {"route": "base"}, {"route": "base"})),
        Family("base says whether, adapter which", "nothing", (short | {"route": "soft"},)),
        Family(
            "distillation from the switched-off model",
            "nothing",
            tuple(
                short | {"distill": β, "temperature": T}
                for β in (0.3, 1.0, 3.0)
                for T in (1.0, 2.0)
            ),
        ),
        Family("masked cross-entropy", "nothing", (short | {"margin": INF}, {"margin": INF})),
        Family(
            "margin", "nothing", tuple(short | {"margin": m} for m in (3.0, 4.0, 5.0, 6.0, 8.0))
        ),
        Family(
            "margin and kept mass",
            "nothing",
            tuple(short | {"margin": m, "mass": 1.0} for m in (2.0, 4.0, INF)),
        ),
        Family(
            "EWC on ΔW, information of the tuned images",
            "nothing",
            tuple(short | {"ewc": w} for w in (10.0, 100.0, 1000.0)),
        ),
        Family(
            "null space of the base's weights",
            "nothing",
            tuple(short | {"null_space": e} for e in (0.5, 0.8, 0.95)),
        ),
        Family("masked, longer", "nothing", (LONG | {"margin": INF}, WIDE | {"margin": INF})),
        Family(
            "margin, longer",
            "nothing",
            (*(LONG | {"margin": m} for m in (8.0, 10.0, 12.0)), WIDE | {"margin": 10.0}),
        ),
        Family("replay of 100", "100 per digit", (replay, short | replay)),
        Family(
            "null space of 100 old images' activations",
            "100 per digit",
            tuple(short | replay | {"null_space": e, "null_space_of": "old"} for e in (0.9, 0.99)),
        ),
        Family("gate learned from 100", "100 per digit", (short | replay | {"route": "gate"},)),
        Family(
            "masked, and a balanced replay of 100 (ER-ACE), longer",
            "100 per digit",
            (
                LONG | ACE | {"tune_batch": 32, "steps": 400, "lr": 2e-3},
                LONG | ACE | {"steps": 400, "lr": 2e-3},
                LONG | ACE,
                WIDE | ACE | {"lr": 2e-3},
            ),
        ),
        Family(
            "replay of 100 with a margin, longer",
            "100 per digit",
            tuple(
                LONG | replay | {"margin": m, "tune_batch": b, "steps": s, "lr": 2e-3}
                for m in (0.0, 1.0, 2.0)
                for b, s in ((32, 400), (32, 600))
            ),
        ),
        Family(
            f"early stopping on {validation} a digit",
            f"{validation} per digit, for stopping",
            tuple(short | {"patience": p} for p in (3,)),
        ),
    )
