"""The version of torch, for tests that leave out what an older one lacks."""

import torch


def torch_before(version: str) -> bool:
    """Return whether the installed torch is older, such as 2.6.0 is than "2.7"."""
    return torch.__version__ < version  # a TorchVersion, which compares the numbers
