"""LoRA+: parameter groups for an optimizer, in which B learns faster than A.

A: lr        B: lr · ratio
"""

from typing import Any

from torch import nn

from ..kinds.spec import is_finite
from ..site.names import check_factors
from ..site.survey import Survey


def parameter_groups(
    model: nn.Module,
    *names: str,
    lr: float,
    ratio: float = 16.0,
    embedding_lr: float | None = None,
) -> list[dict[str, Any]]:
    """Return the factors of adapters in groups for an optimizer, B with a higher learning rate.

    The factors that a kind lists in `fast` get `lr · ratio`: B of a `LoRA`, B and d of a `DoRA`.
    All others get `lr`.

    Args:
        model: a module with adapters.
        names: the adapters; all if none is given.
        lr: the learning rate of A, and of the factors of other kinds.
        ratio: how many times faster B learns. The paper recommends 16 for language models; 1 is
            plain LoRA.
        embedding_lr: the learning rate of all factors at embeddings, usually lower than the others;
            None treats embeddings like other layers.

    Returns:
        A dict with "params" and "lr" per learning rate; rates without factors are left out.

    Raises:
        AdapterNameError: an adapter does not exist.
        StateError: there are no adapters, or the adapters have no factors to train.
        ValueError: a rate or the ratio is not a positive finite number.

    >>> import torch, paramlora as pl
    >>> model = nn.Linear(4, 3)
    >>> _ = pl.attach(model, pl.LoRA(rank=2), "weight")
    >>> optimizer = torch.optim.AdamW(pl.parameter_groups(model, lr=1e-4), weight_decay=0.0)
    >>> [(group["lr"], len(group["params"])) for group in optimizer.param_groups]
    [(0.0001, 1), (0.0016, 1)]

    Source: Hayou et al. 2024, "LoRA+: Efficient Low Rank Adaptation of Large Models",
    arXiv 2402.12354, section 4.
    """
    numbers = {"lr": lr, "ratio": ratio}
    if embedding_lr is not None:
        numbers["embedding_lr"] = embedding_lr
    for argument, number in numbers.items():
        if not is_finite(number) or number <= 0:
            raise ValueError(f"{argument} must be a positive number, got {number!r}")
    by_rate: dict[float, list[nn.Parameter]] = {}
    for _, _, site, factors in Survey(model).parts(names):
        embedding = isinstance(site.module, nn.Embedding | nn.EmbeddingBag)
        for key, parameter in factors.named_parameters():
            rate = lr * ratio if key in factors.spec.fast else lr
            if embedding and embedding_lr is not None:
                rate = embedding_lr
            by_rate.setdefault(rate, []).append(parameter)
    check_factors(by_rate)
    return [{"params": parameters, "lr": rate} for rate, parameters in by_rate.items()]
