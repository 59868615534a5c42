"""Run PEFT's own tests of custom models on paramlora, and count the results by reason.

    python -m tests.support.peft_suite PATH [--plain] [--fewest-passed N] [--most-failures N]
        [options of pytest]

PATH is a checkout or an unpacked source distribution of PEFT at the installed version:
`pip download --no-deps --no-binary peft peft==VERSION`. Its files are copied to a temporary folder.
`model.py` takes the place of PEFT's functions. `--plain` runs PEFT itself instead,
which shows the tests that fail here for other reasons, such as a missing network.

Some tests are expected to fail: docs/comparison.md counts them. With `--fewest-passed` or
`--most-failures` the exit status is 0 if the result is at least as good, and 2 if it is worse.
"""

import argparse
import collections
import importlib.util
import re
import shutil
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

import pytest

from . import expressed, functions

FILES = ("test_custom_models", "testing_common", "testing_utils")
# Modules that PEFT's helpers import and the tests of custom models do not use.
_OPTIONAL = {"diffusers": "StableDiffusionPipeline", "datasets": "load_dataset"}
_PLACED = (
    *("get_peft_model", "PeftModel", "get_peft_model_state_dict", "get_base_model_state_dict"),
    *("set_base_model_state_dict", "inject_adapter_in_model", "set_peft_model_state_dict"),
)
_REFUSED = ("convert_to_lora",)
_INNER = ("BaseTunerLayer", "LoraLayer", "ModulesToSaveWrapper", "TrainableTokensWrapper")
# The attributes of PEFT's layers and of its model's parts that tests read.
_ATTRIBUTES = re.compile(
    r"'(\w+)' object has no attribute '((lora|ia3|hada|lokr|oft|miss|hira)_\w+|"
    r"base_layer|get_base_layer|merge|merged|unmerge|merged_adapters|scaling|modules_to_save|r|"
    r"original_module|token_adapter|disable_adapters|active_adapters?|set_adapter|use_dora|"
    r"in_features|out_features|peft_config|_init_\w+|inject_adapter|targeted_\w+|update_layer|"
    r"adapter_layer_names|disable_adapter_layers|model|lin\d|emb|conv\w+)'"
)
# Failures of these tests have one reason; the first pattern that is found counts.
_REASONS = (
    (r"huggingface|couldn.t connect|is not a local folder|OSError.*config", "needs the Hub"),
    (r"to require gradients, got", "compares the names of PEFT's parameters"),
    (r"cannot be taken out of its mod", "FSDP 1 flattens parameters"),
    (r"'SiteList' object has no attribute 'data'", "takes a list of parametrizations for a bias"),
    (r"DID NOT RAISE", "PEFT refuses a call that works here"),
    (
        r"batches_multiple_modules_to_save.*assert False",
        "float32 rounds where a logarithm is near 0",
    ),
    (
        r"LoHaConfig.*assert False",
        "LoHa starts from larger values than in PEFT and diverges at the learning rate",
    ),
    (r"DID NOT WARN|assert 'library_name|README.md", "compares a warning or a model card"),
)


class Shim:
    """A plugin of pytest that puts the shim in place, and turns missing parts into skips."""

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items[:1]:  # all are of one file
            package = item.getparent(pytest.Module).obj.__package__  # type: ignore[union-attr]
            for name in FILES[:2]:
                place(sys.modules[f"{package}.{name}"])

    @pytest.hookimpl(wrapper=True)
    def pytest_pyfunc_call(self, pyfuncitem: pytest.Function) -> Any:
        try:
            return (yield)
        except expressed.NotExpressed as missing:
            pytest.skip(f"not expressed: {missing}")
        except AttributeError as error:
            found = _ATTRIBUTES.search(str(error))
            if found is None:
                raise
            pytest.skip(f"not expressed: the attribute {found[2]} of PEFT's layers")


