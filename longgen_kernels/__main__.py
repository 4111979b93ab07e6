"""`python -m longgen_kernels`: what is installed, and which backend runs what on this machine, or why it does not.

`python -m longgen_kernels bench`: whether it is right here, and how fast beside what else is installed.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

import longgen_kernels
from longgen_kernels import dispatch
from longgen_kernels._version import __version__
from longgen_kernels.attention import explain_attention
from longgen_kernels.benchmark.cases import PASSES, parse_length
from longgen_kernels.decode import explain_kvcache_attention
from longgen_kernels.kernels.cuda import available, build_info
from longgen_kernels.kv_cache import SparseKVCache
from longgen_kernels.merge import explain_merge
from longgen_kernels.patterns import AttentionPattern

Reasons = dict[str, str | None]


def _attention(device: str) -> Reasons:
    q = torch.empty(1, 128, 2, 128, dtype=torch.bfloat16, device=device)
    return explain_attention(q, q, q, AttentionPattern.sink_window(sink=4, window=64))


def _merge(device: str) -> Reasons:
    return explain_merge(torch.empty(1, 128, 2, 128, dtype=torch.bfloat16, device=device))


def _decode(device: str) -> Reasons:
    cache = SparseKVCache(AttentionPattern.sink_window(sink=4, window=64), 1, 2, 128, 128, device=device)
    return explain_kvcache_attention(torch.empty(1, 1, 2, 128, dtype=torch.bfloat16, device=device), cache)


OPERATIONS: dict[str, Callable[[str], Reasons]] = {"attention": _attention, "merge": _merge, "decode": _decode}
"""For each operation the reasons by backend for bf16 tensors of head_dim 128 on a device."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; `bench` returns 1 if a kernel was wrong or failed."""
    parser = argparse.ArgumentParser(prog="python -m longgen_kernels", description="What runs on this machine.")
    bench = parser.add_subparsers(dest="command", metavar="bench").add_parser(
        "bench",
        help="is it right here, and how fast? at most about two minutes",
        description="Checks attention against the reference and times it beside cuDNN, FlashAttention and "
        "FlexAttention, as far as they are installed. Without a GPU the reference alone runs, on a small problem.",
    )
    bench.add_argument("--length", type=parse_length, default=8192, help="tokens, such as 8K or 32K (default: 8K)")
    bench.add_argument("--forward", action="store_true", help="the forward pass only")
    bench.add_argument("--seconds", type=float, default=120.0, help="no kernel is begun after these (default: 120)")
    args = parser.parse_args(argv)
    if args.command is None:
        _report()
        return 0
    from longgen_kernels.benchmark import quick  # imports what it compares with, which takes its time

    return quick.run(args.length, PASSES[:1] if args.forward else PASSES, args.seconds)


def _report() -> None:
    for name, value in _versions():
        print(f"{name:<17}{value}")

    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"\nBackends for bf16 tensors of head_dim 128 on {device}:")
    for operation, explain in OPERATIONS.items():
        reasons = explain(device)
        for backend in dispatch.BACKENDS:
            reason = reasons[backend]
            print(f"  {operation:<12}{backend:<12}{'supported' if reason is None else f'no: {reason}'}")


def _versions() -> list[tuple[str, str]]:
    info = build_info()
    if info.cuda_absent:
        kernels = f"absent: {info.cuda_absent}"
    else:
        kernels = f"built for {', '.join(info.cuda_archs)} with nvcc {info.nvcc}"
    cannot_run = available()
    gpus = [_gpu(index) for index in range(torch.cuda.device_count())]
    return [
        ("longgen_kernels", f"{__version__} from {Path(longgen_kernels.__file__).parent}"),
        ("commit", info.commit),
        ("CUDA kernels", kernels),
        ("CUDA backend", "ready" if cannot_run is None else f"not usable: {cannot_run}"),
        ("GPU", "; ".join(gpus) or "none that PyTorch can use"),
        ("driver", _driver()),
        ("torch", f"{torch.__version__} (CUDA {torch.version.cuda or 'none'})"),
        ("triton", _installed("triton")),
        ("transformers", _installed("transformers")),
        ("python", f"{platform.python_version()} on {platform.platform()}"),
    ]


def _gpu(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    return (
        f"{properties.name}, compute capability {properties.major}.{properties.minor}, "
        f"{properties.multi_processor_count} multiprocessors, {properties.total_memory / 2**30:.0f} GiB"
    )


def _driver() -> str:
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return "none (no nvidia-smi)"
    query = [smi, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, check=True, capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown ({error})"
    return answer.splitlines()[0] if answer else "unknown (nvidia-smi lists no GPU)"


def _installed(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    sys.exit(main())
