"""The library's exceptions, and two helpers for their messages.

Each exception also derives from the matching standard exception. A message says what was asked,
what was found, and what to do next.
"""

import difflib
import itertools
from collections.abc import Iterable


def nearest(path: str, paths: Iterable[str]) -> str:
    """Return a question that names the most similar paths, or "" if none is similar.

    >>> nearest("fc9", ["fc1", "fc2", "head"])
    '; did you mean fc2, fc1?'
    """
    close = difflib.get_close_matches(path, list(paths), n=3, cutoff=0.5)
    return f"; did you mean {', '.join(close)}?" if close else ""


def some(names: Iterable[str]) -> str:
    """Return the first eight names, separated by commas, with an ellipsis if there are more.

    >>> some(f"fc{i}" for i in range(100))
    'fc0, fc1, fc2, fc3, fc4, fc5, fc6, fc7, …'
    """
    first = list(itertools.islice(names, 9))
    return ", ".join(first[:8]) + (", …" if len(first) > 8 else "")


class ParamloraError(Exception):
    """The base class of all paramlora errors."""


class TargetError(ParamloraError, ValueError):
    """A target matches no tensor, or it matches one that cannot be adapted."""


class AdapterNameError(ParamloraError, KeyError):
    """No adapter has this name, another adapter has it already, or it is not a valid name."""

    # KeyError prints the repr of its argument, which would quote and escape the message.
    __str__ = Exception.__str__


class StateError(ParamloraError, RuntimeError):
    """The call is not possible in this state of a model or adapter, such as merged or sharded."""


class CheckpointError(ParamloraError, ValueError):
    """A file or a state dict is damaged, has another format, or belongs to another model."""
