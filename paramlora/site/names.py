"""The order of adapters' names, and the checks of names before a verb changes anything."""

from collections.abc import Container, Iterable, Iterator, Sequence, Sized

from ..errors import AdapterNameError, StateError, nearest
from ..stack.overlay import foreign_block, is_routed
from ..stack.stack import Stack


def ordered_names(stacks: Iterable[Stack]) -> list[str]:
    """Return the names of the adapters in stacks, in attaching order.

    All stacks number their adapters with one counter, so the smallest number of a name in any stack
    gives its position.
    """
    pairs = sorted((number, name) for stack in stacks for name, number in stack.numbers.items())
    return list(dict.fromkeys(name for _, name in pairs))


def check_names(stacks: Sequence[Stack], names: Iterable[str]) -> None:
    """Raise an error if there are no adapters at all, or none of one of these names.

    Raises:
        AdapterNameError: no stack holds an adapter of that name.
        StateError: no name is given, and there are no stacks.
        TypeError: a name is not a string.
    """
    names = list(names)
    if not names and not stacks:
        raise StateError(
            "no adapter is attached here; attach or load one first, or call this on the model that "
            "has adapters"
        )
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"adapter names are separate arguments, each a string, got {name!r}")
        if not any(name in stack.names for stack in stacks):
            known = ordered_names(stacks)
            listed = ", ".join(map(repr, known)) or "none"
            raise AdapterNameError(
                f"no adapter {name!r} here; attached are: {listed}{nearest(name, known)}"
            )


def check_no_other_block(stacks: Iterable[Stack], verb: str) -> None:
    """Raise a StateError if another thread or task has a block open on one of these stacks."""
    for stack in stacks:
        block = foreign_block(stack)
        if block is not None:
            raise StateError(
                f"cannot {verb} while another thread or task is inside of {block.verb}() on this "
                "model, which would compute with the changed weights; wait until it has left"
            )


def check_not_routed(stacks: Iterable[Stack], what: str) -> None:
    """Raise a StateError inside of `routed`, where each row has an adapter of its own."""
    if any(is_routed(stack) for stack in stacks):
        raise StateError(
            f"cannot {what} inside of routed(): every row would get it; leave the block first"
        )


def check_order(stacks: Iterable[Stack], names: Container[str]) -> None:
    """Raise a StateError if switching adapters on would change the order in which they act.

    A merged adapter acts first, for it is in the stored weight. With IA3 `a` attached before
    Delta `b`, W' = l ⊙ W + D; with `b` merged, switching `a` on would give l ⊙ (W + D).
    """
    for stack in stacks:
        on = [name for name in stack.names if name in names and name not in stack.seen().active]
        for earlier, later in out_of_order(stack, on, stack.merged):
            raise StateError(
                f"cannot switch on {earlier!r} while {later!r}, which was attached after it, is "
                "merged: one of them depends on the tensor that it is applied to, so their order "
                f"counts; unmerge first, and merge {earlier!r} as well"
            )


def out_of_order(
    stack: Stack, on: Iterable[str], merged: Container[str]
) -> Iterator[tuple[str, str]]:
    """Yield pairs of adapters whose order counts, the earlier one on and only the later merged."""
    for earlier in [name for name in on if name not in merged]:
        for later in stack.names[stack.names.index(earlier) + 1 :]:
            if later in merged and not stack.commute(earlier, later):
                yield earlier, later


def check_unmerged(stacks: Iterable[Stack], names: Sequence[str], verb: str) -> None:
    """Raise a StateError if one of these adapters is merged; without names, if any is merged."""
    for stack in stacks:
        for name in stack.merged:
            if not names or name in names:
                raise StateError(
                    f"cannot {verb} adapter {name!r} while it is merged; unmerge first"
                )


def check_factors(found: Sized) -> None:
    """Raise a StateError if an optimizer would get no factors."""
    if not found:
        raise StateError(
            "there are no factors to train: the adapters here have only constants; name other "
            "adapters"
        )
