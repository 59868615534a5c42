"""Shared by integrations: the name of an adapter's file, and the check that it has all."""

from torch import nn

from ..errors import StateError, some
from ..site.survey import Survey

FILE = "adapter.safetensors"  # in a checkpoint of transformers, and in a repository of the Hub


def only_trained(model: nn.Module, name: str | None) -> str:
    """Return the name of an adapter, by default the only one; check that nothing else is trained.

    Raises:
        AdapterNameError: there is no adapter of that name; or it is None, and there are several
            adapters or none.
        StateError: a parameter that does not belong to the adapter requires a gradient.
    """
    survey = Survey(model)
    name = survey.one(name, "adapter")
    kept = {id(p) for part in survey.parts([name]) for p in part.factors.parameters()}
    lost = [key for key, p in model.named_parameters() if p.requires_grad and id(p) not in kept]
    if lost:
        raise StateError(
            f"checkpoints of adapter {name!r} would lack {some(lost)}, which require a gradient as "
            "well; freeze them, or train them as part of the adapter, with Delta()"
        )
    return name
