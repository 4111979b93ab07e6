"""The compiled extension: whether it is there, and whether a GPU can run it."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from dataclasses import dataclass

import torch

__all__ = ["BuildInfo", "available", "build_info", "runs_on"]


@dataclass(frozen=True)
class BuildInfo:
    """How this copy of the package was built; setup.py writes it to `longgen_kernels/_build_info.py`."""

    commit: str
    cuda_archs: tuple[str, ...]
    nvcc: str | None
    cuda_absent: str | None
    """Why there are no CUDA kernels; None if there are."""


@functools.cache
def build_info() -> BuildInfo:
    """How this copy was built. In a checkout that was never built every answer is "unknown" or nothing."""
    if importlib.util.find_spec("longgen_kernels._build_info") is None:
        never = "this copy was never built; `pip install -e .` in the checkout does it"
        return BuildInfo(commit="unknown", cuda_archs=(), nvcc=None, cuda_absent=never)
    info = importlib.import_module("longgen_kernels._build_info")
    return BuildInfo(info.commit, tuple(info.cuda_archs), info.nvcc, info.cuda_absent)


def available(device: torch.device | None = None) -> str | None:
    """None if the portable CUDA kernels run on `device` (by default the current one), otherwise the reason why not."""
    if device is not None and device.index is not None:
        return _unavailable_on(device.index)  # a tensor is there: nothing is asked twice
    if torch.cuda.is_available():
        return _unavailable_on(torch.cuda.current_device())
    return _not_loadable() or _no_gpu()


@functools.cache
def _not_loadable() -> str | None:
    if importlib.util.find_spec("longgen_kernels._C") is None:
        return f"not built: {build_info().cuda_absent or 'longgen_kernels._C is missing, install again'}"
    try:
        importlib.import_module("longgen_kernels._C")
    except ImportError as error:
        return f"longgen_kernels._C does not load ({error}): install again"
    return None


def _no_gpu() -> str:
    from longgen_kernels import _C

    if torch.version.cuda is None:
        return "built, but this PyTorch is a build without CUDA"
    if _C.build_info()["cuda_driver"] == 0:
        return "built, but this machine has no NVIDIA driver"
    return "built, but PyTorch finds no GPU that it can use"


@functools.cache
def _unavailable_on(index: int) -> str | None:
    reason = _not_loadable()
    if reason is not None:
        return reason
    if torch.version.hip is not None:
        return "this PyTorch is built for ROCm"
    from longgen_kernels import _C

    info = _C.build_info()
    # Within a major version every driver runs every runtime; our runtime may be newer than PyTorch's.
    if info["cuda_driver"] // 1000 < info["cuda_runtime"] // 1000:
        built, driver = (f"{v // 1000}.{v % 1000 // 10}" for v in (info["cuda_runtime"], info["cuda_driver"]))
        return f"built with CUDA {built}, but the driver runs CUDA {driver}: update it, or build with an older nvcc"
    archs = info["cuda_archs"].split(",")
    capability = torch.cuda.get_device_capability(index)
    if not runs_on(archs, capability):
        name = torch.cuda.get_device_name(index)
        built = ", ".join(archs)
        return (
            f"built for compute capabilities {built}; {name} has {capability[0]}.{capability[1]} (LONGGEN_CUDA_ARCHS)"
        )
    return None


def runs_on(archs: list[str], capability: tuple[int, int]) -> bool:
    """Whether kernels built for `archs` run on a GPU: "80" there and on all later ones (as PTX), "90a" on 9.0 alone,
    "100f" on 10.0 and the later ones of its family, 10.x.

    >>> runs_on(["90a"], (9, 0)), runs_on(["90a"], (10, 0)), runs_on(["80", "90a"], (10, 0))
    (True, False, True)
    """
    have = capability[0] * 10 + capability[1]

    def runs(arch: str) -> bool:
        built = int(arch.rstrip("af"))
        if arch.endswith("a"):
            return have == built
        if arch.endswith("f"):
            return have >= built and capability[0] == built // 10
        return have >= built

    return any(runs(arch) for arch in archs)
