"""The open blocks of `using`, `enabled`, `disabled` and `routed`, by thread and task.

Note [blocks belong to threads]
    The state of a stack, which a persistent verb such as `enable` writes, is shared by all threads.
    A block writes nothing there. It is a `Block` object with a `Change` for each stack, and a
    context variable holds the blocks that the current thread or asyncio task has entered. A
    stack computes with its own state, changed by those blocks from the outermost to the innermost.

    Leaving a block removes that block and no other, so blocks may be left in any order:

        outer, inner = pl.using(model, "a"), pl.disabled(model)
        outer.__enter__(), inner.__enter__()
        outer.__exit__(None, None, None)        # "a" is still off: `inner` is open
        inner.__exit__(None, None, None)

    Resetting the variable by its token would instead restore what it held on entry, and so bring
    back a block that was left in the meantime.

    A new thread starts with an empty context. One that was started inside a block would silently
    compute something else than its parent. So each stack also knows the blocks that are open at it
    in any thread, and a thread that has entered none raises. A new asyncio task copies the context
    of its parent, and with it the blocks. If it outlives one of them, it raises as well. A thread
    of autograd, which recomputes checkpointed forwards on a GPU, takes the open blocks if all
    belong to one thread, and raises otherwise.

    torch.compile cannot guard on a context variable in every version. While it traces, a stack
    reads plain attributes instead, which blocks and verbs keep up to date (`Stack.reflect`).
"""

import sys
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import StateError
from ..kinds.spec import Strength
from ..private_torch import in_backward

if TYPE_CHECKING:
    from .stack import Stack

NO_BLOCK = (
    "an adapted tensor was read in a thread that has entered no block itself, while another "
    "thread is inside of {verb}() on the same model; enter a block in this thread too, or run it "
    "in a copy of the other's context (contextvars.copy_context().run)"
)
ENDED = (
    "an adapted tensor was read in a task that was started inside of {verb}(), and that block has "
    "ended; enter a block in the task itself"
)
BACKWARD = (
    "activation checkpointing recomputes a forward in a thread of autograd while several threads "
    "are inside of a block on the model ({verbs}), so it is not known whose block counts; pass "
    "context_fn=paramlora.keep_blocks to torch.utils.checkpoint.checkpoint(use_reentrant=False), "
    "which recomputes in the blocks of the forward"
)


UNSET: Mapping[str, Strength] = {}


class State(NamedTuple):
    """What a stack computes with.

    Args:
        active: the adapters that are switched on.
        live: the adapters to compute: active and not merged.
        route: inside `routed`, which row of a batch gets which of the live adapters.
        strengths: the strengths that blocks set; other adapters have their own. None while
            torch.compile traces, which reads the strengths elsewhere.
    """

    active: tuple[str, ...] = ()
    live: tuple[str, ...] = ()
    route: Any = None
    strengths: Mapping[str, Strength] | None = UNSET


class Change(NamedTuple):
    """What a block changes at one stack, by the numbers of the adapters there.

    Adapters that are attached inside the block have other numbers, so they keep their own state.

    Args:
        switched: which adapters it switches on or off.
        strengths: the strengths that it sets.
        route: the route that it sets; None for no route; KEEP leaves it as it is.
    """

    switched: Mapping[int, bool]
    strengths: Mapping[int, Strength]
    route: Any


KEEP = "keep"


class Block:
    """An open block.

    Attributes:
        verb: the name of the function that opened it.
        changes: what it changes, by the key of the stack.
        owner: the thread and the asyncio task that entered it.
        closed: whether it was left.
    """

    def __init__(self, verb: str, changes: Mapping[object, Change]) -> None:
        self.verb, self.changes = verb, changes
        self.owner = _here()
        self.closed = False

    def __deepcopy__(self, memo: dict[int, Any]) -> "Block":
        return self


