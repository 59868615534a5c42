"""Run torch's own tests of parametrizations on models with stacks, and count the results.

    python -m tests.support.torch_suite FILE [--plain] [options of pytest]

FILE is `test/nn/test_parametrization.py` of a checkout of PyTorch at the installed version, or of a
fork: docs/comparison.md names the one that was used. It needs expecttest. After each
`register_parametrization` of a test, a `Delta` is attached on top. It starts at zero, so all values
stay. `--plain` runs the tests without stacks, as a control.
"""

import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from torch import nn
from torch.nn.utils import parametrize

import paramlora as pl
from paramlora.stack.stack import Stack

_register = parametrize.register_parametrization
_transfer: Any = parametrize.transfer_parametrizations_and_params


def register_below_a_stack(
    module: nn.Module, tensor_name: str, parametrization: nn.Module, **options: Any
) -> nn.Module:
    """Register a parametrization as torch does, then attach a `Delta` on top."""
    _register(module, tensor_name, parametrization, **options)
    adapt(module, tensor_name)
    return module


def transfer(*args: Any) -> nn.Module:
    """Copy parametrizations, stacks among them, as torch does."""
    parametrize.register_parametrization = _register
    try:
        return _transfer(*args)
    finally:
        parametrize.register_parametrization = register_below_a_stack


def adapt(module: nn.Module, tensor_name: str) -> None:
    """Attach a `Delta` to a tensor, unless it has one."""
    plist = module.parametrizations[tensor_name]  # type: ignore[index]
    if any(type(one) is Stack for one in plist):
        return
    try:
        # The same name always, so that state dicts fit. The tests train the base.
        pl.attach(
            module, {tensor_name: pl.Delta()}, name=tensor_name, activate="also", freeze=False
        )
        Counts.attached += 1
    except (pl.TargetError, pl.StateError) as refused:
        Counts.refused.append(str(refused).split(";")[0])


class Counts:
    """A plugin of pytest that puts stacks onto the models of each test."""

    refused: list[str] = []  # noqa: RUF012
    attached = 0

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self) -> Iterator[None]:
        parametrize.register_parametrization = register_below_a_stack
        parametrize.transfer_parametrizations_and_params = transfer  # type: ignore[assignment]
        try:
            return (yield)
        finally:
            parametrize.register_parametrization = _register
            parametrize.transfer_parametrizations_and_params = _transfer

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        terminalreporter.write_line(f"{self.attached} stacks; refused: {len(self.refused)}")
        for reason in sorted(set(self.refused)):
            terminalreporter.write_line(f"    {reason}")


@contextmanager
def copied(path: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "pytest.ini").write_text("[pytest]\n")
        yield Path(shutil.copy(path, folder))


def main(path: str, *options: str) -> int:
    plugins = [] if "--plain" in options else [Counts()]
    given = [option for option in options if option != "--plain"]
    quiet = ["-q", "--no-header", "--tb=short", "-p", "no:cacheprovider", "-W", "ignore"]
    with copied(Path(path)) as file:
        return int(pytest.main([str(file), f"--rootdir={file.parent}", *quiet, *given], plugins))


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    sys.exit(main(*sys.argv[1:]))
