"""The notebooks run from top to bottom."""

import os
import re
from pathlib import Path
from typing import Any

import pytest

nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")
kernelspec = pytest.importorskip("ipykernel.kernelspec")

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
STORY = ROOT / "notebooks" / "3-forgetting.ipynb"  # has saved outputs and a slider


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Start kernels in the small mode, without MNIST and with few steps; return a module folder."""
    # The kernel is this interpreter, whatever kernels the user has installed.
    kernelspec.write_kernel_spec(tmp_path / "jupyter" / "kernels" / "python3")
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    modules = tmp_path / "modules"
    modules.mkdir()
    monkeypatch.setenv("PYTHONPATH", f"{modules}{os.pathsep}{ROOT}", prepend=os.pathsep)
    monkeypatch.setenv("PARAMLORA_SMALL", "1")
    return modules


def execute(path: Path, folder: Path) -> Any:
    """Run a notebook in an empty folder, and return it with the outputs of its cells."""
    folder.mkdir()
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    ).execute()
    return notebook


@pytest.mark.parametrize(
    "path", [path for path in NOTEBOOKS if path != STORY], ids=lambda path: path.name
)
def test_notebook(path: Path, tmp_path: Path, small: Path) -> None:
    """Each notebook runs to its end without an error, in an empty folder."""
    execute(path, tmp_path / "work")


@pytest.mark.parametrize("installed", [True, False], ids=["ipywidgets", "no ipywidgets"])
def test_slider_or_figure(installed: bool, tmp_path: Path, small: Path) -> None:
    """The story runs to its end, with a slider for λ, or a figure if ipywidgets is missing."""
    if installed:
        pytest.importorskip("ipywidgets")
    else:
        (small / "ipywidgets.py").write_text("raise ImportError('as if it were not installed')")
    story = execute(STORY, tmp_path / "work")
    (slider,) = (cell for cell in story.cells if "SelectionSlider" in cell["source"])
    kinds = {kind for output in slider["outputs"] for kind in output.get("data", {})}
    assert ("application/vnd.jupyter.widget-view+json" in kinds) == installed
    assert ("image/png" in kinds) == (not installed)
    # The output of the slider goes to a widget, and so would an error.
    states = story.metadata.get("widgets", {}).values()
    models = [model["state"] for state in states for model in state["state"].values()]
    drawn = [output for model in models for output in model.get("outputs", ())]
    assert ["image/png" in output.get("data", {}) for output in drawn] == [True] * installed


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_saved_outputs(path: Path) -> None:
    """The story has outputs of a clean run on MNIST, in order; the other notebooks have none."""
    cells = [c for c in nbformat.read(path, as_version=4).cells if c["cell_type"] == "code"]
    counts, outputs = (
        [c["execution_count"] for c in cells],
        [o for c in cells for o in c["outputs"]],
    )
    if path != STORY:
        assert not outputs
        assert set(counts) == {None}
        return
    assert counts == list(range(1, len(cells) + 1))
    text = "\n".join(o.get("text") or o["data"]["text/plain"] for o in outputs)
    assert "data: MNIST" in text
    assert not re.search(r"(?<![\w.])/\w+/", text), "an absolute path in the outputs"
    assert all(o.get("name") != "stderr" and o["output_type"] != "error" for o in outputs)
