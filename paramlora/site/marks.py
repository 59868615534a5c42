"""Marks in a state dict that say which adapters are merged into its weights.

While an adapter is merged, the module's stored tensor is W', and a state dict has W' beside the
factors. Loaded below adapters that are not merged, it would get the update twice. So merging adds
a buffer to the parametrization, which every state dict has from then on:

    fc.weight                                   W'
    fc.parametrizations.weight.0.merged_digits  the mark
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from ..stack.stack import Stack
from .find import Site, in_list, stored_tensors

_MARK = "merged_"


def mark(sites: Iterable[Site]) -> None:
    """Make the marks at sites say what is merged there; each of several tied ones gets them."""
    for site in sites:
        buffers = in_list(site.plist, site.stack)._buffers
        for key in [key for key in buffers if key.startswith(_MARK)]:
            del buffers[key]
        device = stored_tensors(site.plist)[0].device
        for name in site.stack.merged:
            buffers[_MARK + name] = torch.ones((), dtype=torch.uint8, device=device)


def merged_twice(state: Mapping[str, Any], prefix: str, stack: Stack) -> list[str]:
    """Return the adapters that are merged into a saved tensor and not at the stack.

    Args:
        state: the state dict.
        prefix: the beginning of the keys of the tensor's list of parametrizations.
        stack: the stack in that list.
    """
    rests = [key.removeprefix(prefix) for key in state if key.startswith(prefix)]
    names = [rest.partition(f".{_MARK}")[2] for rest in rests]
    return [name for name in names if name and "." not in name and name not in stack.merged]
