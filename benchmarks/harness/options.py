"""Options that several subcommands take."""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch

from .contestants import CONTESTANTS

Add = Callable[..., argparse.Action]  # `add_argument` of a group


def add_rounds(add: Add, default: int, help: str) -> None:
    """Add `--rounds`; `help` says what one round does."""
    add("--rounds", type=int, default=default, help=help)


def add_clock(add: Add) -> None:
    """Add `--clock`."""
    text = "processor: CPU time of this process, for a machine that others use; excludes GPU time"
    add("--clock", choices=["wall", "processor"], default="wall", help=text)


def add_device(add: Add) -> None:
    """Add `--device`."""
    default = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", default=default, help="cpu or cuda")


def add_sizes(add: Add, batch: int, of: str) -> None:
    """Add `--batch`, `--length` and `--rank`; `of` names the items of a batch."""
    add("--batch", type=int, default=batch, help=of)
    add("--length", type=int, default=1024, help="tokens per sequence")
    add("--rank", type=int, default=16, help="rank r of the adapters")


def add_only(add: Add, default: list[str] | None = None) -> None:
    """Add `--only`; `default` lists the contestants to measure without it, None for all."""
    names = [contestant.name for contestant in CONTESTANTS]
    text = f"contestants beside the floor: {', '.join(map(repr, names[1:]))}"
    if default is None:
        text += " (default: all)"
    add("--only", nargs="+", choices=names, default=default, metavar="NAME", help=text)


def add_folder(add: Add) -> None:
    """Add `--out`, a folder."""
    text = "folder; rows are appended to results.jsonl in it"
    add("--out", type=Path, default=Path("runs/benchmarks"), metavar="DIR", help=text)


def add_file(add: Add, default: str) -> None:
    """Add `--out`, a file."""
    text = "JSON Lines file that rows are appended to"
    add("--out", type=Path, default=Path(default), metavar="FILE", help=text)
