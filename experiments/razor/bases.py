"""The bases: networks that know the parity of some digits, and some garments."""

import torch
from torch import Tensor, nn

from ..harness.batches import seeded_order
from ..harness.train import cosine, cpu_threads, cross_entropy, learning_rate, train
from .data import ParityData
from .settings import RazorSettings
from .stacked import Weights, network

DECAY = 0.01  # AdamW's weight decay


def pretrained(settings: RazorSettings, data: ParityData, seed: int) -> Weights:
    """Train a network on some images of both tasks; return its weights."""
    inputs, batches = drawn_images(settings, data, seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = network(settings.network.hidden).to(inputs.device)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=DECAY, fused=True)
    steps = len(batches)
    rate = learning_rate(optimizer, cosine(settings.pretraining.base_lr, steps, steps // 10))

    def objective(model: nn.Module, rows: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(model, inputs[rows], targets)

    with cpu_threads(settings.place.threads):
        label = f"pre-training {seed}"
        train(model, batches, objective, optimizer, label=label, hooks=[rate])
    return {name: p.detach() for name, p in model.named_parameters()}


def drawn_images(
    settings: RazorSettings, data: ParityData, seed: int
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Return the inputs of pre-training, and the rows and labels of each batch.

    An image of a digit has a random digit of the same parity as its label, drawn anew each epoch.
    """
    generator, device = torch.Generator().manual_seed(seed), data.digits.labels.device
    parts, count = (data.digits, data.garments), settings.pretraining.base_images
    rows = [torch.randperm(len(part.labels), generator=generator)[:count] for part in parts]
    pairs = list(zip(parts, rows, strict=True))
    inputs = torch.cat([part.inputs[chosen.to(device)] for part, chosen in pairs])
    labels = torch.cat([part.labels[chosen.to(device)] for part, chosen in pairs]).cpu()
    total = settings.pretraining.base_epochs * len(labels)
    order = seeded_order(len(labels), total, generator)
    same_parity = labels[order] % 2 + 2 * torch.randint(5, order.shape, generator=generator)
    targets = torch.where(order < len(rows[0]), same_parity, labels[order])
    size = settings.finetuning.batch
    batches = zip(order.to(device).split(size), targets.to(device).split(size), strict=True)
    return inputs, list(batches)
