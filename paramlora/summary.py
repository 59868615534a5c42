"""What is attached to a model: as a table to print, and as data."""

from dataclasses import dataclass

from torch import nn

from .stack import Factors, Site, below, first_sites


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


@dataclass(frozen=True, repr=False)
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

    __repr__ = __str__  # a notebook's last line shows the table too


def summary(model: nn.Module) -> Summary:
    """Return what is attached to a model, as a table to print and as data.

    >>> print(summary(nn.Linear(4, 3)))
    no adapters; trainable 15 of the base's 15 (100.00%)
    """
    here = first_sites(model)
    factors = {id(p) for site in here for p in site.stack.parameters()}
    return Summary(
        sites=tuple(
            _row(site, name, path, factors)
            for site in here
            for name in site.stack.factors
            for path, factors in site.parts(name).items()
        ),
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        total=sum(p.numel() for p in model.parameters() if id(p) not in factors),
    )


def _row(site: Site, name: str, path: str, factors: Factors) -> SiteSummary:
    stack = site.stack
    weight = below(site.plist, stack)
    shape = (weight if factors.block is None else factors.block.cut(weight)).shape
    parameters = sum(p.numel() for p in factors.parameters())
    wasted = factors.spec.rank is not None and factors.spec.rank > min(shape[0], shape[1:].numel())
    notes = ["rank above the smaller side"] if wasted else []
    notes += [f"tied: {', '.join(stack.tied)}"] if stack.tied else []
    return SiteSummary(
        site=path,
        adapter=name,
        shape=tuple(shape),
        kind=type(factors.spec).__name__,
        rank=factors.spec.rank,
        scale=float(factors.scale),
        active=name in stack.active,
        trainable=any(p.requires_grad for p in factors.parameters()),
        merged=name in stack.merged,
        parameters=parameters,
        share=parameters / shape.numel(),
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
