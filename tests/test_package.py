"""The installed package: its imports, and the contents of its wheel."""

import inspect
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from zipfile import ZipFile

import pytest

import paramlora as pl
from tests.support import user_program

ROOT = Path(__file__).parents[1]

IMPORTS = """
import sys, time
import torch, safetensors.torch
before, start = set(sys.modules), time.perf_counter()
import paramlora
took = time.perf_counter() - start
new = {name.partition(".")[0] for name in set(sys.modules) - before}
print(took, *sorted(new - sys.stdlib_module_names))
"""


def run(*command: str, cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_imported_packages(
    record_property: Callable[[str, object], None],
) -> None:
    """`import paramlora` imports nothing beyond torch, safetensors and the standard library."""
    seconds, *packages = run(sys.executable, "-c", IMPORTS, cwd=ROOT).split()
    # Recorded, not asserted: on a shared machine times vary.
    record_property("import_seconds", seconds)
    assert set(packages) <= {"paramlora", "safetensors", "torch"}


def test_the_program_with_types_runs() -> None:
    """The program that pyright checks in strict mode runs, and calls every public function."""
    user_program.main()
    text = Path(user_program.__file__).read_text(encoding="utf-8")
    functions = [name for name in pl.__all__ if inspect.isfunction(getattr(pl, name))]
    assert [name for name in functions if f"pl.{name}" not in text] == []


def test_contents_of_the_wheel(tmp_path: Path) -> None:
    """The wheel contains the package, its `py.typed`, the source to build, and nothing else.

    With the addresses of the release workflow, all links of its description are absolute.
    """
    pytest.importorskip("setuptools", minversion="77", reason="building needs setuptools 77")
    source, out = tmp_path / "source", tmp_path / "out"
    unwanted = shutil.ignore_patterns(
        ".*", "venv*", "build", "dist", "runs", "data", "*.egg-info", "__pycache__"
    )
    shutil.copytree(ROOT, source, ignore=unwanted)
    run(sys.executable, str(ROOT / ".ci" / "urls.py"), "https://host/owner/name", "v1", cwd=source)
    code = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
    run(sys.executable, "-c", code, str(out), cwd=source)
    (wheel,) = out.glob("*.whl")
    names = ZipFile(wheel).namelist()
    package = {path.relative_to(ROOT).as_posix() for path in (ROOT / "paramlora").rglob("*.py")}
    installed = {name for name in names if ".dist-info/" not in name}
    assert installed == package | {"paramlora/py.typed", "paramlora/native/native.cpp"}
    (metadata,) = (name for name in names if name.endswith("METADATA"))
    description = ZipFile(wheel).read(metadata).decode()
    links = re.findall(r"\]\(([^)]+)\)", description)
    assert "https://host/owner/name/raw/v1/docs/performance.png" in links
    assert "https://host/owner/name/blob/v1/docs/start.md" in links
    assert [link for link in links if not link.startswith("https://")] == []
    assert "Project-URL: Source, https://host/owner/name\n" in description


def test_ci_runs_the_oldest_versions() -> None:
    """CI pins the oldest versions that setup.cfg allows, with the oldest Python."""
    setup = (ROOT / "setup.cfg").read_text(encoding="utf-8")
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    found = re.search(r'python: "(.+)"\n +pins: "(.*peft.*)"', workflow)
    assert found is not None
    assert f"python_requires = >={found[1]}\n" in setup
    for name, version in (pin.split("==") for pin in found[2].split()):
        bound = re.search(rf"\n +{name}(\[\w+\])?>=(.+)\n", setup)
        assert bound is not None
        assert version.removesuffix(".0") == bound[2]


def test_version():
    """The citation and the newest heading of the changelog have the package's version."""
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {pl.__version__}\n" in citation
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall(r"^## \[(.+?)\]", changelog, re.MULTILINE)[0] == pl.__version__
