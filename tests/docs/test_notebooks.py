"""The notebooks run from top to bottom."""

import os
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")
kernelspec = pytest.importorskip("ipykernel.kernelspec")

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
STORY = ROOT / "notebooks" / "3-forgetting.ipynb"  # has saved outputs and a slider


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Start a kernel in the small mode, without MNIST and with few steps.

    All notebooks run in it one after the other, because a kernel takes seconds to import torch.
    """
    folder = tmp_path_factory.mktemp("kernel")
    # The kernel is this interpreter, whatever kernels the user has installed.
    kernelspec.write_kernel_spec(folder / "jupyter" / "kernels" / "python3")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JUPYTER_PATH", str(folder / "jupyter"))
        patch.setenv("IPYTHONDIR", str(folder / "ipython"))
        patch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
        patch.setenv("PARAMLORA_SMALL", "1")
        client = nbclient.NotebookClient(nbformat.v4.new_notebook(), kernel_name="python3")
        with client.setup_kernel():
            yield client.km


def execute(notebook: Any, kernel: Any, folder: Path) -> Any:
    """Run a notebook in an empty folder and without names of others; fill in its outputs."""
    folder.mkdir()
    begin = nbformat.v4.new_code_cell(f"%reset -f\n%cd -q {folder}")
    notebook.cells.insert(0, begin)
    client = nbclient.NotebookClient(notebook, timeout=600, km=kernel)
    client.execute()
    client.kc.stop_channels()
    return notebook


@pytest.mark.slow
@pytest.mark.parametrize(
    "path", [path for path in NOTEBOOKS if path != STORY], ids=lambda path: path.name
)
def test_notebook(path: Path, tmp_path: Path, kernel: Any) -> None:
    """Each notebook runs to its end without an error, in an empty folder."""
    execute(nbformat.read(path, as_version=4), kernel, tmp_path / "work")


@pytest.mark.slow
def test_slider_or_figure(tmp_path: Path, kernel: Any) -> None:
    """The story runs to its end, with a slider for λ, or a figure if ipywidgets is missing."""
    story = nbformat.read(STORY, as_version=4)
    (slider,) = (cell for cell in story.cells if "SelectionSlider" in cell["source"])
    hide = nbformat.v4.new_code_cell("sys.modules['ipywidgets'] = None  # cannot be imported")
    without = nbformat.v4.new_code_cell(slider["source"])
    story.cells += [hide, without]
    execute(story, kernel, tmp_path / "work")
    assert kinds_of(without) == {"image/png", "text/plain"}
    if find_spec("ipywidgets") is None:
        return
    assert "application/vnd.jupyter.widget-view+json" in kinds_of(slider)
    assert "image/png" not in kinds_of(slider)
    # The output of the slider goes to a widget, and so would an error.
    states = story.metadata.get("widgets", {}).values()
    models = [model["state"] for state in states for model in state["state"].values()]
    drawn = [output for model in models for output in model.get("outputs", ())]
    assert ["image/png" in output.get("data", {}) for output in drawn] == [True]


def kinds_of(cell: Any) -> set[str]:
    """Return the MIME types of a cell's outputs."""
    return {kind for output in cell["outputs"] for kind in output.get("data", {})}


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
