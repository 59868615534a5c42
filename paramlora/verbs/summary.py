"""The adapters of a model and the tensors without one, as a table and as data."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from ..errors import some
from ..kinds.spec import Spec
from ..layers.statistics import is_held, with_statistics
from ..site.place import Place
from ..site.survey import Part, Survey
from .table import as_html, as_text, cells, grouped


@dataclass(frozen=True)
class SiteSummary:
    """One adapter at one site: a row of the summary.

    >>> import paramlora as pl
    >>> model = nn.Sequential(nn.Linear(4, 3))
    >>> row = pl.attach(model, pl.LoRA(rank=2)).sites[0]
    >>> row.site, row.kind, row.parameters
    ('0.weight', 'LoRA', 14)
    """

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
    """A tensor of the base without an adapter, the reason, and whether it is trained.

    >>> import paramlora as pl
    >>> model = nn.Sequential(nn.Linear(4, 3))
    >>> pl.attach(model, pl.LoRA(rank=2)).skipped[0]
    Skipped(tensor='0.bias', shape=(3,), reason='matching no target', trainable=False)
    """

    tensor: str
    shape: tuple[int, ...]
    reason: str
    trainable: bool


@dataclass(frozen=True, repr=False)
class Summary:
    """The adapters of a model; prints as a table.

    Attributes:
        sites: a `SiteSummary` for each adapter at each site, in model order; a block of a tensor
            is a site. `scale` is the factor of the update, strength times alpha/r. `share` is the
            number of the adapter's parameters over that of the tensor's elements. `gradient`
            says whether the trained factors got a nonzero gradient. It is None before the first
            backward, and if no factor is trained. If it is False, `note` has the reason, if known.
        trainable: the number of elements that require a gradient, the base's included.
        total: the number of elements of the base's parameters, without adapters.
        skipped: a `Skipped` for each tensor of the base without an adapter; in the summary that
            `attach` returns, for each tensor without the new adapter, with the reason.
        held: the paths of the layers whose running statistics are held.
        moving: the paths of the layers whose running statistics move in training mode.
        active: the adapters that are switched on somewhere, in attaching order.
        switched_off: the adapters that the call that returns this summary switched off.
        dry_run: whether this is the summary of an `attach` that did not take place.

    >>> import paramlora as pl
    >>> model = nn.Sequential(nn.Linear(4, 3))
    >>> summary = pl.attach(model, pl.LoRA(rank=2))
    >>> summary.trainable, summary.total, summary.active
    (14, 15, ('default',))
    """

    sites: tuple[SiteSummary, ...]
    trainable: int
    total: int
    skipped: tuple[Skipped, ...] = ()
    held: tuple[str, ...] = ()
    moving: tuple[str, ...] = ()
    active: tuple[str, ...] = ()
    switched_off: tuple[str, ...] = ()
    dry_run: bool = False

    def __str__(self) -> str:
        return as_text(self._table(), self._notes(), self._start())

    def _repr_html_(self) -> str:
        return as_html(self._table(), self._notes(), self._start())

    def _table(self) -> list[tuple[str, ...]]:
        """Return the rows of the table, alike sites in one; empty if there are no adapters."""
        rows = [cells(group) for group in grouped(self.sites)]
        return [tuple(rows[0]), *(tuple(row.values()) for row in rows)] if rows else []

    def _start(self) -> list[str]:
        return ["dry run: nothing is changed; after attach it would be"] if self.dry_run else []

    def _notes(self) -> list[str]:
        """Return the lines below the table."""
        share = f" ({self.trainable / self.total:.2%})" if self.total else ""
        end = f"trainable {self.trainable:,} of the base's {self.total:,}{share}"
        if not self.sites:
            return [f"no adapters; {end}"]
        moving = []
        for verb, paths in (("held still", self.held), ("that move in training", self.moving)):
            moving += [f"running statistics {verb}: {len(paths)} ({some(paths)})"] if paths else []
        return [*moving, *self._switched(), *_reasons(self.skipped), end]

    def _switched(self) -> list[str]:
        """Return the line that names the active adapters; a single one is in the table."""
        if len({row.adapter for row in self.sites}) < 2:
            return []
        off = f"; switched off by this call: {', '.join(self.switched_off)}"
        return [f"active: {', '.join(self.active) or 'none'}{off if self.switched_off else ''}"]

    __repr__ = __str__


def summary(model: nn.Module) -> Summary:
    """Return the adapters of a model, as a table to print and as data.

    After a backward, the table names the sites whose factors got no gradient.

    Args:
        model: any module, with or without adapters.

    >>> print(summary(nn.Linear(4, 3)))
    no adapters; trainable 15 of the base's 15 (100.00%)
    """
    return report(Survey(model))


def report(survey: Survey, fresh: str | None = None) -> Summary:
    """Return the summary of a model; `fresh` is an adapter attached after the last backward."""
    here, base = survey.first_sites, survey.base_parameters
    trained = [p for p in (*base, *survey.factors) if p.requires_grad]
    # A frozen base may still have gradients from before it was frozen; those do not count.
    seen = any(p.grad is not None for p in trained)
    parts = survey.parts() if here else []
    rows = [row(part, seen and part.name != fresh) for part in parts]
    active = {row.adapter for row in rows if row.active}
    norms = with_statistics(survey.modules) if here else []
    bare = [place for place in survey.places if place.stack is None] if here else []
    return Summary(
        sites=tuple(rows),
        trainable=sum(p.numel() for p in trained),
        total=sum(p.numel() for p in base),
        active=tuple(name for name in survey.names if name in active),
        skipped=tuple(skip(p, "without an adapter", p.stored.requires_grad) for p in bare),
        held=tuple(path for path, module in norms if is_held(module)),
        moving=tuple(path for path, module in norms if not is_held(module)),
    )


def row(part: Part, seen: bool) -> SiteSummary:
    """Return the row of an adapter at a site; the stack may not have the adapter yet.

    Args:
        part: the factors of the adapter.
        seen: whether there was a backward.
    """
    path, name, site, factors = part
    stack, place = site.stack, Place(path, "", site.module, site.tensor, factors.block)
    shape = tuple(place.value.shape)
    parameters = sum(p.numel() for p in factors.parameters())
    state = stack.seen()
    merged, active = name in stack.merged, name in state.active or name not in stack.factors
    strength = (state.strengths or {}).get(name)
    trained = {key: p.grad for key, p in factors.named_parameters() if p.requires_grad}
    gradient, without = gradient_of(trained) if seen else (None, "")
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
        scale=float(factors.at(strength) * factors.spec.scaling),
        active=active,
        trainable=bool(trained),
        merged=merged,
        parameters=parameters,
        share=parameters / math.prod(shape),
        gradient=gradient,
        note="; ".join(note for note in notes if note),
    )


def skip(place: Place, reason: str, trainable: bool) -> Skipped:
    """Return the row of a tensor without an adapter."""
    return Skipped(place.path, tuple(place.value.shape), reason, trainable)


def _wasted(spec: Spec, shape: tuple[int, ...]) -> bool:
    """Return whether a spec's rank exceeds the largest rank of a matrix of this shape."""
    rows, *columns = shape[getattr(spec, "batch_dims", 0) :] or (1,)
    return spec.rank is not None and spec.rank > min(rows, math.prod(columns))


