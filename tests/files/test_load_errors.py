"""Files that do not fit or were changed: each error of `load` word by word, the model unchanged.

`[...]` in a message stands for words that do not come from paramlora.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import paramlora as pl
from paramlora import LoRA
from tests.support.helpers import A_NAME, LEAVE_OUT, refuses, refuses_file
from tests.support.models import Net, attached, half_merged, plain


@dataclass(frozen=True)
class Typed(pl.Delta):
    """A kind with a field that JSON cannot represent."""

    dtype: torch.dtype = torch.float32


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file with an adapter "digits" for the model of `attached`, with other values."""
    model = attached()
    with torch.no_grad():
        for parameter in pl.parameters(model, "digits"):
            parameter.mul_(-3)
    pl.scale(model, 0.5, "digits")
    pl.save(model, tmp_path / "digits.safetensors", "digits")
    return tmp_path / "digits.safetensors"


def contents(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    with safe_open(path, framework="pt") as opened:
        return {key: opened.get_tensor(key) for key in opened.keys()}, opened.metadata()  # noqa: SIM118


def rewrite(path: Path, change: Callable[[dict[str, Tensor], dict[str, Any]], Any]) -> None:
    """Change the tensors and the metadata of a file in place."""
    tensors, metadata = contents(path)
    content = json.loads(metadata["paramlora"])
    change(tensors, content)
    save_file(tensors, path, {**metadata, "paramlora": json.dumps(content)})


SITE = {"kind": "LoRA", "fields": {"rank": 2}, "strength": 1.0, "shape": [1, 1]}

# A change of a file, and the message of loading it.
CHANGES: dict[str, tuple[Callable[[dict[str, Tensor], dict[str, Any]], Any], str]] = {
    "a missing and an unexpected tensor": (
        lambda tensors, content: tensors.update({"fc1.weight.C": tensors.pop("fc1.weight.A")}),
        "{path} does not fit: missing fc1.weight.A; unexpected fc1.weight.C",
    ),
    "a tensor of another shape": (
        lambda tensors, content: tensors.update({"fc2.weight.A": torch.ones(3, 4)}),
        "{path} does not fit: fc2.weight.A: expected (2, 4), found (3, 4)",
    ),
    "a tensor for no site": (
        lambda tensors, content: content["sites"].pop("fc1.weight"),
        "{path} does not fit: unexpected fc1.weight.A, fc1.weight.B",
    ),
    "other numbers": (
        lambda tensors, content: tensors["fc2.weight.A"].add_(1),
        "{path} is damaged: its content does not match its digest; save the adapter again",
    ),
    "another alpha": (
        lambda tensors, content: content["sites"]["fc1.weight"]["fields"].update(alpha=64),
        "{path} is damaged: its content does not match its digest; save the adapter again",
    ),
    "another strength": (
        lambda tensors, content: content["sites"]["fc1.weight"].update(strength=0.25),
        "{path} is damaged: its content does not match its digest; save the adapter again",
    ),
    "a site that the model does not have": (
        lambda tensors, content: content["sites"].update(
            {"fc3.weight": content["sites"].pop("fc2.weight"), "h.0": {**SITE}}
        ),
        "{path} belongs to another model: it adapts fc3.weight, h.0, which this model "
        "does not have; did you mean fc2.weight, fc1.weight, emb.weight?",
    ),
    "a site of another shape": (
        lambda tensors, content: content["sites"]["fc2.weight"].update(shape=[10, 4]),
        "{path} belongs to another model: 'fc2.weight' has shape [10, 4] in the file and "
        "[3, 4] in this model",
    ),
    "a kind that does not fit the site": (
        lambda tensors, content: content["sites"].update({"fc1.bias": {**SITE, "shape": [4]}}),
        "{path} does not fit this model: cannot adapt 'fc1.bias' with LoRA: a low-rank update "
        f"needs two dimensions, it has 1; use Delta() {LEAVE_OUT}",
    ),
    "an unknown kind": (
        lambda tensors, content: content["sites"]["fc1.weight"].update(kind="Quantum"),
        "{path} has an adapter of kind 'Quantum' at 'fc1.weight', and no imported class of that "
        "name derives from Spec (there are [...]Delta, [...]LoRA[...]); import it",
    ),
    "a kind that is not a Spec": (
        lambda tensors, content: content["sites"]["fc1.weight"].update(kind="system"),
        "{path} has an adapter of kind 'system' at 'fc1.weight', and no imported class of that "
        "name derives from Spec (there are [...]); import it",
    ),
    "rank 0": (
        lambda tensors, content: content["sites"]["fc1.weight"]["fields"].update(rank=0),
        "{path} has settings for 'fc1.weight' that LoRA does not accept: rank must be a "
        "whole number of at least 1, got 0",
    ),
    "a rank of 10**30": (
        lambda tensors, content: content["sites"]["fc1.weight"]["fields"].update(rank=10**30),
        "{path} has settings for 'fc1.weight' that cannot create factors, LoRA(rank=1[...]): [...]",
    ),
    "an unknown setting": (
        lambda tensors, content: content["sites"]["fc1.weight"]["fields"].update(noise=0.1),
        "{path} has settings for 'fc1.weight' that LoRA does not accept: [...]'noise'[...]",
    ),
    "a newer format": (
        lambda tensors, content: content.update(version=2),
        "{path} has format version 2, and this paramlora reads versions up to 1; update paramlora",
    ),
    "a newer format with other keys": (
        lambda tensors, content: content.update(version=7, sites=None, digest=None),
        "{path} has format version 7, and this paramlora reads versions up to 1; update paramlora",
    ),
    "a version below 1": (
        lambda tensors, content: content.update(version=0),
        "{path} is damaged: its format version must be at least 1, found 0; save the adapter again",
    ),
    "a version that is no number": (
        lambda tensors, content: content.update(version=True),
        "{path} is damaged: its format version must be at least 1, found True; save the adapter "
        "again",
    ),
    "a version too large for a float": (
        lambda tensors, content: content.update(version=10**400),
        "{path} has format version 10000000000000000000, and this paramlora reads versions up to "
        "1; update paramlora",
    ),
    "an alpha too large for a float": (
        lambda tensors, content: content["sites"]["fc1.weight"]["fields"].update(alpha=10**400),
        "{path} has settings for 'fc1.weight' that LoRA does not accept: alpha must be a finite "
        "number or None, got 1000[...]",
    ),
    "a strength too large for a float": (
        lambda tensors, content: content["sites"]["fc1.weight"].update(strength=10**400),
        "{path} is damaged: the strength for 'fc1.weight' must be a finite number, found "
        f"1{'0' * 49}; save the adapter again",
    ),
    "a rank too large for a float": (
        lambda tensors, content: content["sites"]["fc1.weight"]["fields"].update(rank=10**400),
        "{path} has settings for 'fc1.weight' that cannot create factors, LoRA(rank=1000[...]: "
        "[...]",
    ),
    "a shape too large for a float": (
        lambda tensors, content: content["sites"]["fc1.weight"].update(shape=[10**400, 5]),
        "{path} belongs to another model: 'fc1.weight' has shape [1000[...], 5] in the file and "
        "[4, 5] in this model",
    ),
    "a strength of NaN": (
        lambda tensors, content: content["sites"]["fc1.weight"].update(strength=math.nan),
        "{path} is damaged: the strength for 'fc1.weight' must be a finite number, found nan; save "
        "the adapter again",
    ),
}


@pytest.mark.parametrize(("change", "message"), CHANGES.values(), ids=CHANGES.keys())
def test_changed_file(
    file: Path, change: Callable[[dict[str, Tensor], dict[str, Any]], Any], message: str
) -> None:
    """A file whose tensors or metadata were changed raises, and names file, key and shapes."""
    rewrite(file, change)
    refuses_file(file, message)


FILE_PARTS: dict[str, Any] = {"version": "1", "name": 1, "sites": [], "digest": 0}
SITE_PARTS: dict[str, Any] = {"kind": None, "fields": [], "strength": "1", "shape": 4}


@pytest.mark.parametrize("missing", [True, False], ids=["missing", "wrong"])
@pytest.mark.parametrize("part", [*FILE_PARTS, *SITE_PARTS])
def test_metadata_of_wrong_types(file: Path, part: str, missing: bool) -> None:
    """Metadata with a missing part, or a part of a wrong type, raises and names the part."""
    parts, place = FILE_PARTS, "its metadata 'paramlora'"
    if part in SITE_PARTS:
        parts, place = SITE_PARTS, "its metadata for 'fc1.weight'"

    def change(tensors: dict[str, Tensor], content: dict[str, Any]) -> None:
        holder = content if part in FILE_PARTS else content["sites"]["fc1.weight"]
        holder[part] = parts[part]
        if missing:
            del holder[part]

    rewrite(file, change)
    refuses_file(
        file,
        f"{{path}} is damaged: {place} must have {', '.join(map(repr, parts))}, and {part!r} is "
        "missing or of the wrong type in [...]; save the adapter again",
    )


INVALID_JSON = {
    "empty": "",
    "cut off": "{",
    "code": "pl.LoRA(2)",
    "too deep": "[" * 100_000,
    "too many digits": '{"version": ' + "9" * 5000 + "}",
}


@pytest.mark.parametrize("text", INVALID_JSON.values(), ids=INVALID_JSON.keys())
def test_metadata_that_is_not_json(file: Path, text: str) -> None:
    """Metadata that is not JSON, or is nested too deeply, raises."""
    tensors, metadata = contents(file)
    save_file(tensors, file, {**metadata, "paramlora": text})
    refuses_file(
        file,
        "{path} is damaged: its metadata 'paramlora' is not JSON ([...]); save the adapter again",
    )


@pytest.mark.parametrize("text", ["null", "5", '"digits"', "[]", "[1, 2]"])
def test_metadata_that_is_not_an_object(file: Path, text: str) -> None:
    """Metadata that is JSON but not an object raises."""
    tensors, metadata = contents(file)
    save_file(tensors, file, {**metadata, "paramlora": text})
    refuses_file(
        file,
        "{path} is damaged: its metadata 'paramlora' must have 'version', 'name', 'sites', "
        "'digest', and 'version' is missing or of the wrong type in [...]; save the adapter again",
    )


def with_lazy_head() -> nn.Module:
    model = Net()
    model.head = nn.LazyLinear(3)
    return model


def with_rank_3() -> nn.Module:
    model = plain()
    pl.attach(model, LoRA(rank=3), name="digits")
    return model


# A model, the name to load under, and the error of loading a good file into it.
MODELS: dict[str, tuple[Callable[[], nn.Module], str | None, type[Exception], str]] = {
    "a lazy layer": (
        with_lazy_head,
        None,
        pl.TargetError,
        "'head.weight' is lazy and has no shape yet; run one batch through the model first, and "
        "attach then",
    ),
    "other sites under the same name": (
        attached,
        "letters",
        pl.AdapterNameError,
        "adapter 'letters' is attached already, and its sites, kinds or ranks differ from those in "
        "{path} (fc1.weight, fc2.weight); pass another name=, or detach it first",
    ),
    "another rank under the same name": (
        with_rank_3,
        None,
        pl.AdapterNameError,
        "adapter 'digits' is attached already, and its sites, kinds or ranks differ from those in "
        "{path} (fc1.weight, fc2.weight); pass another name=, or detach it first",
    ),
    "a merged adapter": (
        half_merged,
        None,
        pl.StateError,
        "cannot load adapter 'digits' while it is merged; unmerge first",
    ),
    "an invalid name": (plain, "a.b", pl.AdapterNameError, f"'a.b' {A_NAME}"),
}


@pytest.mark.parametrize(("make", "name", "error", "message"), MODELS.values(), ids=MODELS.keys())
def test_model_or_name_that_does_not_fit(
    file: Path,
    make: Callable[[], nn.Module],
    name: str | None,
    error: type[Exception],
    message: str,
) -> None:
    """A good file raises if the model or the adapter of that name cannot take it."""
    refuses(make(), lambda m: pl.load(m, file, name=name), error, message.format(path=file))


def test_save_errors(tmp_path: Path) -> None:
    """Saving to an impossible path, or a spec that JSON cannot hold, writes nothing."""
    nowhere = tmp_path / "no" / "digits.safetensors"
    refuses(
        attached(),
        lambda m: pl.save(m, nowhere, "digits"),
        FileNotFoundError,
        f"cannot write {nowhere}: the folder {nowhere.parent} does not exist",
    )
    refuses(
        attached(),
        lambda m: pl.save(m, tmp_path, "digits"),
        IsADirectoryError,
        f"cannot write {tmp_path}: it is a folder; name a file in it",
    )
    model = plain()
    pl.attach(model, Typed(), "fc1", name="typed")
    refuses(
        model,
        lambda m: pl.save(m, tmp_path / "typed.safetensors", "typed"),
        TypeError,
        "cannot save adapter 'typed': a spec's fields must be numbers, strings, booleans or None "
        "([...]dtype[...])",
    )
    assert list(tmp_path.iterdir()) == []


def test_correct_call_after_errors(file: Path) -> None:
    """After refused calls the correct call works as on a fresh model."""
    model, other = plain(), plain()
    for call in (
        lambda: pl.attach(model, LoRA(2), "fc1.bias"),
        lambda: pl.load(model, file.parent),
        lambda: pl.merge(model),
    ):
        with pytest.raises(pl.ParamloraError, match=r"fc1|folder|no adapter"):
            call()
    pl.load(model, file)
    pl.load(other, file)
    assert pl.fingerprint(model) == pl.fingerprint(other)
    x = torch.randn(2, 5)
    assert torch.equal(model.get_submodule("fc1")(x), other.get_submodule("fc1")(x))
