"""`audit`: one step on a batch that finds what trains nothing, and what moves but should not.

The step runs the model as it is, in its current mode and inside the open blocks, and computes
gradients with `torch.autograd.grad`. So no `.grad` is written, and no hook of a backward or of an
optimizer runs. Buffers and the random state are put back.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import some
from ..layers.install import check_whole
from ..site.names import check_names
from ..site.survey import Survey
from .audit_checks import Finding, Step, findings
from .table import as_text

Loss = Callable[[Any], Tensor] | None


@dataclass(frozen=True, repr=False)
class AuditReport:
    """What `audit` found; prints as a table, and is false if it found nothing.

    Attributes:
        findings: a `Finding` for each fault at each site.
        training: whether the model was in training mode.

    >>> bool(AuditReport((), training=True))
    False
    """

    findings: tuple[Finding, ...]
    training: bool

    def __len__(self) -> int:
        return len(self.findings)

    def __iter__(self) -> Iterator[Finding]:
        return iter(self.findings)

    def __str__(self) -> str:
        groups: dict[tuple[str, str, str], list[str]] = {}
        for one in self.findings:
            groups.setdefault((one.kind, one.name or "-", one.message), []).append(one.site)
        rows = [
            (kind, name, f"{message}: {len(sites)} ({some(sites)})")
            for (kind, name, message), sites in groups.items()
        ]
        notes = [] if rows else ["nothing found"]
        if not self.training:
            notes.append(
                "the model is in evaluation mode; call model.train() first to find statistics that "
                "drift"
            )
        return as_text([("kind", "adapter", "finding"), *rows] if rows else [], notes)

    __repr__ = __str__  # a notebook's last line shows the table too


def audit(
    model: nn.Module,
    batch: Any,
    loss: Loss = None,
    *,
    optimizer: torch.optim.Optimizer | None = None,
) -> AuditReport:
    """Find what would train nothing, and what would move but should not, by one step on a batch.

    Call it before training, with the model in training mode, its adapters switched as you train
    them. The model is bit-identical afterwards, and so is the random state.

    | kind | finding |
    | --- | --- |
    | "gradient" | trained factors get no gradient, a zero one, or one that is not finite |
    | "update" | an active adapter changes nothing: ΔW is exactly zero and stays zero |
    | "base" | `attach` froze the base, and this parameter of it is trained all the same |
    | "rounding" | the base is in half precision, and merging would lose most of the update |
    | "statistics" | the forward writes to buffers of a frozen base, such as those of BatchNorm |
    | "optimizer" | the optimizer does not hold the trained factors of an active adapter |

    A new adapter, such as a LoRA with B = 0, has an update of zero and a gradient that is not; that
    is no finding. If nothing was frozen (`attach(freeze=False)`), the base is meant to be trained,
    and no parameter of it is reported. To prove that a base has not moved since some earlier time,
    compare its `fingerprint` with the one from then.

    Args:
        model: a module with adapters.
        batch: the inputs of the model: a tensor, or a tuple, list or mapping of the arguments of
            its forward.
        loss: a function from the model's output to a scalar; by default the output's own `loss`,
            if it has one (as transformers' models do when given labels), or else a fixed random
            projection of the output.
        optimizer: the optimizer that you train with, to check which parameters it holds.

    Returns:
        A report: a sequence of findings that prints as a table.

    Raises:
        StateError: there are no adapters, or a tensor is sharded.
        TypeError: the output has no floating tensor to make a loss of.
        ValueError: `loss` does not return a scalar tensor.

    >>> import paramlora as pl
    >>> model, x = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), torch.randn(8, 4)
    >>> _ = pl.attach(model, pl.LoRA(rank=2), "0", name="digits")
    >>> print(pl.audit(model, x))
    nothing found
    >>> model[2].bias.requires_grad_(True)[:0]
    tensor([], grad_fn=<SliceBackward0>)
    >>> [(finding.kind, finding.site) for finding in pl.audit(model, x)]
    [('base', '2.bias')]
    """
    survey = Survey(model)
    check_names(survey.stacks, ())
    check_whole(survey.sites)
    wanted = [p for p in (*survey.factors, *survey.base_parameters) if p.requires_grad]
    with _untouched(survey) as written:
        gradients = _gradients(model, batch, loss, wanted)
    groups = [] if optimizer is None else optimizer.param_groups
    held = {id(p) for group in groups for p in group["params"]}
    step = Step(survey, gradients, written, None if optimizer is None else held)
    return AuditReport(tuple(findings(step)), model.training)


def _gradients(
    model: nn.Module, batch: Any, loss: Loss, wanted: list[nn.Parameter]
) -> dict[int, Tensor]:
    """Return the gradients of one step by the id of the parameter."""
    with torch.inference_mode(False), torch.enable_grad():
        output = call(model, batch)
        total = _projection(output) if loss is None else loss(output)
        if not isinstance(total, Tensor) or total.numel() != 1:
            found = tuple(total.shape) if isinstance(total, Tensor) else total
            raise ValueError(f"loss must return a scalar tensor, got {found!r}")
        if not wanted or not total.requires_grad:
            return {}
        values = torch.autograd.grad(total, wanted, allow_unused=True)
    return {id(p): g for p, g in zip(wanted, values, strict=True) if g is not None}


def call(model: nn.Module, batch: Any) -> Any:
    """Call a model on a batch: a tensor, or a tuple, list or mapping of its arguments."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple | list) else model(batch)


