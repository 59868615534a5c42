"""What is attached to a model, and what is not: as a table to print, and as data."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from ..errors import some
from ..kinds.spec import Spec
from ..layers.statistics import is_held, with_statistics
from ..site.factors import Factors
from ..site.find import below, first_sites
from ..site.place import Place, places
from ..site.stack import Stack


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
    gradient: bool | None = None
    note: str = ""


@dataclass(frozen=True)
class Skipped:
    """A tensor of the base that an adapter does not touch, why, and whether it is trained."""

    tensor: str
    shape: tuple[int, ...]
    reason: str
    trainable: bool


@dataclass(frozen=True, repr=False)
class Summary:
    """The adapters of a model; prints as a table.

    Attributes:
        sites: a `SiteSummary` for each adapter at each site, in model order; a block of a tensor
            is a site. Its `scale` is all that multiplies the update, strength times alpha/r; its
            `share` is the adapter's parameters over those of the site. Its `gradient` says, once
            a parameter of the model has one, whether the adapter's trained factors got one here
            that is not zero: where they did not, the note says why, if that is known. It is None
            before, and where nothing is trained.
        trainable: how many elements of the model require a gradient, the base's included.
        total: how many elements the base's parameters have, the adapters not counted.
        skipped: a `Skipped` for each tensor of the base without an adapter; of `attach`, without
            the one that it attached, and with the reason.
        held: the paths of the layers whose running statistics are held still.
        moving: of those whose statistics move in training mode, base or not.
        dry_run: whether it says what `attach` would do.
    """

    sites: tuple[SiteSummary, ...]
    trainable: int
    total: int
    skipped: tuple[Skipped, ...] = ()
    held: tuple[str, ...] = ()
    moving: tuple[str, ...] = ()
    dry_run: bool = False

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
        start = ["dry run: nothing is changed; attached, it would be"] if self.dry_run else []
        for what, paths in (("held still", self.held), ("that move in training", self.moving)):
            lines += [f"running statistics {what}: {len(paths)} ({some(paths)})"] if paths else []
        return "\n".join([*start, *lines, *_reasons(self.skipped), end])

    __repr__ = __str__  # a notebook's last line shows the table too


def summary(model: nn.Module) -> Summary:
    """Return what is attached to a model, as a table to print and as data.

    After a backward it names the sites whose factors got no gradient.

    >>> print(summary(nn.Linear(4, 3)))
    no adapters; trainable 15 of the base's 15 (100.00%)
    """
    return report(model)


def report(model: nn.Module, fresh: str | None = None) -> Summary:
    """Return the summary of a model; `fresh` is an adapter that no backward can have seen yet."""
    here = first_sites(model)
    factors = {id(p) for site in here for p in site.stack.parameters()}
    # Not by the gradients that a base still has from before it was frozen.
    seen = any(p.grad is not None and p.requires_grad for p in model.parameters())
    rows = [
        row(path, name, part, site.stack, below(site.plist, site.stack), seen and name != fresh)
        for site in here
        for name in site.stack.factors
        for path, part in site.parts(name).items()
    ]
    norms = with_statistics(model) if here else []
    bare = [place for place in places(model) if place.stack is None] if here else []
    return Summary(
        sites=tuple(rows),
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        total=sum(p.numel() for p in model.parameters() if id(p) not in factors),
        skipped=tuple(skip(p, "without an adapter", p.stored.requires_grad) for p in bare),
        held=tuple(path for path, module in norms if is_held(module)),
        moving=tuple(path for path, module in norms if not is_held(module)),
    )


def row(
    path: str,
    name: str,
    factors: Factors,
    stack: Stack,
    whole: Tensor,
    seen: bool,  # whether there was a backward
) -> SiteSummary:
    """Return the row for an adapter at a site; without it in the stack, as if it were new."""
    shape = tuple(whole.shape) if factors.block is None else factors.block.inner
    parameters = sum(p.numel() for p in factors.parameters())
    merged, active = name in stack.merged, name in stack.active or name not in stack.factors
    gradient, without = _gradient(factors) if seen else (None, "")
    if gradient is False:
        without += ", it is merged" if merged else "" if active else ", it is switched off"
    notes = [
        "rank above the smaller side" if _wasted(factors.spec, shape) else "",
        f"tied: {', '.join(stack.tied)}" if stack.tied else "",
        without,
    ]
    return SiteSummary(
        site=path,
        adapter=name,
        shape=shape,
        kind=type(factors.spec).__name__,
        rank=factors.spec.rank,
        scale=float(factors.strength * factors.spec.scaling),
        active=active,
        trainable=any(p.requires_grad for p in factors.parameters()),
        merged=merged,
        parameters=parameters,
        share=parameters / math.prod(shape),
        gradient=gradient,
        note="; ".join(note for note in notes if note),
    )


def skip(place: Place, reason: str, trainable: bool) -> Skipped:
    """Return the row for a tensor that an adapter does not touch."""
    return Skipped(place.path, tuple(place.value.shape), reason, trainable)


def _wasted(spec: Spec, shape: tuple[int, ...]) -> bool:
    """Return whether a spec has a rank that no matrix of this shape can have."""
    rows, *columns = shape[getattr(spec, "batch_dims", 0) :] or (1,)
    return spec.rank is not None and spec.rank > min(rows, math.prod(columns))


def _gradient(factors: Factors) -> tuple[bool | None, str]:
    """Return whether trained factors have a gradient, and which have none; None if none trains."""
    trained = {key: p.grad for key, p in factors.named_parameters() if p.requires_grad}
    without = [key for key, grad in trained.items() if grad is None]
    if not trained:
        return None, ""
    if len(without) == len(trained):
        return False, "no gradient"
    if not any(_may_be_more_than_zero(grad) for grad in trained.values() if grad is not None):
        return False, "the gradient is zero"
    return True, f"no gradient in {', '.join(without)}" if without else ""


def _may_be_more_than_zero(grad: Tensor) -> bool:
    # To look into a sharded one takes all processes, and a summary may be asked for by one.
    return grad.is_meta or hasattr(grad, "full_tensor") or bool(grad.any())


def _reasons(skipped: Iterable[Skipped]) -> list[str]:
    """Return a line for each reason, with the first of the tensors."""
    groups: dict[tuple[bool, str], list[str]] = {}
    for one in skipped:
        groups.setdefault((one.trainable, one.reason), []).append(one.tensor)
    return [
        f"skipped, {'trained' if trainable else 'frozen'}: {len(names)} {reason} ({some(names)})"
        for (trainable, reason), names in groups.items()
    ]


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
