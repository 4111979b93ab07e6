"""The KV cache that `generate` uses: each layer keeps what its pattern can still show, and no more."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from longgen_kernels import AttentionPattern, SparseKVCache, longgen_attn_with_kvcache
from longgen_kernels.cache_layout import MAX_QUERY_TOKENS
from model_integration.configuration import LongGenConfig
from model_integration.layout import checked_mask, position_jumps


class LongGenCacheLayer(CacheLayerMixin):
    """One layer's `SparseKVCache`, made when the first keys tell its batch, dtype and device.

    Args:
        pattern: what the layer sees; a dense one keeps everything.
        max_length: tokens to have room for at once; more make the cache grow.

    Attributes: `kv`, None before the first tokens; `seen`, tokens of a row so far, padding included.
    """

    is_croppable = True  # transformers asks from 5.24 on

    def __init__(self, pattern: AttentionPattern, max_length: int) -> None:
        super().__init__()
        self.pattern = pattern
        self.max_length = max_length
        self.kv: SparseKVCache | None = None
        self.seen = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Makes room for tokens like these: (batch, kv_heads, n, head_dim)."""
        batch, kv_heads, n, head_dim = key_states.shape
        self.kv = SparseKVCache(
            self.pattern, batch, kv_heads, head_dim, max(self.max_length, n),
            dtype=value_states.dtype, device=value_states.device, grows=True,
        )  # fmt: skip
        self.is_initialized = True

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None, counts: Tensor | None) -> Tensor:
        """Appends k, v (batch, n, kv_heads, head_dim) and returns what q (batch, n, heads, head_dim) sees, like q.

        `counts` and the errors are those of `longgen_attn_with_kvcache`.
        """
        if self.kv is None:
            self.lazy_initialization(k.transpose(1, 2), v.transpose(1, 2))
        assert self.kv is not None
        out = longgen_attn_with_kvcache(q, self.kv, k, v, counts=counts, softmax_scale=scale)
        self.seen += q.shape[1]
        return out

    def update(self, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
        """Refused: what is left of a sparse layer's keys is in no order that a masked attention could use."""
        raise ValueError(
            'a LongGenCache only serves LongGen hybrids with attn_implementation="longgen"; '
            "use transformers' DynamicCache with others"
        )

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_seq_length(self) -> int:
        return self.seen

    def get_max_length(self) -> int:
        return -1  # it grows

    def reset(self) -> None:
        if self.kv is not None:
            self.kv.reset()
        self.seen = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.kv is not None:
            self.kv.reorder(beam_idx)

    def crop(self, tokens_to_remove: int) -> None:
        if self.kv is not None:
            self.kv.crop(-tokens_to_remove)
            self.seen += tokens_to_remove

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.kv is not None:
            rows = torch.arange(self.kv.batch, device=self.kv.k.device)
            self.batch_select_indices(rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.kv is not None:
            state = self.kv.state_dict()
            rows = {name: state[name][indices.to(self.kv.k.device)] for name in ("k", "v", "seqlens")}
            self.kv = SparseKVCache.from_state_dict({**state, **rows})


class LongGenCache(Cache):
    """The cache of a LongGen hybrid; `generate` makes one by itself.

    It works like transformers' DynamicCache: pass it as `cache` (before transformers 5.24 `generate` calls it
    `past_key_values`, a hybrid takes either name), also to several calls, copy it, reorder it.
    It takes no gradients, and `crop` goes back 16 tokens for certain, which is what assisted decoding may draft.

    Args:
        config: the model's; every layer's pattern is in it.
        max_length: tokens to have room for at once. More tokens double the room, by a copy.

    >>> from model_integration import LongGenLlamaConfig
    >>> cache = LongGenCache(LongGenLlamaConfig(num_hidden_layers=3))
    >>> len(cache), cache.get_seq_length(), cache.nbytes
    (3, 0, 0)
    """

    def __init__(self, config: LongGenConfig, max_length: int = 1) -> None:
        super().__init__(layers=[LongGenCacheLayer(pattern, max_length) for pattern in config.layer_patterns])
        self._padded_until = 0  # no row has padding behind this column

    @property
    def kv(self) -> list[SparseKVCache]:
        """The layers' `SparseKVCache`s; empty before the first tokens."""
        return [layer.kv for layer in self.layers if layer.kv is not None]

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values, those that there is only room for included."""
        return sum(kv.nbytes for kv in self.kv)

    @property
    def full_nbytes(self) -> int:
        """What `nbytes` would be if every layer kept every token."""
        return sum(kv.nbytes // kv.slots * kv.max_seqlen for kv in self.kv)

    def tokens_kept(self) -> Tensor:
        """Tokens that are in the cache, int64 (layers, batch, kv_heads); (0,) before the first tokens."""
        kept = [kv.tokens_kept() for kv in self.kv]
        return torch.stack(kept) if kept else torch.empty(0, dtype=torch.int64)

    def reserve(self, tokens: int) -> None:
        """Makes room for this many more tokens of each sequence; a layer that has to grow gets other memory."""
        for kv in self.kv:
            kv.reserve(tokens)

    def advanced(self, tokens: int) -> None:
        """Tells the host that a CUDA graph's replay has appended this many tokens to each sequence of each layer."""
        for layer in self.layers:
            layer.kv.advanced(tokens)
            layer.seen += tokens

    def reset(self) -> None:
        super().reset()
        self._padded_until = 0

    def crop(self, tokens_to_remove: int | Tensor) -> None:
        """Drops the last `-tokens_to_remove` tokens of each row, in all layers or, raising ValueError, in none."""
        seen, tokens_to_remove = self.get_seq_length(), int(tokens_to_remove)  # a 0-d tensor in transformers 5.17
        if not -seen <= tokens_to_remove <= 0:
            raise ValueError(
                f"crop takes the negative number of tokens to remove, down to {-seen}; got {tokens_to_remove}"
            )
        if tokens_to_remove and seen + tokens_to_remove < self._padded_until:
            raise ValueError(
                f"cannot crop to {seen + tokens_to_remove} tokens: some row has padding up to {self._padded_until}, "
                "and the cache does not know which of its tokens came before it"
            )
        for kv in self.kv:
            try:
                kv.check_still_kept(-tokens_to_remove)
            except ValueError as error:
                raise ValueError(
                    f"{error}. For assisted decoding set num_assistant_tokens (or prompt_lookup_num_tokens) to at most "
                    f'{MAX_QUERY_TOKENS}, or keep every token with cache_implementation="dynamic"'
                ) from error
        super().crop(tokens_to_remove)

    def step(
        self,
        batch: int,
        q_length: int,
        device: torch.device,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cu_seq_lens: Tensor | None = None,
    ) -> CacheStep:
        """Reads from a model's arguments which of the next tokens are real.

        Args:
            attention_mask: (batch, seen + q_length), 0 for padding, on either side.
            position_ids: (batch or 1, q_length).

        Raises ValueError for packed sequences, and for a mask that contradicts what the cache has taken.
        """
        seen = self.get_seq_length()
        real = checked_mask(attention_mask, seen, q_length, device)
        if cu_seq_lens is not None or (
            position_ids is not None
            and q_length > 1
            and position_jumps(position_ids.expand(batch, -1), real, seen).any()
        ):
            raise ValueError("packed sequences cannot be cached together: give each a row, or pass use_cache=False")
        if real is None:
            return CacheStep(self)
        past, new = real.split([seen, q_length], dim=1)
        if seen and not torch.equal(past.sum(1), self.kv[0].seqlens.long()):
            raise ValueError(
                f"attention_mask hides or shows other tokens among the first {seen} than when they were cached, and "
                "those cached as real stay visible; pass the same mask again, or start with an empty cache"
            )
        if new.all():
            return CacheStep(self)
        self._padded_until = seen + 1 + int((~new).any(0).nonzero().max())
        return CacheStep(self, new)


@dataclass(frozen=True, eq=False)
class CacheStep:
    """One forward pass with a cache: what the layers get as their attention_mask.

    Attributes:
        cache: where new keys and values go.
        real: (batch, q_length) bool, False for padding; None when all new tokens are real.
    """

    cache: LongGenCache
    real: Tensor | None = None

    def attend(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        """`LongGenCacheLayer.attend` in the layer of this attention module; the output of padding is 0.

        Raises ValueError if the cache was made for other patterns, RuntimeError where a gradient is wanted.
        """
        layers, index = self.cache.layers, module.layer_idx
        assert isinstance(index, int)
        if index >= len(layers) or layers[index].pattern != module.pattern:
            raise ValueError(f"the cache was made for another config: layer {index} has another pattern there")
        if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
            raise RuntimeError(
                "a LongGenCache has no gradient: call the model under torch.no_grad(), or train with use_cache=False"
            )
        if self.real is None:
            return layers[index].attend(q, k, v, scale, None)
        # A sequence's real tokens are appended from the first row on, whatever the padding's side.
        order = (~self.real).to(torch.uint8).argsort(dim=1, stable=True)
        q, k, v = (torch.take_along_dim(x, order[..., None, None], dim=1) for x in (q, k, v))
        out = layers[index].attend(q, k, v, scale, self.real.sum(1, dtype=torch.int32))
        back = order.argsort(dim=1)
        return torch.take_along_dim(out, back[..., None, None], dim=1) * self.real[..., None, None]
