"""The library's own errors, each also the standard error that it is.

Every message says what was asked, what was found, and what to do next.
"""


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
