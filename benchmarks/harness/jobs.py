"""Models with batches for several adapters: what `routed --train` trains."""

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .models import Llama, mlp

MODELS = ("mlp", "minilm", "llama")
LENGTH = 32  # tokens of a text or of a sequence


@dataclass(frozen=True)
class Job:
    """A frozen model, its batches, and the losses of their rows.

    Args:
        name: the model, with its shape or source.
        base: maps the inputs to the outputs.
        rank: of the adapters.
        targets: where they are attached.
        batches: for each step inputs (adapters, n, …) and targets (adapters, n, …).
        losses: maps outputs and targets to the loss of each row, (rows,).
    """

    name: str
    base: nn.Module
    rank: int
    targets: Any
    batches: list[tuple[Tensor, Tensor]]
    losses: Callable[[Tensor, Tensor], Tensor]


def job_of(name: str, adapters: int, n: int, options: argparse.Namespace) -> Job:
    """Return the job of a model for a number of adapters, each with n rows in a batch."""
    torch.manual_seed(0)
    make = {"mlp": _mlp, "minilm": _minilm, "llama": _llama}[name]
    job = make((options.steps, adapters, n), options)
    job.base.requires_grad_(False).eval()
    return job


def _mlp(shape: tuple[int, int, int], options: argparse.Namespace) -> Job:
    """Return the network of the digit study, on random images."""
    data = zip(torch.rand(*shape, 784), torch.randint(10, shape), strict=True)
    batches = [(x.to(options.device), y.to(options.device)) for x, y in data]
    return Job("digit MLP", mlp().to(options.device), 2, nn.Linear, batches, row_losses)


def _llama(shape: tuple[int, int, int], options: argparse.Namespace) -> Job:
    """Return a block of a Llama, on random sequences and targets."""
    on_cpu = options.device == "cpu"
    width, dtype = (256, torch.float32) if on_cpu else (4096, torch.bfloat16)
    base = Llama(width, head=64 if on_cpu else 128).to(options.device, dtype)
    steps, *rows = shape
    drawn = [
        torch.randn(*rows, LENGTH, width, device=options.device, dtype=dtype)
        for _ in range(min(steps, 4) + 1)
    ]
    batches = [(drawn[i % (len(drawn) - 1)], drawn[-1]) for i in range(steps)]
    name = f"Llama block, width {width}"
    return Job(name, base, 8, nn.Linear, batches, lambda y, t: (y - t).square().mean((1, 2)))


def _minilm(shape: tuple[int, int, int], options: argparse.Namespace) -> Job:
    """Return MiniLM as a classifier, on texts of the SMS Spam Collection or random tokens."""
    from transformers import AutoModelForSequenceClassification, BertConfig

    from experiments.text.models import load_classifier

    if options.checkpoint:
        classifier, name = load_classifier(options.checkpoint, 2, 0, seed=0), "MiniLM"
    else:
        config = BertConfig(
            hidden_size=384,
            num_hidden_layers=6,
            num_attention_heads=12,
            intermediate_size=1536,
            num_labels=2,
        )
        classifier = AutoModelForSequenceClassification.from_config(config)
        name = "random MiniLM"
    ids, labels = (torch.randint(100, 1000, (*shape, LENGTH)), torch.randint(2, shape))
    if options.data_dir and options.checkpoint:
        ids, labels = _texts(shape, options)
        name += ", SMS"
    data = zip(ids.to(options.device), labels.to(options.device), strict=True)
    targets = ["*.query", "*.key", "*.value", "*.dense"]
    base = Logits(classifier.to(options.device))
    return Job(name, base, 8, targets, list(data), row_losses)


def _texts(shape: tuple[int, int, int], options: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Return tokens, (*shape, LENGTH), and labels of random texts of the SMS Spam Collection."""
    from experiments.text.data import load_corpus
    from experiments.text.models import load_tokenizer
    from experiments.text.settings import DatasetSettings

    corpus = load_corpus(DatasetSettings(data="spam", data_dir=options.data_dir))
    rows = corpus.splits["train"]
    chosen = [rows[i] for i in torch.randint(len(rows), (math.prod(shape),)).tolist()]
    encoded = load_tokenizer(options.checkpoint)(
        [text for text, _ in chosen],
        truncation=True,
        padding="max_length",
        max_length=LENGTH,
        return_tensors="pt",
    )
    labels = torch.tensor([corpus.labels.index(label) for _, label in chosen])
    return encoded["input_ids"].view(*shape, LENGTH), labels.view(shape)


def row_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy of each row, (n,)."""
    return F.cross_entropy(logits.float(), labels, reduction="none")


class Logits(nn.Module):
    """A classifier of texts as a function of token ids, in which 0 is padding."""

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, ids: Tensor) -> Tensor:
        return self.classifier(input_ids=ids, attention_mask=(ids != 0).long()).logits
