"""An example to copy: an adapter on a ResNet-18, and a page on what it changed.

    python -m experiments.examples.own_model --out runs/resnet

The network is pre-trained on ten classes, then an adapter on its convolutions is trained on two of
them. The page shows which answers became correct or wrong.

The data are random images of CIFAR's shape, so that nothing has to be downloaded. Each class is a
fixed colour pattern under noise. Replace `patterns` with your own data, and `resnet` with your own
network. `--weights` loads a state dict (safetensors) into the network and skips pre-training.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

import paramlora as pl

from ..analysis.explore import explore
from ..analysis.geometry import geometry
from ..analysis.insight import flips, predict, predict_off_and_on, strength_curve, trade_off
from ..harness.batches import Batches, seeded_order
from ..harness.loggers import Curve, logging
from ..harness.train import cross_entropy, every, train
from ..report.document import Block, Picture
from ..report.figures import (
    contact_sheet,
    flip_bars,
    geometry_table,
    plt,
    png,
    trade_off_curve,
    training_curve,
)
from ..report.page import write_page

CLASSES = ["plane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
TUNED = [3, 5]
STRENGTHS = [0.0, 0.25, 0.5, 0.75, 1.0]
BATCH = 32


def patterns(count: int, seed: int, noise: float = 10.0) -> tuple[Tensor, Tensor]:
    """Return random images, float32 (n, 3, 32, 32), each its class's pattern with noise; labels."""
    fixed = torch.Generator().manual_seed(0)
    coarse = torch.randn(len(CLASSES), 3, 4, 4, generator=fixed)
    patterns = nn.functional.interpolate(coarse, size=(32, 32), mode="bilinear")
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(len(CLASSES), (count,), generator=generator)
    images = patterns[labels] + noise * torch.randn(count, 3, 32, 32, generator=generator)
    return images, labels


def resnet(weights: Path | None = None) -> nn.Module:
    """Return torchvision's ResNet-18 for ten classes, with random or given weights."""
    from torchvision.models import resnet18

    model = resnet18(num_classes=len(CLASSES))
    if weights is not None:
        from safetensors.torch import load_file

        model.load_state_dict(load_file(weights))
    return model


def run(out: Path, base_steps: int, steps: int, images: int, weights: Path | None = None) -> Path:
    """Pre-train, fine-tune on two classes, write the page, and return its path."""
    torch.manual_seed(0)
    model, (x, y) = resnet(weights), patterns(images, seed=1)
    test_x, test_y = patterns(max(100, images // 4), seed=2)
    # A list of batches; a torch DataLoader that does not shuffle works as well.
    test = list(zip(test_x.split(100), test_y.split(100), strict=True))
    generator = torch.Generator().manual_seed(0)
    if weights is None:
        order = seeded_order(len(y), base_steps * BATCH, generator)
        optimizer: torch.optim.Optimizer = torch.optim.Adam(model.parameters(), 1e-3)
        train(model, Batches((x, y), order, BATCH), cross_entropy, optimizer, label="pre-training")

    # From here on the code is the same for any model: attach, train, analyse.
    adapted = ["layer2.*.conv?", "layer3.*.conv?"]
    pl.attach(model, pl.LoRA(rank=4), adapted, name="pets", generator=generator)
    rows = torch.isin(y, torch.tensor(TUNED)).nonzero().flatten()
    order = rows[seeded_order(len(rows), steps * BATCH, generator)]

    def objective(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
        # In training mode batch norms would update their running statistics. Those belong to the
        # base, and switching the adapter off would not restore them.
        return cross_entropy(model.eval(), inputs, labels)

    curve = Curve()
    hook = logging(curve, lambda model: predict(model, test).accuracies(TUNED))
    optimizer = torch.optim.Adam(pl.parameters(model, "pets"), 1e-3)
    hooks = [every(max(1, steps // 10), hook)]
    train(model, Batches((x, y), order, BATCH), objective, optimizer, hooks=hooks)
    return report(out / "report.html", model, test, test_x, curve)


def report(
    path: Path, model: nn.Module, test: list[tuple[Tensor, Tensor]], images: Tensor, curve: Curve
) -> Path:
    """Write the page: figures, the updates' geometry and the explorer. Return its path."""
    off, on = predict_off_and_on(model, test)
    flipped = flips(off, on)
    low, high = images.amin((1, 2, 3), True), images.amax((1, 2, 3), True)
    pixels = (255 * (images - low) / (high - low)).byte().permute(0, 2, 3, 1).contiguous()

    figure, panels = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    flip_bars(panels[0], flipped, CLASSES)
    panels[0].tick_params(axis="x", rotation=90)
    trade_off_curve(panels[1], trade_off(strength_curve(model, test, STRENGTHS), TUNED))
    training_curve(panels[2], curve)
    caption = (
        "Left: images whose answer became correct or wrong. Middle: accuracy at each strength λ. "
        "Right: accuracy during fine-tuning."
    )
    figures: list[Block] = [Picture(png(figure), caption)]
    for side, caption in (
        ("positive", "Wrong with the adapter off, correct with it on."),
        ("negative", "Correct with the adapter off, wrong with it on."),
    ):
        if any(getattr(flipped, side).values()):
            sheet = contact_sheet(flipped, pixels, (off, on), CLASSES, side)
            figures.append(Picture(png(sheet), caption))
    sites = geometry(model)
    write_page(
        path,
        "An adapter on a ResNet-18",
        f"Rank 4 on {len(sites)} convolutions, {pl.summary(model).trainable:,} parameters, tuned "
        f"on {' and '.join(CLASSES[label] for label in TUNED)}.",
        {"Figures": figures, "Updates": [geometry_table(sites)]},
        explore(model, test, CLASSES, tuned=TUNED, images=pixels, strengths=STRENGTHS, per_cell=4),
    )
    return path


def main(arguments: list[str] | None = None) -> None:
    """Run the example from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.examples.own_model", description=__doc__
    )
    parser.add_argument("--out", type=Path, default=Path("runs/resnet"), help="folder of the page")
    parser.add_argument("--weights", type=Path, help="a state dict of the network, safetensors")
    for name, value, words in (
        ("base-steps", 60, "steps of pre-training"),
        ("steps", 40, "steps of fine-tuning"),
        ("images", 2000, "training images"),
    ):
        parser.add_argument(f"--{name}", type=int, default=value, help=f"{words} [{value}]")
    print(run(**vars(parser.parse_args(arguments))))


if __name__ == "__main__":
    main()
