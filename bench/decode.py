"""Measure decoding from a KV cache: `python -m bench.decode --cases mha_9216,mha_2048 --out FILE.json`.

One query token a sequence, through as many layers' caches as no level-2 cache holds, replayed as one CUDA graph: what
a model's decoding step pays for attention, a layer. Peers run dense attention over a compact cache of the same number
of keys, and are timed by turns. With "append" a step writes its token to the cache first: this package's kernels do
both in one launch, and each turn begins at `seen` tokens. Bandwidth counts each kept key and value once.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import itertools
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from bench import machine
from longgen_kernels import AttentionPattern, SparseKVCache, longgen_attn_with_kvcache
from longgen_kernels.benchmark import gate
from longgen_kernels.benchmark.packages import one_line, why_not_installed
from longgen_kernels.benchmark.timing import GPU_WARM_UP_S, Effort, Result, Timing, captured, measure, measure_by_turns

SEEN = 131072  # tokens, of which a sparse cache keeps a part
SPARE = 8192  # tokens that the steps of a turn may append
LAYERS_BYTES = 1 << 30  # of all layers' caches together: many times a level-2 cache
MAX_LAYERS = 32
Step = Callable[[], Tensor]  # decodes one token in one layer


@dataclass(frozen=True)
class DecodeCase:
    """One decoding step of `batch` sequences of `seen` tokens under a pattern.

    If `ragged`, the last sequence has so many, and the others, in order, as many fewer as share out evenly.
    """

    name: str
    pattern: AttentionPattern
    batch: int = 1
    q_heads: int = 32
    kv_heads: int = 32
    head_dim: int = 128
    seen: int = SEEN
    dtype: torch.dtype = torch.bfloat16
    ragged: bool = False

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence."""
        return [self.seen * (i + 1) // self.batch if self.ragged else self.seen for i in range(self.batch)]

    @property
    def kept(self) -> int:
        """Keys that a query of the longest sees."""
        return self.pattern.kept_tokens(self.seen)

    @property
    def kept_by_all(self) -> int:
        """Keys that the queries of all sequences see."""
        return sum(map(self.pattern.kept_tokens, self.lengths))

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values that are seen."""
        return 2 * self.kv_heads * self.kept_by_all * self.head_dim * self.dtype.itemsize

    @property
    def flops(self) -> int:
        """Two products of head_dim for each query head and key that it sees."""
        return 4 * self.q_heads * self.kept_by_all * self.head_dim

    @property
    def layers(self) -> int:
        return min(MAX_LAYERS, max(2, math.ceil(LAYERS_BYTES / self.nbytes)))


_A = AttentionPattern
_2048, _3072, _4096 = (_A.sink_window(sink=128, window=kept - 128) for kept in (2048, 3072, 4096))
_9216 = _A.sink_window(sink=1024, window=8192)
CASES = {
    case.name: case
    for case in (
        DecodeCase("mha_2048", _2048),
        DecodeCase("mha_9216", _9216),
        DecodeCase("mha_128K", _A.causal()),
        DecodeCase("gqa_2048", _2048, kv_heads=8),
        DecodeCase("gqa_9216", _9216, kv_heads=8),
        DecodeCase("gqa_128K", _A.causal(), kv_heads=8),
        DecodeCase("mqa_128K", _A.causal(), q_heads=8, kv_heads=1),
        DecodeCase("mha_2048_batch_5", _2048, batch=5),
        DecodeCase("mha_2048_batch_8", _2048, batch=8),
        DecodeCase("mha_9216_batch_8", _9216, batch=8),
        DecodeCase("mqa_128K_batch_8", _A.causal(), batch=8, q_heads=16, kv_heads=1),
        DecodeCase("gqa_128K_batch_8", _A.causal(), batch=8, kv_heads=8),
        DecodeCase("gqa_128K_ragged_batch_8", _A.causal(), batch=8, kv_heads=8, ragged=True),
        DecodeCase("strided", _A.strided(16, 64, window=1024)),
    )
}
SWEEP = {
    case.name: case
    for name, pattern in (("2048", _2048), ("3072", _3072), ("4096", _4096), ("9216", _9216))
    for group in (4, 8, 16)
    for batch in (*range(4, 19), *range(20, 34, 2), *range(36, 68, 4))
    for case in [DecodeCase(f"gqa{group}_{name}_batch_{batch}", pattern, batch, q_heads=8 * group, kv_heads=8)]
    if 128e6 <= case.nbytes <= 1.25e9
}
"""Many sequences of 8 KV heads, which divide among multiprocessors more or less evenly."""
QUICK = DecodeCase("quick", _A.sink_window(4, 60), q_heads=2, kv_heads=1, head_dim=16, seen=500, dtype=torch.float32)


@dataclass(frozen=True)
class CacheStep:
    """The package's public function on a `SparseKVCache`."""

    case: DecodeCase
    cache: SparseKVCache
    q: Tensor
    new: tuple[Tensor, ...]  # key and value of the step's token, or nothing
    backend: str

    def __call__(self) -> Tensor:
        return longgen_attn_with_kvcache(self.q, self.cache, *self.new, backend=self.backend)

    def rewind(self) -> None:
        """Forgets the tokens that were appended."""
        _set_lengths(self.case, self.cache.seqlens)


def ours(backend: str, append: bool, fp8: bool = False) -> Callable[[DecodeCase, torch.device], list[Step]]:
    """The package's public function on a `SparseKVCache`; with `append` each step's token is added too."""

    def layers(case: DecodeCase, device: torch.device) -> list[Step]:
        return [layer(case, device, check=i == 0) for i in range(case.layers)]

    def layer(case: DecodeCase, device: torch.device, check: bool) -> Step:
        sizes = (case.batch, case.kv_heads, case.head_dim, case.seen + SPARE)
        scales = torch.full((case.kv_heads,), 1 / 16) if fp8 else None
        cache = SparseKVCache(
            case.pattern,
            *sizes,
            dtype=case.dtype,
            cache_dtype=torch.float8_e4m3fn if fp8 else None,
            k_scale=scales,
            v_scale=scales,
            device=device,
        )
        for x in (cache.k, cache.v):
            x.copy_(torch.randn(x.shape, device=device) * (16 if fp8 else 1))
        _set_lengths(case, cache.seqlens)
        cache.advanced(case.seen, 0 if case.ragged else case.seen)
        q, k, v = (_normal(case, device, 1, heads) for heads in (case.q_heads, case.kv_heads, case.kv_heads))
        new = (k, v) if append else ()
        failure = _wrong(case, cache, q, new, backend) if check else None
        if failure is not None:
            raise RuntimeError(f"wrong, so not timed: {failure}")
        return CacheStep(case, cache, q, new, backend)

    return layers


def sdpa(backend: SDPBackend, append: bool = False) -> Callable[[DecodeCase, torch.device], list[Step]]:
    """PyTorch's attention over a compact cache (batch, kv_heads, kept, head_dim).

    With `append` after two `index_copy_` of the step's key and value, as transformers' static cache has them.
    """

    def layer(case: DecodeCase, device: torch.device) -> Step:
        if case.ragged:
            raise NotImplementedError("takes sequences of one length without a mask")
        q = _normal(case, device, 1, case.q_heads).transpose(1, 2)
        k, v = (_normal(case, device, case.kept, case.kv_heads).transpose(1, 2).contiguous() for _ in range(2))
        new = tuple(_normal(case, device, 1, case.kv_heads).transpose(1, 2) for _ in range(2))
        last = torch.full((1,), case.kept - 1, device=device)

        def step() -> Tensor:
            if append:
                for cached, token in zip((k, v), new, strict=True):
                    cached.index_copy_(2, last, token)
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(q, k, v, enable_gqa=case.q_heads != case.kv_heads)

        return step

    return lambda case, device: [layer(case, device) for _ in range(case.layers)]


def flash_attn(module: str) -> Callable[[DecodeCase, torch.device], list[Step]]:
    """flash-attn's decoding over a compact cache, where that package is installed."""

    def layers(case: DecodeCase, device: torch.device) -> list[Step]:
        attend: Any = importlib.import_module(module).flash_attn_with_kvcache
        kept = [case.pattern.kept_tokens(n) for n in case.lengths]
        lengths = torch.tensor(kept, dtype=torch.int32, device=device)

        def layer() -> Step:
            q = _normal(case, device, 1, case.q_heads)
            k, v = (_normal(case, device, case.kept, case.kv_heads) for _ in range(2))
            return lambda: attend(q, k, v, cache_seqlens=lengths)

        return [layer() for _ in range(case.layers)]

    return layers


def flashinfer(case: DecodeCase, device: torch.device) -> list[Step]:
    """FlashInfer's decoding over pages of 16 tokens, planned once for all layers, where it is installed."""
    if case.ragged:
        raise NotImplementedError("is measured with sequences of one length")
    wrapper: Any = importlib.import_module("flashinfer").BatchDecodeWithPagedKVCacheWrapper
    page = 16
    pages = -(-case.kept // page)
    firsts = torch.arange(0, (case.batch + 1) * pages, pages, dtype=torch.int32, device=device)
    indices = torch.arange(case.batch * pages, dtype=torch.int32, device=device)
    last = torch.full((case.batch,), case.kept - (pages - 1) * page, dtype=torch.int32, device=device)
    decoder = wrapper(
        torch.empty(128 << 20, dtype=torch.uint8, device=device), "NHD", use_cuda_graph=True,
        use_tensor_cores=case.q_heads > case.kv_heads, paged_kv_indptr_buffer=firsts.clone(),
        paged_kv_indices_buffer=indices.clone(), paged_kv_last_page_len_buffer=last.clone(),
    )  # fmt: skip
    decoder.plan(
        firsts, indices, last, case.q_heads, case.kv_heads, case.head_dim, page,
        q_data_type=case.dtype, kv_data_type=case.dtype,
    )  # fmt: skip

    def layer() -> Step:
        q = _normal(case, device, 1, case.q_heads)[:, 0]
        shape = (case.batch * pages, page, case.kv_heads, case.head_dim)
        cache = tuple(torch.randn(shape, device=device, dtype=case.dtype) for _ in range(2))
        return lambda: decoder.run(q, cache)

    return [layer() for _ in range(case.layers)]


PACKAGES = {"flash_attn": "flash_attn", "fa3": "flash_attn_interface", "flashinfer": "flashinfer"}
PEERS: dict[str, Callable[[DecodeCase, torch.device], list[Step]]] = {
    "cuda": ours("cuda", append=False),
    "cuda_append": ours("cuda", append=True),
    "triton": ours("triton", append=False),
    "triton_append": ours("triton", append=True),
    "cuda_fp8": ours("cuda", append=False, fp8=True),
    "cuda_fp8_append": ours("cuda", append=True, fp8=True),
    "triton_fp8": ours("triton", append=False, fp8=True),
    "cudnn": sdpa(SDPBackend.CUDNN_ATTENTION),
    "cudnn_append": sdpa(SDPBackend.CUDNN_ATTENTION, append=True),
    "fa2_sdpa": sdpa(SDPBackend.FLASH_ATTENTION),
    "flash_attn": flash_attn(PACKAGES["flash_attn"]),
    "fa3": flash_attn(PACKAGES["fa3"]),
    "flashinfer": flashinfer,
    "reference": ours("reference", append=True),
}


def read_bandwidth(device: torch.device, effort: Effort) -> float:
    """Bytes a second of a kernel that only reads, 2 GiB at once."""
    from bench.read_kernel import read_kernel

    x = torch.zeros(1 << 29, dtype=torch.float32, device=device)
    block = 8192
    sums = torch.empty(x.numel() // block, dtype=torch.float32, device=device)

    def read() -> Tensor:
        read_kernel[(sums.numel(),)](x, sums, BLOCK=block, num_warps=8)
        return sums

    return x.nbytes / (measure(read, device, effort)[0].median_ms * 1e-3)


def time_case(case: DecodeCase, peers: Sequence[str], device: torch.device, effort: Effort) -> list[dict[str, Any]]:
    """Of each peer on one case microseconds a layer and bytes a second, or the reason why there are none."""
    failures: dict[str, dict[str, Any]] = {}
    layers: dict[str, list[Step]] = {}
    models: dict[str, Callable[[], Result]] = {}
    with torch.no_grad():
        for name in peers:
            try:
                steps = PEERS[name](case, device)
                models[name] = _model(steps, effort.cuda_graph)
                layers[name] = steps  # must live as long as a graph of them
            except NotImplementedError as error:
                failures[name] = {"status": "unsupported", "reason": one_line(error)}
            except Exception as error:  # its result, and no reason to stop the others
                failures[name] = {"status": "error", "reason": one_line(error)}

        def rewind() -> None:
            for step in itertools.chain.from_iterable(layers.values()):
                if isinstance(step, CacheStep):
                    step.rewind()

        timings = measure_by_turns(models, device, effort, rewind) if models else {}
    return [_record(case, name, timings.get(name), failures.get(name, {})) for name in peers]


def _model(steps: list[Step], cuda_graph: bool) -> Callable[[], Result]:
    """All layers' steps, which have run once; if wanted, as one CUDA graph."""

    def model() -> Result:
        return tuple(step() for step in steps)

    model()
    return captured(model) if cuda_graph else model


def _record(case: DecodeCase, name: str, timing: Timing | None, failure: dict[str, Any]) -> dict[str, Any]:
    nbytes = case.nbytes // case.dtype.itemsize if "fp8" in name else case.nbytes
    record = {"case": case.name, "peer": name, "kept": case.kept, "bytes": nbytes, "layers": case.layers}
    if timing is None:
        return record | failure
    to_us = 1e3 / case.layers
    times = {f"{q}_us": getattr(timing, f"{q}_ms") * to_us for q in ("median", "q1", "q3", "min")}
    return record | {"status": "ok", **times, "rounds": timing.repeats, "tbps": nbytes / times["median_us"] * 1e-6}


def _set_lengths(case: DecodeCase, seqlens: Tensor) -> None:
    if case.ragged:
        seqlens.copy_(torch.tensor(case.lengths, dtype=torch.int32))
    else:
        seqlens.fill_(case.seen)


def _normal(case: DecodeCase, device: torch.device, tokens: int, heads: int) -> Tensor:
    return torch.randn(case.batch, tokens, heads, case.head_dim, device=device, dtype=case.dtype)


def _wrong(case: DecodeCase, cache: SparseKVCache, q: Tensor, new: tuple[Tensor, ...], backend: str) -> str | None:
    """What is wrong with the first step's output, by the reference on a copy of the cache; None if nothing is."""
    copy = SparseKVCache.from_state_dict(cache.state_dict())
    exact = longgen_attn_with_kvcache(q, copy, *new, backend="reference").float()
    got = longgen_attn_with_kvcache(q, cache, *new, backend=backend).float()
    # An average of n values of variance 1 is about n ** -0.5; weights and result are rounded once each.
    allowed = gate.FACTOR * 4 * torch.finfo(case.dtype).eps * max(1e-3, exact.abs().max().item()) + gate.ATOL
    error = (got - exact).abs().max().item()
    return None if error <= allowed else f"off by {error:.2e}, allowed is {allowed:.2e}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns 1 if one of this package's kernels failed."""
    parser = argparse.ArgumentParser(prog="python -m bench.decode", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--cases", default=",".join(CASES), help=f"from {', '.join(CASES)} (default: all)")
    parser.add_argument("--sweep", action="store_true", help=f"{len(SWEEP)} cases of 4 to 64 sequences instead")
    parser.add_argument("--peers", help=f"from {', '.join(PEERS)} (default: what is installed)")
    parser.add_argument("--budget", type=float, default=0.2, help="seconds of timed runs per measurement")
    parser.add_argument("--warm-up", type=float, default=GPU_WARM_UP_S, help="seconds before them, on a GPU")
    parser.add_argument("--quick", action="store_true", help="a tiny run that tests the script, without a GPU too")
    parser.add_argument("--commit", help="recorded where the sources have no .git")
    parser.add_argument("--out", type=Path, help="JSON result file")
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() and not args.quick else "cpu")
    on_gpu = device.type == "cuda"
    absent = {name: why_not_installed(module, device) for name, module in PACKAGES.items()}
    installed = [name for name in PEERS if name != "reference" and absent.get(name) is None]
    peers = args.peers.split(",") if args.peers else installed if on_gpu else ["reference"]
    chosen = list(SWEEP.values()) if args.sweep else [CASES[name] for name in args.cases.split(",")]
    cases = [QUICK] if args.quick else chosen
    quick = Effort(budget_s=0.0, warmups=1, min_repeats=3)
    effort = Effort(budget_s=args.budget, warmup_s=args.warm_up, cuda_graph=True) if on_gpu else quick

    document: dict[str, Any] = {"machine": machine.describe(device, args.commit), "effort": asdict(effort)}
    records: list[dict[str, Any]] = []
    document["records"] = records
    with torch.cuda.stream(torch.cuda.Stream(device)) if on_gpu else contextlib.nullcontext():
        peak = read_bandwidth(device, effort) if on_gpu else math.nan
        document["read_bandwidth"] = peak if on_gpu else None
        if on_gpu:
            print(f"read-only bandwidth {peak / 1e12:.2f} TB/s")
        for case in cases:
            print(
                f"{case.name}: {case.kept} keys, {case.nbytes / 1e6:.1f} MB a layer, {case.layers} layers", flush=True
            )
            for record in time_case(case, peers, device, effort):
                records.append(record)
                print("  " + _line(record, peak), flush=True)
            if on_gpu:
                torch.cuda.empty_cache()
            if args.out is not None:
                args.out.parent.mkdir(parents=True, exist_ok=True)
                args.out.write_text(json.dumps(document, indent=1) + "\n")
    own = [r for r in records if r["peer"].split("_")[0] in ("cuda", "triton", "reference")]
    return int(any(r["status"] == "error" for r in own))


def _line(record: dict[str, Any], peak: float) -> str:
    if record["status"] != "ok":
        return f"{record['peer']:<14} {record['reason']}"
    share = "" if math.isnan(peak) else f" ({record['tbps'] * 1e12 / peak:.0%} of reading)"
    spread = f"{record['q1_us']:.1f} to {record['q3_us']:.1f}"
    return f"{record['peer']:<14} {record['median_us']:8.1f} us [{spread}]  {record['tbps']:.2f} TB/s{share}"


if __name__ == "__main__":
    sys.exit(main())
