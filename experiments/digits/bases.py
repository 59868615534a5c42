"""Pre-training, and the folder of bases that earlier runs trained.

A base is kept under a hash of everything that it depends on, so that runs share it and no run
can get one that is not its own.
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
    """Return the network of these settings, its weights from torch's global generator."""
    shape = settings.network
    return DigitNet(shape.hidden, shape.activation, shape.relu_logits)


def pretrain(settings: DigitSettings, inputs: Tensor, labels: Tensor) -> Base:
    """Train a network on all training images, as the blog does, and return it.

    One seed decides the first weights and then the order of the images; torch's global generator
    is left as it was.
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
    """Return `count` of `rows` indices in the order in which the blog's fine-tuning draws them.

    That order continues the random numbers of pre-training on `images` images, which is why it
    depends on the base's seed. Torch's global generator is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        _drawn(settings, images)
        # The loader of the test pass in between does not shuffle, and draws one number even so.
        torch.empty((), dtype=torch.int64).random_()
        return loader_order(rows, count)


def _drawn(settings: DigitSettings, images: int) -> tuple[DigitNet, Tensor]:
    """Seed torch's global generator; return the first weights and the order of the images."""
    torch.manual_seed(settings.seed)
    count = settings.pretraining.base_steps * settings.pretraining.batch
    return network(settings), loader_order(images, count)


def base_path(settings: DigitSettings, device: torch.device, data_digest: str) -> Path:
    """Return where the base of these settings is kept: a file named after all it depends on."""
    every = flattened(result_settings(settings))
    decides = [every[name] for name in FIELDS] + [device.type, data_digest, torch.__version__]
    if settings.holdout.selection:
        decides.append(settings.holdout.validation)  # images that this base has not seen
    name = hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:16]
    return Path(settings.place.bases) / f"{name}.safetensors"


def keep(base: Base, path: Path) -> None:
    """Write a base to a file, at once."""
    tensors = {f"model.{key}": value.contiguous() for key, value in base.state.items()}
    replace_file(path, save({**tensors, "losses": base.losses}))


def find(path: Path) -> Base | None:
    """Return the base in a file, or None where there is no such file.

    Raises:
        StudyError: the file is damaged.
    """
    if not path.exists():
        return None
    try:
        tensors = load(path.read_bytes())
        losses = tensors.pop("losses")
    except (SafetensorError, KeyError) as error:
        raise StudyError(f"{path} is not a base that a run left ({error}); delete it") from None
    return Base({key.removeprefix("model."): value for key, value in tensors.items()}, losses)


def restore(settings: DigitSettings, base: Base, device: torch.device) -> nn.Module:
    """Return a new network with the base's weights, in evaluation mode, on the device."""
    with torch.random.fork_rng(devices=[]):
        model = network(settings)
    model.load_state_dict(base.state)
    return model.to(device).eval()
