"""Configuration of all tests: threads, fixtures, and skips if a machine lacks something."""

import os
from collections import defaultdict
from pathlib import Path
from types import ModuleType

# `make test` runs several processes, which are slower if their threads compete for the cores. Set
# before torch is imported, so that it also applies to processes that tests start.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from paramlora.native import load as native

ROOT = Path(__file__).parents[1]
# A program that a test runs; importing it for doctests would fail.
collect_ignore = ["support/crash.py"]


def find_mnist() -> Path | None:
    """Return the folder with the four MNIST archives, or None."""
    path = Path(os.environ.get("PARAMLORA_MNIST") or ROOT.parent / "shared" / "mnist")
    return path if path.is_dir() else None


@pytest.fixture(scope="session")
def mnist_dir() -> Path:
    """The folder with the four MNIST archives."""
    path = find_mnist()
    if path is None:
        pytest.skip("no MNIST here: set PARAMLORA_MNIST to a folder with its four archives")
    return path


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests that need MNIST, skip those that need an accelerator, and put slow ones first.

    A slow test that one process begins at the end would leave the other processes without work.
    """
    items.sort(
        key=lambda item: not {"slow", "thorough"} & {mark.name for mark in item.iter_markers()}
    )
    for item in items:
        if "mnist_dir" in getattr(item, "fixturenames", ()):
            item.add_marker("mnist")
        if item.get_closest_marker("gpu") and not torch.accelerator.is_available():
            item.add_marker(pytest.mark.skip(reason="no accelerator on this machine"))


@pytest.fixture
def as_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute small Linears as large ones, by our autograd Function in Python."""
    monkeypatch.setattr("paramlora.native.load.module", lambda: None)
    monkeypatch.setattr("paramlora.compute.plan.PLAIN_BELOW", defaultdict(int))


@pytest.fixture
def native_module() -> ModuleType:
    """The native extension."""
    built = native.module()
    if built is None:
        pytest.skip("not built for this torch: python -m paramlora.native.build")
    return built
