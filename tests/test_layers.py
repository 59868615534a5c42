"""Imports between folders run in one direction only, as the tables here say."""

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# For each folder or file of a package: what else of the package its files may import. An entry such
# as "kinds.spec" allows that file of a folder and no other. Imports within a folder are free, and
# the package's own __init__.py may import everything.
Layers = Mapping[str, set[str]]
SHARED = {"harness", "analysis", "report"}
EXPERIMENTS: Layers = {
    "harness": set(),
    "analysis": {"harness"},
    "report": {"harness", "analysis"},
    "digits": SHARED,
    "text": SHARED,
    "examples": SHARED,
    "sweeps": {*SHARED, "digits"},
    "tasks": {*SHARED, "digits"},
    "razor": {*SHARED, "digits"},
    "__main__": {"harness"},  # it finds the studies by their folders, and names none
}
BELOW_LAYERS = {"site", "stack", "kinds", "errors", "wrappers"}
BELOW_VERBS = {"layers", *BELOW_LAYERS}
PARAMLORA: Layers = {
    "errors": set(),
    "native": set(),
    "kinds": {"errors"},
    "private_torch": set(),
    "compute": {"kinds", "native", "private_torch"},
    "wrappers": {"errors", "private_torch"},
    "stack": {"kinds", "errors", "private_torch", "wrappers"},
    "site": {"stack", "kinds", "errors", "wrappers"},
    "routing": {"site", "stack", "compute", "kinds", "errors"},
    "layers": {
        "routing",
        "site",
        "stack",
        "compute",
        "kinds",
        "errors",
        "private_torch",
        "wrappers",
    },
    "targets": {"site", "stack", "kinds", "errors"},
    "verbs": {"targets", "routing", *BELOW_VERBS},
    "methods": {"verbs", *BELOW_VERBS},
    "files": {"verbs", *BELOW_VERBS},
    "peft": {"files", "verbs", *BELOW_VERBS},
    # Each file serves one library. Only the command line imports from this folder.
    "integrations": {"peft", "files", "methods", "verbs", *BELOW_VERBS},
    "skeleton": {"files", "peft", "errors"},
    "__main__": {
        "__version__",
        "integrations.diffusers",
        "skeleton",
        "peft",
        "files",
        "verbs",
        "native",
        *BELOW_VERBS,
    },
}
# Packages of the repository that paramlora must not import.
ABOVE = {"experiments", "benchmarks", "tests"}
PACKAGES = {"paramlora": PARAMLORA, "experiments": EXPERIMENTS}


def imports(path: Path, root: Path) -> Iterator[tuple[int, str]]:
    """Yield the line and the dotted name of each import of the package `root`, without its name."""
    package = path.relative_to(root.parent).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            start = ".".join([*above, *filter(None, [node.module])])
            names = [f"{start}.{name.name}" for name in node.names]
        elif isinstance(node, ast.Import):
            names = [name.name for name in node.names]
        else:
            continue
        for name in names:
            if name == root.name or name.startswith(f"{root.name}."):
                yield node.lineno, name.removeprefix(root.name).removeprefix(".") or "itself"
            elif root.name == "paramlora" and name.partition(".")[0] in ABOVE:
                yield node.lineno, name


def broken(root: Path, layers: Layers) -> list[str]:
    """Return each import of the package `root` that its layers do not allow, and where it is."""
    found = []
    for path in sorted(set(root.rglob("*.py")) - {root / "__init__.py"}):
        part = Path(path.relative_to(root).parts[0]).stem
        allowed = layers.get(part, set()) | {part}
        for line, name in imports(path, root):
            if not any(f"{name}.".startswith(f"{entry}.") for entry in allowed):
                found.append(f"{path.relative_to(root.parent)}:{line} imports {name}")
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_follow_the_layers(package: str) -> None:
    """Each folder imports only what its layer allows; the imports inside functions count too."""
    assert broken(ROOT / package, PACKAGES[package]) == []


@pytest.mark.parametrize("package", PACKAGES)
def test_every_folder_has_a_layer(package: str) -> None:
    """The table names each folder and file of the package, and nothing else."""
    parts = {p.relative_to(ROOT / package).parts[0] for p in (ROOT / package).rglob("*.py")}
    assert {Path(part).stem for part in parts} - {"__init__"} == set(PACKAGES[package])


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("from ..digits.data import Data", "digits.data.Data"),
        ("from .. import digits", "digits"),
        ("from experiments import text", "text"),
        ("import experiments.text.study as study", "text.study"),
        ("def later():\n    from ..digits import data", "digits.data"),
    ],
)
def test_a_broken_direction_is_found(tmp_path: Path, line: str, name: str) -> None:
    """Every way of writing an import that is not allowed is reported with its place."""
    folder = tmp_path / "experiments" / "harness"
    folder.mkdir(parents=True)
    text = f"import paramlora as pl\nfrom .settings import StudyError\n{line}\n"
    (folder / "planted.py").write_text(text)
    (said,) = broken(tmp_path / "experiments", EXPERIMENTS)
    assert said.startswith("experiments/harness/planted.py:")
    assert said.endswith(f" imports {name}")


@pytest.mark.parametrize("line", ["import paramlora", "import experiments.digits"])
def test_a_library_that_imports_itself_or_a_study(tmp_path: Path, line: str) -> None:
    """A file of paramlora imports neither the whole package nor what is built on it."""
    (tmp_path / "paramlora" / "kinds").mkdir(parents=True)
    (tmp_path / "paramlora" / "kinds" / "planted.py").write_text(f"{line}\n")
    assert len(broken(tmp_path / "paramlora", PARAMLORA)) == 1


def test_one_file_of_a_folder_can_be_allowed(tmp_path: Path) -> None:
    """An entry with a dot allows that file and not the folder around it."""
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "file.py").write_text(
        "from ..two.spec import Spec\nfrom ..two import spec\nfrom ..two import other\n"
    )
    said = broken(tmp_path, {"one": {"two.spec"}})
    assert [line.split(" ")[-1] for line in said] == ["two.other"]
