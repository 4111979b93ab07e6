"""`SparseKVCache`: keys and values of a batch of sequences, as far as a pattern can still show them."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from longgen_kernels import dispatch
from longgen_kernels.cache_layout import CacheLayout
from longgen_kernels.cache_scales import as_bytes, checked_scales
from longgen_kernels.kernels.cache_problem import CacheTensors, check_new_tokens, tickets_needed
from longgen_kernels.ops import kvcache as _kvcache_ops  # defines torch.ops.longgen_kernels.kvcache_append
from longgen_kernels.patterns import MAX_POSITION, AttentionPattern, pattern_from_dict

__all__ = ["KVCache", "SparseKVCache", "explain_append"]


class KVCache(ABC):
    """What `longgen_attn_with_kvcache` needs of a cache. Lengths live on the device; the host keeps an upper bound."""

    layout: CacheLayout
    k: Tensor
    v: Tensor
    seqlens: Tensor
    """Tokens seen, int32 (batch,), on the device."""
    tickets: Tensor
    dtype: torch.dtype
    """Of queries, new tokens and output; `k` and `v` may be fp8, and then there are scales."""
    k_scale: Tensor | None
    """What the bytes of `k` are multiplied by, fp32 (kv_heads,); likewise `v_scale`."""
    v_scale: Tensor | None

    @property
    def pattern(self) -> AttentionPattern:
        """What later queries see, and so what is kept."""
        return self.layout.pattern

    @property
    def batch(self) -> int:
        return self.seqlens.shape[0]

    @property
    @abstractmethod
    def tensors(self) -> CacheTensors:
        """The cache as the kernels take it."""

    @property
    @abstractmethod
    def is_empty(self) -> bool:
        """True when the host knows that no sequence has a token."""

    @property
    @abstractmethod
    def equal_lengths(self) -> bool:
        """True when the host knows that all sequences have one length."""

    @abstractmethod
    def reserve(self, tokens: int) -> None:
        """Makes room for this many more tokens of each sequence, or raises ValueError."""

    @abstractmethod
    def advanced(self, tokens: int, fewest: int | None = None) -> None:
        """Tells the host that each sequence has become longer by `tokens`, or by `fewest` to `tokens`.

        The functions that append do it themselves. A CUDA graph's replay does not: call it then, or `reserve`, `crop`
        and growth work with too small a bound, and a chunk of a prompt may take the cache for empty.
        """

    @abstractmethod
    def check_still_kept(self, tokens: int) -> None:
        """Raises ValueError if a query that stands `tokens` before the end may miss keys that it should see."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values that the class's `from_state_dict` makes the same cache of."""

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the cache to a file, which the class's `load` reads."""
        torch.save(self.state_dict(), path)

    def append(self, k: Tensor, v: Tensor, counts: Tensor | None = None, *, backend: str = "auto") -> None:
        """Appends n tokens to each sequence, of which the cache keeps what a later query can still see.

        Args:
            k, v: (batch, n, kv_heads, head_dim) of the cache's `dtype`; any strides with a unit last one.
            counts: int32 (batch,) on the device: only the first `counts[b]` rows are sequence `b`'s. None: all n.
            backend: "auto", "cuda", "triton" or "reference".

        Raises:
            TypeError, ValueError: an argument does not fit, or the sequences would become too long.
            NotImplementedError: no allowed backend can append; the message gives each one's reason.
        """
        dispatch.check_backend_name(backend)
        cache = self.tensors
        check_new_tokens(cache, k, v, counts)
        self.reserve(k.shape[1])
        cache = self.tensors  # it may have grown
        torch.ops.longgen_kernels.kvcache_append(
            cache.k, cache.v, cache.seqlens, self.tickets, cache.block_table, self.pattern.encode(), self.layout.ring,
            k, v, counts, True, backend, cache.k_scale, cache.v_scale,
        )  # fmt: skip
        self.advanced(k.shape[1], None if counts is None else 0)

    def tokens_kept(self) -> Tensor:
        """Tokens that are in the cache, int64 (batch, kv_heads), computed on the device."""
        cache = self.tensors
        head = torch.arange(cache.kv_heads, device=cache.k.device)
        return (self.layout.positions(self.seqlens[:, None], head, cache.slots) >= 0).sum(-1)


