"""The state dict of the plain model with adapters folded in, for export."""

from typing import Any

from torch import nn

from ..layers.install import check_whole
from ..site.names import check_names
from ..site.survey import Survey
from ..verbs.fold import effective
from ..wrappers import inner
from .base import Base, base_state_dict


def merged_state_dict(model: nn.Module) -> dict[str, Any]:
    """Return the state dict of the plain model, with the active adapters folded into its weights.

    It loads into the same model without paramlora, which then computes what this model computes
    now, inside an open block too. The model does not change, and does not have to be merged. Only
    the adapted tensors take new memory.

    Args:
        model: a module with adapters.

    Returns:
        The tensors by key, in the order of the plain model's state dict. Those without an active
        adapter share memory with the model's, as in `nn.Module.state_dict`; tied tensors share
        memory with each other.

    Raises:
        StateError: the model has no adapters; or it is inside of `routed`; or a tensor is sharded;
            or another parametrization below an adapter cannot store the result (spectral_norm); or
            a layer with a live adapter is quantized; or
            another thread has a block open.

    >>> import torch
    >>> import paramlora as pl
    >>> model, plain = nn.Sequential(nn.Linear(4, 3)), nn.Sequential(nn.Linear(4, 3))
    >>> _ = pl.attach(model, pl.LoRA(rank=2, init="gaussian"))
    >>> plain.load_state_dict(pl.merged_state_dict(model))
    <All keys matched successfully>
    >>> x = torch.randn(2, 4)
    >>> torch.allclose(plain(x), model(x), atol=1e-6)
    True
    """
    survey = Survey(model)
    check_names(survey.stacks, ())
    check_whole(survey.sites)
    tensors = {id(site.stack): effective(site) for site in survey.first_sites}
    found = base_state_dict(model)
    for original, stack, number in Base(inner(model)).stored.values():
        if original in found:  # the weight of a quantized layer may be under another name
            found[original] = tensors[id(stack)][number]
    return found
