"""The Hopper backward kernel's enumeration of work, compiled for the CPU, against the definition of "visible"."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
import torch
from attention_cases import A, Case, dense, named_cases, packed, patterns_of_every_kind
from attention_strategies import KINDS, random_cases
from host_library import NVCC, ROOT, address, code, compile_for_host
from hypothesis import given, settings
from hypothesis import strategies as st

from longgen_kernels import BlockMask

pytestmark = pytest.mark.skipif(NVCC is None, reason="needs nvcc, which compiles csrc for the CPU")
BF16 = torch.bfloat16
MULTIPROCESSORS = 132


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return compile_for_host("backward_enumeration.cu", tmp_path_factory.mktemp("enumeration"))


def offsets(lengths: tuple[int, ...]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)


def sequences(case: Case) -> list[tuple[int, slice, slice, int, int]]:
    """Of each sequence the tensors' batch index, its rows of queries and keys, and the positions of the first ones."""
    batch = len(case.seqlens_q)
    k_starts = case.k_starts or (0,) * batch
    suffixes = [k + nk - nq for k, nk, nq in zip(k_starts, case.seqlens_k, case.seqlens_q, strict=True)]
    starts = zip(case.q_starts or suffixes, k_starts, strict=True)
    if not case.packed:
        rows = slice(0, case.seqlens_q[0]), slice(0, case.seqlens_k[0])
        return [(b, *rows, *start) for b, start in enumerate(starts)]
    q, k = (offsets(lengths).tolist() for lengths in (case.seqlens_q, case.seqlens_k))
    return [(0, slice(*q[b : b + 2]), slice(*k[b : b + 2]), *start) for b, start in enumerate(starts)]


def check(library: ctypes.CDLL, case: Case) -> int:
    """Every key is in one tile, every visible pair shown once, nothing else. Returns the number of chunks."""
    pattern = case.pattern
    cols = pattern.cols.numpy() if isinstance(pattern, BlockMask) else None
    if case.packed:
        tensors, seqlen_q, seqlen_k = 1, sum(case.seqlens_q) + case.spare_rows, sum(case.seqlens_k) + case.spare_rows
        cu_q, cu_k = offsets(case.seqlens_q), offsets(case.seqlens_k)
        q_starts, k_starts = (
            None if x is None else np.array(x, dtype=np.int32) for x in (case.q_starts, case.k_starts)
        )
        first = (0, 0)
    else:
        tensors, seqlen_q, seqlen_k = len(case.seqlens_q), case.seqlens_q[0], case.seqlens_k[0]
        cu_q = cu_k = q_starts = k_starts = None
        first = sequences(case)[0][3:]
    sizes = np.array(
        [len(case.seqlens_q), seqlen_q, seqlen_k, case.q_heads, case.kv_heads, case.head_dim, *first, MULTIPROCESSORS],
        dtype=np.int32,
    )
    owned = np.zeros((tensors, case.kv_heads, seqlen_k), dtype=np.int32)
    seen = np.zeros((tensors, case.q_heads, seqlen_q, seqlen_k), dtype=np.int8)
    want = np.zeros_like(seen)
    heads = pattern.heads if isinstance(pattern, BlockMask) else case.kv_heads
    for b, q_rows, k_rows, q_start, k_start in sequences(case):
        p, j = (torch.arange(rows.stop - rows.start) + start for rows, start in ((q_rows, q_start), (k_rows, k_start)))
        for head in range(case.q_heads):
            visible = pattern.is_visible(p[:, None], j[None], head * heads // case.q_heads)
            want[b, head, q_rows, k_rows] = visible.numpy()
    arrays = [code(pattern), cols, sizes, cu_q, cu_k, q_starts, k_starts, owned, seen]
    result = library.enumerate(*map(address, arrays))
    assert result > 0
    assert (owned == 1).all()
    assert (seen == want).all()
    return int(result)


def takes(case: Case) -> bool:
    if isinstance(case.pattern, BlockMask) and case.pattern.block_size < 128:
        return False
    return sum(case.seqlens_q) + case.spare_rows > 0 and sum(case.seqlens_k) + case.spare_rows > 0


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("case", [case for case in named_cases() if takes(case)], ids=str)
def test_named_case(case: Case, head_dim: int, library: ctypes.CDLL) -> None:
    check(library, case.at(BF16, head_dim))


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("kind", patterns_of_every_kind(128))
def test_every_kind_of_pattern(kind: str, head_dim: int, library: ctypes.CDLL) -> None:
    for size in (128, 256):
        pattern = patterns_of_every_kind(size)[kind]
        heads = {"q_heads": 4, "kv_heads": 2}
        cases = [
            dense(kind, pattern, 2 * size + 9, 3 * size + 9, **heads),
            packed(kind, pattern, (size + 9, 5, 2 * size), (size + 9, 3 * size, 7), **heads),
        ]
        for case in filter(takes, cases):
            check(library, case.at(BF16, head_dim))


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("pattern", [A.sink_window(128, 300), A.strided(2, 64, window=100, sink=5)], ids=str)
def test_global_keys_of_few_heads_are_divided(pattern: A, head_dim: int, library: ctypes.CDLL) -> None:
    case = dense("few heads", pattern, 2500, batch=1, q_heads=2, kv_heads=1)
    assert check(library, case.at(BF16, head_dim)) > 1


@pytest.mark.parametrize("pattern", [A.causal(), A.strided(3, 64, window=100, sink=5)], ids=str)
def test_last_tiles_of_many_heads(pattern: A, library: ctypes.CDLL) -> None:
    """More local tiles than are left for the end: of 128 heads two each."""
    check(library, dense("many heads", pattern, 700, batch=2, q_heads=64, kv_heads=64).at(BF16, 128))
    check(library, packed("many heads", pattern, (130, 5, 300), q_heads=64, kv_heads=64).at(BF16, 128))


def test_the_documentation_draws_the_items_that_there_are(
    library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(ROOT)  # `bench` is run from the root and is not installed
    drawing = pytest.importorskip("bench.diagrams.backward_items", reason="the sources have no bench/")
    rows = np.zeros((100, 3 + drawing.TOKENS // drawing.QUERY_TILE), np.int32)
    count = library.list_items(
        address(code(drawing.PATTERN)), drawing.TOKENS, drawing.MULTIPROCESSORS, rows.shape[1], address(rows)
    )
    listed = [(key, bool(is_global), tuple(tiles[:n])) for key, is_global, n, *tiles in rows[:count].tolist()]
    assert listed == [(item.key, item.is_global, item.query_tiles) for item in drawing.items()]


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@settings(max_examples=40, deadline=None)  # times 8 kinds
def test_random_cases(kind: str, library: ctypes.CDLL, data: st.DataObject) -> None:
    case = data.draw(random_cases(kind, [(BF16, 64, 1), (BF16, 128, 4), (BF16, 64, 2), (BF16, 128, 1)], longest=600))
    if takes(case):
        check(library, case)
