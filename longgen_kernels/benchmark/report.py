"""Tables for people."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from longgen_kernels.benchmark.cases import length_name
from longgen_kernels.benchmark.results import Record


def table(records: Iterable[Record], baseline: str | None, matmul_tflops: float | None = None) -> str:
    """The records with each one's useful TFLOP/s over the baseline peer's, and over a matrix product's where known.

    A baseline that has no figure for a case is taken from its dense causal figure at the same shape, marked with *.
    """
    records = list(records)
    rates = {record.identity: record.tflops for record in records if record.tflops}
    rows = [_row(record, rates, baseline, matmul_tflops) for record in records if record.status != "unsupported"]
    ratio = f"x {baseline}" if baseline else "ratio"
    header = ("case", "pass", "peer", "ms", "quartiles", "TFLOP/s", "of matmul", ratio, "first call", "extra GiB")
    shown = [i for i, name in enumerate(header) if name != "of matmul" or matmul_tflops is not None]
    lines = [columns([header[i] for i in shown], [[row[i] for i in shown] for row in rows])]
    if matmul_tflops is not None:
        lines.append(f"of matmul: of the {matmul_tflops:.0f} TFLOP/s of a large bf16 matrix product in this run")
    if any(row[7].endswith("*") for row in rows):
        lines.append(f"* against {baseline} on dense causal attention of the same shape, in useful TFLOP/s")
    failures = [record for record in records if record.status in ("refused", "error")]
    lines += [f"{r.key} {r.which} {r.peer}: {r.status}: {r.reason}" for r in failures]
    cannot = dict.fromkeys((r.peer, r.reason) for r in records if r.status == "unsupported")
    lines += [f"{peer}: {reason}" for peer, reason in cannot]
    return "\n".join(lines)


def columns(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Left-aligned text, right-aligned numbers."""
    cells = [tuple(header), *map(tuple, rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    numeric = [all(not row[i] or row[i][0].isdigit() for row in cells[1:]) for i in range(len(header))]
    lines = []
    for row in cells:
        padded = (c.rjust(w) if right else c.ljust(w) for c, w, right in zip(row, widths, numeric, strict=True))
        lines.append("  ".join(padded).rstrip())
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def summary(record: Record) -> str:
    """One record in a few words, for progress lines."""
    if record.status != "ok":
        return f"{record.status}: {record.reason}"
    return f"{milliseconds(record.median_ms)} ms, {record.tflops:.3g} TFLOP/s, {record.repeats} runs"


def milliseconds(value: float | None) -> str:
    """Four significant digits."""
    if value is None:
        return ""
    return f"{value:.0f}" if value >= 1000 else f"{value:.4g}"


def share(tflops: float | None, of: float | None) -> str:
    """One rate as a percentage of another; nothing where one of them is unknown."""
    return "" if tflops is None or of is None else f"{tflops / of:.0%}"


def _row(
    record: Record, rates: dict[tuple[str, str, str], float], baseline: str | None, matmul_tflops: float | None
) -> tuple[str, ...]:
    name = (record.key, record.which, record.peer)
    if record.tflops is None:
        return (*name, record.status, "", "", "", "", "", "")
    return (
        *name,
        milliseconds(record.median_ms),
        f"{milliseconds(record.q1_ms)} to {milliseconds(record.q3_ms)}",
        f"{record.tflops:.1f}" if record.tflops >= 1 else f"{record.tflops:.2g}",
        share(record.tflops, matmul_tflops),
        _ratio(record, rates, baseline),
        "" if record.first_call_s is None else f"{record.first_call_s:.1f} s",
        "" if record.extra_bytes is None else f"{record.extra_bytes / 2**30:.2f}",
    )


def _ratio(record: Record, rates: dict[tuple[str, str, str], float], baseline: str | None) -> str:
    if baseline is None or record.tflops is None:
        return ""
    dense_key = f"causal/{length_name(record.case['seqlen'])}/{record.case['variant']}"
    for key, mark in ((record.key, ""), (dense_key, "*")):
        rate = rates.get((key, baseline, record.which))
        if rate:
            return f"{record.tflops / rate:.3f}{mark}"
    return ""
