"""Kernels' arithmetic compiled for the CPU: what of csrc decides who visits what is tested without a GPU."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np

from longgen_kernels import AttentionPattern, BlockMask

ROOT = Path(__file__).parent.parent
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def compile_for_host(source: str, folder: Path) -> ctypes.CDLL:
    """The library of a source file in python_tests."""
    target = folder / "host.so"
    flags = ["-std=c++17", "-O2", "-shared", "-Xcompiler", "-fPIC", "-arch", "sm_80", f"-I{ROOT / 'csrc'}"]
    subprocess.run([str(NVCC), *flags, "-o", str(target), str(ROOT / "python_tests" / source)], check=True)
    return ctypes.CDLL(str(target))


def code(pattern: AttentionPattern | BlockMask) -> np.ndarray:
    """PatternParams, in its order."""
    log2_block = (pattern.block_size or 1).bit_length() - 1
    if isinstance(pattern, BlockMask):
        sizes = pattern.heads, pattern.q_blocks, pattern.k_blocks
        return np.array([pattern.is_causal, 0, 0, 0, 0, log2_block, 0, 0, *sizes], dtype=np.int32)
    kind = 0 if pattern.is_dense else 1 if pattern.window is not None else 2
    window = (pattern.window if kind == 1 else pattern.window_blocks) or 0
    stride = pattern.stride or 0
    phases = [pattern.head_phase_step % stride, pattern.head_phase_offset % stride] if stride else [0, 0]
    return np.array(
        [pattern.is_causal, kind, window, pattern.sink, stride, log2_block, *phases, 0, 0, 0], dtype=np.int32
    )


def address(x: np.ndarray | None) -> ctypes.c_void_p | None:
    return None if x is None else x.ctypes.data_as(ctypes.c_void_p)
