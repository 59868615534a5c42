"""Switch adapters on and off, and set their strength; requires_grad does not change."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from ..kinds.spec import Strength, is_finite
from ..site.find import stacks_in
from ..site.names import check_names, check_unmerged, ordered_names
from ..site.stack import Stack


def enable(model: nn.Module, *names: str) -> None:
    """Switch adapters on, by default all: they contribute whenever a tensor is read.

    Args:
        model: a module with adapters; it may be a part of a larger one: `enable(net.fc1)`.
        names: the adapters; by default all.

    Raises:
        AdapterNameError: there is no adapter of that name.
        StateError: an adapter is merged.
    """
    _enable(stacks_in(model), names)


def disable(model: nn.Module, *names: str) -> None:
    """Switch adapters off, by default all; with all off, outputs are bit-for-bit the base's.

    Args:
        model: a module with adapters; it may be a part of a larger one.
        names: the adapters; by default all.

    Raises:
        AdapterNameError: there is no adapter of that name.
        StateError: an adapter is merged.
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
        StateError: an adapter is merged.

    >>> import paramlora as pl
    >>> model = nn.Linear(4, 3)
    >>> _ = pl.attach(model, pl.LoRA(rank=2), name="digits")
    >>> pl.scale(model, 0.5, "digits")
    >>> pl.summary(model).sites[0].scale
    0.5
    """
    _check_strength(factor)
    stacks = stacks_in(model)
    _check(stacks, names, "scale")
    for stack in stacks:
        for name in names or stack.names:
            if name in stack.names:
                stack[name].set_strength(factor)


def names(model: nn.Module) -> list[str]:
    """Return the names of a model's adapters, in attaching order; empty if there are none.

    >>> import paramlora as pl
    >>> model = nn.Linear(4, 3)
    >>> _ = pl.attach(model, pl.LoRA(rank=2), name="digits")
    >>> pl.names(model)
    ['digits']
    """
    return ordered_names(stacks_in(model))


def activate(
    model: nn.Module, /, *names: str | Mapping[str, Strength], **strengths: Strength
) -> None:
    """Let exactly these adapters contribute, and switch the others off; `using` for a block.

    Args:
        model: a module with adapters; it may be a part of a larger one.
        names: adapters to use at their own strength; or mappings from names to strengths, for names
            that cannot be keywords: `activate(model, {"task-1": 0.5})`.
        strengths: adapters whose strength is set as well, as by `scale`:
            `activate(model, digits=0.5)`.

    Raises:
        ValueError: a strength is not a finite number.
        AdapterNameError: there is no adapter of that name.
        StateError: an adapter is merged.

    >>> import paramlora as pl
    >>> model = nn.Linear(4, 3)
    >>> for name in ("digits", "letters"):
    ...     _ = pl.attach(model, pl.LoRA(rank=2), name=name)
    >>> pl.activate(model, "digits")
    >>> pl.summary(model).active
    ('digits',)
    """
    _activate(stacks_in(model), _wanted(names, strengths))


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
def using(
    model: nn.Module, /, *names: str | Mapping[str, Strength], **strengths: Strength
) -> Iterator[None]:
    """Let exactly these adapters contribute inside the block; restore the earlier state after it.

    Activation checkpointing runs a forward again in the backward, with the adapters that are on
    at that time. The backward therefore belongs inside the block as well, here as in `enabled` and
    `disabled`.

    Args:
        model: a module with adapters.
        names: adapters to use at their own strength; or mappings from names to strengths, for names
            that cannot be keywords: `using(model, {"task-1": 0.5})`.
        strengths: adapters to use at another strength: `using(model, digits=0.5)`.

    Raises:
        ValueError: a strength is not a finite number.
        AdapterNameError: there is no adapter of that name.
        StateError: an adapter is merged.

    >>> import paramlora as pl
    >>> model = nn.Linear(4, 3)
    >>> for name in ("digits", "letters"):
    ...     _ = pl.attach(model, pl.LoRA(rank=2), name=name)
    >>> with pl.using(model, "letters", digits=0.5):
    ...     [(row.adapter, row.active, row.scale) for row in pl.summary(model).sites]
    [('digits', True, 0.5), ('letters', True, 1.0)]
    """
    wanted = _wanted(names, strengths)
    with _restored(model) as stacks:
        _activate(stacks, wanted)
        yield


def _wanted(
    names: Sequence[str | Mapping[str, Strength]], strengths: Mapping[str, Strength]
) -> dict[str, Strength | None]:
    """Return the adapters to use, each with its new strength; None keeps the strength it has."""
    wanted: dict[str, Strength | None] = {}
    for given in (*names, strengths):
        if isinstance(given, Mapping):
            for strength in given.values():
                _check_strength(strength)
            wanted |= given
        elif isinstance(given, str):
            wanted.setdefault(given, None)
        else:
            raise TypeError(f"adapter names are separate arguments, each a string, got {given!r}")
    return wanted


def _activate(stacks: Sequence[Stack], wanted: Mapping[str, Strength | None]) -> None:
    check_names(stacks, wanted)
    _check(stacks, (), "toggle")
    for stack in stacks:
        stack.switch(wanted)
        for name in wanted.keys() & stack.named.keys():
            if (strength := wanted[name]) is not None:
                stack[name].set_strength(strength)


def _enable(stacks: Sequence[Stack], names: Sequence[str]) -> None:
    _check(stacks, names, "enable")
    for stack in stacks:
        stack.switch({*stack.active, *(names or stack.names)})


def _disable(stacks: Sequence[Stack], names: Sequence[str]) -> None:
    _check(stacks, names, "disable")
    for stack in stacks:
        stack.switch({*stack.active} - {*(names or stack.names)})


def _check(stacks: Sequence[Stack], names: Sequence[str], verb: str) -> None:
    """Raise an error if an adapter is missing or merged; check all adapters if none is named."""
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

    a has to keep its strength 0.5 after the block, because the stored weight contains 0.5·ΔW. So
    adapters that are merged or attached inside the block keep their states after it.
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
