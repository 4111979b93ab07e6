"""Peers from other packages, which are not installed here: stand-ins with their signatures say what they are asked."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

# `bench` is run from the repository's root and is not installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
pytest.importorskip("bench", reason="the sources have no bench/")

from bench import decode
from longgen_kernels import AttentionPattern, longgen_attn_func, longgen_attn_varlen_func, longgen_attn_with_kvcache
from longgen_kernels.benchmark.cases import PATTERNS, Case, make_cases, make_inputs
from longgen_kernels.benchmark.gate import Gate
from longgen_kernels.benchmark.packages import BlockSparseAttn, FlashAttn, why_not_installed
from longgen_kernels.benchmark.timing import Effort

CPU = torch.device("cpu")
BLOCK = 128


def install(monkeypatch: pytest.MonkeyPatch, name: str, **functions: Any) -> None:
    module = ModuleType(name)
    for function, body in functions.items():
        setattr(module, function, body)
    for parent in (name[:at] for at, letter in enumerate(name) if letter == "."):
        monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
    monkeypatch.setitem(sys.modules, name, module)


def tiny(name: str) -> Case:
    """Longer than every window."""
    (case,) = make_cases([name], [2500], ["tiny"])
    return case


# -- what is there -----------------------------------------------------------------------------------------------------


def test_reasons_why_a_package_is_not_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    gpu = torch.device("cuda")
    assert why_not_installed("flash_attn.cute", CPU) == "needs a GPU, this is cpu"
    for absent in ("no_such_package", "no_such_package.part"):
        assert why_not_installed(absent, gpu) == f"{absent} is not installed"
    (tmp_path / "half_a_package.py").write_text("import no_such_package\n")
    (tmp_path / "wrong_build.py").write_text("raise OSError('undefined symbol')\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert why_not_installed("half_a_package", gpu) == (
        "half_a_package does not import: ModuleNotFoundError: No module named 'no_such_package'"
    )
    assert why_not_installed("wrong_build", gpu) == "wrong_build does not import: OSError: undefined symbol"
    install(monkeypatch, "flash_attn.cute")
    assert why_not_installed("flash_attn.cute", gpu) is None


def test_what_packages_express() -> None:
    cases = {case.name: case for case in make_cases(PATTERNS, [8192])}
    expressed = {
        peer.name: [name for name, case in cases.items() if peer.unsupported(case, CPU) is None]
        for peer in (FlashAttn("fa4", "flash_attn.cute"), BlockSparseAttn())
    }
    assert expressed == {
        "fa4": ["window", "causal"],
        "block_sparse_attn": ["sink_window", "sink_window_blocks", "window", "causal"],
    }
    small = AttentionPattern.sink_window(sink=128, window_blocks=2, block_size=64)
    assert BlockSparseAttn().unsupported(Case("small", small, 8192), CPU) == "blocks of 128 tokens only"


# -- attention ---------------------------------------------------------------------------------------------------------


def flash_attn_func(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, window_size: tuple[int, int] | None = None
) -> tuple[Tensor, None]:
    assert causal
    left, right = window_size or (1 << 20, 0)
    assert right == 0
    return longgen_attn_func(q, k, v, AttentionPattern.sink_window(sink=0, window=left + 1)), None


def packed(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, pattern: AttentionPattern, longest: int) -> Tensor:
    assert bounds.dtype == torch.int32
    out = longgen_attn_varlen_func(q, k, v, pattern, bounds, bounds, longest, longest)
    assert isinstance(out, Tensor)
    return out


def block_sparse_attn_func(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, head_mask_type: Tensor,
    streaming_info: Tensor, base_blockmask: None, max_seqlen_q_: int, max_seqlen_k_: int, p_dropout: float,
    deterministic: bool = False, softmax_scale: float | None = None, is_causal: bool = False,
) -> Tensor:  # fmt: skip
    assert head_mask_type.tolist() == [0] * q.shape[1]
    assert is_causal
    assert (base_blockmask, p_dropout, softmax_scale) == (None, 0.0, None)
    return packed(q, k, v, cu_seqlens_q, AttentionPattern.causal(), max_seqlen_q_)


def token_streaming_attn_func(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, head_mask_type: Tensor,
    streaming_info: Tensor, max_seqlen_q_: int, max_seqlen_k_: int,
) -> Tensor:  # fmt: skip
    assert head_mask_type.tolist() == [-1] * q.shape[1]
    sink, window = streaming_info.view(-1, 2).unique(dim=0)[0].tolist()
    return packed(q, k, v, cu_seqlens_q, AttentionPattern.sink_window(sink, window), max_seqlen_q_)


def block_streaming_attn_func(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, head_mask_type: Tensor,
    streaming_info: Tensor, max_seqlen_q_: int, max_seqlen_k_: int, p_dropout: float,
) -> Tensor:  # fmt: skip
    assert head_mask_type.tolist() == [-1] * q.shape[1]
    sink, blocks = streaming_info.view(-1, 2).unique(dim=0)[0].tolist()
    pattern = AttentionPattern.sink_window(sink * BLOCK, window_blocks=blocks, block_size=BLOCK)
    return packed(q, k, v, cu_seqlens_q, pattern, max_seqlen_q_)


@pytest.mark.parametrize("name", ["window", "causal"])
def test_flash_attn_is_asked_for_the_case(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "flash_attn.cute", flash_attn_func=flash_attn_func)
    case = tiny(name)
    inputs = make_inputs(case, CPU)
    calls = FlashAttn("fa4", "flash_attn.cute").prepare(case, inputs)
    gate = Gate(case, inputs)
    assert gate.forward_failure(calls.forward()) is None
    assert gate.backward_failure(calls.backward()) is None


@pytest.mark.parametrize("name", ["sink_window", "sink_window_blocks", "causal"])
def test_block_sparse_attn_is_asked_for_the_case(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    functions = (block_sparse_attn_func, token_streaming_attn_func, block_streaming_attn_func)
    install(monkeypatch, "block_sparse_attn", **{function.__name__: function for function in functions})
    case = tiny(name)
    inputs = make_inputs(case, CPU)
    calls = BlockSparseAttn().prepare(case, inputs)
    assert Gate(case, inputs, backward=False).forward_failure(calls.forward()) is None


# -- decoding ----------------------------------------------------------------------------------------------------------


class Decoder:
    """FlashInfer's wrapper, as far as it is used."""

    runs: ClassVar[list[tuple[Tensor, Tensor]]] = []  # keys and lengths of each

    def __init__(self, workspace: Tensor, kv_layout: str, *, use_cuda_graph: bool, **buffers: Any) -> None:
        assert (workspace.dtype, kv_layout, use_cuda_graph) == (torch.uint8, "NHD", True)
        assert {name for name in buffers if name.endswith("_buffer")} == {
            f"paged_kv_{name}_buffer" for name in ("indptr", "indices", "last_page_len")
        }

    def plan(
        self, indptr: Tensor, indices: Tensor, last_page_len: Tensor, q_heads: int, kv_heads: int, head_dim: int,
        page_size: int, *, q_data_type: torch.dtype, kv_data_type: torch.dtype,
    ) -> None:  # fmt: skip
        assert all(x.dtype == torch.int32 for x in (indptr, indices, last_page_len))
        self.sizes = (q_heads, kv_heads, head_dim, q_data_type, kv_data_type)
        pages = indptr.diff()
        self.lengths = (pages - 1) * page_size + last_page_len
        self.table = indices.view(len(pages), -1)

    def run(self, q: Tensor, cache: tuple[Tensor, Tensor]) -> Tensor:
        k, v = cache
        assert (q.shape[1], k.shape[2], k.shape[3], q.dtype, k.dtype) == self.sizes
        out = longgen_attn_with_kvcache(q[:, None], (k, v), cache_seqlens=self.lengths, block_table=self.table)
        assert isinstance(out, Tensor)
        Decoder.runs.append((k, self.lengths))
        return out[:, 0]


