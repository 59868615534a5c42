"""Code that reads an adapted tensor to handle the parameter, and must not get W'.

Note [who reads the tensor]
    `layer.weight` is W', for the forward of a user's layer and for whoever looks at the weights.
    But some code reads a parameter as an attribute in order to move, shard or replace it:

    torch.nn.Module           get_parameter("0.weight") promises what named_parameters has there
    torchao's quantize_       quantizes getattr(module, "weight"), and stores the result
    torch.distributed         FSDP manages getattr(module, "weight"); checkpoints look names up
    accelerate                moves getattr(module, "weight") and stores the result as the parameter
    transformers' tying       head.weight = embed.weight
    transformers' resizing    puts a weight of another size below adapters of the old size
    hqq, quanto, torchao's    put another module in the place of the adapted one
      QAT and float8 training
    torch.nn.utils            the old weight_norm and prune take the parameter out of the module

    The first five get the stored tensor, and the others an error before they change anything. None
    of them asks in a way that a module could answer by itself (`getattr` is all there is), so the
    property looks at the name of the code that reads it. tests/layers/test_readers.py runs each.
"""

import sys
from types import FrameType
from typing import Any

from torch import Tensor, nn
from torch.compiler import is_compiling

from ..errors import StateError
from ..private_torch import READERS_OF_STORED
from ..site.find import parametrization_lists, stack_of
from ..site.quantized import UnreadWeight

_QUANTIZE = ("torchao.quantization.quant", "torchao.prototype._nf4tensor_api")
_HANDLING = (*READERS_OF_STORED, "accelerate.", *_QUANTIZE)
_TRANSFORMERS = "transformers.modeling_utils"
_QUANTIZERS = ("transformers.integrations.", "transformers.quantizers.", _TRANSFORMERS)
_TYING = {"_tie_or_clone_weights", "_tie_embedding_weights"}
_RESIZING = {"_get_resized_embeddings", "_get_resized_lm_head", "_resize_token_embeddings"}
_TAKING = ("torch.nn.utils.weight_norm", "torch.nn.utils.prune")
_REPLACING = ("hqq.", "optimum.quanto.", "torchao.")
_KNOWN = (*_HANDLING, _TRANSFORMERS, *_TAKING, *_REPLACING)


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
    if name.startswith(_REPLACING) and not name.startswith(_QUANTIZE):
        raise StateError(
            f"{name} would put a quantized module in the place of an adapted {class_name(module)}, "
            "and the adapters would be lost: quantize the model first, and attach then"
        )
    if name.startswith(_HANDLING) or (name == _TRANSFORMERS and frame.f_code.co_name in _TYING):
        return module._parameters.get(tensor)
    _check(frame, name, class_name(module), tensor)
    return None


def read_packed(module: nn.Module, tensor: str, depth: int) -> Tensor:
    """Return the stored tensor of a quantized layer, or a stand-in for W', which does not exist.

    The layer's own code, its library and code that handles parameters get the stored tensor.
    Everybody gets it while no adapter is live.

    Args:
        module: the layer.
        tensor: the name of its weight.
        depth: how many calls above this one the reader is.
    """
    stored = module._parameters.get(tensor)
    if stored is None:
        # Python asks nn.Module.__getattr__ next, which finds a buffer, or raises for the layer.
        raise AttributeError(f"{class_name(module)!r} stores its weight under another name")
    if is_compiling():
        return stored
    frame = sys._getframe(depth)
    reader = frame.f_globals.get("__name__") or ""
    if reader == type(module).__bases__[0].__module__:
        return stored  # the layer's own forward, mostly
    if reader.startswith(_QUANTIZERS) and "dequantize" in frame.f_code.co_name:
        raise StateError(
            f"dequantizing would put another module in the place of this {class_name(module)}, and "
            "its adapters would be lost: save and detach them, dequantize, and load them then"
        )
    state = stack_of(parametrization_lists(module)[tensor]).state()  # type: ignore[union-attr]
    if not state.live and state.route is None:
        return stored
    homes = {cls.__module__ for cls in (*type(module).__mro__, type(stored))}
    packages = {home.partition(".")[0] for home in homes} - {"torch"}
    if reader.startswith((*_HANDLING, *_QUANTIZERS)) or reader in homes:
        return stored
    return stored if reader.partition(".")[0] in packages else UnreadWeight.like(stored)


def is_quantizing(depth: int) -> bool:
    """Return whether code that got a stored tensor to quantize it now assigns the result."""
    frame: Any = sys._getframe(depth)
    while frame.f_globals.get("__name__") == "torch.nn.modules.module":  # its __setattr__
        frame = frame.f_back
    return (frame.f_globals.get("__name__") or "").startswith(_QUANTIZE)


def class_name(module: nn.Module) -> str:
    """Return the name of the class that an adapted module had before."""
    return type(module).__bases__[0].__name__


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
