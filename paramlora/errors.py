"""The library's own errors, each also the standard error that it is.

Every message says what was asked, what was found, and what to do next.
"""

import difflib
import itertools
from collections.abc import Iterable


def nearest(path: str, paths: Iterable[str]) -> str:
    """Return a question that names the paths most like `path`, empty where none is."""
    close = difflib.get_close_matches(path, list(paths), n=3, cutoff=0.5)
    return f"; did you mean {', '.join(close)}?" if close else ""


def some(names: Iterable[str]) -> str:
    """Return the first of some names, as a list to read."""
    first = list(itertools.islice(names, 9))
    return ", ".join(first[:8]) + (", …" if len(first) > 8 else "")


class ParamloraError(Exception):
    """The base of all of paramlora's errors; catch this one to catch them all."""


class TargetError(ParamloraError, ValueError):
    """No tensor matches a target, or a tensor that matches cannot be adapted."""


class AdapterNameError(ParamloraError, KeyError):
    """An adapter of this name does not exist, exists already, or cannot be a name."""

    # KeyError prints the repr of its argument, which would quote and escape the message.
    __str__ = Exception.__str__


class StateError(ParamloraError, RuntimeError):
    """The adapter is in a state (merged, switched off) in which this cannot be done."""


class CheckpointError(ParamloraError, ValueError):
    """A file or a state dict is damaged, foreign, or belongs to another model."""
