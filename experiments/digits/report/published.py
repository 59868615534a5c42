"""Published figures, to lay beside ours. Nothing here was measured by this project.

"blog": a blog post of 2024-04-17 on low-rank adapters by parametrization; its "method 1" is
`scrambled` here, its "method 2" `wrapped`. "nine": the script it starts from, hkproj/pytorch-lora,
run on a GPU. Each made with one adapter seed, and with another generator's A: fine-tuned figures
can be met as a band over seeds only.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """Wrong answers to MNIST's test images, by digit, and the mean training loss where it is given.

    `train_loss` is the mean over all steps, in nats.
    """

    wrong_counts: tuple[int, ...]
    train_loss: float | None = None


# By preset, then by method; "base" is the network before fine-tuning.
PUBLISHED: dict[str, dict[str, Published]] = {
    "blog": {
        "base": Published((33, 12, 147, 115, 69, 196, 98, 91, 185, 148), 0.72),
        "scrambled": Published((543, 484, 79, 101, 609, 98, 348, 765, 103, 44), 0.329),
        "wrapped": Published((88, 503, 97, 101, 361, 119, 120, 651, 103, 55), 0.413),
    },
    "nine": {
        "base": Published((33, 28, 42, 95, 19, 10, 61, 52, 19, 107)),
        "lora": Published((53, 32, 60, 201, 186, 85, 69, 677, 193, 11)),
    },
}
