"""Small models that the tests of model_integration share."""

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from longgen_kernels import AttentionPattern
from model_integration.data import byte_tokenizer

SINK_WINDOW = AttentionPattern.sink_window(sink=2, window=7)
STRIDED = AttentionPattern.strided(3, 4, window=6, sink=1)  # per-head phases: both KV heads see other blocks
VOCABULARY = 89
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,  # large enough that what attention sees decides the logits
}


def save_byte_llama(path: Path, **fields: Any) -> LlamaConfig:
    """A dense Llama with random weights and the byte tokenizer, as a user would have a checkpoint; its config."""
    torch.manual_seed(3)
    sizes = {
        "vocab_size": 260,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    config = LlamaConfig(**{**sizes, **fields})
    LlamaForCausalLM(config).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return config
