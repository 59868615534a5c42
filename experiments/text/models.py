"""Sequence classifiers from transformers checkpoints, and the parameters that each method trains.

full          all parameters
last-layers   the last two nn.Linear modules, in the order of `model.modules()`
lora          low-rank updates of the targets; the head stays frozen at its random initialisation
lora+head     as lora, and full-size updates (`pl.Delta`) of the head, so that disabling the
              adapter restores the checkpoint
"""

import re
from typing import Any

import torch
from torch import nn

import paramlora as pl

from ..harness.settings import StudyError
from .settings import AdapterSettings, TextSettings

ADAPTER = "text"


def transformers() -> Any:
    """Import transformers, which takes seconds, turn its log off, and return it.

    Raises:
        StudyError: transformers is not installed.
    """
    try:
        import transformers as package
    except ImportError:
        raise StudyError(
            "the text study needs transformers: pip install 'paramlora[text]'"
        ) from None
    package.logging.set_verbosity_error()
    package.logging.disable_progress_bar()
    return package


def load_tokenizer(model: str) -> Any:
    """Return the tokenizer of a checkpoint. Without a padding token it pads with the last token.

    Raises:
        StudyError: the checkpoint cannot be loaded.
    """
    try:
        tokenizer = transformers().AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise _no_checkpoint(model, error) from None
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_classifier(model: str, labels: int, pad: int, seed: int) -> nn.Module:
    """Return a checkpoint as a text classifier, in float32 on the CPU, in evaluation mode.

    Args:
        model: the checkpoint's name on the Hugging Face Hub, or a folder.
        labels: the number of labels.
        pad: the id of the padding token.
        seed: the seed of the new head. The state of torch's global generator does not change.

    Raises:
        StudyError: the checkpoint cannot be loaded as a classifier.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            found = transformers().AutoModelForSequenceClassification.from_pretrained(
                model, num_labels=labels, pad_token_id=pad, dtype=torch.float32
            )
        except (OSError, ValueError) as error:
            raise _no_checkpoint(model, error) from None
        return with_bias(found).eval()


def _no_checkpoint(model: str, error: Exception) -> StudyError:
    reason = str(error).strip().splitlines()[0]
    return StudyError(
        f"--model {model}: cannot load a text model from there ({reason}); name a folder that "
        "save_pretrained wrote, or a model on the Hugging Face Hub"
    )


def with_bias(model: nn.Module) -> nn.Module:
    """Add a zero bias to a head `score` without bias, such as that of GPT-2; return the model."""
    score = getattr(model, "score", None)
    if isinstance(score, nn.Linear) and score.bias is None:
        score.bias = nn.Parameter(torch.zeros_like(score.weight[:, 0]))
    return model


def backbone_of(model: nn.Module) -> nn.Module:
    """Return the part of a classifier that the checkpoint has: all modules but the new head."""
    return model.get_submodule(str(model.base_model_prefix))


def head_of(model: nn.Module) -> list[str]:
    """Return the paths of the head's parameters, which are those outside the backbone."""
    inside = str(model.base_model_prefix) + "."
    return [name for name, _ in model.named_parameters() if not name.startswith(inside)]


def globs(targets: str) -> list[str]:
    """Split a list of globs at its commas, but not at commas inside the brackets of an index.

    >>> globs("*.c_attn.weight[:, :768],score")
    ['*.c_attn.weight[:, :768]', 'score']
    """
    return [part.strip() for part in re.split(r",(?![^\[]*\])", targets) if part.strip()]


def lora_of(settings: AdapterSettings) -> pl.LoRA:
    """Return the update of the settings: W' = W + scaling · B A."""
    return pl.LoRA(settings.rank, settings.scaling * settings.rank, init=settings.init)


def prepare(
    model: nn.Module, method: str, settings: TextSettings, generator: torch.Generator
) -> list[nn.Parameter]:
    """Prepare a classifier for a method, and return the parameters that the method trains.

    Args:
        model: is changed in place: parameters are frozen, or the adapter ADAPTER is attached.
        method: one of `settings.METHODS`.
        settings: the settings with the targets and the update.
        generator: the generator of the factors' initialisation.

    Raises:
        StudyError: a target matches nothing in the model, or cannot be adapted.
    """
    if method == "full":
        return list(model.parameters())
    if method == "last-layers":
        model.requires_grad_(False)
        linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
        last = [p for module in linear[-2:] for p in module.parameters()]
        for parameter in last:
            parameter.requires_grad_(True)
        return last
    spec: dict[Any, pl.kinds.Spec] = {
        target: lora_of(settings.adapter) for target in globs(settings.adapter.targets)
    }
    if method == "lora+head":
        # The head comes first, because a tensor gets the spec of the first target that matches it.
        spec = {**dict.fromkeys(head_of(model), pl.Delta()), **spec}
    try:
        pl.attach(model, spec, name=ADAPTER, generator=generator)
    except pl.TargetError as error:
        raise StudyError(f"--targets {settings.adapter.targets}: {error}") from None
    return pl.parameters(model, ADAPTER)


def rate_of(settings: TextSettings, method: str) -> float:
    """Return the learning rate of a method."""
    training = settings.finetuning
    return {"full": training.full_lr, "last-layers": training.last_lr}.get(method, training.lr)
