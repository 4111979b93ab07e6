"""Where and with what a result was measured."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from longgen_kernels._version import __version__

ROOT = Path(__file__).resolve().parents[1]
_CLOCKS = {
    "sm_mhz": "clocks.sm",
    "memory_mhz": "clocks.mem",
    "max_sm_mhz": "clocks.max.sm",
    "temperature_c": "temperature.gpu",
    "power_w": "power.draw",
    "power_limit_w": "power.limit",
}


def describe(device: torch.device, commit: str | None = None) -> dict[str, Any]:
    """Names and versions that a figure depends on. `commit` serves where the sources came without their .git."""
    facts: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "package": __version__,
        "commit": _git("rev-parse", "HEAD") or commit,
        "dirty": _dirty(),
        "device": device.type,
        "gpu": None,
        "driver": None,
        "cpu_count": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": None,
        "triton": _triton_version(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts["gpu"] = properties.name
        facts["driver"] = next(iter(_nvidia_smi(device, ["driver_version"]) or []), None)
        facts["cudnn"] = torch.backends.cudnn.version()
    return facts


def clocks(device: torch.device) -> dict[str, float | None] | None:
    """Clocks, temperature and power of the GPU at this moment, as nvidia-smi reads them; None without it."""
    if device.type != "cuda":
        return None
    values = _nvidia_smi(device, list(_CLOCKS.values()))
    return dict(zip(_CLOCKS, map(_number, values), strict=True)) if values else None


def _nvidia_smi(device: torch.device, fields: list[str]) -> list[str] | None:
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)  # CUDA's own numbering differs
    which = ["-i", f"GPU-{str(uuid).removeprefix('GPU-')}"] if uuid else []
    answer = _run("nvidia-smi", *which, f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits")
    if not answer:
        return None
    values = [value.strip() for value in answer.splitlines()[0].split(",")]
    return values if len(values) == len(fields) else None


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:  # "[N/A]"
        return None


def _dirty() -> bool | None:
    """Whether tracked files of the package or the benchmarks differ from the commit; None without a .git."""
    status = _git("status", "--porcelain", "--untracked-files=no")
    return None if status is None else bool(status)


def _git(*arguments: str) -> str | None:
    # Not the repository of some parent directory, where the package may be unpacked.
    return _run("git", "-C", str(ROOT), *arguments) if (ROOT / ".git").exists() else None


def _run(*command: str) -> str | None:
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _triton_version() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return str(triton.__version__)
