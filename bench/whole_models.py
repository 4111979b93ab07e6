"""Whole models for bench.end_to_end: the LongGen hybrid and the dense Llama, of one shape, with random weights.

A `Contender` is a model on a device and what can be done with it: read a prompt, decode behind it, train a step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM, Cache, LlamaConfig
from transformers.cache_utils import CacheLayerMixin

from longgen_kernels.cache_layout import CacheLayout
from model_integration import GraphDecoder, LongGenCache, LongGenLlamaConfig
from model_integration.cache_name import CACHE_NAME
from model_integration.decoding import captured
from model_integration.loss import next_token_loss
from model_integration.training.activations import recompute_activations

SHAPES: dict[str, dict[str, int]] = {
    "llama-2-7b": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "tiny": {
        "vocab_size": 97,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 6,
        "num_attention_heads": 2,
    },
}
Step = Callable[[Tensor], Tensor]  # (1,) tokens -> (1, vocab_size) logits


class FullLayer(CacheLayerMixin):
    """Every token of one layer, in memory taken once; when it is full, a new token takes the last one's place.

    So steps at one length can be repeated, and no step copies the cache, as transformers' DynamicCache does.
    """

    is_sliding = False

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room, self.seen = room, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        batch, heads, _, head_dim = key_states.shape
        self.keys, self.values = (x.new_empty(batch, heads, self.room, head_dim) for x in (key_states, value_states))
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        self.seen = start + key_states.shape[2]
        self.keys[:, :, start : self.seen] = key_states
        self.values[:, :, start : self.seen] = value_states
        return self.keys[:, :, : self.seen], self.values[:, :, : self.seen]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        return min(self.seen, self.room - 1)

    def get_max_length(self) -> int:
        return self.room

    def reset(self) -> None:
        self.seen = 0


class Contender:
    """A model with random weights, made on the device in its dtype."""

    implementation: str

    def __init__(self, config: LlamaConfig, device: torch.device, dtype: torch.dtype) -> None:
        self.config, self.device, self.dtype = config, device, dtype
        with device:
            self.model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=self.implementation)
        self.model.eval()

    def new_cache(self, length: int, spare: int) -> Cache:
        """Room for a prompt of `length` tokens and, if the cache goes on growing, `spare` more."""
        raise NotImplementedError

    def cache_bytes(self, length: int, spare: int) -> int:
        """Bytes of the keys and values that `new_cache` will hold."""
        raise NotImplementedError

    def graph_step(self, cache: Cache) -> Step:
        """Decoding steps behind a filled cache, replayed as one CUDA graph."""
        raise NotImplementedError

    def read(self, ids: Tensor, cache: Cache, chunk: int | None) -> Tensor:
        """Fills the cache with a prompt (1, tokens); returns the logits (1, vocab_size) of its last token."""
        for part in ids.split(chunk or ids.shape[1], dim=1):
            logits = self.step(part, cache)
        return logits

    def step(self, ids: Tensor, cache: Cache) -> Tensor:
        with torch.no_grad():
            output = self.model(ids, use_cache=True, logits_to_keep=1, **{CACHE_NAME: cache})
        logits: Tensor = output.logits[:, -1]
        return logits

    def eager_step(self, cache: Cache) -> Step:
        """Decoding steps behind a filled cache, launched from Python."""
        return lambda tokens: self.step(tokens[:, None], cache)

    def train_step(self, ids: Tensor, keep_attention: bool = False) -> Tensor:
        """Forward and backward pass with gradient checkpointing; the loss, never all logits at once."""
        self.model.train()
        recompute_activations(self.model, keep_attention=keep_attention)
        try:
            hidden = self.model.model(input_ids=ids, use_cache=False).last_hidden_state
            loss = next_token_loss(hidden, self.model.lm_head, ids, self.config.vocab_size)
            loss.backward()
            return loss.detach()
        finally:
            self.model.zero_grad(set_to_none=True)
            recompute_activations(self.model, on=False)
            self.model.eval()

    def prefill_bytes(self, length: int, spare: int, chunk: int | None) -> dict[str, int]:
        """What reading a prompt needs beside the weights: the cache exactly, the activations estimated."""
        # A layer's widest moments: residual, norm and the MLP's four tensors; or queries, keys, values, their rotation
        # with its temporaries, the parts of the output.
        width, inner = self.config.hidden_size, self.config.intermediate_size
        wide = max(3 * width + 4 * inner, 13 * width)
        return {
            "kv_cache": self.cache_bytes(length, spare),
            "activations": min(length, chunk or length) * wide * self.dtype.itemsize,
        }

    @property
    def _token_bytes(self) -> int:
        """Bytes of one token's key and value in one KV head."""
        head_dim: int = self.config.head_dim
        return 2 * head_dim * self.dtype.itemsize


class Hybrid(Contender):
    """The LongGen hybrid with its sparse cache."""

    implementation = "longgen"

    def new_cache(self, length: int, spare: int) -> LongGenCache:
        return LongGenCache(self.config, max_length=length + spare)

    def cache_bytes(self, length: int, spare: int) -> int:
        heads, room = self.config.num_key_value_heads, length + spare
        slots = [CacheLayout.compact(pattern, room).slots(room, heads) for pattern in self.config.layer_patterns]
        return sum(slots) * heads * self._token_bytes

    def graph_step(self, cache: Cache) -> Step:
        return GraphDecoder(self.model, cache).step


class Dense(Contender):
    """transformers' Llama; on a GPU its attention is cuDNN's. Its graph holds for one length only."""

    implementation = "sdpa"

    def new_cache(self, length: int, spare: int) -> Cache:
        return Cache(layers=[FullLayer(length) for _ in range(self.config.num_hidden_layers)])

    def cache_bytes(self, length: int, spare: int) -> int:
        return self.config.num_hidden_layers * length * self.config.num_key_value_heads * self._token_bytes

    def step(self, ids: Tensor, cache: Cache) -> Tensor:
        with self._kernel():
            return super().step(ids, cache)

    def train_step(self, ids: Tensor, keep_attention: bool = False) -> Tensor:
        with self._kernel():
            return super().train_step(ids, keep_attention)

    def graph_step(self, cache: Cache) -> Step:
        static = torch.zeros(1, 1, dtype=torch.int64, device=self.device)
        self.step(static, cache)  # compiles and allocates what a capture must not
        replay = captured(lambda: self.step(static, cache), self.device)

        def step(tokens: Tensor) -> Tensor:
            static.copy_(tokens[:, None])
            return replay()

        return step

    def _kernel(self) -> Any:
        backend = SDPBackend.CUDNN_ATTENTION if self.device.type == "cuda" else SDPBackend.MATH
        return sdpa_kernel(backend)


def contenders(shape: str, sparse_pattern: Any) -> dict[str, tuple[type[Contender], LlamaConfig]]:
    """Each contender's class and config. The hybrid's full layers are the default third, in the middle."""
    dense = LlamaConfig(**SHAPES[shape])
    return {
        "hybrid": (Hybrid, LongGenLlamaConfig.from_dense(dense, sparse_pattern=sparse_pattern)),
        "dense": (Dense, dense),
    }
