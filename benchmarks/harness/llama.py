"""A Llama with random weights, in the shapes that `big-model` and `scaling` measure."""

import torch
from torch import nn

# The shape of TinyLlama 1.1B, that of Llama 3 8B with five layers, and one for tests.
SHAPES: dict[str, dict[str, int]] = {
    "deep": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
    },
    "wide": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 5,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
    },
    "tiny": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 96,
    },
}
SHAPES_HELP = "TinyLlama 1.1B; five layers of the width of Llama 3 8B, 1.35B; a model for tests"


def llama(shape: str, device: str) -> nn.Module:
    """Return a Llama with random weights in bfloat16, frozen, in training mode."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    with torch.device(device):
        config = LlamaConfig(
            **SHAPES[shape], max_position_embeddings=4096, use_cache=False, dtype="bfloat16"
        )
        return LlamaForCausalLM(config).to(torch.bfloat16).requires_grad_(False).train()
