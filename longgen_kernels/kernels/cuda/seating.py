"""Which multiprocessors of a Hopper GPU stay idle, where a launch has fewer thread blocks.

The GPU is two halves, each with half of the bandwidth to memory: as many multiprocessors of one should be at work as of
the other. Which are in which differs from GPU to GPU. It shows in how long they wait for atomic operations, which are
done where the line is at home: 200 cycles longer from the other half. That is measured once, by the first call that
wants to know; nobody waits for it, and until it has ended those with the first numbers stay idle.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from longgen_kernels.kernels.cuda.arguments import current_stream, on_device

__all__ = ["NO_IDLE_SEATS", "idle_order", "idle_seats"]

_LINES, _STRIDE = 64, 1024  # of L2, and from one to the next in 4 bytes: enough that both halves have many
_WORDS, _BITS = 4, 64  # with a bit for each seat

Words = tuple[int, ...]
NO_IDLE_SEATS: Words = (0,) * _WORDS

_measurements: dict[torch.device, _Measurement] = {}


def idle_seats(device: torch.device, multiprocessors: int, seats: int, items: int) -> Words:
    """A bit for each of the seats that stay idle."""
    measurement = _measurements.get(device)
    if measurement is None:
        # A graph's own memory is not to be kept, and its kernels run later.
        if torch.cuda.is_current_stream_capturing():
            return _words((), seats, items)
        measurement = _measurements[device] = _Measurement(device, multiprocessors)
    return _words(measurement.order(), seats, items)


@lru_cache(maxsize=4096)
def _words(order: tuple[int, ...], seats: int, items: int) -> Words:
    """The first of the order that are seats, then those with the first numbers."""
    first = dict.fromkeys(i for i in (*order, *range(seats)) if i < seats)
    bits = sum(1 << i for i in list(first)[: -items % seats])
    return tuple(bits >> _BITS * word & (1 << _BITS) - 1 for word in range(_WORDS))


class _Measurement:
    """Of one GPU, by a kernel that writes to the host's memory when it has ended."""

    def __init__(self, device: torch.device, multiprocessors: int) -> None:
        from longgen_kernels import _C

        self._order: tuple[int, ...] | None = None
        self._memory = torch.zeros(_LINES * _STRIDE + 1, dtype=torch.int32, device=device)
        # Named, as only the host's memory can be pinned, and the default device may be another.
        cycles = torch.zeros(multiprocessors * _LINES + 1, dtype=torch.int32, device="cpu", pin_memory=True)
        self.latencies, self._has_ended = cycles[:-1].view(multiprocessors, _LINES), cycles[-1]
        addresses = self._memory.data_ptr(), cycles.data_ptr(), current_stream(self._memory)
        with on_device(self._memory):
            _C.measure_l2_latencies(multiprocessors, _LINES, _STRIDE, *addresses)

    def order(self) -> tuple[int, ...]:
        """In which multiprocessors stay idle; empty: not known."""
        if self._order is None:
            if self._has_ended.item() == 0:
                return ()
            self._order = idle_order(self.latencies)
            del self._memory
        return self._order


def idle_order(latencies: Tensor) -> tuple[int, ...]:
    """In which order multiprocessors stay idle, from how long each waits for lines of L2.

    Args:
        latencies: (multiprocessors, lines), cycles.

    Returns:
        All multiprocessors: of the half that has more left, the pair (one TPC: 2 i and 2 i + 1) whose latencies within
        the half differ most. So the two or three pairs of one cluster (CPC) stay idle together, which is 1 to 2% faster
        than one of each. Empty if there are no halves to be seen.
    """
    seen = _halves(latencies.double())
    if seen is None:
        return ()
    spread_of_pairs = seen.spread.view(-1, 2).sum(1).tolist()
    is_first = seen.is_first.view(-1, 2)[:, 0]
    halves = [half.nonzero().flatten().tolist() for half in (is_first, ~is_first)]
    left = [sorted(half, key=spread_of_pairs.__getitem__) for half in halves]
    order: list[int] = []
    while left[0] or left[1]:
        pair = max(left, key=len).pop()
        order += [2 * pair, 2 * pair + 1]
    return tuple(order)


class _Halves(NamedTuple):
    is_first: Tensor  # (multiprocessors,), of the first one's half
    spread: Tensor  # (multiprocessors,), variance of the latencies of lines at home in the own half


def _halves(cycles: Tensor) -> _Halves | None:
    if cycles.shape[0] % 2 != 0 or not bool((cycles > 0).all()):  # some have not been measured
        return None
    beyond = cycles - cycles.mean(1, keepdim=True)
    beyond -= beyond.mean(0)
    likeness = beyond @ beyond[0]  # to the first one
    is_first = likeness > 0
    are_clear = bool(likeness.abs().min() > likeness.abs().median() / 2)
    if not are_clear or not torch.equal(is_first[::2], is_first[1::2]):
        return None
    near = beyond < 0
    count = near.sum(1)
    mean = (cycles * near).sum(1) / count
    return _Halves(is_first, ((cycles - mean[:, None]).square() * near).sum(1) / count)