class Entered:
    """The blocks that a thread or task has entered, outermost first. It never changes.

    Attributes:
        blocks: the blocks.
        kept: whether they count although they have been left (`keep_blocks`).
        outer: for kept blocks, what was entered before.
        states: a cache: for the key of a stack (its own state, its open blocks, the state).
    """

    def __init__(
        self, blocks: Sequence[Block], kept: bool = False, outer: "Entered | None" = None
    ) -> None:
        self.blocks, self.kept, self.outer = tuple(blocks), kept, outer
        self.states: dict[object, tuple[State, tuple[Block, ...], State]] = {}

    def at(self, stack: "Stack") -> list[Block]:
        """Return the blocks that change a stack."""
        return [block for block in self.blocks if stack.key in block.changes]


ENTERED: ContextVar[Entered | None] = ContextVar("paramlora_blocks", default=None)
_LOCK = threading.RLock()


@contextmanager
def opened(verb: str, changes: Mapping["Stack", Change]) -> Iterator[None]:
    """Open a block for the current thread or task: see Note [blocks belong to threads]."""
    block = Block(verb, {stack.key: change for stack, change in changes.items()})
    inherited = _of_backward(changes) if ENTERED.get() is None else []
    with _LOCK:
        for stack in changes:
            stack.put_open((*stack.open, block))
    _enter(*inherited, block)
    try:
        yield
    finally:
        block.closed = True
        _leave(*inherited, block)
        with _LOCK:
            for stack in changes:
                stack.put_open(tuple(other for other in stack.open if not other.closed))


@contextmanager
def changed(changes: Mapping["Stack", Change]) -> Iterator[None]:
    """Change stacks for the current thread while it computes one layer; others see nothing."""
    block = Block("routed", {stack.key: change for stack, change in changes.items()})
    _enter(block)
    try:
        yield
    finally:
        _leave(block)


def _enter(*blocks: Block) -> None:
    entered = ENTERED.get()
    if entered is None:
        ENTERED.set(Entered(blocks))
    else:
        # A task that has outlived a block and enters one of its own is rid of the first one.
        before = [block for block in entered.blocks if entered.kept or not block.closed]
        ENTERED.set(Entered([*before, *blocks], entered.kept, entered.outer))


def _leave(*blocks: Block) -> None:
    entered = ENTERED.get()
    if entered is not None:
        rest = [block for block in entered.blocks if block not in blocks]
        kept = entered.kept
        ENTERED.set(Entered(rest, kept, entered.outer) if rest or kept else None)


def state_within(stack: "Stack") -> State:
    """Return the state of a stack at which a block is open, in this thread or another.

    Raises:
        StateError: it is not known which blocks count: see Note [blocks belong to threads].
    """
    entered = ENTERED.get()
    if entered is not None:
        cached = entered.states.get(stack.key)
        if cached is not None and cached[0] is stack.own and cached[1] is stack.open:
            return cached[2]
        blocks = entered.at(stack)
        if not entered.kept:
            _check_open(blocks)
            blocks = [block for block in blocks if not block.closed]
        if blocks or entered.kept:
            state = composed(stack, blocks)
            entered.states[stack.key] = stack.own, stack.open, state
            return state
    return composed(stack, _without_own(stack))


def _check_open(blocks: Sequence[Block]) -> None:
    """Raise a StateError if this is a task that has outlived a block of its parent."""
    for block in blocks:
        # The thread that opened a block may not have left it itself: a generator that is not used
        # any more is closed by whichever thread collects the garbage.
        if block.closed and block.owner != _here():
            raise StateError(ENDED.format(verb=block.verb))


def _without_own(stack: "Stack") -> Sequence[Block]:
    """Return the blocks that count for a thread without one of its own at a stack, or raise."""
    blocks = [block for block in stack.open if not block.closed]
    foreign = [block for block in blocks if block.owner[0] != threading.get_ident()]
    if not foreign:
        return []  # another task of this thread has opened them
    if _is_backward_thread():
        if len({block.owner[0] for block in blocks}) == 1:
            return blocks
        verbs = ", ".join(sorted({f"{block.verb}()" for block in blocks}))
        raise StateError(BACKWARD.format(verbs=verbs))
    raise StateError(NO_BLOCK.format(verb=foreign[0].verb))


