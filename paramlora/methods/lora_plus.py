"""LoRA+: the factors of adapters in groups, for an optimizer that trains B faster than A."""

from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from ..kinds.spec import is_finite
from ..site.survey import first_sites, select


def parameter_groups(
    model: nn.Module,
    *names: str,
    lr: float,
    ratio: float = 16.0,
    embedding_lr: float | None = None,
) -> list[dict[str, Any]]:
    """Return the factors of the adapters, all where none is named, grouped for an optimizer.

    The factors that a kind names in `fast`, B of a `LoRA` (and the magnitudes of a `DoRA`), get the
    rate `lr · ratio`; all others get `lr`. A group without factors is left out.

    Args:
        model: a module with adapters.
        names: the adapters.
        lr: the learning rate of A, and of factors of other kinds.
        ratio: how many times as fast B learns. The paper finds 16 good for language models;
            1 is plain LoRA.
        embedding_lr: one rate for all factors at embeddings, where one is wanted; as a rule lower
            than the others.

    Raises:
        AdapterNameError: no adapter of that name.
        ValueError: a rate or a ratio that is no positive number.

    Source: Hayou et al. 2024, "LoRA+: Efficient Low Rank Adaptation of Large Models",
    arXiv 2402.12354, section 4.

    >>> import torch, paramlora as pl
    >>> model = nn.Linear(4, 3)
    >>> _ = pl.attach(model, pl.LoRA(rank=2), "weight")
    >>> optimizer = torch.optim.AdamW(pl.parameter_groups(model, lr=1e-4), weight_decay=0.0)
    >>> [(group["lr"], len(group["params"])) for group in optimizer.param_groups]
    [(0.0001, 1), (0.0016, 1)]
    """
    rates = {
        "lr": lr,
        "ratio": ratio,
        "embedding_lr": 1.0 if embedding_lr is None else embedding_lr,
    }
    for what, rate in rates.items():
        if not is_finite(rate) or rate <= 0:
            raise ValueError(f"{what} must be a positive number, got {rate!r}")
    chosen = {id(stack): its_names for stack, its_names in select(model, names)}
    found: dict[float, list[nn.Parameter]] = {}
    for site in first_sites(model):
        kind = parametrize.type_before_parametrizations(site.module)
        embedding = issubclass(kind, nn.Embedding | nn.EmbeddingBag)
        for name in chosen.get(id(site.stack), ()):
            for factors in site.stack.parts(name):
                for key, parameter in factors.named_parameters():
                    rate = lr * ratio if key in factors.spec.fast else lr
                    if embedding and embedding_lr is not None:
                        rate = embedding_lr
                    found.setdefault(rate, []).append(parameter)
    return [{"params": parameters, "lr": rate} for rate, parameters in found.items()]
