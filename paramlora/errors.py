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
    """The base class of all paramlora errors.

    >>> import torch, paramlora as pl
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3))
    >>> try:
    ...     pl.attach(model, pl.LoRA(rank=2), [])
    ... except pl.ParamloraError as error:
    ...     print(error)
    no targets given; name at least one, such as nn.Linear or 'fc1'
    """


class TargetError(ParamloraError, ValueError):
    """A target matches no tensor, or it matches one that cannot be adapted.

    >>> import torch, paramlora as pl
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3))
    >>> try:
    ...     pl.attach(model, pl.LoRA(rank=2), "fc1")
    ... except pl.TargetError as error:
    ...     print(error)
    no tensor matches 'fc1'; there are 0, 0.weight, 0.bias
    """


class AdapterNameError(ParamloraError, KeyError):
    """No adapter has this name, another adapter has it already, or it is not a valid name.

    >>> import torch, paramlora as pl
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3))
    >>> _ = pl.attach(model, pl.LoRA(rank=2), name="a")
    >>> try:
    ...     pl.enable(model, "b")
    ... except pl.AdapterNameError as error:
    ...     print(error)
    no adapter 'b' here; attached are: 'a'
    """

    # KeyError prints the repr of its argument, which would quote and escape the message.
    __str__ = Exception.__str__


class StateError(ParamloraError, RuntimeError):
    """The call is not possible in this state of a model or adapter, such as merged or sharded.

    >>> import torch, paramlora as pl
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3))
    >>> _ = pl.attach(model, pl.LoRA(rank=2), name="a")
    >>> pl.merge(model)
    >>> try:
    ...     pl.disable(model)
    ... except pl.StateError as error:
    ...     print(error)
    cannot disable adapter 'a' while it is merged; unmerge first
    """


class CheckpointError(ParamloraError, ValueError):
    """A file or a state dict is damaged, has another format, or belongs to another model.

    >>> import torch, paramlora as pl
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3))
    >>> _ = pl.attach(model, pl.LoRA(rank=2), name="a")
    >>> try:
    ...     pl.load_state_dict(model, {"0.weight.A": torch.ones(2, 4)})
    ... except pl.CheckpointError as error:
    ...     print(error)
    the state for adapter 'a' does not fit: missing 0.weight.B
    """
