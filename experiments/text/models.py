"""Sequence classifiers from transformers checkpoints, and what each method trains of them.

full          everything
last-layers   the last two nn.Linear of the model, in its order
lora          low-rank updates of the targets; the head stays frozen at its random start
lora+head     the same, and a full-size update (`pl.Delta`) of all that lies outside the
              backbone, so that one switch gives the checkpoint back
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
    """Return the package transformers with its log turned off; importing it takes seconds.

    Raises:
        StudyError: it is not installed.
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
    """Return the tokenizer of a checkpoint; without a padding token, it pads with its last token.

    Raises:
        StudyError: there is no such checkpoint.
    """
    try:
        tokenizer = transformers().AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise _no_checkpoint(model, error) from None
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_classifier(model: str, labels: int, pad: int, seed: int) -> nn.Module:
    """Return a checkpoint as a classifier of texts, in float32 on the CPU, in evaluation mode.

    Args:
        model: the checkpoint's name on the hub, or a folder.
        labels: the number of labels.
        pad: the id of the padding token.
        seed: the seed of the new head; torch's global generator does not change.

    Raises:
        StudyError: the checkpoint does not exist, or has no classifier.
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
        f"--model {model}: no checkpoint of a text model can be loaded there ({reason}); name a "
        "folder that save_pretrained wrote, or a model of the hub"
    )


def with_bias(model: nn.Module) -> nn.Module:
    """Give a head `score` without a bias, as in transformers' GPT-2, a bias of zeros."""
    score = getattr(model, "score", None)
    if isinstance(score, nn.Linear) and score.bias is None:
        score.bias = nn.Parameter(torch.zeros_like(score.weight[:, 0]))
    return model


def backbone_of(model: nn.Module) -> nn.Module:
    """Return the checkpoint's own part of a classifier: all but the new head."""
    return model.get_submodule(str(model.base_model_prefix))


def head_of(model: nn.Module) -> list[str]:
    """Return the paths of the head's parameters: those outside of the backbone."""
    inside = str(model.base_model_prefix) + "."
    return [name for name, _ in model.named_parameters() if not name.startswith(inside)]


def globs(targets: str) -> list[str]:
    """Split a list of globs at its commas, except commas inside the brackets of an index.

    >>> globs("*.c_attn.weight[:, :768],score")
    ['*.c_attn.weight[:, :768]', 'score']
    """
    return [part.strip() for part in re.split(r",(?![^\[]*\])", targets) if part.strip()]


def lora_of(settings: AdapterSettings) -> pl.LoRA:
    """Return the update that the settings ask for; `settings.scaling` multiplies B A."""
    return pl.LoRA(settings.rank, settings.scaling * settings.rank, init=settings.init)


def prepare(
    model: nn.Module, method: str, settings: TextSettings, generator: torch.Generator
) -> list[nn.Parameter]:
    """Prepare a classifier for a method, and return the parameters that it trains.

    Args:
        model: changed in place: frozen in part, or with the adapter ADAPTER attached.
        method: one of `settings.METHODS`.
        settings: which targets, and which update.
        generator: where the factors' random numbers come from.

    Raises:
        StudyError: a target matches nothing in this model, or cannot be adapted.
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
        # The head comes first, because the first target that matches a tensor decides.
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
