"""Progress with an estimate: a bar in a terminal, and elsewhere a line now and then."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")
EVERY = 60.0  # seconds between two lines


def progress(items: Iterable[T], total: int | None, label: str, unit: str) -> Iterator[T]:
    """Yield the items, and show on stderr how many are done.

    If stderr is not a terminal, a line is printed at most every EVERY seconds, so that a log of a
    short run has none.

    Args:
        items: yielded unchanged.
        total: their number, for the estimate; None if it is not known.
        label: what is going on, such as "stages".
        unit: the word for one item, such as "stage".
    """
    if sys.stderr.isatty():
        yield from tqdm(items, total=total, desc=label, unit=unit, leave=False)
        return
    began = last = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if done and now - last >= EVERY:
            print(line(label, done, total, unit, now - began), file=sys.stderr, flush=True)
            last = now
        yield item


def line(label: str, done: int, total: int | None, unit: str, seconds: float) -> str:
    """Return a line of progress after some seconds.

    >>> line("stages", 1, 4, "stage", 150)
    'stages   1 of 4 stages, about 8 min left'
    >>> line("lora 0", 300, None, "step", 150)
    'lora 0   300 steps'
    """
    if total is None:
        return f"{label:<8} {done:,} {unit}s"
    left = seconds / done * (total - done)
    about = f"{left:.0f} s" if left < 90 else f"{left / 60:.0f} min"
    return f"{label:<8} {done:,} of {total:,} {unit}s, about {about} left"
