"""Switching adapters on and off, and setting their strength; requires_grad is never touched."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from ..kinds.spec import Strength, is_finite
from ..site.find import stacks_in
from ..site.names import check_names, check_unmerged
from ..site.stack import Stack


def enable(model: nn.Module, *names: str) -> None:
    """Switch adapters on, by default all: they contribute whenever a tensor is read.

    Args:
        model: a module with adapters; it may be a part of a larger one: `enable(net.fc1)`.
        names: the adapters; by default all.

    Raises:
        AdapterNameError: there is no adapter of that name.
        StateError: there are no adapters, or one is merged.
    """
    _enable(stacks_in(model), names)


def disable(model: nn.Module, *names: str) -> None:
    """Switch adapters off, by default all; with all off, outputs are bit-for-bit the base's.

    Args:
        model: a module with adapters; it may be a part of a larger one.
        names: the adapters; by default all.

    Raises:
        AdapterNameError: there is no adapter of that name.
        StateError: there are no adapters, or one is merged.
    """
    _disable(stacks_in(model), names)


def scale(model: nn.Module, factor: Strength, *names: str) -> None:
    """Set the strength λ of adapters, by default all: W' = W + λ·ΔW.

    Args:
        model: a module with adapters.
        factor: λ, a finite number or a tensor without dimensions. 1 is the adapter as trained, 0
            the base. It stays until it is set again, and is saved with the adapter. A tensor may
            change, or require a gradient, without recompiling a compiled model.
        names: the adapters; by default all.

    Raises:
        ValueError: the factor is not a finite number.
        AdapterNameError: there is no adapter of that name.
        StateError: there are no adapters, or one is merged.

    >>> import paramlora as pl
    >>> model = nn.Linear(4, 3)
    >>> _ = pl.attach(model, pl.LoRA(rank=2), name="digits")
    >>> pl.scale(model, 0.5, "digits")
    >>> pl.summary(model).sites[0].scale
    0.5
    """
    stacks = stacks_in(model)
    _check_strength(factor)
    _check(stacks, names, "scale")
    for stack in stacks:
        for name in names or stack.names:
            if name in stack.names:
                stack[name].set_strength(factor)


@contextmanager
def enabled(model: nn.Module, *names: str) -> Iterator[None]:
    """Switch adapters on inside the block, as `enable` does; restore the earlier state after it."""
    with _restored(model) as stacks:
        _enable(stacks, names)
        yield


@contextmanager
def disabled(model: nn.Module, *names: str) -> Iterator[None]:
    """Switch adapters off inside the block, as `disable` does; restore the earlier state after it.

    >>> import torch
    >>> import paramlora as pl
    >>> model, x = nn.Linear(4, 3), torch.randn(2, 4)
    >>> base = model(x)
    >>> _ = pl.attach(model, pl.Delta())
    >>> with pl.disabled(model):
    ...     torch.equal(model(x), base)
    True
    """
    with _restored(model) as stacks:
        _disable(stacks, names)
        yield


@contextmanager
def using(model: nn.Module, /, *names: str, **scales: Strength) -> Iterator[None]:
    """Let exactly these adapters contribute inside the block; restore the earlier state after it.

    Activation checkpointing runs a forward again in the backward, with the adapters that are on
    then. The backward therefore belongs inside the block as well, here as in `enabled` and
    `disabled`.

    Args:
        model: a module with adapters.
        names: adapters to use at their own strength.
        scales: adapters to use at another strength: `using(model, digits=0.5)`.

    Raises:
        ValueError: a strength is not a finite number.
        AdapterNameError: there is no adapter of that name.
        StateError: there are no adapters, or one is merged.

    >>> import paramlora as pl
    >>> model = nn.Linear(4, 3)
    >>> for name in ("digits", "letters"):
    ...     _ = pl.attach(model, pl.LoRA(rank=2), name=name)
    >>> with pl.using(model, "letters", digits=0.5):
    ...     [(row.adapter, row.active, row.scale) for row in pl.summary(model).sites]
    [('digits', True, 0.5), ('letters', True, 1.0)]
    """
    for factor in scales.values():
        _check_strength(factor)
    wanted = {*names, *scales}
    with _restored(model) as stacks:
        check_names(stacks, wanted)
        _check(stacks, (), "toggle")
        for stack in stacks:
            stack.switch(wanted)
            for name in scales.keys() & stack.named.keys():
                stack[name].set_strength(scales[name])
        yield


def _enable(stacks: Sequence[Stack], names: Sequence[str]) -> None:
    _check(stacks, names, "enable")
    for stack in stacks:
        stack.switch({*stack.active, *(names or stack.names)})


def _disable(stacks: Sequence[Stack], names: Sequence[str]) -> None:
    _check(stacks, names, "disable")
    for stack in stacks:
        stack.switch({*stack.active} - {*(names or stack.names)})


def _check(stacks: Sequence[Stack], names: Sequence[str], verb: str) -> None:
    """Raise if an adapter of these names, any if none is named, is missing or merged."""
    check_names(stacks, names)
    check_unmerged(stacks, names, verb)


def _check_strength(factor: Strength) -> None:
    if isinstance(factor, Tensor):
        if factor.dim() != 0 or not factor.is_floating_point():
            raise ValueError(
                "a strength given as a tensor must be floating and without dimensions, got "
                f"{factor.dtype} of shape {tuple(factor.shape)}"
            )
        if not factor.is_meta and not factor.isfinite():
            raise ValueError(f"a strength must be a finite number, got {factor!r}")
    elif not is_finite(factor):
        raise ValueError(f"a strength must be a finite number, got {factor!r}")


@contextmanager
def _restored(model: nn.Module) -> Iterator[list[Stack]]:
    """Yield the stacks; afterwards restore which adapters are active, and their strengths.

    Only an adapter that is still the same and is not merged gets its earlier state back:

        with pl.using(model, "a"):              # b was on, and is off inside
            pl.detach(model, "b")
            pl.attach(model, spec, name="b")    # another b, which is on and has to stay on

    Factors are therefore compared by identity, not by name. And in

        with pl.using(model, a=0.5):
            pl.merge(model, "a")                # the stored weight is now W + 0.5·ΔW

    a has to keep its strength 0.5 after the block: that is what the stored weight contains. So a
    merged adapter keeps its state, too, and an adapter that was attached inside keeps its own.
    """
    stacks = stacks_in(model)
    saved = []
    for stack in stacks:
        strengths = {name: factors.strength for name, factors in stack.named.items()}
        # Inside `routed` an adapter may be active and not live.
        live = stack.active if stack.merged else stack.live
        saved.append((stack, stack.active, live, {**stack.named}, strengths))
    try:
        yield stacks
    finally:
        for stack, active, live, named, strengths in saved:
            same = [
                name
                for name, factors in named.items()
                if stack.named.get(name) is factors and name not in stack.merged
            ]
            for name in same:
                stack[name].put_strength(strengths[name])  # type: ignore[arg-type]
            if len(same) == len(named) == len(stack.named):
                vars(stack).update(active=active, live=live)
            else:
                others = [name for name in stack.active if name not in same]
                stack.switch([*others, *(name for name in same if name in active)])
