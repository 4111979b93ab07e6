"""Decoding a token at a time with one CUDA graph, so that no step waits for Python to launch its kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from model_integration import attention
from model_integration.cache import LongGenCache
from model_integration.cache_name import CACHE_NAME
from model_integration.configuration import LongGenConfig


def graph_unsupported(model: PreTrainedModel) -> str | None:
    """Why this model's decoding step cannot be captured; None if it can."""
    implementation = model.config._attn_implementation
    if implementation != attention.NAME:
        return f"attn_implementation={implementation!r} keeps every token; only {attention.NAME!r} has a LongGenCache"
    rope_type = (model.config.rope_parameters or {}).get("rope_type", "default")
    if "dynamic" in rope_type or rope_type == "longrope":
        return f"rope_type={rope_type!r} changes its frequencies with the length, which the host has to read"
    devices = {p.device for p in model.parameters()}
    return f"the model is spread over {len(devices)} devices" if len(devices) > 1 else None


class GraphDecoder:
    """Decodes one token a sequence at a time; on a GPU the steps are replays of one CUDA graph.

    Lengths and position ids come from the cache's counters on the device, so that the graph stays right while the cache
    grows. The first step runs as usual, because kernels are compiled in it; the second is captured. When the cache
    takes more memory both are repeated, so give it room: `LongGenCache(config, max_length=...)`. On other devices each
    step is computed directly.

    Args:
        model: a hybrid with attn_implementation="longgen".
        cache: what `model` has read so far, at least one token a sequence; between steps it may be used and changed
            like any other. Rows may be of different lengths: position ids count a row's real tokens.

    Raises:
        TypeError: an argument is of another kind.
        ValueError: the cache is empty.
        NotImplementedError: the step cannot be captured (`graph_unsupported`).

    >>> from model_integration import LongGenLlamaConfig, LongGenLlamaForCausalLM
    >>> config = LongGenLlamaConfig(
    ...     vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2
    ... )
    >>> model, cache = LongGenLlamaForCausalLM(config).eval(), LongGenCache(config, max_length=100)
    >>> with torch.no_grad():
    ...     logits = model(torch.randint(0, 50, (1, 10)), cache=cache).logits[:, -1]
    >>> decoder = GraphDecoder(model, cache)
    >>> for _ in range(5):
    ...     logits = decoder.step(logits.argmax(-1))
    >>> logits.shape, cache.get_seq_length()
    (torch.Size([1, 50]), 15)
    """

    def __init__(self, model: PreTrainedModel, cache: LongGenCache) -> None:
        if not isinstance(getattr(model, "config", None), LongGenConfig) or model.get_output_embeddings() is None:
            raise TypeError(
                f"model must be a LongGen hybrid with a language-modelling head, got {type(model).__name__}"
            )
        if not isinstance(cache, LongGenCache):
            raise TypeError(f"cache must be a LongGenCache, got {type(cache).__name__}")
        reason = graph_unsupported(model)
        if reason is not None:
            raise NotImplementedError(f"decoding with a CUDA graph: {reason}")
        if not cache.kv:
            raise ValueError("cache is empty: let the model read the prompt with cache=cache first")
        self.model, self.cache = model, cache
        first = cache.kv[0]
        self._captures = first.k.device.type == "cuda"
        self._tokens = torch.zeros(first.batch, 1, dtype=torch.int64, device=first.k.device)
        self._addresses: list[int] = []
        self._replay: Callable[[], Tensor] | None = None

    def step(self, tokens: Tensor) -> Tensor:
        """Appends a token to each sequence and returns what may follow.

        Args:
            tokens: int64 (batch,) or (batch, 1), on the model's device.

        Returns: logits (batch, vocab_size) in the model's dtype, valid until the next step overwrites them.

        Raises ValueError for another shape or dtype. Nothing waits for the device.
        """
        batch = self._tokens.shape[0]
        if tokens.dtype != torch.int64 or tuple(tokens.shape) not in ((batch,), (batch, 1)):
            raise ValueError(f"tokens must be int64 ({batch},), got {tokens.dtype} {tuple(tokens.shape)}")
        self._tokens.copy_(tokens.view(batch, 1))
        self.cache.reserve(1)
        addresses = [kv.k.data_ptr() for kv in self.cache.kv]
        if addresses != self._addresses:
            self._addresses, self._replay = addresses, None
            return self._compute()
        if not self._captures:
            return self._compute()
        if self._replay is None:
            self._replay = captured(self._compute, self._tokens.device)  # counts the step, and computes nothing
            return self._replay()
        logits = self._replay()
        self.cache.advanced(1)
        return logits

    def _compute(self) -> Tensor:
        with torch.no_grad():
            positions = self.cache.kv[0].seqlens.long()[:, None]
            output = self.model(
                self._tokens, position_ids=positions, cache=self.cache, use_cache=True, logits_to_keep=1
            )
        logits: Tensor = output.logits[:, -1]
        return logits


class GraphedCall:
    """A hybrid's call as `generate` makes it, in which single tokens behind a LongGenCache are a GraphDecoder's steps.

    The first of them is computed as usual: the model checks what the mask and the position ids say, and so does this
    class. Prompts and their chunks, and a call for hidden states or attentions, are always computed as usual.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._decoder: GraphDecoder | None = None

    def __call__(self, **inputs: Any) -> Any:
        """The model's own arguments and result; of the logits the last token's, valid until the next call."""
        ids, cache = inputs.get("input_ids"), inputs[CACHE_NAME]
        extras = inputs.get("output_hidden_states") or inputs.get("output_attentions")
        if ids is None or ids.shape[1] != 1 or cache.get_seq_length() == 0 or extras:
            return self._model(**inputs)
        if self._decoder is None or self._decoder.cache is not cache:
            positions = inputs.get("position_ids")
            counted = cache.kv[0].seqlens.long()[:, None]
            if positions is None or torch.equal(positions, counted.expand_as(positions)):
                self._decoder = GraphDecoder(self._model, cache)
            return self._model(**inputs)
        logits = self._decoder.step(ids)
        return CausalLMOutputWithPast(logits=logits[:, None], **{CACHE_NAME: cache})


def captured(call: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
    """A function that replays `call` as a CUDA graph and returns the graph's own output."""
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream(device)
    # thread_local: what other threads of a server do on the GPU meanwhile is no error.
    with torch.cuda.device(device), torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        result = call()

    def replay() -> Tensor:
        with torch.cuda.device(device):
            graph.replay()
        return result

    return replay