class SparseKVCache(KVCache):
    """Keys and values of one layer, for a batch of sequences of different lengths, in one block of memory.

    A token that no later query can see is overwritten by a later one; nothing is ever moved. A dense pattern gives a
    plain full cache, so that one class serves every layer of a hybrid model.

    On a GPU the calls of one cache, those that only read it too, must follow each other: on one stream, or on streams
    that wait.

    Args:
        pattern: what later queries see; not a block mask, which may show any key again.
        batch, kv_heads, head_dim: sizes.
        max_seqlen: tokens of the longest sequence, seen, not kept.
        dtype, device: of k and v, queries and output.
        cache_dtype: torch.float8_e4m3fn keeps keys and values in half the bytes of 16 bits; by default as `dtype`.
        k_scale, v_scale: with fp8, float32 (kv_heads,): a token is divided by its KV head's, and what is then beyond
            +-448 saturates. The cache has copies, which do not change.
        grows: become as large as needed, at least twice as large at a time, instead of raising at `max_seqlen`. CUDA
            graphs captured before such a step would write to memory that is no longer the cache's.

    Attributes: `k` and `v` (batch, kv_heads, slots, head_dim), `seqlens` int32 (batch,), `nbytes`, `slots`, `dtype`,
        `k_scale` and `v_scale` (None without fp8).

    Raises:
        TypeError, ValueError: an argument does not fit.
        NotImplementedError: the pattern is a block mask or bidirectional.

    Source: StreamingLLM's sink and window (arXiv 2309.17453); retention per KV head as in LongGen (arXiv 2410.01485).

    >>> pattern = AttentionPattern.sink_window(sink=4, window=64)
    >>> cache = SparseKVCache(pattern, batch=1, kv_heads=2, head_dim=64, max_seqlen=4096, dtype=torch.float32)
    >>> for _ in range(10):
    ...     cache.append(torch.randn(1, 100, 2, 64), torch.randn(1, 100, 2, 64))
    >>> cache.seqlens.tolist(), cache.tokens_kept().tolist(), cache.slots
    ([1000], [[96, 96]], 96)
    """

    def __init__(
        self,
        pattern: AttentionPattern,
        batch: int,
        kv_heads: int,
        head_dim: int,
        max_seqlen: int,
        *,
        dtype: torch.dtype = torch.bfloat16,
        cache_dtype: torch.dtype | None = None,
        k_scale: Tensor | None = None,
        v_scale: Tensor | None = None,
        device: torch.device | str | None = None,
        grows: bool = False,
    ) -> None:
        for name, size in {
            "batch": batch,
            "kv_heads": kv_heads,
            "head_dim": head_dim,
            "max_seqlen": max_seqlen,
        }.items():
            if isinstance(size, bool) or not isinstance(size, int):
                raise TypeError(f"{name} must be an int, got {type(size).__name__} {size!r}")
            if not 1 <= size <= MAX_POSITION:
                raise ValueError(f"{name} must be in [1, {MAX_POSITION}], got {size}")
        self.k_scale, self.v_scale = checked_scales(dtype, cache_dtype, kv_heads, k_scale, v_scale, device)
        self.dtype = dtype
        self.layout = CacheLayout.compact(pattern, max_seqlen)
        self.max_seqlen = max_seqlen
        self.grows = grows
        shape = (batch, kv_heads, self.layout.slots(max_seqlen, kv_heads), head_dim)
        self.k, self.v = (torch.empty(shape, dtype=cache_dtype or dtype, device=device) for _ in range(2))
        # Not last: who counts with them may start early, beside the kernel that fills what comes behind.
        self.tickets = torch.zeros(tickets_needed(batch, kv_heads), dtype=torch.int32, device=device)
        self.seqlens = torch.zeros(batch, dtype=torch.int32, device=device)
        self._longest = 0  # no sequence has more tokens
        self._cropped = 0  # no sequence has been longer by more tokens than it is
        self._equal = True

    @property
    def tensors(self) -> CacheTensors:
        return CacheTensors(
            self.k, self.v, self.seqlens, self.layout, None, self.tickets, self.k_scale, self.v_scale, self.dtype,
            self.equal_lengths,
        )  # fmt: skip

    @property
    def slots(self) -> int:
        """Tokens a KV head of a sequence that there is memory for."""
        return self.k.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values."""
        return self.k.nbytes + self.v.nbytes

    @property
    def is_empty(self) -> bool:
        return self._longest == 0

    @property
    def equal_lengths(self) -> bool:
        return self._equal or self.batch == 1

    def reserve(self, tokens: int) -> None:
        needed = self._longest + tokens
        if needed <= self.max_seqlen:
            return
        if not self.grows:
            raise ValueError(
                f"{tokens} more tokens than {self._longest} would pass max_seqlen={self.max_seqlen}; "
                "make the cache larger, or with grows=True"
            )
        if needed > MAX_POSITION:
            raise ValueError(f"positions must stay below {MAX_POSITION}, got up to {needed}")
        self._grow(min(MAX_POSITION, max(needed, 2 * self.max_seqlen)))

    def advanced(self, tokens: int, fewest: int | None = None) -> None:
        fewest = tokens if fewest is None else fewest
        self._longest += tokens
        self._cropped = max(0, self._cropped - fewest)
        self._equal = self._equal and fewest == tokens

    def check_still_kept(self, tokens: int) -> None:
        most = self.layout.max_crop
        overwritten = self._longest + self._cropped > (self.layout.ring or 0)
        if most is not None and overwritten and self._cropped + tokens > most:
            raise ValueError(
                f"a query {tokens} tokens before the end"
                + (f", {self._cropped} tokens having been cropped," if self._cropped else "")
                + f" may need keys that the cache has overwritten; at most {most} tokens are kept beyond the window"
            )

    def crop(self, tokens: int | Tensor, at_most: int | None = None) -> None:
        """Drops the last tokens of each sequence, as after rejected drafts; sequences of fewer become empty.

        Args:
            tokens: how many; or int32 (batch,) on the device, one number for each sequence.
            at_most: with a tensor, its upper bound, which the host checks.

        Raises:
            ValueError: keys that the window of the last token left would show have been overwritten. Sixteen tokens
                beyond the window are always kept, less those cropped since.
        """
        if isinstance(tokens, Tensor):
            if tokens.dtype != torch.int32 or tokens.shape != self.seqlens.shape or at_most is None:
                raise ValueError(f"tokens must be an int, or int32 ({self.batch},) together with at_most; got {tokens}")
            most = at_most
        elif isinstance(tokens, bool) or not isinstance(tokens, int):
            raise TypeError(f"tokens must be an int or an int32 tensor, got {type(tokens).__name__}")
        else:
            most = tokens
        if most < 0 or (isinstance(tokens, int) and tokens > self._longest):
            raise ValueError(f"tokens must be in [0, {self._longest}], as many as the longest sequence has; got {most}")
        self.check_still_kept(most)
        self._cropped += most
        if isinstance(tokens, int):
            self._longest -= tokens
        else:
            self._equal = False
            tokens = tokens.clamp(0, most)
        self.seqlens.sub_(tokens).clamp_(min=0)

    def reset(self) -> None:
        """Empties every sequence; the memory stays."""
        self.seqlens.zero_()
        self._longest = self._cropped = 0
        self._equal = True

    def reorder(self, indices: Tensor) -> None:
        """Makes sequence `b` a copy of what sequence `indices[b]` was: beams. `indices` is int64 (batch,)."""
        if not isinstance(indices, Tensor) or indices.dtype not in (torch.int32, torch.int64):
            raise TypeError("indices must be an int64 tensor")
        if indices.shape != self.seqlens.shape:
            raise ValueError(f"indices must be ({self.batch},), got {tuple(indices.shape)}")
        for x in (self.k, self.v, self.seqlens):  # in place: CUDA graphs know the addresses
            as_bytes(x).copy_(as_bytes(x).index_select(0, indices.to(x.device)))

    def state_dict(self) -> dict[str, Any]:
        return {
            "pattern": self.pattern.to_dict(),
            "max_seqlen": self.max_seqlen,
            "grows": self.grows,
            "longest": self._longest,
            "cropped": self._cropped,
            "equal": self._equal,
            "k": self.k,
            "v": self.v,
            "seqlens": self.seqlens,
            "dtype": self.dtype,
            "k_scale": self.k_scale,
            "v_scale": self.v_scale,
        }

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: torch.device | str | None = None) -> SparseKVCache:
        """The cache that `save` wrote, on `device` or where it was."""
        return cls.from_state_dict(torch.load(path, map_location=device, weights_only=True))

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> SparseKVCache:
        """The cache that `state_dict` described, with copies of its tensors."""
        pattern, k = pattern_from_dict(state["pattern"]), state["k"]
        assert isinstance(pattern, AttentionPattern)
        batch, kv_heads, _, head_dim = k.shape
        sizes = (batch, kv_heads, head_dim, state["max_seqlen"])
        # Files of before there were fp8 caches have neither dtype nor scales.
        options = {"dtype": state.get("dtype", k.dtype), "cache_dtype": k.dtype}
        options |= {name: state.get(name) for name in ("k_scale", "v_scale")}
        cache = cls(pattern, *sizes, **options, device=k.device, grows=state["grows"])
        for own, saved in ((cache.k, k), (cache.v, state["v"]), (cache.seqlens, state["seqlens"])):
            own.copy_(saved)
        cache._longest, cache._cropped = state["longest"], state["cropped"]
        cache._equal = state.get("equal", False)  # older files do not say
        return cache

    def _grow(self, max_seqlen: int) -> None:
        old, layout = self.layout.ring or 0, CacheLayout.compact(self.pattern, max_seqlen)
        batch, kv_heads, slots, head_dim = self.k.shape
        shape = (batch, kv_heads, layout.slots(max_seqlen, kv_heads), head_dim)
        ring = layout.ring or 0
        for name in ("k", "v"):
            x = getattr(self, name)
            grown = torch.empty(shape, dtype=x.dtype, device=x.device)
            # A ring becomes larger only while it was as long as the sequences: nothing in it has wrapped yet.
            grown[:, :, :old] = x[:, :, :old]
            grown[:, :, ring : ring + slots - old] = x[:, :, old:]
            setattr(self, name, grown)
        self.layout, self.max_seqlen = layout, max_seqlen


def explain_append(cache: KVCache) -> dict[str, str | None]:
    """For each backend None, where it can append to `cache`, or the reason why it cannot. Nothing runs.

    >>> pattern = AttentionPattern.causal()
    >>> cache = SparseKVCache(pattern, batch=1, kv_heads=2, head_dim=64, max_seqlen=16, dtype=torch.float32)
    >>> explain_append(cache)["reference"] is None
    True
    """
    tensors = cache.tensors
    return dispatch.explain(_kvcache_ops.APPEND_SUPPORT, tensors, "appending to a KV cache", tensors.k.device.type)
