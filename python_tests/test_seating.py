"""Which multiprocessors stay idle, and whether halves differ, from latencies and rates as an H200 has them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from longgen_kernels.kernels.cuda.seating import UNKNOWN, idle_seats, seating_of


def bits_of(words: tuple[int, ...]) -> set[int]:
    return {64 * i + bit for i, word in enumerate(words) for bit in range(64) if word >> bit & 1}


def latencies(is_first: Tensor, spread: Tensor, lines: int = 64, seed: int = 0) -> Tensor:
    """Of each pair, 325 cycles from its half and 200 more from the other; as much as `spread` more or less by line."""
    generator = torch.Generator().manual_seed(seed)
    at_home_in_first = torch.arange(lines) % 2 == 0
    is_far = is_first[:, None] != at_home_in_first
    of_line = torch.rand(lines, generator=generator) * 2 - 1
    of_pairs = 325 + 200 * is_far + spread[:, None] * of_line
    noise = torch.rand(2 * len(is_first), lines, generator=generator) * 4
    return (of_pairs.repeat_interleave(2, 0) + noise).int()


def rates(is_fast: Tensor, seed: int = 0) -> Tensor:
    """Of each pair, 190 runs or a third more, and up to a twentieth less."""
    noise = torch.rand(2 * len(is_fast), generator=torch.Generator().manual_seed(seed)) / 20
    return ((190 + 65 * is_fast).repeat_interleave(2) * (1 - noise)).int()


ALIKE = rates(torch.zeros(66))


@given(first=st.integers(8, 40), second=st.integers(8, 40), seed=st.integers(0, 100))
def test_as_many_of_either_half_are_at_work(first: int, second: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    is_first = torch.randperm(first + second, generator=generator) < first
    spread = torch.rand(first + second, generator=generator) * 20 + 10
    seating = seating_of(latencies(is_first, spread, seed=seed), rates(torch.zeros(first + second)))
    order = seating.idle_order
    assert bits_of(seating.first_half) in (
        {2 * i + j for i in range(len(is_first)) if is_first[i] == side for j in (0, 1)} for side in (True, False)
    )
    assert seating.halves_differ is False
    assert sorted(order) == list(range(2 * (first + second)))
    assert all(order[i + 1] == order[i] + 1 for i in range(0, len(order), 2))  # a pair stays idle together
    left = torch.tensor([first, second])
    for i in range(0, len(order), 2):
        half = 0 if is_first[order[i] // 2] else 1
        assert left[half] >= left[1 - half]
        left[half] -= 1


def test_those_whose_latencies_differ_most_stay_idle_first() -> None:
    spread = torch.tensor([10.0, 15.0, 20.0, 10.0, 15.0, 20.0]).repeat(11)  # of each third pair of a GPC
    seating = seating_of(latencies(torch.arange(66) % 8 < 4, spread), ALIKE)
    order = seating.idle_order
    assert {i // 2 % 3 for i in order[:36]} == {2}
    assert {i // 2 % 3 for i in order[96:]} == {0}


@pytest.mark.parametrize(
    "cycles",
    [
        torch.randint(300, 500, (132, 64), generator=torch.Generator().manual_seed(1)),  # no halves
        torch.zeros(132, 64, dtype=torch.int32),  # not measured
        torch.full((132, 64), 400),
        torch.randint(300, 500, (131, 64), generator=torch.Generator().manual_seed(1)),
        latencies(torch.arange(66) % 2 == 0, torch.full((66,), 20.0))[1:-1],  # pairs that are of both halves
    ],
)
def test_where_there_are_no_halves_to_be_seen_there_is_no_order(cycles: Tensor) -> None:
    assert seating_of(cycles, ALIKE) == UNKNOWN


def test_one_that_has_not_been_measured() -> None:
    cycles = latencies(torch.arange(66) % 2 == 0, torch.full((66,), 20.0))
    assert len(seating_of(cycles, ALIKE).idle_order) == 132
    cycles[77] = 0
    assert seating_of(cycles, ALIKE) == UNKNOWN


@given(
    fast=st.tuples(st.integers(0, 8), st.integers(0, 8)),
    idle=st.integers(-1, 131),  # one that has not been measured
    seed=st.integers(0, 100),
)
def test_halves_differ_if_one_has_a_cluster_more_that_lacks_a_pair(fast: tuple[int, int], idle: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    is_first = torch.randperm(66, generator=generator) < 33
    is_fast = torch.zeros(66)
    for side, count in zip((True, False), fast, strict=True):
        pairs = (is_first == side).nonzero().flatten()
        is_fast[pairs[torch.randperm(33, generator=generator)[:count]]] = 1
    seen = rates(is_fast, seed)
    if idle >= 0:
        seen[idle] = 0
    counts = [2 * count for count in fast]
    if idle >= 0 and is_fast[idle // 2]:
        counts[0 if is_first[idle // 2] else 1] -= 1
    assert seating_of(latencies(is_first, torch.full((66,), 20.0)), seen).halves_differ == (
        abs(counts[0] - counts[1]) >= 4
    )


@pytest.mark.parametrize(
    ("order", "seats", "blocks", "idle"),
    [
        ((), 132, 129, {0, 1, 2}),  # until it is known
        ((131, 64, 63, 0, 5), 132, 128, {131, 64, 63, 0}),
        ((131, 64, 63, 0, 5), 132, 125, {131, 64, 63, 0, 5, 1, 2}),
        ((131, 64, 3), 100, 97, {64, 3, 0}),  # seats that there are
        ((7, 6), 255, 253, {7, 6}),
        ((7, 6), 132, 132, set()),
        ((7, 6), 8, 16, set()),
    ],
)
def test_bits_of_idle_seats(order: tuple[int, ...], seats: int, blocks: int, idle: set[int]) -> None:
    words = idle_seats(order, seats, blocks)
    assert len(words) == 4
    assert bits_of(words) == idle
