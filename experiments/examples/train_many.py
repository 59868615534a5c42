"""An example to copy: sixteen adapters of one base, trained in one pass.

    python -m experiments.examples.train_many

Four ranks with four seeds each learn the same task on batches of their own. `pl.routed` gives each
row of a joint batch its adapter, so one forward, one backward and one step of Adam train all of
them. Afterwards the same adapters are trained one by one, to show that the factors agree.

The data are random vectors: the base has learned to tell eight centres apart, and the adapters
learn the same centres after a shift. Replace `points` and `Network` with your own. See
docs/train-many.md.
"""

import argparse
import copy
import functools
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import paramlora as pl

RANKS, SEEDS = (1, 2, 4, 8), (0, 1, 2, 3)
WIDTH, CLASSES, BATCH, RATE = 64, 8, 16, 5e-3
NAMES = [f"rank {rank}, seed {seed}" for rank in RANKS for seed in SEEDS]
SPECS = [pl.LoRA(rank, alpha=rank) for rank in RANKS for _ in SEEDS]


def points(shape: tuple[int, ...], seed: int, shift: float = 0.0) -> tuple[Tensor, Tensor]:
    """Return noisy points around the centres of their classes, (*shape, WIDTH), and labels."""
    centres = torch.randn(CLASSES + 1, WIDTH, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, shape, generator=generator)
    noise = torch.randn(*shape, WIDTH, generator=generator)
    return centres[labels] + shift * centres[-1] + 1.5 * noise, labels


def pretrained(steps: int) -> nn.Module:
    """Return a network that was trained on the points without a shift."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, 128), nn.ReLU(), nn.Linear(128, CLASSES))
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for step in range(steps):
        x, labels = points((64,), 1000 + step)
        optimizer.zero_grad()
        F.cross_entropy(model(x), labels).backward()
        optimizer.step()
    return model


def attach(model: nn.Module, name: str, spec: pl.LoRA, seed: int) -> None:
    """Attach an adapter whose first factors depend on its seed alone."""
    generator = torch.Generator().manual_seed(seed)
    pl.attach(model, spec, nn.Linear, name=name, activate="no", generator=generator)


def train_at_once(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> None:
    """Train all adapters of a model on batches (adapters, BATCH, …)."""
    pl.unfreeze(model)  # a new adapter freezes the earlier ones
    optimizer = torch.optim.Adam(pl.parameters(model), RATE)
    ids = torch.arange(len(NAMES)).repeat_interleave(BATCH)
    with pl.routed(model, ids, *NAMES):
        for x, labels in batches:
            optimizer.zero_grad()
            logits = model(x.flatten(0, 1))
            # Each adapter's mean, summed: an adapter's gradient is that of its own mean.
            (F.cross_entropy(logits, labels.flatten(), reduction="sum") / BATCH).backward()
            optimizer.step()


def train_alone(model: nn.Module, name: str, batches: list[tuple[Tensor, Tensor]]) -> None:
    """Train the only adapter of a model on batches (BATCH, …)."""
    pl.activate(model, name)
    pl.unfreeze(model)
    optimizer = torch.optim.Adam(pl.parameters(model, name), RATE)
    for x, labels in batches:
        optimizer.zero_grad()
        F.cross_entropy(model(x), labels).backward()
        optimizer.step()


def seconds(act: Callable[[], object]) -> float:
    """Return the processor time that a call takes."""
    start = time.process_time()
    act()
    return time.process_time() - start


@torch.no_grad()
def accuracy(model: nn.Module, *names: str) -> float:
    """Return the share of right answers to shifted points that were not used in training."""
    x, labels = points((2000,), 1, shift=2.0)
    with pl.using(model, *names):
        return (model(x.double()).argmax(1) == labels).float().mean().item()


def run(base_steps: int, steps: int) -> float:
    """Train at once and one by one, print the results; return the largest difference of a factor.

    The networks are in float64, in which rounding is easily told from an error.
    """
    base = pretrained(base_steps).double()
    drawn = [points((len(NAMES), BATCH), 2000 + step, shift=2.0) for step in range(steps)]
    batches = [(x.double(), labels) for x, labels in drawn]
    model = copy.deepcopy(base)
    for i, (name, spec) in enumerate(zip(NAMES, SPECS, strict=True)):
        attach(model, name, spec, i)
    before = accuracy(model)
    at_once = seconds(lambda: train_at_once(model, batches))
    one_by_one, difference = 0.0, 0.0
    for i, (name, spec) in enumerate(zip(NAMES, SPECS, strict=True)):
        alone, own = copy.deepcopy(base), [(x[i], labels[i]) for x, labels in batches]
        attach(alone, name, spec, i)
        one_by_one += seconds(functools.partial(train_alone, alone, name, own))
        expected = pl.state_dict(alone, name)
        for key, factor in pl.state_dict(model, name).items():
            difference = max(difference, (factor - expected[key]).abs().max().item())
    print(f"base: {100 * before:.1f} % right")
    for rank in RANKS:
        of_rank = [name for name in NAMES if name.startswith(f"rank {rank},")]
        scores = [100 * accuracy(model, name) for name in of_rank]
        print(f"rank {rank}: {statistics.mean(scores):.1f} ± {statistics.stdev(scores):.1f} %")
    print(f"at once {at_once:.2f} s, one by one {one_by_one:.2f} s of processor time")
    print(f"largest difference of a factor: {difference:.0e}")
    return difference


def main(arguments: list[str] | None = None) -> None:
    """Run the example from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.examples.train_many", description=__doc__
    )
    parser.add_argument("--base-steps", type=int, default=200, help="steps of pre-training [200]")
    parser.add_argument("--steps", type=int, default=100, help="steps of the adapters [100]")
    run(**vars(parser.parse_args(arguments)))


if __name__ == "__main__":
    main()
