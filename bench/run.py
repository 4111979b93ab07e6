"""Measure attention kernels: `python -m bench.run --cases sink_window,strided --lengths 16K,128K --out FILE.json`."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from bench import machine
from longgen_kernels.benchmark import gate, report
from longgen_kernels.benchmark.cases import LENGTHS, PASSES, PATTERNS, VARIANTS, length_name, make_cases, parse_length
from longgen_kernels.benchmark.peers import Peer, all_peers
from longgen_kernels.benchmark.results import Document
from longgen_kernels.benchmark.runner import Plan, Runner
from longgen_kernels.benchmark.timing import GPU_WARM_UP_S, Effort, matmul_tflops

DEFAULT_PEERS = {
    "cuda": ("cuda", "triton", "flex", "cudnn", "fa2_sdpa", "flash_attn", "fa3", "fa4", "block_sparse_attn"),
    "cpu": ("reference",),
}
BASELINES = ("flex", "fa3", "cudnn")  # what ratios are printed to, if nothing else is asked for
QUICK_LENGTH = 2304  # longer than every window, short enough for the reference on two CPU cores


def main(argv: Sequence[str] | None = None, peers: dict[str, Peer] | None = None) -> int:
    """Run the command line; `peers` replaces the contenders by name. Returns 1 if a kernel was refused as wrong."""
    peers = all_peers() if peers is None else peers
    args = _parse(argv, peers)
    device = torch.device(args.device)
    why_not = {name: peers[name].available(device) for name in args.peers}
    there = [peers[name] for name in args.peers if why_not[name] is None]
    baseline = args.baseline or next((p.name for name in BASELINES for p in there if p.name == name), None)
    effort = Effort(
        budget_s=args.budget_s,
        warmups=args.warmups,
        warmup_s=args.warmup_s,
        min_repeats=args.min_repeats,
        cuda_graph=args.cuda_graph,
    )
    settings = {
        "argv": _without_out(sys.argv[1:] if argv is None else argv),
        "passes": args.passes,
        "effort": asdict(effort),
        "seed": args.seed,
        "gate": {"factor": gate.FACTOR, "atol": gate.ATOL, "whole_up_to": gate.WHOLE_UP_TO},
    }
    document = Document(machine.describe(device, args.commit), settings, why_not)
    plan = Plan.of(make_cases(args.cases, args.lengths, args.variants), there, device)

    started = time.perf_counter()
    _announce(document, plan)
    runner = Runner(device, args.passes, effort, seed=args.seed, log=_progress)
    document.clocks["before"] = machine.clocks(device)
    if device.type == "cuda":
        document.matmul_tflops = matmul_tflops(device)
    # A graph is captured on a stream of its own, and a backward pass runs on the stream of its forward.
    stream = torch.cuda.stream(torch.cuda.Stream(device)) if args.cuda_graph else contextlib.nullcontext()
    with stream:
        for record in runner.run(plan):
            document.records.append(record)
            if record.status != "unsupported":
                _progress(f"    {record.which}: {report.summary(record)}")
            if args.out is not None:  # after each record: an interrupted run keeps what it measured
                document.save(args.out)
    document.clocks["after"] = machine.clocks(device)
    if args.out is not None:
        document.save(args.out)

    print(report.table(document.records, baseline, document.matmul_tflops))
    print(f"{time.perf_counter() - started:.0f} s" + (f", written to {args.out}" if args.out else ""))
    return 1 if any(record.status == "refused" for record in document.records) else 0


def _without_out(argv: Sequence[str]) -> list[str]:
    """The command line but for where the file went, which says nothing about a measurement."""
    at = next((i for i, word in enumerate(argv) if word == "--out"), len(argv))
    return [*argv[:at], *argv[at + 2 :]]


def _parse(argv: Sequence[str] | None, peers: dict[str, Peer]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.run", description=__doc__)
    add = parser.add_argument
    add("--cases", type=_names(PATTERNS), help=f"from {', '.join(PATTERNS)} (default: sink_window,strided,causal)")
    add("--lengths", type=_lengths, help=f"tokens (default: {','.join(map(length_name, LENGTHS[:2]))})")
    add("--variants", type=_names(VARIANTS), help=f"from {', '.join(VARIANTS)} (default: mha)")
    add("--peers", type=_names(peers), help=f"from {', '.join(peers)} (default: what is installed)")
    add("--passes", type=_names(PASSES), default=list(PASSES), help="fwd,bwd (default: both)")
    add("--baseline", choices=list(peers), help="the peer that ratios are printed to (default: flex if it runs)")
    add("--budget", dest="budget_s", type=float, help="seconds of timed runs per measurement (default: 0.3)")
    add("--warmups", type=int, help="calls before timing, after the first (default: 3)")
    add("--warmup-seconds", dest="warmup_s", type=float, help="of such calls, at least (default: 1 on a GPU, else 0)")
    add("--min-repeats", type=int, help="timed calls at least (default: 5)")
    add("--cuda-graph", action="store_true", help="time replays of a CUDA graph")
    add("--quick", action="store_true", help="a tiny run that tests the harness, for machines without a GPU too")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: the GPU if there is one")
    add("--seed", type=int, default=0, help="of the random inputs")
    add("--commit", help="recorded where the sources have no .git")
    add("--out", type=Path, help="JSON result file, such as bench/results/NAME.json")
    args = parser.parse_args(argv)

    device = args.device.split(":")[0]
    if device not in DEFAULT_PEERS:
        parser.error(f"--device is {args.device}; valid are cpu, cuda and cuda:INDEX")
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no GPU that it can use")
    if args.cuda_graph and device != "cuda":
        parser.error("--cuda-graph needs a GPU")
    if args.min_repeats is not None and args.min_repeats < 2:
        parser.error("--min-repeats must be at least 2: a spread is reported")
    if args.out is not None and args.out.is_dir():
        parser.error(f"--out {args.out} is a directory; give a file name")
    args.cases = args.cases or ["sink_window", "strided", *([] if args.quick else ["causal"])]
    args.lengths = args.lengths or ([QUICK_LENGTH] if args.quick else list(LENGTHS[:2]))
    args.variants = args.variants or (["tiny"] if args.quick else ["mha"])
    args.peers = args.peers or [name for name in DEFAULT_PEERS[device] if name in peers]
    usual = Effort(warmup_s=GPU_WARM_UP_S if device == "cuda" else 0.0)
    effort = Effort(budget_s=0.0, warmups=1, min_repeats=3) if args.quick else usual
    for name in ("budget_s", "warmups", "warmup_s", "min_repeats"):
        if getattr(args, name) is None:
            setattr(args, name, getattr(effort, name))
    return args


def _names(valid: Iterable[str]) -> Callable[[str], list[str]]:
    choices = list(valid)

    def parse(text: str) -> list[str]:
        names = list(dict.fromkeys(text.split(",")))
        for name in names:
            if name not in choices:
                raise argparse.ArgumentTypeError(f"{name!r} is unknown; valid are {', '.join(choices)}")
        return names

    return parse


def _lengths(text: str) -> list[int]:
    try:
        return [parse_length(part) for part in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _announce(document: Document, plan: Plan) -> None:
    facts = document.machine
    where = facts["gpu"] or f"{facts['cpu_count']} CPU cores"
    _progress(f"{where}; torch {facts['torch']}, triton {facts['triton']}; commit {facts['commit'] or 'unknown'}")
    for name, reason in document.peers.items():
        if reason is not None:
            _progress(f"{name} is left out: {reason}")
    _progress(f"{plan.size} combinations of case and peer")


def _progress(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
