"""Switch adapters on and off, and set their strength; requires_grad does not change."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from ..kinds.spec import Strength, is_finite
from ..site.find import stacks_in
from ..site.names import check_names, check_not_routed, check_order, check_unmerged, ordered_names
from ..stack.overlay import KEEP, Change, opened
from ..stack.stack import Stack
from ..wrappers import check_model


def enable(model: nn.Module, *names: str) -> None:
    """Switch adapters on, by default all: they contribute whenever a tensor is read.

    Args:
        model: a module with adapters; it may be a part of a larger one: `enable(net.fc1)`.
        names: the adapters; by default all.

    Raises:
        AdapterNameError: there is no adapter of that name.
        StateError: there are no adapters, or one is merged; or one that was attached later is
            merged, and their order counts (IA3, DoRA).

    >>> import paramlora as pl
    >>> model = nn.Sequential(nn.Linear(4, 3))
    >>> _ = pl.attach(model, pl.LoRA(rank=2), name="digits", activate="no")
    >>> pl.enable(model, "digits")
    >>> pl.summary(model).active
    ('digits',)
    """
    stacks = _checked(model, names, "enable")
    check_order(stacks, names)
    for stack in stacks:
        stack.switch({*stack.active, *(names or stack.names)})


def disable(model: nn.Module, *names: str) -> None:
    """Switch adapters off, by default all; with all off, outputs are bit-for-bit the base's.

    Args:
        model: a module with adapters; it may be a part of a larger one.
        names: the adapters; by default all.

    Raises:
        AdapterNameError: there is no adapter of that name.
        StateError: there are no adapters, or one is merged.

    >>> import paramlora as pl
    >>> model = nn.Sequential(nn.Linear(4, 3))
    >>> _ = pl.attach(model, pl.LoRA(rank=2), name="digits")
    >>> pl.disable(model)
    >>> pl.summary(model).active
    ()
    """
    stacks = _checked(model, names, "disable")
    for stack in stacks:
        stack.switch({*stack.active} - {*(names or stack.names)})


def scale(
    model: nn.Module, factor: Strength | None = None, *names: str, **strengths: Strength
) -> None:
    """Set the strength λ of adapters, by default all: W' = W + λ·ΔW.

    Args:
        model: a module with adapters.
        factor: λ, a finite number or a tensor without dimensions. 1 is the adapter as trained, 0
            the base. It stays until it is set again, and is saved with the adapter. A tensor may
            change, or require a gradient, without recompiling a compiled model.
        names: the adapters; by default all.
        strengths: a strength for each adapter instead: `scale(model, digits=0.5, letters=2)`.

    Raises:
        ValueError: a strength is not a finite number.
        TypeError: there is no strength, or a name in its place.
        AdapterNameError: there is no adapter of that name.
        StateError: there are no adapters, or one is merged.

    >>> import paramlora as pl
    >>> model = nn.Linear(4, 3)
    >>> _ = pl.attach(model, pl.LoRA(rank=2), name="digits")
    >>> pl.scale(model, 0.5, "digits")
    >>> pl.summary(model).sites[0].scale
    0.5
    """
    check_model(model)
    one_form = strengths and not names if factor is None else not strengths
    if not one_form or isinstance(factor, str | Mapping):
        raise TypeError(
            "the strength comes before the names, scale(model, 0.5, 'digits'), or is given by "
            f"name, scale(model, digits=0.5); got {factor!r}"
        )
    if factor is not None:
        _check_strength(factor)
    wanted = _wanted(names, strengths)
    for stack in _checked(model, wanted, "scale"):
        here = [name for name in stack.names if not wanted or name in wanted]
        stack.set_strengths({n: strengths[n] if factor is None else factor for n in here})


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
    wanted = _wanted(names, strengths)
    stacks = _checked(model, wanted, "toggle", every=True)
    for stack in stacks:
        stack.switch(wanted)
        new = {name: s for name, s in wanted.items() if s is not None and name in stack.named}
        stack.set_strengths(new)


@contextmanager
def enabled(model: nn.Module, *names: str) -> Iterator[None]:
    """Switch adapters on inside the block; leaving it restores the earlier state.

    Like all blocks, it belongs to the thread or asyncio task that enters it: see `using`.

    Args:
        model: a module with adapters; it may be a part of a larger one.
        names: the adapters; by default all.

    Raises:
        AdapterNameError: there is no adapter of that name.
        StateError: as in `enable`; or this is inside of `routed`.

    >>> import paramlora as pl
    >>> model = nn.Sequential(nn.Linear(4, 3))
    >>> _ = pl.attach(model, pl.LoRA(rank=2), name="digits", activate="no")
    >>> with pl.enabled(model, "digits"):
    ...     pl.summary(model).active
    ('digits',)
    """
    stacks = _checked(model, names, "enable")
    check_order(stacks, names)
    check_not_routed(stacks, "switch adapters on")
    with opened("enabled", _switched(stacks, names, True)):
        yield


@contextmanager
def disabled(model: nn.Module, *names: str) -> Iterator[None]:
    """Switch adapters off inside the block; leaving it restores the earlier state.

    Like all blocks, it belongs to the thread or asyncio task that enters it: see `using`.

    Args:
        model: a module with adapters; it may be a part of a larger one.
        names: the adapters; by default all.

    Raises:
        AdapterNameError: there is no adapter of that name.
        StateError: an adapter is merged.

    >>> import torch
    >>> import paramlora as pl
    >>> model, x = nn.Linear(4, 3), torch.randn(2, 4)
    >>> base = model(x)
    >>> _ = pl.attach(model, pl.Delta())
    >>> with pl.disabled(model):
    ...     torch.equal(model(x), base)
    True
    """
    stacks = _checked(model, names, "disable")
    with opened("disabled", _switched(stacks, names, False)):
        yield


@contextmanager
def using(
    model: nn.Module, /, *names: str | Mapping[str, Strength], **strengths: Strength
) -> Iterator[None]:
    """Let exactly these adapters contribute inside the block; leaving it restores the state.

    A block belongs to the thread or asyncio task that enters it; others do not see it. A task that
    is started inside is in the block as well. A thread that is started inside is not, and raises a
    StateError when it runs the model: enter a block there, or start it with
    `contextvars.copy_context().run`. A compiled model has one state for all threads.

    Verbs such as `enable`, `disable` and `scale` that are called inside change the model for good,
    and their effect is seen where the block leaves it open. An adapter that is attached inside is
    no part of the block.

    Activation checkpointing runs a forward again in the backward, with the adapters that are on
    then. The backward therefore belongs inside the block as well, here as in the other blocks; or
    pass `keep_blocks` to the checkpoint.

    Args:
        model: a module with adapters.
        names: adapters to use at their own strength; or mappings from names to strengths, for names
            that cannot be keywords: `using(model, {"task-1": 0.5})`.
        strengths: adapters to use at another strength: `using(model, digits=0.5)`.

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
    wanted = _wanted(names, strengths)
    stacks = _checked(model, wanted, "toggle", every=True)
    changes = {
        stack: Change(
            {n: name in wanted for name, n in stack.numbers.items()},
            {n: s for name, n in stack.numbers.items() if (s := wanted.get(name)) is not None},
            None,
        )
        for stack in stacks
    }
    with opened("using", changes):
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
            raise TypeError(
                f"adapter names are separate arguments, each a string, got {given!r}; a strength "
                "is given by name, as in digits=0.5"
            )
    return wanted


def _checked(model: nn.Module, names: Iterable[str], verb: str, every: bool = False) -> list[Stack]:
    """Return a model's stacks; raise an error if one of these adapters is missing or merged.

    Without names, and with `every`, no adapter may be merged.
    """
    stacks, names = stacks_in(model), list(names)
    check_names(stacks, names)
    check_unmerged(stacks, () if every else names, verb)
    return stacks


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


def _switched(stacks: Sequence[Stack], names: Sequence[str], on: bool) -> dict[Stack, Change]:
    """Return the changes of a block that switches adapters, by default all, on or off."""
    return {
        stack: Change(
            {n: on for name, n in stack.numbers.items() if not names or name in names}, {}, KEEP
        )
        for stack in stacks
    }