def with_kvcache(q: Tensor, k: Tensor, v: Tensor, *, cache_seqlens: Tensor) -> Tensor:
    assert cache_seqlens.tolist() == [k.shape[1]] * len(k)
    out = longgen_attn_with_kvcache(q, (k, v), cache_seqlens=cache_seqlens)
    assert isinstance(out, Tensor)
    return out


def test_flashinfer_decodes_as_many_keys_as_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "flashinfer", BatchDecodeWithPagedKVCacheWrapper=Decoder)
    monkeypatch.setattr(Decoder, "runs", [])
    pattern = AttentionPattern.sink_window(4, 67)  # no whole number of pages
    case = decode.DecodeCase("ragged", pattern, 2, 4, 2, 16, seen=500, dtype=torch.float32)
    steps = decode.PEERS["flashinfer"](case, CPU)
    assert len(steps) == case.layers
    assert steps[0]().shape == (2, 4, 16)
    ((k, lengths),) = Decoder.runs
    assert lengths.tolist() == [71, 71]
    assert k.shape == (2 * 5, 16, 2, 16)


def test_pytorchs_attention_may_write_its_token_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """All zeros but the new value, of which each query takes its share."""
    case = decode.DecodeCase("tiny", AttentionPattern.sink_window(4, 60), 2, 4, 2, 16, seen=500, dtype=torch.float32)

    def zeros_or_a_token(case: decode.DecodeCase, device: torch.device, tokens: int, heads: int) -> torch.Tensor:
        return torch.full((case.batch, tokens, heads, case.head_dim), float(tokens == 1), device=device)

    monkeypatch.setattr(decode, "_normal", zeros_or_a_token)
    for append, want in ((False, 0.0), (True, 1.0)):
        steps = decode.sdpa(SDPBackend.MATH, append)(case, CPU)
        out = steps[0]()
        weight = math.exp(4.0) / (math.exp(4.0) + case.kept - 1)  # 16 products of 1, times 16 ** -0.5
        assert out.shape == (2, 4, 1, 16)
        assert torch.allclose(out, torch.full_like(out, want * weight))


@pytest.mark.parametrize("peer", ["flash_attn", "fa3"])
def test_flash_attn_decodes_as_many_keys_as_are_kept(peer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, decode.PACKAGES[peer], flash_attn_with_kvcache=with_kvcache)
    (record,) = decode.time_case(decode.QUICK, [peer], CPU, Effort(budget_s=0.0, warmups=1, min_repeats=2))
    assert record["status"] == "ok", record
