"""The command line: `python -m paramlora`, or `paramlora`."""

import argparse
import importlib.util
import platform
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import __version__
from .errors import ParamloraError
from .files.checkpoint import load, save
from .integrations.diffusers import load_diffusers, save_diffusers
from .native.load import state
from .peft.folder import load_peft, save_peft
from .site.survey import Survey
from .skeleton import skeleton
from .verbs.summary import Summary

PACKAGES = ("torch", "safetensors", "transformers", "peft", "diffusers", "accelerate", "lightning")
EXAMPLES = """examples:
  paramlora summary digits.safetensors
  paramlora convert digits.safetensors folder-for-peft --model gpt2
  paramlora convert folder-of-peft digits.safetensors --name digits
exit codes: 0, 1 if audit finds something, 2 after an error, such as a damaged file"""
# How each format is written.
FORMATS: dict[str, Any] = {"paramlora": save, "peft": save_peft, "diffusers": save_diffusers}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return 0, 1 if an audit has findings, or 2 if it cannot be carried out."""
    options = vars(parser().parse_args(arguments))
    try:
        if "path" in options and not options["path"].exists():
            raise FileNotFoundError(f"{options['path']} does not exist: pass a file or a folder")
        return options.pop("command")(**options)
    except (ParamloraError, OSError, ValueError, TypeError, RuntimeError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    top = argparse.ArgumentParser(
        prog="paramlora",
        description="Look at adapters in files, check and convert them. Without a command: the "
        "versions, the native extension, and the devices.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.set_defaults(command=info)
    top.add_argument("--version", action="version", version=f"paramlora {__version__}")
    commands = top.add_subparsers(metavar="COMMAND")
    for command, name, what in (
        (show, "summary", "print the sites of an adapter"),
        (check, "audit", "find updates that are zero or not finite; exit with 1 if there are any"),
        (convert, "convert", "write an adapter in the other format"),
    ):
        one = commands.add_parser(name, help=what, description=what)
        one.add_argument("path", type=Path, help="a file of paramlora.save, or a PEFT folder")
        one.add_argument("--model", help="the base: a folder or name of a transformers model")
        one.set_defaults(command=command)
    one.add_argument("out", type=Path, help="the file or folder to write or to replace")
    one.add_argument("--to", choices=FORMATS, help="its format [the other one]")
    one.add_argument("--from", dest="source", choices=["diffusers"], help="if PATH is of diffusers")
    component = "the model in a pipeline of diffusers [unet]"
    one.add_argument("--component", default="unet", help=component)
    one.add_argument("--name", default="default", help="the name of one without a name [default]")
    return top


def info() -> int:
    """Print versions, the state of the native extension, and devices."""
    print(f"paramlora    {__version__}\npython       {platform.python_version()}")
    for package in PACKAGES:
        if importlib.util.find_spec(package):
            print(f"{package:<12} {metadata.version(package)}")
    print(f"extension    {state()}")
    print(f"device       cpu, {torch.get_num_threads()} threads")
    for index in range(torch.cuda.device_count()):
        print(f"device       cuda:{index}, {torch.cuda.get_device_name(index)}")
    return 0


def show(path: Path, model: str | None) -> int:
    """Print the sites of the adapter in a file."""
    found = str(_load(_base(path, model), path, finite=False))
    # Without --model the lines below the table would be about the adapted tensors alone.
    print(found if model else found.rpartition("\ntrainable ")[0])
    return 0


def check(path: Path, model: str | None) -> int:
    """Check the adapter in a file, and print what is wrong; return 1 if anything is."""
    base, findings = _base(path, model), list[str]()
    rows = _load(base, path, finite=False).sites
    for site, _, _, factors in Survey(base).parts():
        term, tensors = factors.low_rank(), factors.tensors
        wrong = [key for key, tensor in tensors.items() if not tensor.isfinite().all()]
        findings += [f"{site}: {key} has values that are not finite" for key in wrong]
        if term is not None and not (term.A.any() and term.B.any()):
            findings.append(f"{site}: the update is zero, as before any training")
    print("\n".join(findings) or f"{path}: {len(rows)} sites, whole and finite")
    return 1 if findings else 0


def convert(
    path: Path,
    out: Path,
    *,
    to: str | None,
    source: str | None,
    component: str,
    name: str,
    model: str | None,
) -> int:
    """Write the adapter of a file in another format."""
    to = to or ("paramlora" if source or path.is_dir() else "peft")
    if to == "peft" and out.suffix == ".safetensors":
        raise ValueError(f"PEFT's format is a folder, and {out} is the name of a file; see --to")
    if to != "paramlora" and not model:
        # A Linear, transformers' Conv1D and an Embedding all have a matrix, and need other files.
        raise ValueError(f"writing the format of {to} needs the types of the layers: pass --model")
    base = _base(path, model, component if source else "")
    if source:
        sites = load_diffusers(base, path, name=name, component=component).sites
    else:
        sites = _load(base, path, name).sites
    FORMATS[to]({component: base} if to == "diffusers" else base, out, sites[0].adapter)
    print(f"{out}: adapter {sites[0].adapter!r} with {len(sites)} sites, in the format of {to}")
    return 0


def _load(model: nn.Module, path: Path, name: str = "default", **options: Any) -> Summary:
    """Load a file into a model by its format."""
    if path.is_dir():
        return load_peft(model, path, name=name, **options)
    return load(model, path, **options)


def _base(path: Path, model: str | None, component: str = "") -> nn.Module:
    """Return a transformers model in the class of its checkpoint, or a skeleton for the file."""
    if model is None:
        return skeleton(path, component)
    import transformers

    config = transformers.AutoConfig.from_pretrained(model)
    (name, *_) = config.architectures or ["AutoModel"]
    if not hasattr(transformers, name):
        raise ValueError(f"{model} needs {name}, which transformers does not have: use Python")
    return getattr(transformers, name).from_pretrained(model)


if __name__ == "__main__":
    sys.exit(main())
