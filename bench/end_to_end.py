"""Measure whole models: `python -m bench.end_to_end --lengths 128K --parts prefill,decode,train --out FILE.json`.

The LongGen hybrid beside the dense Llama of the same shape, with random weights, one after the other on one GPU:
reading a prompt into the KV cache, decoding behind it, a training step. Each figure is the median of a few calls.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from bench import machine
from bench.whole_models import SHAPES, Contender, contenders
from longgen_kernels import AttentionPattern
from longgen_kernels.benchmark.cases import PATTERNS, length_name, parse_length
from longgen_kernels.benchmark.packages import one_line
from longgen_kernels.benchmark.timing import synchronize

PARTS = ("prefill", "decode", "train")
PEERS = ("hybrid", "dense")
MAX_REPEATS = 5
STEPS = 32  # decoded in a row for one figure, without waiting for any of them
SPARE = (1 + MAX_REPEATS) * STEPS * 2 + 1  # tokens by which a cache grows while eager and captured steps are timed
GIB = 1 << 30


class LacksMemoryError(RuntimeError):
    """The device lacks the memory that a part needs; nothing was started."""


class Bench:
    """One contender at one length. The cache that `prefill` fills is what `decode` goes on from."""

    def __init__(
        self, peer: Contender, length: int, chunk: int | None, budget_s: float, spare: int, keep_attention: bool = False
    ) -> None:
        self.peer, self.length, self.chunk, self.budget_s, self.spare = peer, length, chunk, budget_s, spare
        self.keep_attention = keep_attention
        self.device = peer.device
        generator = torch.Generator(self.device).manual_seed(0)
        shape = (1, length)
        self.ids = torch.randint(peer.config.vocab_size, shape, generator=generator, device=self.device)
        self.cache: Cache | None = None
        self.cache_allocated: int | None = None

    def prefill(self, record: dict[str, Any]) -> None:
        """Reading the prompt; logits of the last token only."""
        record["needed_bytes"] = self.check_memory()
        # Chunks after the second are like it: two warm up for a prompt of many.
        warm_up = self.read if self.chunk is None else partial(self.read, 2 * self.chunk)
        _summarise(record, "s", self.times(self.read, warm_up))
        self.note_cache(record)

    def decode(self, record: dict[str, Any]) -> None:
        """Milliseconds a token with the cache full, launched from Python and replayed as a CUDA graph."""
        if self.cache is None:
            self.check_memory()
            self.read()
        self.note_cache(record)
        _summarise(record, "eager_ms", [t * 1e3 / STEPS for t in self.times(self.tokens(self.peer.eager_step))])
        if self.device.type == "cuda":
            _summarise(record, "graph_ms", [t * 1e3 / STEPS for t in self.times(self.tokens(self.peer.graph_step))])

    def train(self, record: dict[str, Any]) -> None:
        """Forward and backward pass with gradient checkpointing; no optimizer."""
        self.cache = None
        _free(self.device)
        _summarise(record, "s", self.times(lambda: self.peer.train_step(self.ids, self.keep_attention)))

    def read(self, tokens: int | None = None) -> Tensor:
        """The prompt, or its first `tokens`."""
        ids = self.ids[:, :tokens]
        if self.cache is not None:
            self.cache.reset()
            return self.peer.read(ids, self.cache, self.chunk)
        before = _allocated(self.device)
        self.cache = self.peer.new_cache(self.length, self.spare)
        logits = self.peer.read(ids, self.cache, self.chunk)
        if before is not None:
            self.cache_allocated = torch.cuda.memory_allocated(self.device) - before - logits.nbytes
        return logits

    def tokens(self, make_step: Callable[[Cache], Callable[[Tensor], Tensor]]) -> Callable[[], Tensor]:
        """A call that decodes STEPS tokens greedily."""
        assert self.cache is not None
        step = make_step(self.cache)

        def call() -> Tensor:
            token = self.ids[:, -1]
            for _ in range(STEPS):
                token = step(token).argmax(-1)
            return token

        return call

    def times(self, call: Callable[[], Tensor], warm_up: Callable[[], Tensor] | None = None) -> list[float]:
        """Seconds of calls until the budget is spent, at least one; `warm_up`, or another call, comes before."""
        times: list[float] = []
        result = (warm_up or call)()
        synchronize(self.device)
        while not times or (len(times) < MAX_REPEATS and sum(times) < self.budget_s):
            start = time.perf_counter()
            result = call()
            synchronize(self.device)
            times.append(time.perf_counter() - start)
        if not result.isfinite().all():
            raise RuntimeError("wrong: the last call's result is not finite")
        return times

    def check_memory(self) -> int:
        """Bytes that reading the prompt needs beside the weights; raises LacksMemoryError if the device has fewer."""
        parts = self.peer.prefill_bytes(self.length, self.spare, self.chunk)
        needed, free = sum(parts.values()), free_bytes(self.device)
        if free is not None and needed > free:
            listed = ", ".join(f"{name.replace('_', ' ')} {size / GIB:.1f} GiB" for name, size in parts.items())
            raise LacksMemoryError(
                f"needs {needed / GIB:.1f} GiB beside the weights ({listed}); {free / GIB:.1f} GiB are free"
            )
        return needed

    def note_cache(self, record: dict[str, Any]) -> None:
        record["kv_bytes"] = self.peer.cache_bytes(self.length, self.spare)
        record["kv_allocated_bytes"] = self.cache_allocated


def free_bytes(device: torch.device) -> int | None:
    """Bytes that the allocator can still give, its own unused ones included; None where that is not known."""
    if device.type != "cuda":
        return None
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def measured(part: str, bench: Bench, record: dict[str, Any]) -> dict[str, Any]:
    """The record with one part's figures; if something stops the part, with what there is and the reason."""
    device = bench.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    try:
        getattr(bench, part)(record)
        record["status"] = "ok"
    except LacksMemoryError as error:
        record |= {"status": "refused", "reason": str(error)}
    except torch.OutOfMemoryError as error:
        record |= {"status": "out of memory", "reason": one_line(error)}
    except Exception as error:
        record |= {"status": "error", "reason": one_line(error)}
    if device.type == "cuda":
        record["peak_bytes"] = torch.cuda.max_memory_allocated(device)
    if record["status"] != "ok":
        bench.cache = None  # whatever is in it
    _free(device)
    return record


