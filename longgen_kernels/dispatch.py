"""Which backend runs a call, and why not the others.

Backends are asked in the order of their speed on the tensors' device. A tensor on an accelerator never falls to the
PyTorch reference unasked: that would be a silent hundredfold slowdown, so the call raises with every reason instead.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import TypeVar

__all__ = ["BACKENDS", "ENV_BACKEND", "check_backend_name", "choose", "explain"]

BACKENDS = ("cuda", "triton", "reference")
"""The backends by name; `backend="auto"` stands for the first of them that fits."""

ENV_BACKEND = "LONGGEN_BACKEND"
"""The environment variable that replaces "auto" for a whole process."""

Problem = TypeVar("Problem")
Support = Callable[[Problem], str | None]
"""Says whether a backend can run a problem, as the operation's kernels take it: None if it can, otherwise why not."""


def check_backend_name(backend: str) -> None:
    """Raises ValueError unless `backend` is "auto" or the name of a backend."""
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f'backend is {backend!r}; valid are "auto", "cuda", "triton" and "reference"')


def choose(
    requested: str,
    candidates: Mapping[str, Support[Problem]],
    problem: Problem,
    what: str,
    device_type: str,
    last: tuple[str, ...] = (),
) -> str:
    """Returns the name of the backend that runs a call.

    Args:
        requested: "auto" or a backend's name. "auto" is replaced by `LONGGEN_BACKEND` where that is set.
        candidates: for each backend that implements the operation, a function that says None if it can run a problem
            and otherwise why not. Only backends that come into question are asked.
        problem: what they are asked about.
        what: the operation's name, for the messages.
        device_type: `tensor.device.type` of the arguments.
        last: backends that "auto" asks after the others, as they would be slower at this problem.

    Raises:
        ValueError: there is no backend of the requested name.
        NotImplementedError: the requested backend, or under "auto" none of the kernels, can run the call.

    >>> choose("auto", {"reference": lambda problem: None}, "any", "merge", "cpu")
    'reference'
    """
    asked_by = f'backend="{requested}"'
    check_backend_name(requested)
    if requested == "auto":
        # Read at each call, not at import: a test or a notebook may set it later.
        override = os.environ.get(ENV_BACKEND) or "auto"
        if override != "auto" and override not in BACKENDS:
            raise ValueError(f"{ENV_BACKEND} is {override!r}; valid are auto, {', '.join(BACKENDS)}")
        if override != "auto":
            requested, asked_by = override, f"{ENV_BACKEND}={override}"

    order = _auto_order(device_type) if requested == "auto" else (requested,)
    if last:
        order = tuple(sorted(order, key=last.__contains__))
    reasons = {}
    for name in order:
        reason = _why_not(name, candidates, problem, what, device_type)
        if reason is None:
            return name
        reasons[name] = reason

    lines = [f"{what} on {device_type} tensors: no backend can run this call ({asked_by})"]
    lines += [f"  {name}: {reason}" for name, reason in reasons.items()]
    if "reference" not in reasons:
        lines.append('  backend="reference" runs it in plain PyTorch: correct, and many times slower')
    raise NotImplementedError("\n".join(lines))


def explain(
    candidates: Mapping[str, Support[Problem]], problem: Problem, what: str, device_type: str
) -> dict[str, str | None]:
    """Every backend by name with None if it could run the problem, otherwise the reason why not."""
    return {name: _why_not(name, candidates, problem, what, device_type) for name in BACKENDS}


def _auto_order(device_type: str) -> tuple[str, ...]:
    if device_type == "cpu":
        return ("reference",)
    # PyTorch calls AMD's GPUs "cuda" too; the CUDA backend itself says that it is not for them.
    return ("cuda", "triton") if device_type == "cuda" else ("triton",)


def _why_not(
    name: str, candidates: Mapping[str, Support[Problem]], problem: Problem, what: str, device_type: str
) -> str | None:
    if name not in candidates:
        return f"has no implementation of {what}"
    if name == "cuda" and device_type != "cuda":
        return f"takes CUDA tensors, got {device_type} tensors"
    if name == "triton" and device_type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "takes CPU tensors only in Triton's interpreter: set TRITON_INTERPRET=1 before the process starts"
    return candidates[name](problem)
