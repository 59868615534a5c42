"""State dicts of adapters."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..site.factors import Factors
from ..site.names import check_unmerged, select, sites_of
from ..site.storage import check_real, check_settled, fill, settle
from .compare import compare


def state_dict(model: nn.Module, name: str = "default") -> dict[str, Tensor]:
    """Return an adapter's factors by `<site>.<factor>`: `fc1.weight.A`.

    As with `nn.Module.state_dict` the tensors are detached, and share memory with the model's;
    of a model that FSDP has sharded they are in parts (DTensors).

    Raises:
        AdapterNameError: no adapter of that name.
    """
    settle(model)
    return {
        f"{path}.{key}": tensor.detach()
        for path, factors in parts_of_sites(model, name).items()
        for key, tensor in factors.tensors.items()
    }


@torch.no_grad()
def load_state_dict(model: nn.Module, state: Mapping[str, Tensor], name: str = "default") -> None:
    """Copy factors, as `state_dict` gave them, into an adapter that is attached.

    Nothing else changes: no other adapter, not what is active, scaled or trained. Where the model
    is sharded all processes call it, with whole tensors or with parts.

    Raises:
        AdapterNameError: no adapter of that name.
        CheckpointError: missing or unexpected keys, all of them listed, or other shapes; the
            model is then as it was.
        StateError: the adapter is merged, or the model is on the meta device.
    """
    check_unmerged(select(model, [name]), "load")
    own = state_dict(model, name)
    compare(state, own, f"the state for adapter {name!r}")
    check_writable(model, name)
    for key, tensor in own.items():
        fill(tensor, state[key])


def parts_of_sites(model: nn.Module, name: str) -> dict[str, Factors]:
    """Return one adapter's factors by the path of the site or block, in the same order."""
    return {
        path: factors
        for site in sites_of(model, name)
        for path, factors in site.parts(name).items()
    }


def check_writable(model: nn.Module, name: str) -> None:
    """Raise a StateError where what is written to an adapter's factors would be lost."""
    for site in sites_of(model, name):
        for path, factors in site.parts(name).items():
            # Parameters alone: constants are buffers, which FSDP leaves whole.
            for key, parameter in factors.named_parameters():
                check_settled(site.module, parameter, path)
                check_real(f"{path}.{key}", parameter)