def run(args: argparse.Namespace, device: torch.device, save: Callable[[dict[str, Any]], None]) -> None:
    """Calls `save` with each record as it comes."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    pattern = AttentionPattern.sink_window(4, 60) if args.quick else PATTERNS["sink_window"]
    available = contenders(args.model, pattern)
    for name in args.peers:
        kind, config = available[name]
        torch.manual_seed(0)
        before, start = _allocated(device), time.perf_counter()
        try:
            peer = kind(config, device, dtype)
            weights = None if before is None else torch.cuda.memory_allocated(device) - before
            # The first products take cuBLAS's workspace, which would count as the cache's.
            peer.read(torch.zeros(1, 64, dtype=torch.int64, device=device), peer.new_cache(64, 0), None)
            synchronize(device)
        except Exception as error:
            save({"peer": name, "part": "build", "status": "error", "reason": one_line(error)})
            continue
        built = {"peer": name, "part": "build", "status": "ok", "median_s": time.perf_counter() - start}
        built["parameters"] = sum(p.numel() for p in peer.model.parameters())
        built["weight_bytes"] = weights
        save(built)
        for length in args.lengths:
            spare = SPARE if "decode" in args.parts else 0
            bench = Bench(peer, length, args.chunk, args.budget, spare, args.keep_attention)
            for part in args.parts:
                print(f"{name}, {length_name(length)}: {part} ...", file=sys.stderr, flush=True)
                record = {"peer": name, "part": part, "tokens": length, "chunk": args.chunk}
                save(measured(part, bench, record))
            del bench
            _free(device)
        del peer
        _free(device)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns 1 if a part raised anything but that memory was lacking."""
    args = _parse(argv)
    device = torch.device("cuda" if torch.cuda.is_available() and not args.quick else "cpu")
    settings = {name: value for name, value in vars(args).items() if name not in ("out", "commit")}
    document: dict[str, Any] = {
        "machine": machine.describe(device, args.commit),
        "transformers": _transformers_version(),
        "settings": settings,
        "model": dict(SHAPES[args.model]),
        "clocks": {"before": machine.clocks(device), "after": None},
        "records": [],
    }

    def save(record: dict[str, Any]) -> None:
        document["records"].append(record)
        document["clocks"]["after"] = machine.clocks(device)
        print(_line(record), flush=True)
        if args.out is not None:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(document, indent=1) + "\n")

    run(args, device, save)
    return int(any(record["status"] == "error" for record in document["records"]))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.end_to_end", description=(__doc__ or "").split("\n\n")[0])
    add = parser.add_argument
    add("--model", choices=[name for name in SHAPES if name != "tiny"], default="llama-2-7b", help="the shape")
    add("--lengths", default="128K", help="tokens of the prompt and of the training sequence, such as 32K,128K")
    add("--parts", default=",".join(PARTS), help=f"from {', '.join(PARTS)} (default: all)")
    add("--peers", default=",".join(PEERS), help=f"from {', '.join(PEERS)} (default: both)")
    add("--chunk", help="tokens of the prompt that are read at once, such as 64K (default: all); for the hybrid")
    add("--keep-attention", action="store_true", help="train computes the attention of full layers once, not again")
    add("--budget", type=float, default=20.0, help="seconds of timed calls per figure, after which none is begun")
    add("--quick", action="store_true", help="a tiny run on the CPU that tests the script")
    add("--commit", help="recorded where the sources have no .git")
    add("--out", type=Path, help="JSON result file, written after every part")
    args = parser.parse_args(argv)
    args.parts, args.peers = args.parts.split(","), args.peers.split(",")
    for option, names, valid in (("--parts", args.parts, PARTS), ("--peers", args.peers, PEERS)):
        wrong = [name for name in names if name not in valid]
        if wrong:
            parser.error(f"{option}: {', '.join(wrong)} is unknown; valid are {', '.join(valid)}")
    args.parts = [part for part in PARTS if part in args.parts]  # the cache that one fills serves the next
    try:
        args.lengths = [parse_length(text) for text in args.lengths.split(",")]
        args.chunk = None if args.chunk is None else parse_length(args.chunk)
    except ValueError as error:
        parser.error(str(error))
    if args.chunk is not None and "dense" in args.peers:
        parser.error("--chunk: the dense model would need a mask for each chunk; use --peers hybrid")
    if args.quick:
        args.model, args.lengths, args.budget = "tiny", [300], 0.0
        args.chunk = None if args.chunk is None else 128
    elif not torch.cuda.is_available():
        parser.error("PyTorch finds no GPU that it can use; --quick tests the script without one")
    return args


def _summarise(record: dict[str, Any], unit: str, times: list[float]) -> None:
    """Puts the median under "median_s", or "median_eager_ms"; and all of them."""
    record |= {f"median_{unit}": statistics.median(times), f"all_{unit}": times}


def _line(record: dict[str, Any]) -> str:
    tokens = length_name(record["tokens"]) if "tokens" in record else ""
    head = f"{record['peer']:<7} {record['part']:<8} {tokens:>6}"
    words = [f"{record[key]:9.3f} {key.removeprefix('median_')}" for key in record if key.startswith("median_")]
    sizes = {"KV": record.get("kv_bytes"), "peak": record.get("peak_bytes"), "weights": record.get("weight_bytes")}
    words += [f"{name} {size / GIB:.2f} GiB" for name, size in sizes.items() if size is not None]
    if record["status"] != "ok":
        words.append(f"{record['status']}: {record['reason']}")
    return "  ".join([head, *words])


def _allocated(device: torch.device) -> int | None:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else None


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _transformers_version() -> str:
    import transformers

    return str(transformers.__version__)


if __name__ == "__main__":
    sys.exit(main())
