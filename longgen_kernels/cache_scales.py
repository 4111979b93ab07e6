"""Caches that keep keys and values in 8 bits, e4m3, with a scale of K and one of V for each KV head."""

from __future__ import annotations

import torch
from torch import Tensor

from longgen_kernels.kernels.problem import DTYPES

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0

Scales = tuple[Tensor, Tensor] | tuple[None, None]


def checked_scales(
    dtype: torch.dtype,
    cache_dtype: torch.dtype | None,
    kv_heads: int,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    device: torch.device | str | None,
) -> Scales:
    """Copies of the scales on the device, or a pair of None where the cache keeps tokens as they come.

    Raises:
        TypeError, ValueError: a cache of `cache_dtype` cannot take tokens of `dtype`, or the scales do not fit.
    """
    if dtype not in DTYPES:
        raise TypeError(f"dtype must be float16, bfloat16, float32 or float64, got {dtype}")
    if cache_dtype not in (None, dtype, FP8):
        raise TypeError(f"cache_dtype must be that of the tokens, {dtype}, or float8_e4m3fn, got {cache_dtype}")
    if cache_dtype != FP8:
        if k_scale is not None or v_scale is not None:
            raise ValueError(f"k_scale and v_scale are for cache_dtype=torch.float8_e4m3fn, got {cache_dtype}")
        return None, None
    return _on(device, "k_scale", k_scale, kv_heads), _on(device, "v_scale", v_scale, kv_heads)


def _on(device: torch.device | str | None, name: str, scale: Tensor | None, kv_heads: int) -> Tensor:
    if not isinstance(scale, Tensor) or scale.dtype != torch.float32:
        described = scale.dtype if isinstance(scale, Tensor) else type(scale).__name__
        raise TypeError(f"{name} must be a float32 tensor with cache_dtype=torch.float8_e4m3fn, got {described}")
    if scale.shape != (kv_heads,):
        raise ValueError(f"{name} must be ({kv_heads},), one for each KV head, got {tuple(scale.shape)}")
    if not bool(((scale > 0) & scale.isfinite() & scale.reciprocal().isfinite()).all()):
        raise ValueError(f"{name} must be positive, finite and with a finite reciprocal, got {scale.tolist()}")
    return scale.to(device=device, copy=True)


def quantised(x: Tensor, scale: Tensor) -> Tensor:
    """x (..., head_dim) divided by a scale that broadcasts, as fp8: rounded to the nearest; NaN stays NaN."""
    return (x.float() * scale.reciprocal()).clamp(-FP8_MAX, FP8_MAX).to(FP8)


def as_bytes(x: Tensor) -> Tensor:
    """An fp8 tensor as bytes, which every operation of PyTorch takes; any other tensor as it is."""
    return x.view(torch.uint8) if x.dtype == FP8 else x
