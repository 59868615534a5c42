"""Run notebooks, in tests and to renew their saved outputs.

    python -m tests.support.notebooks notebooks/*.ipynb

runs each notebook in a kernel of its own, in its folder, and saves it with its outputs. The slider
of notebook 3 needs a running kernel, so ipywidgets is hidden and a figure is saved in its place.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import nbclient
import nbformat
from ipykernel import kernelspec

ROOT = Path(__file__).parents[2]


@contextmanager
def kernel(folder: Path, **environment: str) -> Iterator[Any]:
    """Start a kernel with this interpreter, whatever kernels the user has installed.

    Args:
        folder: an empty folder for the kernel's files.
        environment: further environment variables of the kernel.
    """
    kernelspec.write_kernel_spec(folder / "jupyter" / "kernels" / "python3")
    places = {
        "JUPYTER_PATH": str(folder / "jupyter"),
        "IPYTHONDIR": str(folder / "ipython"),
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    with patch.dict(os.environ, {**places, **environment}):
        client = nbclient.NotebookClient(nbformat.v4.new_notebook(), kernel_name="python3")
        with client.setup_kernel():
            yield client.km


def execute(notebook: Any, manager: Any, before: str) -> Any:
    """Run the code `before`, then the notebook; fill in its outputs, numbered from 1."""
    notebook.cells.insert(0, nbformat.v4.new_code_cell(before))
    client = nbclient.NotebookClient(notebook, timeout=600, km=manager, record_timing=False)
    client.execute(reset_kc=True)
    del notebook.cells[0]
    for number, cell in enumerate(code_cells(notebook), 1):
        cell["execution_count"] = number
        for output in cell["outputs"]:
            if output["output_type"] == "execute_result":
                output["execution_count"] = number
    return notebook


def code_cells(notebook: Any) -> list[Any]:
    """Return the cells that have code."""
    return [cell for cell in notebook.cells if cell["cell_type"] == "code"]


def renew(path: Path) -> None:
    """Run a notebook and save it with its outputs."""
    notebook = nbformat.read(path, as_version=4)
    metadata = dict(notebook.metadata)
    before = f"%cd -q {path.parent.resolve()}\nimport sys\nsys.modules['ipywidgets'] = None"
    with TemporaryDirectory() as folder, kernel(Path(folder)) as manager:
        execute(notebook, manager, before)
    notebook.metadata = metadata  # without the version of Python
    nbformat.write(notebook, path)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        renew(Path(name))
