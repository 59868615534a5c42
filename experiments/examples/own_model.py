"""The lab on one's own model: a ResNet-18 with adapters on its convolutions, and what they did.

    python -m experiments.examples.own_model --out runs/resnet

An example to copy from. The data are random images of CIFAR's shape in ten classes, each a colour
pattern of its own under noise, so that there is something to learn and nothing to download; put
your own loader in their place. `--weights` takes a state dict (safetensors) for the network.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

import paramlora as pl

from ..analysis.explore import explore
from ..analysis.geometry import geometry
from ..analysis.insight import (
    Answers,
    Ledger,
    answers_of,
    learning_and_forgetting,
    ledger,
    off_and_on,
    strength_curve,
)
from ..harness.batches import Batches, seeded_order
from ..harness.loggers import Curve, logging
from ..harness.rundir import replace_file
from ..harness.train import cross_entropy, every, train
from ..report.figures import (
    contact_sheet,
    geometry_table,
    ledger_bars,
    plt,
    png,
    strength_front,
    training_curve,
)
from ..report.page import figure_html, list_html, page, table_html
from ..report.table import pairs

CLASSES = ["plane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
TUNED = [3, 5]
STRENGTHS = [0.0, 0.25, 0.5, 0.75, 1.0]


def patterns(count: int, seed: int, noise: float = 10.0) -> tuple[Tensor, Tensor]:
    """Return random images, float32 (n, 3, 32, 32), and labels: a fixed pattern each, and noise."""
    fixed = torch.Generator().manual_seed(0)
    coarse = torch.randn(len(CLASSES), 3, 4, 4, generator=fixed)
    patterns = nn.functional.interpolate(coarse, size=(32, 32), mode="bilinear")
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(len(CLASSES), (count,), generator=generator)
    images = patterns[labels] + noise * torch.randn(count, 3, 32, 32, generator=generator)
    return images, labels


def resnet(weights: Path | None = None) -> nn.Module:
    """Return torchvision's ResNet-18 for ten classes, random or with given weights."""
    from torchvision.models import resnet18

    model = resnet18(num_classes=len(CLASSES))
    if weights is not None:
        from safetensors.torch import load_file

        model.load_state_dict(load_file(weights))
    return model


def loader(images: Tensor, labels: Tensor, size: int = 100) -> list[tuple[Tensor, Tensor]]:
    """Return batches in order; a torch DataLoader that does not shuffle does as well."""
    return list(zip(images.split(size), labels.split(size), strict=True))


def run(out: Path, base_steps: int, steps: int, images: int, weights: Path | None = None) -> Path:
    """Pre-train, fine-tune on two classes, write a page on what the adapters did; return it."""
    torch.manual_seed(0)
    model, (x, y) = resnet(weights), patterns(images, seed=1)
    test_x, test_y = patterns(max(100, images // 4), seed=2)
    test = loader(test_x, test_y)
    generator = torch.Generator().manual_seed(0)
    if weights is None:
        order = seeded_order(len(y), base_steps * 32, generator)
        optimizer: torch.optim.Optimizer = torch.optim.Adam(model.parameters(), 1e-3)
        train(model, Batches((x, y), order, 32), cross_entropy, optimizer, label="pre-training")

    # From here on it is the same for any model: attach, train, look.
    adapted = ["layer2.*.conv?", "layer3.*.conv?"]
    pl.attach(model, pl.LoRA(rank=4), adapted, name="pets", generator=generator)
    rows = torch.isin(y, torch.tensor(TUNED)).nonzero().flatten()
    order = rows[seeded_order(len(rows), steps * 32, generator)]
    curve = Curve()

    def objective(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
        # In evaluation mode: batch norms would go on averaging, which no toggle takes back.
        return cross_entropy(model.eval(), inputs, labels)

    def accuracies(model: nn.Module) -> dict[str, float]:
        its = answers_of(model, test)
        new = torch.isin(its.labels, torch.tensor(TUNED))
        return {
            name: float(its.right[s].float().mean())
            for name, s in (("tuned", new), ("other", ~new))
        }

    hooks = [every(max(1, steps // 10), logging(curve, accuracies))]
    optimizer = torch.optim.Adam(pl.parameters(model, "pets"), 1e-3)
    train(model, Batches((x, y), order, 32), objective, optimizer, hooks=hooks)
    path = out / "report.html"
    replace_file(path, report(model, test, test_x, curve).encode())
    return path


def report(
    model: nn.Module, test: list[tuple[Tensor, Tensor]], images: Tensor, curve: Curve
) -> str:
    """Return the page: ledger, sheets, strength, geometry and the explorer."""
    off, on = off_and_on(model, test)
    book = ledger(off, on)
    strengths = strength_curve(model, test, STRENGTHS)
    low, high = images.amin((1, 2, 3), True), images.amax((1, 2, 3), True)
    pixels = (255 * (images - low) / (high - low)).byte().permute(0, 2, 3, 1).contiguous()
    explored = explore(
        model, test, CLASSES, tuned=TUNED, images=pixels, strengths=STRENGTHS, a_cell=4
    )
    drawn = _figures(book, (off, on), strengths, pixels, curve)
    figures = [figure_html(png, said) for png, said in drawn]
    found = geometry(model)
    return page(
        "An adapter on a ResNet-18",
        f"Rank 4 on {len(found)} convolutions, tuned on {' and '.join(CLASSES[c] for c in TUNED)}.",
        [
            ("Figures", "\n".join(figures)),
            ("Updates", table_html(geometry_table(found))),
            (
                "Images that changed sides",
                list_html(
                    [f"{CLASSES[c]}: {won} won, {lost} lost" for c, won, lost in book.counts()]
                ),
            ),
            ("Adapter", table_html(pairs({"parameters": pl.summary(model).trainable}))),
        ],
        explored,
    )


def _figures(
    book: Ledger,
    answers: tuple[Answers, Answers],
    strengths: list[tuple[float, Answers]],
    pixels: Tensor,
    curve: Curve,
) -> Iterator[tuple[bytes, str]]:
    figure, panels = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    ledger_bars(panels[0], book, CLASSES)
    panels[0].tick_params(axis="x", rotation=90)
    strength_front(panels[1], [s for s, _ in strengths], learning_and_forgetting(strengths, TUNED))
    training_curve(panels[2], curve)
    yield png(figure), "What was won and lost, what strength buys, and accuracy while tuning."
    for side in ("won", "lost"):
        if any(getattr(book, side).values()):
            sheet = contact_sheet(book, pixels, answers, CLASSES, side)
            yield png(sheet), f"Images that were {side}."


def main(arguments: list[str] | None = None) -> None:
    """Run the example from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.examples.own_model", description=__doc__
    )
    parser.add_argument("--out", type=Path, default=Path("runs/resnet"), help="folder of the page")
    parser.add_argument("--weights", type=Path, help="a state dict of the network, safetensors")
    for name, value, said in (
        ("base-steps", 60, "steps of pre-training"),
        ("steps", 40, "steps of fine-tuning"),
        ("images", 2000, "training images"),
    ):
        parser.add_argument(f"--{name}", type=int, default=value, help=f"{said} [{value}]")
    print(run(**vars(parser.parse_args(arguments))))


if __name__ == "__main__":
    main()
