"""docs/format.md describes the files that `save` writes and what `load` refuses."""

import json
import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import paramlora as pl
from paramlora.files import metadata
from tests.artefacts.make import HERE

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "format.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
TYPES = {"integer": int, "string": str, "object": dict, "number": (int, float), "array": list}
FILES = sorted((HERE / str(metadata.VERSION)).iterdir())

Content = dict[str, Any]
Tensors = dict[str, Tensor]


def table(heading: str) -> list[list[str]]:
    """Return the rows of the table whose first row begins with a heading."""
    _, _, rest = PAGE.partition(f"\n| {heading} |")
    rows = rest.partition("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows]


def read(path: Path) -> tuple[Content, Content]:
    """Read a file by the program of the page."""
    names: dict[str, Any] = {}
    exec(PYTHON[1], names)
    return names["read"](path)


def save_example(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Run the example of the page, and return the file that it writes."""
    monkeypatch.chdir(folder)
    exec(PYTHON[0], {})
    return folder / "digits.safetensors"


def test_metadata(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The example writes the JSON text of the page, and the header has two entries."""
    path = save_example(tmp_path, monkeypatch)
    content, tensors = read(path)
    (shown,) = re.findall(r"^```json\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    base = {key: f"{text.partition(' ')[0]} …" for key, text in content["base"].items()}
    assert json.loads(shown) == {**content, "base": base, "digest": "…"}
    assert list(json.loads(shown)["sites"]["0.weight"]["fields"]) == [
        *content["sites"]["0.weight"]["fields"]
    ]
    assert set(tensors) == {"0.weight.A", "0.weight.B"}
    header = path.read_bytes()
    size = int.from_bytes(header[:8], "little")
    assert set(json.loads(header[8 : 8 + size])["__metadata__"]) == {"format", "paramlora"}


@pytest.mark.parametrize(
    ("heading", "parts"), [("entry", metadata._FILE), ("entry of a site", metadata._SITE)]
)
def test_entries(heading: str, parts: dict[str, Any]) -> None:
    """The tables have the entries that `load` demands, with their types."""
    assert {name.strip("`"): TYPES[kind] for name, kind, _ in table(heading)} == parts


def test_factors() -> None:
    """The table of factors has each kind, with the names that its files have."""
    stored: dict[str, set[str]] = defaultdict(set)
    for path in FILES:
        content, tensors = read(path)
        for key in tensors:
            site, _, factor = key.rpartition(".")
            stored[content["sites"][site]["kind"]].add(factor)
    listed = {kind.strip("`"): names.partition(" if `init`")[0] for kind, names in table("kind")}
    assert {kind: set(re.findall(r"\b[A-Za-z]\d?\b", names)) for kind, names in listed.items()} == {
        kind: {*names} | ({"B1", "A1", "B2", "A2"} if kind == "LoKr" else set())
        for kind, names in stored.items()
    }


def test_constants() -> None:
    """The factors A0 and B0 belong to the inits that the page names."""
    (row,) = (names for kind, names in table("kind") if kind == "`LoRA`")
    for init in re.findall(r'"([a-z]+)"', row):
        assert pl.LoRA(2, init=init).constants == ("A0", "B0")
    (refused,) = (str(e) for e in [error_of(lambda: pl.LoRA(2, init="no"))])
    others = (
        set(re.findall(r"'([a-z/_]+)'", refused)) - set(re.findall(r'"([a-z]+)"', row)) - {"no"}
    )
    assert all(pl.LoRA(2, init=init).constants == () for init in others)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_digest(path: Path) -> None:
    """The program of the page reads each stored file, and finds its digest."""
    content, tensors = read(path)
    assert content["version"] == metadata.VERSION
    assert {key: tuple(entry["shape"]) for key, entry in tensors.items()} == {
        key: tuple(tensor.shape) for key, tensor in load_file(path).items()
    }


def test_versions() -> None:
    """The table of versions ends with the version that `save` writes."""
    assert [int(version) for version, _ in table("version")] == [*range(1, metadata.VERSION + 1)]


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3))


def rewritten(change: Callable[[Tensors, Content], Any], *, honest: bool = True) -> Any:
    """Return a function that changes a file, by default with a new digest."""

    def write(path: Path) -> None:
        content, _ = read(path)
        tensors = load_file(path)
        digest = metadata.digest_of(tensors, content)
        change(tensors, content)
        content["digest"] = metadata.digest_of(tensors, content) if honest else digest
        save_file(tensors, path, {"paramlora": json.dumps(content)})

    return write


def site(content: Content) -> Content:
    return content["sites"]["0.weight"]


def at_other_path(tensors: Tensors, content: Content) -> None:
    content["sites"]["9.weight"] = content["sites"].pop("0.weight")


def cast(tensors: Tensors, content: Content) -> None:
    tensors["0.weight.A"] = tensors["0.weight.A"].to(torch.int8)


# How to make each file of the table, in its order.
REFUSED: dict[str, Callable[[Path], Any]] = {
    "does not exist": lambda path: path.unlink(),
    "is cut off": lambda path: path.write_bytes(path.read_bytes()[:50]),
    "was written by another": lambda path: save_file({"a": torch.ones(1)}, path),
    "has a later format": rewritten(lambda t, c: c.update(version=metadata.VERSION + 1)),
    "lacks an entry": rewritten(lambda t, c: site(c).pop("kind")),
    "has a version below 1": rewritten(lambda t, c: c.update(version=0)),
    "has a strength": rewritten(lambda t, c: site(c).update(strength=float("inf"))),
    "has a kind": rewritten(lambda t, c: site(c).update(kind="Quantum")),
    "has a field": rewritten(lambda t, c: site(c)["fields"].update(color="red")),
    "adapts a tensor": rewritten(at_other_path),
    "belongs to a tensor": rewritten(lambda t, c: site(c).update(shape=[4, 3])),
    "has missing": rewritten(lambda t, c: t.pop("0.weight.A")),
    "has tensors of integers": rewritten(cast),
    "does not match": rewritten(lambda t, c: t["0.weight.A"].add_(1), honest=False),
    "has NaN": rewritten(lambda t, c: t["0.weight.A"].fill_(float("nan"))),
}


def error_of(call: Callable[[], Any]) -> Exception:
    try:
        call()
    except Exception as error:
        return error
    raise AssertionError("it did not raise")


@pytest.mark.parametrize(("made", "row"), [*zip(REFUSED, table("the file"), strict=True)])
def test_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: str, row: list[str]
) -> None:
    """Each file of the table is refused with the words of the table."""
    cause, says = row
    assert cause.startswith(made)
    path = save_example(tmp_path, monkeypatch)
    REFUSED[made](path)
    error = error_of(lambda: pl.load(model(), path))
    words = re.findall(r"`([^`]+)`", says)
    assert str(path) in str(error)
    assert words[0] in str(error) if words else type(error).__name__ in says
    if "finite=False" in words:
        with pytest.warns(UserWarning, match=words[0]):
            pl.load(model(), path, finite=False)


def test_other_entries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other entries are ignored, and a missing field takes its default."""

    def change(tensors: Tensors, content: Content) -> None:
        content["note"] = site(content)["note"] = "mine"
        del site(content)["fields"]["dropout"]

    path = save_example(tmp_path, monkeypatch)
    rewritten(change)(path)
    assert pl.load(model(), path).sites[0].scale == 2.0
