"""Code that reads an adapted tensor to handle the parameter, and must not get W'.

Note [who reads the tensor]
    `layer.weight` is W', for the forward of a user's layer and for whoever looks at the weights.
    But some code reads a parameter as an attribute in order to move, shard or replace it:

    torch.nn.Module           get_parameter("0.weight") promises what named_parameters has there
    torch.distributed         FSDP manages getattr(module, "weight"); checkpoints look names up
    accelerate                moves getattr(module, "weight") and stores the result as the parameter
    transformers' tying       head.weight = embed.weight
    transformers' resizing    puts a weight of another size below adapters of the old size
    torch.nn.utils            the old weight_norm and prune take the parameter out of the module

    The first four get the stored tensor, and the others an error before they change anything. None
    of them asks in a way that a module could answer by itself (`getattr` is all there is), so the
    property looks at the name of the code that reads it. tests/layers/test_readers.py runs each.
"""

import sys
from types import FrameType

from torch import Tensor, nn

from ..errors import StateError
from ..private_torch import READERS_OF_STORED

_HANDLING = (*READERS_OF_STORED, "accelerate.")
_TRANSFORMERS = "transformers.modeling_utils"
_TYING = {"_tie_or_clone_weights", "_tie_embedding_weights"}
_RESIZING = {"_get_resized_embeddings", "_get_resized_lm_head", "_resize_token_embeddings"}
_TAKING = ("torch.nn.utils.weight_norm", "torch.nn.utils.prune")
_KNOWN = (*_HANDLING, _TRANSFORMERS, *_TAKING)


def for_reader(module: nn.Module, tensor: str, depth: int) -> Tensor | None:
    """Return the stored tensor if the code that reads it handles the parameter, None otherwise.

    Args:
        module: the module.
        tensor: the name of its adapted tensor.
        depth: how many calls above this one the reader is.

    Raises:
        StateError: the reader would damage the adapted module; see Note [who reads the tensor].
    """
    frame = sys._getframe(depth)
    name = frame.f_globals.get("__name__") or ""
    if not name.startswith(_KNOWN):
        return None
    if name.startswith(_HANDLING) or (name == _TRANSFORMERS and frame.f_code.co_name in _TYING):
        return module._parameters.get(tensor)
    _check(frame, name, type(module).__bases__[0].__name__, tensor)
    return None


def _check(frame: FrameType, name: str, cls: str, tensor: str) -> None:
    function = frame.f_code.co_name
    if name == _TRANSFORMERS and function in _RESIZING:
        raise StateError(
            f"cannot resize the embeddings: the {tensor} of one, {cls}, has adapters of the old "
            "size. Detach them, or bake them into the weights, then resize and attach anew"
        )
    if name.startswith(_TAKING) and function == "apply":
        raise StateError(
            f"{name} cannot take {tensor!r} of a {cls} out of its module, because it has adapters: "
            "detach them first (torch.nn.utils.parametrizations.weight_norm works with adapters)"
        )