def gradient_of(trained: Mapping[str, Tensor | None]) -> tuple[bool | None, str]:
    """Return whether trained factors have a nonzero gradient, and a note on the other factors.

    The first value is None if no factor is trained.
    """
    without = [key for key, grad in trained.items() if grad is None]
    if not trained:
        return None, ""
    if len(without) == len(trained):
        return False, "no gradient"
    if not any(_may_be_nonzero(grad) for grad in trained.values() if grad is not None):
        return False, "the gradient is zero"
    return True, f"no gradient in {', '.join(without)}" if without else ""


def _may_be_nonzero(grad: Tensor) -> bool:
    # Reading a sharded gradient needs all processes, but a single one may call `summary`. So a
    # sharded gradient counts as nonzero.
    return grad.is_meta or hasattr(grad, "full_tensor") or bool(grad.any())


def _reasons(skipped: Iterable[Skipped]) -> list[str]:
    """Return a line for each reason, which names the first tensors."""
    groups: dict[tuple[bool, str], list[str]] = {}
    for one in skipped:
        groups.setdefault((one.trainable, one.reason), []).append(one.tensor)
    return [
        f"skipped, {'trained' if trainable else 'frozen'}: {len(names)} {reason} ({some(names)})"
        for (trainable, reason), names in groups.items()
    ]