def _projection(output: Any) -> Tensor:
    """Return the output's own loss, or a sum of its elements with fixed random weights.

    A plain sum would have a gradient of zero behind a softmax, or behind a LayerNorm.
    """
    own = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if isinstance(own, Tensor):
        return own
    generator, parts = torch.Generator().manual_seed(0), []
    for tensor in _floats(output):
        weights = torch.randn(tensor.shape, generator=generator).to(tensor.device)
        wide = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
        parts.append((wide * weights).sum())
    if not parts:
        raise TypeError(
            f"the model's output, a {type(output).__name__}, has no floating tensor; pass loss=, a "
            "function from the output to a scalar"
        )
    return sum(parts[1:], parts[0])


def _floats(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, Iterable) and not isinstance(output, str):
        for one in output.values() if isinstance(output, Mapping) else output:
            yield from _floats(one)


@contextmanager
def _untouched(survey: Survey) -> Iterator[list[tuple[str, nn.Module, str]]]:
    """Put back buffers, renormalised embeddings and the random state after the block.

    Yields:
        A list that afterwards has the path, module and name of each floating tensor written to.
    """
    written: list[tuple[str, nn.Module, str]] = []
    saved = [
        (path, module, name, tensor, tensor.detach().clone())
        for path, module in survey.modules
        for name, tensor in _volatile(module).items()
        if tensor is not None
    ]
    devices = sorted({p.device.index for p in survey.base_parameters if p.is_cuda})
    try:
        with torch.random.fork_rng(devices):
            yield written
    finally:
        for path, module, name, tensor, before in saved:
            now = module._buffers.get(name, tensor)
            persistent = name not in module._non_persistent_buffers_set
            if tensor.is_floating_point() and persistent and not _same(now, before):
                written.append((path, module, name))
            if name in module._buffers:
                module._buffers[name] = tensor
            if not _same(tensor, before):
                with torch.no_grad():
                    tensor.copy_(before)


def _volatile(module: nn.Module) -> dict[str, Tensor | None]:
    """Return the tensors of a module that its forward may write to."""
    renormalised = ("weight", "original") if getattr(module, "max_norm", None) is not None else ()
    own = {name: p for name, p in module._parameters.items() if name in renormalised}
    return {**module._buffers, **own}


def _same(a: Tensor | None, b: Tensor) -> bool:
    return (
        a is not None
        and (a.shape, a.dtype) == (b.shape, b.dtype)
        and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)
    )
