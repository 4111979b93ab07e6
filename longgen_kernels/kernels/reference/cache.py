"""Attention to a KV cache in plain PyTorch, in fp32 (fp64 for fp64 caches): what the kernels are tested against."""

from __future__ import annotations

import torch
from torch import Tensor

from longgen_kernels.cache_scales import as_bytes, quantised
from longgen_kernels.kernels.cache_problem import CacheProblem, CacheTensors, NewTokens, keys_end
from longgen_kernels.kernels.reference.attention import TILE_ELEMENTS


def cache_unsupported(cache: CacheTensors) -> str | None:
    """None: PyTorch appends to any cache, anywhere."""
    return None


def cache_attention_unsupported(problem: CacheProblem) -> str | None:
    """None: PyTorch attends to any cache, anywhere."""
    return None


def cache_append(cache: CacheTensors, new: NewTokens) -> None:
    """Writes the new tokens to their slots; waits for the device."""
    end = keys_end(cache, new)
    row = torch.arange(new.n, device=end.device)
    position = cache.seqlens.long()[:, None] + row  # (batch, n)
    head = torch.arange(cache.kv_heads, device=end.device)
    slot = cache.layout.slot(position[..., None], head)  # (batch, n, kv_heads)
    kept = (position < end[:, None])[..., None] & (slot >= 0) & (slot < cache.slots)
    if cache.layout.ring:
        # Of two new tokens for one slot of the ring the later one stays.
        recent = ~cache.layout.is_permanent(position[..., None], head)
        kept &= ~(recent & (position + cache.layout.ring < end[:, None])[..., None])
    b, i, h = kept.nonzero(as_tuple=True)
    page, inside = _address(cache, b, slot[b, i, h])
    owned = page >= 0
    b, i, h, page, inside = (x[owned] for x in (b, i, h, page, inside))
    for x, tokens, scale in ((cache.k, new.k, cache.k_scale), (cache.v, new.v, cache.v_scale)):
        rows = tokens[b, i, h]
        as_bytes(x)[page, h, inside] = rows if scale is None else as_bytes(quantised(rows, scale[h, None]))
    if new.advance:
        cache.seqlens.copy_(end)


def cache_attn(problem: CacheProblem) -> tuple[Tensor, Tensor]:
    """Output (like q, contiguous) and LSE (`problem.lse_shape`), after the new tokens were appended."""
    cache, q = problem.cache, problem.q
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    first = cache.seqlens.long() + problem.q_offset
    end = keys_end(cache, problem.new)
    if problem.new is not None:
        cache_append(cache, problem.new)
    if cache.layout.ring is None:
        end = end.clamp(max=cache.slots)
    head = torch.arange(cache.kv_heads, device=q.device)
    position = cache.layout.positions(end[:, None], head, cache.slots)  # (batch, kv_heads, slots)
    k = _gathered(cache, cache.k, cache.k_scale, dtype)
    v = _gathered(cache, cache.v, cache.v_scale, dtype)
    q = q.to(dtype).unflatten(2, (cache.kv_heads, problem.group)).permute(0, 2, 3, 1, 4)
    parts = []
    limit = TILE_ELEMENTS["cpu" if q.device.type == "cpu" else "gpu"]
    step = max(1, limit // max(1, q[..., 0, 0].numel() * cache.slots))
    for lo in range(0, max(problem.n, 1), step):
        q_pos = first[:, None] + torch.arange(lo, min(problem.n, lo + step), device=q.device)
        seen = (position >= 0)[:, :, None, None] & cache.layout.pattern.is_visible(
            q_pos[:, None, None, :, None], position[:, :, None, None], head[:, None, None, None]
        )
        scores = (q[..., lo : lo + step, :] @ k[:, :, None].mT) * problem.softmax_scale
        scores = scores.masked_fill(~seen, -torch.inf)
        lse = torch.logsumexp(scores, dim=-1)
        # A row that sees nothing has LSE -inf; any finite value in its place makes its probabilities exp(-inf) = 0.
        probs = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None])
        # What no row sees may hold anything: 0 times NaN is NaN.
        used = seen.any(dim=3).any(dim=2)[:, :, None, :, None]
        parts.append((probs @ v[:, :, None].masked_fill(~used, 0.0), lse))
    out = torch.cat([out for out, _ in parts], dim=3).permute(0, 3, 1, 2, 4).flatten(2, 3)
    lse = torch.cat([lse for _, lse in parts], dim=3).flatten(1, 2)
    return out.to(problem.q.dtype).contiguous(), lse.contiguous()


def _address(cache: CacheTensors, sequence: Tensor, slot: Tensor) -> tuple[Tensor, Tensor]:
    """First and third index of a slot in `cache.k`."""
    if cache.block_table is None:
        return sequence, slot
    return cache.block_table[sequence, slot // cache.page_size].long(), slot % cache.page_size


def _gathered(cache: CacheTensors, x: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """A cache's k or v as (batch, kv_heads, slots, head_dim). Pages that nobody has stand for any page."""
    if cache.block_table is not None:
        pages = as_bytes(x)[cache.block_table.clamp(0, x.shape[0] - 1).long()].view(x.dtype)
        x = pages.transpose(1, 2).flatten(2, 3)
    return x.to(dtype) if scale is None else x.to(dtype) * scale[:, None, None]
