"""Which multiprocessors of a Hopper GPU have the work of a launch with fewer thread blocks, or more, than run at once.

The GPU is two halves, each with half of the bandwidth to memory: as many multiprocessors of one should be at work as of
the other. Which are in which differs from GPU to GPU. It shows in how long they wait for atomic operations, which are
done where the line is at home: 200 cycles longer from the other half.

Some multiprocessors read faster than others while all do: a cluster of them (CPC) that lacks a pair gets as much as one
of three. One half may have more of these than the other. It shows in how much each reads.

Both are measured once, by the first call that wants to know; nobody waits for it, and until it has ended those with the
first numbers stay idle.
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
_READ_BYTES = 8 << 20  # by all multiprocessors again and again: less than L2 has, more than they read at once
_FAST = 1.15  # times as much as most: others differ by 5%
_FEW = 4  # multiprocessors that one half has more of, at least, if it matters: a cluster that lacks a pair
_WORDS, _BITS = 4, 64  # with a bit for each seat

Words = tuple[int, ...]
NO_SEATS: Words = (0,) * _WORDS

_measurements: dict[torch.device, _Measurement] = {}


class Seating(NamedTuple):
    """What is known of a GPU's multiprocessors."""

    idle_order: tuple[int, ...] = ()  # of all, in which they stay idle
    first_half: Words = NO_SEATS  # a bit for each of one half
    halves_differ: bool | None = None  # in how many fast ones they have


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
    """Of one GPU, by kernels that write to the host's memory."""

    def __init__(self, device: torch.device, multiprocessors: int) -> None:
        from longgen_kernels import _C

        self._seating = UNKNOWN
        zeros = torch.zeros(_LINES * _STRIDE + 1, dtype=torch.int32, device=device)
        memory = torch.empty(_READ_BYTES, dtype=torch.uint8, device=device)
        self._needed: tuple[Tensor, ...] = (zeros, memory)  # until they have ended
        # Named, as only the host's memory can be pinned, and the default device may be another.
        found = torch.zeros(multiprocessors * (_LINES + 1) + 1, dtype=torch.int32, device="cpu", pin_memory=True)
        latencies, self.rates, self._are_there = found.split([multiprocessors * _LINES, multiprocessors, 1])
        self.latencies = latencies.view(multiprocessors, _LINES)
        results = latencies.data_ptr(), self.rates.data_ptr(), self._are_there.data_ptr()
        needed = zeros.data_ptr(), memory.data_ptr(), _READ_BYTES
        with on_device(zeros):
            _C.measure_multiprocessors(multiprocessors, _LINES, _STRIDE, *needed, *results, current_stream(zeros))

    def seating(self) -> Seating:
        """Unknown: it has not ended, or showed no halves."""
        if self._needed and self._are_there.item() != 0:
            self._seating = seating_of(self.latencies, self.rates)
            self._needed = ()
        return self._seating


def seating_of(latencies: Tensor, rates: Tensor) -> Seating:
    """Which multiprocessors are in which half, and which half has more fast ones.

    Args:
        latencies: (multiprocessors, lines), cycles that each waits for lines of L2.
        rates: (multiprocessors,), how much each reads in some time while all do.

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
    left = [
        sorted(half.nonzero().flatten().tolist(), key=spread_of_pairs.__getitem__) for half in (is_first, ~is_first)
    ]
    order: list[int] = []
    while left[0] or left[1]:
        pair = max(left, key=len).pop()
        order += [2 * pair, 2 * pair + 1]
    is_fast = rates > _FAST * rates.median()
    more = int(is_fast[seen.is_first].sum() - is_fast[~seen.is_first].sum())
    return Seating(tuple(order), _words(seen.is_first.nonzero().flatten().tolist()), abs(more) >= _FEW)


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
