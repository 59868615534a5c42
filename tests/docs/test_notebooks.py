"""The notebooks run from top to bottom, and so do the answers to their exercises."""

import re
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

support = pytest.importorskip("tests.support.notebooks")
nbformat = pytest.importorskip("nbformat")
ipython = pytest.importorskip("IPython.core.inputtransformer2")
code_cells = support.code_cells

NOTEBOOKS = sorted((support.ROOT / "notebooks").glob("*.ipynb"))
QUICKSTART, STORY = NOTEBOOKS[0], NOTEBOOKS[2]
ON_EXPERIMENTS = NOTEBOOKS[2:]  # they import from `experiments`, which only a clone has
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Start a kernel in the small mode, without MNIST and with few steps.

    All notebooks run in it one after the other, because a kernel takes seconds to import torch.
    """
    with support.kernel(tmp_path_factory.mktemp("kernel"), PARAMLORA_SMALL="1") as manager:
        yield manager


def run(notebook: Any, manager: Any, folder: Path) -> str:
    """Run a notebook in an empty folder and without names of others; return what it prints."""
    folder.mkdir()
    support.execute(notebook, manager, f"%reset -f\n%cd -q {folder}")
    return printed(notebook)


def printed(notebook: Any) -> str:
    """Return the text of all outputs."""
    outputs = [output for cell in code_cells(notebook) for output in cell["outputs"]]
    return "\n".join(o.get("text") or o["data"]["text/plain"] for o in outputs)


def answers(notebook: Any) -> list[Any]:
    """Return the code of the folded answers as cells."""
    texts = (cell["source"] for cell in notebook.cells if cell["cell_type"] == "markdown")
    folded = re.findall(r"<details>.*?</details>", "\n".join(texts), re.DOTALL)
    code = re.findall(r"```python\n(.*?)```", "\n".join(folded), re.DOTALL)
    return [nbformat.v4.new_code_cell(text) for text in code]


@pytest.mark.thorough
@each_notebook
def test_notebook(path: Path, tmp_path: Path, small: Any) -> None:
    """Each notebook and the answers to its exercises run without an error, in an empty folder."""
    notebook = nbformat.read(path, as_version=4)
    found = answers(notebook)
    assert len(found) >= 2
    notebook.cells += found
    if path == STORY:
        return check_slider_and_figure(notebook, small, tmp_path / "work")
    text = run(notebook, small, tmp_path / "work")
    if path == QUICKSTART:
        # A strength chosen on validation images makes fewer mistakes on test images than the base.
        (base, chosen) = (
            re.search(rf"^{row} .* (\d+)$", text, re.MULTILINE) for row in ("base", r"λ = 0\.\d")
        )
        assert base
        assert chosen
        assert int(chosen[1]) < int(base[1])
    return None


def check_slider_and_figure(story: Any, small: Any, folder: Path) -> None:
    """The story runs to its end, with a slider for λ, or a figure if ipywidgets is missing."""
    (slider,) = (cell for cell in story.cells if "SelectionSlider" in cell["source"])
    hide = nbformat.v4.new_code_cell("sys.modules['ipywidgets'] = None  # cannot be imported")
    without = nbformat.v4.new_code_cell(slider["source"])
    story.cells += [hide, without]
    run(story, small, folder)
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


@each_notebook
def test_saved_outputs(path: Path) -> None:
    """The saved outputs are those of a clean run, in order, without paths of a machine."""
    notebook = nbformat.read(path, as_version=4)
    cells = code_cells(notebook)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert all(o.get("name") != "stderr" and o["output_type"] != "error" for o in outputs)
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not re.search(r"(?<![\w.])/\w+/", printed(notebook)), "an absolute path in the outputs"
    assert path.stat().st_size < 300_000
    assert "SMALL" not in path.read_text(encoding="utf-8") or "data: MNIST" in printed(notebook)


def test_notebooks_are_linked() -> None:
    """Each notebook links to all others at its top, and at its end to the previous and the next."""
    texts = [nbformat.read(path, as_version=4).cells for path in NOTEBOOKS]
    links = [
        [set(re.findall(r"\((\d[\w-]+\.ipynb)\)", cells[place]["source"])) for place in (0, -1)]
        for cells in texts
    ]
    names = {path.name for path in NOTEBOOKS}
    for path, (top, _) in zip(NOTEBOOKS, links, strict=True):
        assert top == names - {path.name}
    for (one, (_, end)), (two, (_, end_two)) in pairwise(zip(NOTEBOOKS, links, strict=True)):
        assert two.name in end
        assert one.name in end_two


@each_notebook
@pytest.mark.parametrize("clone", [True, False], ids=["clone", "alone"])
def test_first_cell_installs_what_is_missing(
    path: Path, clone: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It installs the clone that the notebook lies in, else the package; or it needs a clone."""
    (tmp_path / "notebooks").mkdir()
    if clone:
        (tmp_path / "setup.cfg").touch()
    monkeypatch.chdir(tmp_path / "notebooks")
    monkeypatch.setattr("sys.path", [])
    found = {"experiments"} if clone else set()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name in found or None)
    called: list[str] = []

    class Shell:
        def run_line_magic(self, magic: str, line: str) -> None:
            called.append(f"{magic} {line}")

    cell = code_cells(nbformat.read(path, as_version=4))[0]
    code = ipython.TransformerManager().transform_cell(cell["source"])
    names = {"get_ipython": Shell}
    if not clone and path in ON_EXPERIMENTS:
        with pytest.raises(ModuleNotFoundError, match="clone of the repository"):
            exec(code, names)
        assert not called
        return
    exec(code, names)
    (line,) = called
    line = line.replace("$packages", str(names.get("packages"))).replace('"', "")
    wanted = "-e ..[experiments]" if clone else "paramlora "
    assert line.startswith(f"pip install -q {wanted}")