def _of_backward(stacks: Iterable["Stack"]) -> list[Block]:
    """Return the blocks that count for a thread of autograd before it opens one of its own."""
    if not _is_backward_thread():
        return []
    return list(dict.fromkeys(block for stack in stacks for block in _without_own(stack)))


def _is_backward_thread() -> bool:
    """Return whether autograd has started the current thread: on a GPU each backward uses one."""
    return in_backward() and isinstance(threading.current_thread(), threading._DummyThread)


def composed(stack: "Stack", blocks: Sequence[Block]) -> State:
    """Return a stack's own state, changed by blocks.

    A merged adapter is in the stored weight, whichever blocks are open, so its state stays.
    """
    own, merged = stack.own, stack.merged
    if not blocks:
        return own
    switched: dict[int, bool] = {}
    set_to: dict[int, Strength] = {}
    route = None
    for change in [block.changes[stack.key] for block in blocks]:
        switched.update(change.switched)
        set_to.update(change.strengths)
        route = route if change.route is KEEP else change.route
    active, strengths = [], {}
    for name in stack.names:
        number = stack.numbers[name]
        on = name in own.active
        if on if name in merged else switched.get(number, on):
            active.append(name)
        if number in set_to and name not in merged:
            strengths[name] = set_to[number]
    live = tuple([name for name in active if name not in merged])
    # Without a live adapter all rows get the same tensor.
    return State(tuple(active), live, route if live else None, strengths or UNSET)


def foreign_block(stack: "Stack") -> Block | None:
    """Return a block at a stack that this thread or task has not entered; None if there is none."""
    entered = ENTERED.get()
    mine = () if entered is None else entered.blocks
    return next((block for block in stack.open if not block.closed and block not in mine), None)


def may_be_on(stack: "Stack", name: str) -> bool:
    """Return whether an adapter is switched on now, or may be once open blocks are left."""
    number = stack.numbers[name]
    switched = [b.changes[stack.key].switched for b in stack.open if not b.closed]
    return name in stack.active or any(change.get(number) for change in switched)


def is_routed(stack: "Stack") -> bool:
    """Return whether this thread or task is inside of `routed` at a stack, however deep."""
    entered = ENTERED.get()
    blocks = () if entered is None else entered.at(stack)
    return any(block.changes[stack.key].route not in (None, KEEP) for block in blocks)


def keep_blocks() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Let activation checkpointing recompute a forward in the blocks in which it ran.

    It is a `context_fn` of `torch.utils.checkpoint.checkpoint`. Without it, checkpointing runs the
    forward again in the blocks that are open in the backward, which then has to be inside the same
    block as the forward. Persistent verbs, such as `enable`, count as of the backward in any case.

    Returns:
        Two contexts, for the forward and for its second run.

    >>> import torch
    >>> from torch.utils.checkpoint import checkpoint
    >>> import paramlora as pl
    >>> model, x = torch.nn.Linear(4, 3), torch.randn(2, 4, requires_grad=True)
    >>> _ = pl.attach(model, pl.Delta())
    >>> with pl.disabled(model):
    ...     y = checkpoint(model, x, use_reentrant=False, context_fn=pl.keep_blocks)
    >>> y.sum().backward()      # recomputes with the adapter off
    """
    entered = ENTERED.get()
    return nullcontext(), _Kept(() if entered is None else entered.blocks)


class _Kept:
    """A context in which these blocks count, in whichever thread it is entered, and how often."""

    def __init__(self, blocks: Sequence[Block]) -> None:
        self.blocks = blocks

    def __enter__(self) -> None:
        ENTERED.set(Entered(self.blocks, True, ENTERED.get()))

    def __exit__(self, *_: object) -> None:
        entered = ENTERED.get()
        ENTERED.set(None if entered is None else entered.outer)


def _here() -> tuple[int, object]:
    """Return the current thread and asyncio task, to compare."""
    asyncio = sys.modules.get("asyncio")
    try:
        task = None if asyncio is None else asyncio.current_task()
    except RuntimeError:
        task = None  # no event loop runs in this thread
    return threading.get_ident(), None if task is None else weakref.ref(task)
