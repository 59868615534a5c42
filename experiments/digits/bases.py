"""Pre-training, and the folder of trained bases that runs share.

The file name of a base is a hash of everything that the base depends on. Runs with the same
settings share a base, and a run cannot load a base that was trained with other settings.
"""

import hashlib
import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from ..harness.batches import Batches, loader_order
from ..harness.rundir import replace_file
from ..harness.settings import StudyError, flattened, result_settings
from ..harness.train import cross_entropy, train
from .model import DigitNet
from .settings import DigitSettings

# The settings that a base depends on.
FIELDS = (
    "seed",
    "hidden",
    "activation",
    "relu_logits",
    "mean",
    "std",
    "base_steps",
    "base_lr",
    "batch",
    "threads",
)


@dataclass(frozen=True)
class Base:
    """A trained network: its state dict, and the loss of each step, float32 (steps,), in nats."""

    state: dict[str, Tensor]
    losses: Tensor


def network(settings: DigitSettings) -> DigitNet:
    """Return the untrained network, with weights drawn from torch's global generator."""
    shape = settings.network
    return DigitNet(shape.hidden, shape.activation, shape.relu_logits)


def pretrain(settings: DigitSettings, inputs: Tensor, labels: Tensor) -> Base:
    """Train a network as the blog post does, and return it.

    One seed determines the initial weights and the order of the images. The state of torch's global
    generator is restored.

    Args:
        settings: the network, the seed and the settings of pre-training.
        inputs: the training images, float32 (n, 784), on the training device.
        labels: int64 (n,).
    """
    with torch.random.fork_rng(devices=[]):
        model, order = _drawn(settings, len(labels))
    model.to(inputs.device)
    batches = Batches((inputs, labels), order, settings.pretraining.batch)
    optimizer = torch.optim.Adam(model.parameters(), settings.pretraining.base_lr, fused=True)
    losses = train(model, batches, cross_entropy, optimizer, label="pre-training")
    return Base({key: value.cpu() for key, value in model.state_dict().items()}, losses)


@lru_cache(maxsize=8)
def order_after_base(settings: DigitSettings, images: int, rows: int, count: int) -> Tensor:
    """Return the indices that the blog's fine-tuning draws, int64 (count,).

    The blog's script sets the seed once. Its fine-tuning continues the random numbers of everything
    before it, so the order depends on the base's seed. This function replays these draws in order:
    the initial weights, the DataLoader of pre-training, the DataLoader of the test pass. Skipping
    any of these draws would select other images. The state of torch's global generator is
    restored.

    Args:
        settings: the network, the seed and the length of pre-training.
        images: number of images of pre-training.
        rows: number of images of the tuned digits.
        count: number of indices to return.
    """
    with torch.random.fork_rng(devices=[]):
        _drawn(settings, images)
        # The DataLoader of the test pass does not shuffle, but still draws the workers' base seed.
        torch.empty((), dtype=torch.int64).random_()
        return loader_order(rows, count)


def _drawn(settings: DigitSettings, images: int) -> tuple[DigitNet, Tensor]:
    """Seed torch's global generator; return the initial weights and the order of the images."""
    torch.manual_seed(settings.seed)
    count = settings.pretraining.base_steps * settings.pretraining.batch
    return network(settings), loader_order(images, count)


def base_path(settings: DigitSettings, device: torch.device, data_digest: str) -> Path:
    """Return the path of a base, whose file name is a hash of everything the base depends on."""
    every = flattened(result_settings(settings))
    inputs = [every[name] for name in FIELDS] + [device.type, data_digest, torch.__version__]
    if settings.holdout.selection:
        inputs.append(settings.holdout.validation)  # these images are not in pre-training
    name = hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:16]
    return Path(settings.place.bases) / f"{name}.safetensors"


def keep(base: Base, path: Path) -> None:
    """Write a base to a file, atomically."""
    tensors = {f"model.{key}": value.contiguous() for key, value in base.state.items()}
    replace_file(path, save({**tensors, "losses": base.losses}))


def find(path: Path) -> Base | None:
    """Return the base in a file, or None if the file does not exist.

    Raises:
        StudyError: the file is damaged.
    """
    if not path.exists():
        return None
    try:
        tensors = load(path.read_bytes())
        losses = tensors.pop("losses")
    except (SafetensorError, KeyError) as error:
        raise StudyError(f"{path} is damaged or not a base ({error}); delete it") from None
    return Base({key.removeprefix("model."): value for key, value in tensors.items()}, losses)


def restore(settings: DigitSettings, base: Base, device: torch.device) -> nn.Module:
    """Return a new network with the base's weights on the device, in evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        model = network(settings)
    model.load_state_dict(base.state)
    return model.to(device).eval()
