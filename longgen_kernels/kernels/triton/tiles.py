"""Which tiles, warps and pipeline stages each Triton kernel runs with: one table, and why."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache

import torch


@dataclass(frozen=True)
class Tile:
    """block_m query rows by block_n key columns, with `num_warps` warps and `num_stages` pipeline stages."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# Per kernel and padded head_dim, for 16-bit types on GPUs with at least 200 KB of shared memory a block (Hopper).
# "dq" keeps a query tile and streams keys; "dkdv" keeps a key tile and streams queries. Two blocks of four warps share
# a multiprocessor and fill each other's gaps; one block of eight warps (128 x 64, 128 x 128) measured slower on sparse
# patterns, whose rows are short: docs/triton-kernels.md has the figures.
_LARGE = {
    "fwd": {64: Tile(64, 64, 4, 3), 128: Tile(64, 64, 4, 3), 256: Tile(128, 64, 8, 2)},
    "dq": {64: Tile(64, 64, 4, 3), 128: Tile(64, 64, 4, 2), 256: Tile(64, 32, 4, 2)},
    "dkdv": {64: Tile(64, 64, 4, 3), 128: Tile(64, 64, 4, 2), 256: Tile(32, 64, 8, 2)},
}
# The same for less shared memory (100 KB: consumer Ampere and Ada; 64 KB: AMD). Not measured.
_SMALL = {
    "fwd": {64: Tile(128, 64, 4, 2), 128: Tile(64, 32, 4, 2), 256: Tile(32, 32, 4, 1)},
    "dq": {64: Tile(64, 64, 4, 2), 128: Tile(64, 32, 4, 1), 256: Tile(32, 16, 4, 1)},
    "dkdv": {64: Tile(64, 64, 4, 2), 128: Tile(32, 64, 4, 1), 256: Tile(16, 32, 4, 1)},
}


def padded_head_dim(head_dim: int) -> int:
    """The power of two that a tile's rows are padded to."""
    return max(16, 1 << (head_dim - 1).bit_length())


def tile_for(kernel: str, head_dim: int, dtype: torch.dtype, device: torch.device, mask_block: int | None) -> Tile:
    """The tile of kernel "fwd", "dq" or "dkdv"; with a block mask no side is larger than the mask's block."""
    if INTERPRETED:
        tile = Tile(32, 32, 1, 1)  # small, so that short test sequences still run many tiles
    elif dtype == torch.float32:
        tile = Tile(32, 32, 4, 1)  # exact fp32 runs on the plain FMA units: registers decide, not bandwidth
    else:
        table = _LARGE if _shared_memory(device) >= 200 * 1024 else _SMALL
        tile = table[kernel][min(256, max(64, padded_head_dim(head_dim)))]
    if mask_block is None:
        return tile
    return Tile(min(tile.block_m, mask_block), min(tile.block_n, mask_block), tile.num_warps, tile.num_stages)


def cache_tile(rows: int, head_dim: int, dtype: torch.dtype) -> Tile:
    """The tile of attention to a KV cache: `rows` are the query tokens times the heads of a group. Not measured.

    Few rows: reading decides, and long tiles keep more bytes in flight. Many, as in a chunk of a prompt: as in "fwd".
    """
    if INTERPRETED:
        return Tile(16, 32, 1, 1)
    block_m = min(64, max(16, 1 << (rows - 1).bit_length()))
    if dtype == torch.float32:
        return Tile(min(block_m, 32), 32, 4, 1)
    # 64 x 64 of head_dim 128 spills: masks and slots take registers that "fwd" has to spare.
    block_n = 64 if head_dim <= 128 and padded_head_dim(head_dim) * block_m <= 4096 else 32
    return Tile(block_m, block_n, 4, 3 if head_dim <= 128 else 2)


@lru_cache
def _shared_memory(device: torch.device) -> int:
    properties = torch.cuda.get_device_properties(device)
    # The attribute is missing from ROCm builds and old releases, where the small table is the safe one.
    return int(getattr(properties, "shared_memory_per_block_optin", 0))
