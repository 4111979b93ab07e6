"""How long a call takes: medians of device events on a GPU, of the host clock elsewhere."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
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
TURN_S = 0.008  # of a call's runs before it is another's turn: many times the resolution of events


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


def measure(call: Callable[[], Result], device: torch.device, effort: Effort | None = None) -> tuple[Timing, Result]:
    """Times `call` and returns what its last timed run returned, for the caller to check.

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
    return timed(call, effort.repeats(seconds), device)


def measure_by_turns(
    calls: Mapping[str, Callable[[], Result]],
    device: torch.device,
    effort: Effort | None = None,
    before_turn: Callable[[], None] | None = None,
) -> dict[str, Timing]:
    """Times calls in rounds, in each of which every call has a turn, the first in one round being the last in the next.

    A machine is faster or slower for some seconds by half a percent: all calls share that, and what they take can be
    compared more closely than by one `measure` after another. A turn is one call that is not timed, and as many as take
    `TURN_S` seconds, timed together. They have the level-2 cache as they find it: a call should go through more memory
    than that holds. `before_turn` may undo what calls have changed.

    `effort` counts whole rounds; calls are timed as they are: what is to be a CUDA graph is captured before.
    """
    effort = effort or Effort()
    before_turn = before_turn or (lambda: None)
    count, warm = 0, 0.0
    seconds: dict[str, float] = {}
    while count < max(1, effort.warmups) or warm < effort.warmup_s:
        before_turn()
        for name, call in calls.items():
            seconds[name] = _synchronized_time(call, device)[0]
        count, warm = count + 1, warm + sum(seconds.values())
    runs = {name: max(1, round(TURN_S / s)) if device.type == "cuda" else 1 for name, s in seconds.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    rounds = max(2, effort.repeats(sum(runs[name] * s for name, s in seconds.items()) / len(calls)))
    for i in range(rounds):
        for name in list(calls) if i % 2 == 0 else reversed(list(calls)):
            before_turn()
            calls[name]()
            times[name].append(_time_of_runs(calls[name], runs[name], device))
    return {name: Timing.of(each) for name, each in times.items()}


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


def _time_of_runs(call: Callable[[], Result], runs: int, device: torch.device) -> float:
    """Milliseconds of one of some runs behind each other."""
    if device.type != "cuda":
        return _synchronized_time(call, device)[0] * 1e3  # there is one
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(runs):
        call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / runs


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
