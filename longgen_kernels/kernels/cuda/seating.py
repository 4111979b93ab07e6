"""Which multiprocessors of a Hopper GPU have the work of a launch with fewer thread blocks, or more, than run at once.

The GPU is two halves, each with half of the bandwidth to memory: as many multiprocessors of one should be at work as of
the other. Which are in which differs from GPU to GPU. It shows in how long they wait for atomic operations, which are
done where the line is at home: 200 cycles longer from the other half. That is measured once, by the first call that
wants to know; nobody waits for it, and until it has ended those with the first numbers stay idle.

Some multiprocessors read faster than others while all do: a cluster of them (CPC) that lacks a pair gets as much as one
of three. So if one half has fewer multiprocessors than the other, it has more fast ones.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from longgen_kernels.kernels.cuda.arguments import current_stream, on_device

__all__ = ["NO_SEATS", "UNKNOWN", "Seating", "Words", "idle_seats", "seating_of", "seating_on"]

_LINES, _STRIDE = 64, 1024  # of L2, and from one to the next in 4 bytes: enough that both halves have many
_WORDS, _BITS = 4, 64  # with a bit for each seat

Words = tuple[int, ...]
NO_SEATS: Words = (0,) * _WORDS

_measurements: dict[torch.device, _Measurement] = {}


class Seating(NamedTuple):
    """What is known of a GPU's multiprocessors."""

    idle_order: tuple[int, ...] = ()  # of all, in which they stay idle
    first_half: Words = NO_SEATS  # a bit for each of one half
    halves_differ: bool | None = None  # in how many they have


UNKNOWN = Seating()


def seating_on(device: torch.device, multiprocessors: int) -> Seating:
    """What is known by now."""
    measurement = _measurements.get(device)
    if measurement is None:
        # A graph's own memory is not to be kept, and its kernels run later.
        if torch.cuda.is_current_stream_capturing():
            return UNKNOWN
        measurement = _measurements[device] = _Measurement(device, multiprocessors)
    return measurement.seating()


@lru_cache(maxsize=4096)
def idle_seats(order: tuple[int, ...], seats: int, items: int) -> Words:
    """A bit for each of the seats that stay idle: the first of the order that are seats, then the first numbers."""
    first = dict.fromkeys(i for i in (*order, *range(seats)) if i < seats)
    return _words(list(first)[: -items % seats])


def _words(seats: Iterable[int]) -> Words:
    bits = sum(1 << i for i in seats)
    return tuple(bits >> _BITS * word & (1 << _BITS) - 1 for word in range(_WORDS))


class _Measurement:
    """Of one GPU, by a kernel that writes to the host's memory when it has ended."""

    def __init__(self, device: torch.device, multiprocessors: int) -> None:
        from longgen_kernels import _C

        self._seating = UNKNOWN
        self._memory: Tensor | None = torch.zeros(_LINES * _STRIDE + 1, dtype=torch.int32, device=device)
        # Named, as only the host's memory can be pinned, and the default device may be another.
        cycles = torch.zeros(multiprocessors * _LINES + 1, dtype=torch.int32, device="cpu", pin_memory=True)
        self.latencies, self._has_ended = cycles[:-1].view(multiprocessors, _LINES), cycles[-1]
        addresses = self._memory.data_ptr(), cycles.data_ptr(), current_stream(self._memory)
        with on_device(self._memory):
            _C.measure_l2_latencies(multiprocessors, _LINES, _STRIDE, *addresses)

    def seating(self) -> Seating:
        """Unknown: it has not ended, or showed no halves."""
        if self._memory is not None and self._has_ended.item() != 0:
            self._seating = seating_of(self.latencies)
            self._memory = None
        return self._seating


def seating_of(latencies: Tensor) -> Seating:
    """Which multiprocessors are in which half, from how long each waits for lines of L2.

    Args:
        latencies: (multiprocessors, lines), cycles.

    Returns:
        The order has, of the half that has more left, the pair (one TPC: 2 i and 2 i + 1) whose latencies within the
        half differ most. So the two or three pairs of one cluster (CPC) stay idle together, which is 1 to 2% faster
        than one of each. Unknown if there are no halves to be seen.
    """
    seen = _halves(latencies.double())
    if seen is None:
        return UNKNOWN
    spread_of_pairs = seen.spread.view(-1, 2).sum(1).tolist()
    is_first = seen.is_first.view(-1, 2)[:, 0]
    halves = [half.nonzero().flatten().tolist() for half in (is_first, ~is_first)]
    left = [sorted(half, key=spread_of_pairs.__getitem__) for half in halves]
    order: list[int] = []
    while left[0] or left[1]:
        pair = max(left, key=len).pop()
        order += [2 * pair, 2 * pair + 1]
    return Seating(tuple(order), _words(seen.is_first.nonzero().flatten().tolist()), len(halves[0]) != len(halves[1]))


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
