"""Sequence classifiers from transformers checkpoints, and the parameters that each method trains.

full          all parameters
last-layers   the last two nn.Linear modules, in the order of `model.modules()`
lora          low-rank updates of the targets; the head stays frozen at its random initialisation
lora+head     as lora, and full-size updates (`pl.Delta`) of the head, so that disabling the
              adapter restores the checkpoint
joint         as full, on two data sets at once; see retention.py
joint-lora    as lora, on two data sets at once

`--kind` replaces the low-rank updates by those of another kind of adapter.
"""

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

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


class MeanPooled(nn.Module):
    """A backbone with a linear head on the mean of its last hidden states.

    The classifier of transformers for BERT reads the first token through a pooler. A checkpoint for
    sentence embeddings, such as all-MiniLM-L6-v2, was trained with the mean over the tokens, and
    its pooler is left over from before.
    """

    base_model_prefix = "backbone"

    def __init__(self, backbone: nn.Module, labels: int) -> None:
        super().__init__()
        body: Any = backbone
        if hasattr(body, "pooler"):
            body.pooler = None
        config = body.config
        self.backbone = backbone
        self.dropout = nn.Dropout(getattr(config, "hidden_dropout_prob", 0.1))
        self.classifier = nn.Linear(config.hidden_size, labels)
        nn.init.normal_(self.classifier.weight, std=getattr(config, "initializer_range", 0.02))
        nn.init.zeros_(self.classifier.bias)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        pooled = mean_pooled(self.backbone, input_ids, attention_mask)
        logits = self.classifier(self.dropout(pooled))
        return transformers().modeling_outputs.SequenceClassifierOutput(logits=logits)


def mean_pooled(backbone: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of the last hidden states over the tokens of each text, (n, width)."""
    hidden = backbone(input_ids=ids, attention_mask=mask).last_hidden_state  # (n, tokens, width)
    return (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


def load_classifier(
    model: str, labels: int, pad: int, seed: int, pooling: str = "checkpoint"
) -> nn.Module:
    """Return a checkpoint as a text classifier, in float32 on the CPU, in evaluation mode.

    Args:
        model: the checkpoint's name on the Hugging Face Hub, or a folder.
        labels: the number of labels.
        pad: the id of the padding token.
        seed: the seed of the new head. The state of torch's global generator does not change.
        pooling: "checkpoint" or "mean"; see `TextSettings.pooling`.

    Raises:
        StudyError: the checkpoint cannot be loaded as a classifier.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        auto = transformers()
        try:
            if pooling == "mean":
                backbone = auto.AutoModel.from_pretrained(
                    model, pad_token_id=pad, dtype=torch.float32
                )
                return MeanPooled(backbone, labels).eval()
            found = auto.AutoModelForSequenceClassification.from_pretrained(
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


def spec_of(settings: AdapterSettings) -> pl.kinds.Spec:
    """Return the update of the settings; for kind "lora" it is W' = W + scaling · B A.

    Other kinds train about as many numbers as LoRA of the same rank, except for IA3, which has no
    size. For LoRA-XS this holds at the widths of MiniLM. Kinds with a scale have LoRA's.
    """
    r, s, init = settings.rank, settings.scaling, settings.init
    half = max(1, r // 2)
    kinds: dict[str, Callable[[], pl.kinds.Spec]] = {
        "lora": lambda: pl.LoRA(r, s * r, init=init),
        "dora": lambda: pl.DoRA(r, s * r, init=init),
        "pissa": lambda: pl.LoRA(r, s * r, init="pissa"),
        "olora": lambda: pl.LoRA(r, s * r, init="olora"),
        "loha": lambda: pl.LoHa(half, s * half),
        "lokr": lambda: pl.LoKr(2 * r, s * 2 * r, factor=2),
        "hira": lambda: pl.HiRA(r, init=init),
        "miss": lambda: pl.MiSS(2 * r),
        "oft": lambda: pl.OFT(4 * r),
        "lora-xs": lambda: pl.LoRAXS(12 * r, s * 12 * r),
        "ia3": pl.IA3,
    }
    return kinds[settings.kind]()


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
    if method in ("full", "joint"):
        return list(model.parameters())
    if method == "last-layers":
        model.requires_grad_(False)
        linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
        last = [p for module in linear[-2:] for p in module.parameters()]
        for parameter in last:
            parameter.requires_grad_(True)
        return last
    spec: dict[Any, pl.kinds.Spec] = {
        target: spec_of(settings.adapter) for target in globs(settings.adapter.targets)
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
    own = {"full": training.full_lr, "joint": training.full_lr, "last-layers": training.last_lr}
    return own.get(method, training.lr)
