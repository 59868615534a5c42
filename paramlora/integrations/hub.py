"""Push an adapter to the Hugging Face Hub with a model card, and load one from there.

    adapter.safetensors                                paramlora's own file
    adapter_config.json, adapter_model.safetensors     PEFT's folder, if it can express the adapter
    README.md                                          the model card

Base models are not uploaded.
"""

import os
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCardData, snapshot_download
from torch import nn

from ..errors import CheckpointError, TargetError
from ..files.checkpoint import load, save
from ..peft.disk import CONFIG, TENSORS
from ..peft.folder import load_peft, save_peft
from ..site.survey import Survey
from ..verbs.summary import Summary, summary
from ..wrappers import inner
from .trained import FILE

CARD = "README.md"


def push_to_hub(
    model: nn.Module,
    repo_id: str,
    name: str | None = None,
    *,
    base: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    **upload: Any,
) -> Any:
    """Upload an adapter to a repository of the Hub, which is created if it does not exist.

    Args:
        model: a module with adapters.
        repo_id: the repository, "user/name".
        name: the adapter; by default the only one.
        base: the base's repository, for the card and for PEFT; by default the one that a
            transformers model was loaded from.
        private, token: as for `HfApi.create_repo`.
        **upload: as for `HfApi.upload_folder`, such as `commit_message` and `revision`.

    Returns:
        The result of `HfApi.upload_folder`.

    Raises:
        As `paramlora.save`. Nothing is uploaded then.
    """
    with tempfile.TemporaryDirectory() as folder:
        write_folder(model, folder, name, base=base, repo_id=repo_id)
        api = HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        # PEFT's files of an earlier adapter go, if there are none of this one.
        upload = {"delete_patterns": [CONFIG, TENSORS]} | upload
        return api.upload_folder(repo_id=repo_id, folder_path=folder, **upload)


def from_hub(
    model: nn.Module,
    repo_id: str,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    **options: Any,
) -> Summary:
    """Load an adapter from a repository of the Hub, by `paramlora.load` or `load_peft`.

    paramlora's file is used if there is one, else PEFT's folder.

    Args:
        model: the base that the adapter is for.
        repo_id: the repository, or a local folder with the same files.
        revision, token: as for `snapshot_download`.
        **options: as for `load` or `load_peft`, such as `name` and `activate`. Without a name,
            paramlora's file has its own, and the adapter of PEFT's folder is "default".

    Returns:
        The model's summary.

    Raises:
        CheckpointError: the repository has neither; or as `load` and `load_peft`.
    """
    folder = Path(repo_id)
    if not folder.is_dir():
        where: dict[str, Any] = {"revision": revision, "token": token}
        folder = Path(snapshot_download(repo_id, allow_patterns=[FILE, CONFIG, TENSORS], **where))
    if (folder / FILE).exists():
        return load(model, folder / FILE, **options)
    if not (folder / CONFIG).exists():
        raise CheckpointError(f"{repo_id} has no {FILE} and no {CONFIG}; is it an adapter?")
    if options.pop("check_base", False):
        raise CheckpointError(f"{repo_id} has PEFT's files alone, which do not describe their base")
    return load_peft(model, folder, **options)


def write_folder(
    model: nn.Module,
    folder: str | os.PathLike[str],
    name: str | None = None,
    *,
    base: str | None = None,
    repo_id: str = "user/name",
) -> None:
    """Write the files that `push_to_hub` uploads to an existing folder."""
    name, path = Survey(model).one(name), Path(folder)
    save(model, path / FILE, name)
    for file in (CONFIG, TENSORS):  # of an earlier adapter
        (path / file).unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(dir=path) as inside:
        try:
            save_peft(model, Path(inside) / "peft", name, base=base)
            for file in (CONFIG, TENSORS):
                os.replace(Path(inside) / "peft" / file, path / file)
            refused = None
        except TargetError as error:
            refused = str(error)
    (path / CARD).write_text(card(model, name, repo_id, base, refused), encoding="utf-8")


def card(
    model: nn.Module, name: str, repo_id: str, base: str | None, refused: str | None = None
) -> str:
    """Return the model card of an adapter; `refused` is the reason if PEFT cannot load it."""
    known = getattr(getattr(inner(model), "config", None), "name_or_path", None)
    base = base or (known if known and not os.path.exists(known) else None)
    rows = [row for row in summary(model).sites if row.adapter == name]
    kinds = sorted({row.kind for row in rows})
    tags = ["paramlora", "adapter", *map(str.lower, kinds), *([] if refused else ["peft"])]
    front = ModelCardData(base_model=base, library_name="paramlora", tags=tags).to_yaml()
    what = f"An adapter ({', '.join(kinds)}) of {len(rows)} tensors"
    of = f" of [{base}](https://huggingface.co/{base})" if base else ""
    theirs = f"PEFT cannot load it: {refused}." if refused else f"PEFT too:\n\n{_PEFT % repo_id}"
    title = repo_id.rpartition("/")[2]
    return f"---\n{front}\n---\n\n# {title}\n\n{what}{of}.\n\n{_OURS % repo_id}\n\n{theirs}\n"


_OURS = """```python
from paramlora.integrations import hub

hub.from_hub(model, "%s")  # model: the base
```"""
_PEFT = """```python
from peft import PeftModel

PeftModel.from_pretrained(model, "%s")
```"""