def place(module: Any) -> None:
    """Put the shim in the place of what a module imported from PEFT."""
    for name in _PLACED:
        if hasattr(module, name):
            setattr(module, name, getattr(functions, name))
    for name in _REFUSED:
        if hasattr(module, name):
            setattr(module, name, expressed.not_expressed(name))
    for name in (*_INNER, "AuxiliaryTrainingWrapper"):
        if hasattr(module, name):
            setattr(module, name, expressed.inner_class(name))
    if hasattr(module, "PeftCommonTester"):
        # PEFT writes a README with the adapter, paramlora does not.
        module.PeftCommonTester.check_modelcard = lambda *_: None
    if hasattr(module, "TestMultipleActiveAdapters"):
        # PEFT's own way goes through its layers.
        module.TestMultipleActiveAdapters.set_multiple_active_adapters = lambda _, model, names: (
            model.set_adapter(names)
        )


class Counts:
    """A plugin of pytest that counts the results by reason."""

    def __init__(self) -> None:
        self.passed = 0
        self.reasons: dict[str, collections.Counter[str]] = collections.defaultdict(
            collections.Counter
        )

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.passed:
            self.passed += report.when == "call"
        elif report.skipped:
            reason = report.longrepr[2].removeprefix("Skipped: ")  # type: ignore[index]
            kind = "not expressed" if reason.startswith("not expressed") else "skipped by PEFT"
            self.reasons[kind][reason.removeprefix("not expressed: ").split("\n")[0]] += 1
        else:
            self.reasons["failed"][_reason(report)] += 1

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        write = terminalreporter.write_line
        write(f"{self.passed:5} passed")
        for kind, reasons in self.reasons.items():
            write(f"{reasons.total():5} {kind}")
            for reason, count in reasons.most_common():
                write(f"{count:11} {reason}")

    def worse(self, fewest_passed: int | None, most_failures: int | None) -> list[str]:
        """Return a line for each number that is worse than its limit."""
        failed = self.reasons["failed"].total()
        lines = []
        if fewest_passed is not None and self.passed < fewest_passed:
            lines.append(f"{self.passed} passed, and at least {fewest_passed} should")
        if most_failures is not None and failed > most_failures:
            lines.append(f"{failed} failed, and at most {most_failures} should")
        return lines


def _reason(report: pytest.TestReport) -> str:
    text = str(getattr(report.longrepr, "reprcrash", report.longrepr)).split("\n")[0]
    text = re.sub(r"^.*?: (?=\w+(Error|Warning|Exception|:)|assert|Failed)", "", text)
    for pattern, reason in _REASONS:
        if re.search(pattern, f"{report.nodeid} {report.longrepr}", re.IGNORECASE | re.DOTALL):
            return reason
    return f"{report.nodeid.split('::')[-1].split('[')[0]}: {text[:150]}"


def copied(path: Path, folder: Path) -> Path:
    """Copy PEFT's tests into a package of its own name; return the file of the tests."""
    package = folder / "peft_tests"
    package.mkdir()
    for name in FILES:
        shutil.copy(path / "tests" / f"{name}.py", package)
    (package / "__init__.py").touch()
    (folder / "pytest.ini").write_text("[pytest]\n")
    return package / f"{FILES[0]}.py"


def arguments(given: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return our own options, and those of pytest."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.support.peft_suite",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("path", type=Path)
    parser.add_argument("--plain", action="store_true")
    parser.add_argument("--fewest-passed", type=int)
    parser.add_argument("--most-failures", type=int)
    return parser.parse_known_args(given)


def main(*given: str) -> int:
    options, others = arguments(list(given))
    for name, member in _OPTIONAL.items():
        if importlib.util.find_spec(name) is None:
            sys.modules[name] = types.ModuleType(name)
            setattr(sys.modules[name], member, None)
    counts = Counts()
    plugins: list[object] = [counts] if options.plain else [counts, Shim()]
    with tempfile.TemporaryDirectory() as folder:
        tests = copied(options.path, Path(folder))
        quiet = ["-q", "--no-header", "--tb=line", "-p", "no:cacheprovider", "-W", "ignore"]
        status = int(pytest.main([str(tests), f"--rootdir={folder}", *quiet, *others], plugins))
    limits = options.fewest_passed, options.most_failures
    if status > pytest.ExitCode.TESTS_FAILED or limits == (None, None):
        return status
    worse = counts.worse(*limits)
    print("\n".join(worse))
    return 2 if worse else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
