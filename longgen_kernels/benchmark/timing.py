"""How long a call takes: medians of device events on a GPU, of the host clock elsewhere."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

Result = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True)
class Timing:
    """Median and spread of one call's duration, in milliseconds."""

    median_ms: float
    q1_ms: float
    q3_ms: float
    min_ms: float
    repeats: int

    @classmethod
    def of(cls, times_ms: list[float]) -> Timing:
        """The summary of at least two durations."""
        q1, median, q3 = statistics.quantiles(times_ms, n=4, method="inclusive")
        return cls(median, q1, q3, min(times_ms), len(times_ms))

    def to_dict(self) -> dict[str, float | int]:
        return asdict(self)


# Seconds. For the first tenths of a second after other work an H200 may be a seventh faster or slower than it remains:
# its power, at the limit under such loads, has yet to settle.
GPU_WARM_UP_S = 1.0


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How much time a measurement may take: `budget_s` seconds of repeats after the warm-ups, within the bounds.

    There are at least `warmups` of those, and `warmup_s` seconds of them.
    """

    budget_s: float = 0.3
    warmups: int = 3
    warmup_s: float = 0.0
    min_repeats: int = 5
    max_repeats: int = 100
    cuda_graph: bool = False

    def repeats(self, seconds_each: float) -> int:
        wanted = self.budget_s / max(seconds_each, 1e-9)
        return int(min(self.max_repeats, max(self.min_repeats, wanted)))


def measure(
    call: Callable[[], Result],
    device: torch.device,
    effort: Effort | None = None,
    after_warm_up: Callable[[], None] | None = None,
) -> tuple[Timing, Result]:
    """Times `call` and returns what its last timed run returned, for the caller to check.

    `after_warm_up` may undo what the runs before the timed ones have changed.

    The memory of the results is poisoned with NaN before the timed runs, so that a run which wrote nothing shows. On a
    GPU the level-2 cache is overwritten before each run, outside the timed interval. With `effort.cuda_graph` the call
    is captured, and replays are timed; that needs a current stream that is not the default one.
    """
    effort = effort or Effort()
    timed = _cuda_time if device.type == "cuda" else _host_time
    if effort.cuda_graph and device.type == "cuda":
        call()
        call = captured(call)
    count, warm, seconds, result = 0, 0.0, 0.0, None
    while count < max(1, effort.warmups) or warm < effort.warmup_s:
        result = None  # freed first, so that every run gets the same memory
        seconds, result = _synchronized_time(call, device)
        count, warm = count + 1, warm + seconds
    assert result is not None
    poison(result)
    del result
    if after_warm_up is not None:
        after_warm_up()
    return timed(call, effort.repeats(seconds), device)


def matmul_tflops(device: torch.device, effort: Effort | None = None) -> float:
    """TFLOP/s of a product of two 8192 x 8192 matrices in bf16: what attention, two such products, comes up against.

    Attention over thousands of visible keys does hundreds of operations for each byte that it must move, so that not
    memory is its limit.
    """
    n = 8192
    a, b = (torch.randn(n, n, dtype=torch.bfloat16, device=device) for _ in range(2))
    timing, _ = measure(lambda: a @ b, device, effort)
    return 2 * n**3 / timing.median_ms / 1e9


def captured(call: Callable[[], Result]) -> Callable[[], Result]:
    """A function that replays `call` as a CUDA graph and returns the graph's own output tensors."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        result = call()

    def replay() -> Result:
        graph.replay()
        return result

    return replay


def poison(result: Result) -> None:
    """Overwrites the tensors with NaN; when they are freed, the allocator hands their memory to the next call."""
    with torch.no_grad():
        for tensor in result if isinstance(result, tuple) else (result,):
            tensor.fill_(torch.nan)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _synchronized_time(call: Callable[[], Result], device: torch.device) -> tuple[float, Result]:
    synchronize(device)
    start = time.perf_counter()
    result = call()
    synchronize(device)
    return time.perf_counter() - start, result


def _cuda_time(call: Callable[[], Result], repeats: int, device: torch.device) -> tuple[Timing, Result]:
    l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    flush = torch.empty(2 * l2_bytes, dtype=torch.int8, device=device)
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    result: Result | None = None
    for start, end in events:
        result = None
        flush.fill_(1)
        start.record()
        result = call()
        end.record()
    torch.cuda.synchronize(device)
    assert result is not None
    return Timing.of([start.elapsed_time(end) for start, end in events]), result


def _host_time(call: Callable[[], Result], repeats: int, device: torch.device) -> tuple[Timing, Result]:
    times: list[float] = []
    result: Result | None = None
    for _ in range(repeats):
        result = None
        start = time.perf_counter()
        result = call()
        times.append((time.perf_counter() - start) * 1e3)
    assert result is not None
    return Timing.of(times), result
