"""Decoding a token at a time with one CUDA graph, so that no step waits for Python to launch its kernels."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import GenerateDecoderOnlyOutput, GenerationMode
from transformers.generation.streamers import BaseStreamer

from model_integration import attention
from model_integration.cache import LongGenCache
from model_integration.modeling import LongGenForCausalLM

#: What `generate` can return beside the tokens, and the graph does not keep.
_EXTRAS = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")


def graph_unsupported(model: LongGenForCausalLM) -> str | None:
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
    ...     logits = model(torch.randint(0, 50, (1, 10)), past_key_values=cache).logits[:, -1]
    >>> decoder = GraphDecoder(model, cache)
    >>> for _ in range(5):
    ...     logits = decoder.step(logits.argmax(-1))
    >>> logits.shape, cache.get_seq_length()
    (torch.Size([1, 50]), 15)
    """

    def __init__(self, model: LongGenForCausalLM, cache: LongGenCache) -> None:
        if not isinstance(model, LongGenForCausalLM):
            raise TypeError(
                f"model must be a LongGen hybrid with a language-modelling head, got {type(model).__name__}"
            )
        if not isinstance(cache, LongGenCache):
            raise TypeError(f"cache must be a LongGenCache, got {type(cache).__name__}")
        reason = graph_unsupported(model)
        if reason is not None:
            raise NotImplementedError(f"decoding with a CUDA graph: {reason}")
        if not cache.kv:
            raise ValueError("cache is empty: let the model read the prompt with past_key_values=cache first")
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
                self._tokens, position_ids=positions, past_key_values=self.cache, use_cache=True, logits_to_keep=1
            )
        logits: Tensor = output.logits[:, -1]
        return logits


def captured(call: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
    """A function that replays `call` as a CUDA graph and returns the graph's own output."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), torch.cuda.graph(graph, stream=torch.cuda.Stream(device)):
        result = call()

    def replay() -> Tensor:
        with torch.cuda.device(device):
            graph.replay()
        return result

    return replay


def generate_with_graph(
    model: LongGenForCausalLM, inputs: Tensor | None = None, *, streamer: BaseStreamer | None = None, **options: Any
) -> Tensor | GenerateDecoderOnlyOutput:
    """`model.generate(inputs, ...)`, greedy or sampling, with the steps of a GraphDecoder: the same tokens, sooner.

    Args:
        options: what `generate` takes: `max_new_tokens`, `do_sample`, `attention_mask`, `past_key_values`,
            `prefill_chunk_size`, stopping criteria, logits processors, a generation config.

    Returns what `generate` does. Raises NotImplementedError for beams, assistants and every other mode than greedy and
    sampling, for scores, logits, attentions and hidden states in the output, for another cache than a LongGenCache, and
    where the step cannot be captured.
    """
    if options.get("assistant_model") is not None:
        raise NotImplementedError("assistant_model: a CUDA graph decodes one token at a time; use model.generate")
    reason = graph_unsupported(model)
    if reason is not None:
        raise NotImplementedError(f"decoding with a CUDA graph: {reason}; use model.generate")
    # transformers gives a custom loop no streamer.
    loop = partial(_decode, streamer=streamer)
    output: Tensor | GenerateDecoderOnlyOutput = model.generate(
        inputs, streamer=streamer, custom_generate=loop, **options
    )
    return output


def _decode(
    model: LongGenForCausalLM,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    streamer: BaseStreamer | None = None,
    **model_kwargs: Any,
) -> Tensor | GenerateDecoderOnlyOutput:
    """The loop that `generate` calls once it has prepared everything: tokens are chosen as in its own."""
    mode, cache = generation_config.get_generation_mode(), model_kwargs.get("past_key_values")
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise NotImplementedError(f"{mode.value}: a CUDA graph decodes greedily or samples; use model.generate")
    if not isinstance(cache, LongGenCache):
        raise NotImplementedError(f"a CUDA graph needs a LongGenCache, got {type(cache).__name__}; use model.generate")
    extras = [name for name in _EXTRAS if getattr(generation_config, name)]
    if extras and generation_config.return_dict_in_generate:
        raise NotImplementedError(f"{', '.join(extras)}: a CUDA graph keeps only the tokens; use model.generate")

    logits = model._prefill(input_ids, generation_config, model_kwargs).logits[:, -1]
    decoder = GraphDecoder(model, cache)
    unfinished = torch.ones(input_ids.shape[0], dtype=torch.int64, device=input_ids.device)
    ends = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
    while True:
        scores = logits_processor(input_ids, logits.to(torch.float32, copy=True))
        if generation_config.do_sample:
            tokens = torch.multinomial(scores.softmax(-1), num_samples=1).squeeze(1)
        else:
            tokens = scores.argmax(-1)
        if ends:
            tokens = tokens * unfinished + generation_config._pad_token_tensor * (1 - unfinished)
        input_ids = torch.cat([input_ids, tokens[:, None]], dim=1)
        if streamer is not None:
            streamer.put(tokens.cpu())
        unfinished = unfinished & ~stopping_criteria(input_ids, scores)
        if not unfinished.any():
            break
        logits = decoder.step(tokens)
    if streamer is not None:
        streamer.end()
    if generation_config.return_dict_in_generate:
        return GenerateDecoderOnlyOutput(sequences=input_ids, past_key_values=cache)
    return input_ids
