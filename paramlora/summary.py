"""What is attached to a model, and a digest that proves that its base is untouched."""

import ctypes
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from .stack import BaseKeys, Site, below, sites


@dataclass(frozen=True)
class SiteSummary:
    """One adapter at one site: a row of the summary."""

    site: str
    adapter: str
    shape: tuple[int, ...]
    kind: str
    rank: int | None
    scale: float
    active: bool
    trainable: bool
    merged: bool
    parameters: int
    share: float
    note: str = ""


@dataclass(frozen=True)
class Summary:
    """The adapters of a model; prints as a table.

    Attributes:
        sites: a `SiteSummary` for each adapter at each site, in model order. Its `scale` is all
            that multiplies the update, strength times alpha/r; its `share` is the adapter's
            parameters over those of the adapted tensor.
        trainable: how many elements of the model require a gradient, the base's included.
        total: how many elements the base's parameters have, the adapters not counted.
    """

    sites: tuple[SiteSummary, ...]
    trainable: int
    total: int

    def __str__(self) -> str:
        share = f" ({self.trainable / self.total:.2%})" if self.total else ""
        end = f"trainable {self.trainable:,} of the base's {self.total:,}{share}"
        if not self.sites:
            return f"no adapters; {end}"
        head = (
            "site",
            "adapter",
            "shape",
            "kind",
            "rank",
            "scale",
            "active",
            "trainable",
            "merged",
            "parameters",
            "share",
            "",
        )
        rows = [head, *(_cells(row) for row in self.sites)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        return "\n".join([*lines, end])


def summary(model: nn.Module) -> Summary:
    """Return what is attached to a model, as a table to print and as data.

    >>> print(summary(nn.Linear(4, 3)))
    no adapters; trainable 15 of the base's 15 (100.00%)
    """
    rows, seen = [], set()
    for site in sites(model):
        if id(site.stack) not in seen:
            seen.add(id(site.stack))
            rows += [_row(site, name) for name in site.stack.factors]
    factors = {id(p) for site in sites(model) for p in site.stack.parameters()}
    return Summary(
        sites=tuple(rows),
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        total=sum(p.numel() for p in model.parameters() if id(p) not in factors),
    )


def fingerprint(model: nn.Module) -> str:
    """Return a digest of the base's parameters and buffers, adapters not counted.

    It is the same before adapters are attached, while they train, are switched, scaled or merged,
    and after they are gone: two equal ones prove that a base is untouched.

    Returns:
        SHA-256 over names, dtypes, shapes and bytes, as 64 hexadecimal digits.

    Raises:
        ValueError: a tensor is on the meta device and has no bytes.
    """
    digest = hashlib.sha256()
    for key, tensor in sorted(base_tensors(model), key=lambda item: item[0]):
        if tensor.is_meta:
            raise ValueError(f"{key!r} is on the meta device and has no bytes to digest")
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        _update(digest, tensor)
    return digest.hexdigest()


def base_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the base's parameters and buffers, tied ones each, under their original keys."""
    named = [*model.named_parameters(remove_duplicate=False)]
    named += model.named_buffers(remove_duplicate=False)
    keys = BaseKeys(model)
    for key, tensor in named:
        original = keys.original(key)
        if original is not None:
            yield original, keys.bits(key, tensor)


def _row(site: Site, name: str) -> SiteSummary:
    stack = site.stack
    factors = stack.factors[name]
    stored_shape = below(site.plist, stack).shape
    low_rank = factors.low_rank()
    parameters = sum(p.numel() for p in factors.parameters())
    wasted = factors.spec.rank is not None and factors.spec.rank > min(
        stored_shape[0], stored_shape[1:].numel()
    )
    notes = ["rank above the smaller side"] if wasted else []
    notes += [f"tied: {', '.join(stack.tied)}"] if stack.tied else []
    return SiteSummary(
        site=site.path,
        adapter=name,
        shape=tuple(stored_shape),
        kind=type(factors.spec).__name__,
        rank=factors.spec.rank,
        scale=float(factors.strength if low_rank is None else low_rank.scale),
        active=name in stack.active,
        trainable=any(p.requires_grad for p in factors.parameters()),
        merged=name in stack.merged,
        parameters=parameters,
        share=parameters / stored_shape.numel(),
        note="; ".join(notes),
    )


def _cells(row: SiteSummary) -> tuple[str, ...]:
    yes = {True: "yes", False: "no"}
    return (
        row.site,
        row.adapter,
        "×".join(map(str, row.shape)),
        row.kind,
        "-" if row.rank is None else str(row.rank),
        f"{row.scale:g}",
        yes[row.active],
        yes[row.trainable],
        yes[row.merged],
        f"{row.parameters:,}",
        f"{row.share:.2%}",
        row.note,
    )


def _update(digest: "hashlib._Hash", tensor: Tensor) -> None:
    """Feed a tensor's bytes in row-major order, without numpy and without a copy on the CPU."""
    tensor = tensor.detach().contiguous().cpu()
    size = tensor.numel() * tensor.element_size()
    if size:
        digest.update((ctypes.c_char * size).from_address(tensor.data_ptr()))
