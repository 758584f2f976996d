"""The models that are timed. Weights are random, which changes no timing."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from .measure import DEVICE, DTYPE

MODELS = {
    # HuggingFaceTB/SmolLM2-135M
    "SmolLM2-135M": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
    # Qwen/Qwen2.5-0.5B, as a Llama: without its biases
    "Qwen2.5-0.5B": {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    # meta-llama/Llama-3.1-8B
    "Llama-3.1-8B": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 256,
    },
}


def build(name: str, layers: int | None = None) -> LlamaForCausalLM:
    """A model of this shape on the device under test, with fewer layers if so asked."""
    torch.manual_seed(0)
    shape = dict(MODELS[name])
    if layers is not None:
        shape["num_hidden_layers"] = layers
    config = LlamaConfig(**shape, max_position_embeddings=16384, bos_token_id=1, eos_token_id=2)
    before = torch.get_default_dtype()
    torch.set_default_dtype(DTYPE)
    try:
        with DEVICE:
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def parameters(name: str, layers: int | None = None) -> int:
    """Of the decoder layers, which is what every token passes through."""
    shape = MODELS[name]
    hidden, middle = shape["hidden_size"], shape["intermediate_size"]
    head = hidden // shape["num_attention_heads"]
    attention = 2 * hidden * hidden + 2 * hidden * head * shape["num_key_value_heads"]
    return (layers or shape["num_hidden_layers"]) * (attention + 3 * hidden * middle)
