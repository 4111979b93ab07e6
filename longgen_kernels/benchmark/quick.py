"""`python -m longgen_kernels bench`: is attention right on this machine, and how fast beside what is installed?"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

import torch

from longgen_kernels.benchmark.cases import length_name, make_cases
from longgen_kernels.benchmark.peers import Peer, all_peers
from longgen_kernels.benchmark.report import columns, milliseconds, share
from longgen_kernels.benchmark.results import Record
from longgen_kernels.benchmark.runner import Plan, Runner
from longgen_kernels.benchmark.timing import Effort, matmul_tflops

CASES = {
    "sink_window": "sink 128, window 2048",
    "strided": "window 1024, every 16th block of 64",
    "causal": "dense causal",
}
OURS = ("cuda", "triton", "reference")
GPU_PEERS = ("cuda", "triton", "flex", "cudnn", "fa2_sdpa", "flash_attn", "fa3", "fa4", "block_sparse_attn")
CPU_LENGTH = 2304  # longer than the windows, short enough for the reference
VERDICTS = {"ok": "right", "refused": "WRONG", "error": "failed"}
HEADER = ("attention", "pass", "kernel", "result", "ms", "TFLOP/s", "of matmul", "dense / this")


def run(seqlen: int, passes: Sequence[str], seconds: float, peers: dict[str, Peer] | None = None) -> int:
    """Checks and times what is there and prints a table; returns 1 if a kernel of this package was wrong or failed.

    Args:
        seqlen: tokens on a GPU; without one the reference runs on a problem of its own.
        passes: "fwd", "bwd" or both.
        seconds: no further kernel is begun after these.
        peers: the contenders by name, in place of `all_peers()`.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    peers = all_peers() if peers is None else peers
    names = [name for name in GPU_PEERS if name in peers] if device.type == "cuda" else ["reference"]
    if device.type == "cpu":
        seqlen = CPU_LENGTH
        print(
            "No GPU that PyTorch can use: this is the PyTorch reference in fp32 on the CPU, with 2 heads of 16. It\n"
            "says whether this installation computes the right result, and nothing about the speed of the kernels.\n"
        )
    else:
        print(f"{torch.cuda.get_device_name(device)}, bf16, 32 heads of 128, {length_name(seqlen)} tokens\n")
    absent = {name: reason for name in names if (reason := peers[name].available(device)) is not None}
    there = [peers[name] for name in names if name not in absent]
    plan = Plan.of(make_cases(CASES, [seqlen], ["mha" if device.type == "cuda" else "tiny"]), there, device)
    on_cpu = device.type == "cpu"
    effort = Effort(budget_s=0.1, warmup_s=0.0 if on_cpu else 0.25, min_repeats=3 if on_cpu else 5)
    matmul = matmul_tflops(device, effort) if device.type == "cuda" else None
    records, complete = _measure(Runner(device, passes, effort, log=_progress), plan, passes[-1], seconds)

    print(table(records, matmul))
    for name, reason in absent.items():
        print(f"not measured: {name}: {reason}")
    if not complete:
        print(f"not complete: the {seconds:.0f} seconds were over; --seconds gives it more")
    print("\nright: checked against the reference before and after timing. TFLOP/s: visible pairs only.")
    if matmul is not None:
        print(f"of matmul: of the {matmul:.0f} TFLOP/s that a large bf16 matrix product reaches here.")
    print("dense / this: the time of the fastest dense causal attention of others, if one was measured, over this one.")
    failed = [record for record in records if record.peer in OURS and record.status in ("refused", "error")]
    return int(bool(failed) or not any(record.status == "ok" for record in records))


def table(records: Sequence[Record], matmul: float | None = None) -> str:
    """A row for each record, and a line for each that has a reason instead of figures; `matmul` in TFLOP/s."""
    rows = [_row(record, _dense_ms(records, record.which), matmul) for record in records]
    failures = [
        f"{CASES[record.case['name']]}, {record.which}, {record.peer}: {record.reason}"
        for record in records
        if record.reason is not None
    ]
    return "\n".join([columns(HEADER, rows), *failures])


def _row(record: Record, dense_ms: float | None, matmul: float | None) -> tuple[str, ...]:
    name = (CASES[record.case["name"]], record.which, record.peer, VERDICTS[record.status])
    if record.median_ms is None or record.tflops is None:
        return (*name, "", "", "", "")
    ratio = "" if dense_ms is None else f"{dense_ms / record.median_ms:.2f}"
    return (*name, milliseconds(record.median_ms), f"{record.tflops:.3g}", share(record.tflops, matmul), ratio)


def _dense_ms(records: Sequence[Record], which: str) -> float | None:
    """The fastest dense causal pass of a kernel that is not this package's."""
    return min(
        (
            record.median_ms
            for record in records
            if record.case["name"] == "causal" and record.which == which and record.peer not in OURS
            if record.median_ms is not None
        ),
        default=None,
    )


def _measure(runner: Runner, plan: Plan, last_pass: str, seconds: float) -> tuple[list[Record], bool]:
    """What was measured within the time, and whether that is all."""
    deadline = time.monotonic() + seconds
    records: list[Record] = []
    left = plan.size
    for record in runner.run(plan):
        if record.status == "unsupported":
            continue
        records.append(record)
        if record.which == last_pass:  # this kernel is done
            left -= 1
            if time.monotonic() > deadline:
                break
    return records, left == 0


def _progress(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
