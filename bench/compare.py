"""Compare two result files: `python -m bench.compare BEFORE.json AFTER.json`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from longgen_kernels.benchmark import report
from longgen_kernels.benchmark.results import Document, Record, load

_FACTS = ("gpu", "driver", "torch", "cuda", "triton", "package", "commit")


@dataclass(frozen=True)
class Change:
    """How much faster the second measurement is: `speedup` by the medians, `low` to `high` by the quartiles."""

    before: Record
    after: Record
    speedup: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """What is certain: "faster" and "slower" mean that the quartile ranges do not overlap."""
        if self.low > 1:
            return "faster"
        return "slower" if self.high < 1 else "same within spread"


def changes(before: Document, after: Document) -> list[Change]:
    """One for each case, peer and pass that both files have a figure for, in the order of the second."""
    timed = {record.identity: record for record in before.records if record.status == "ok"}
    pairs = [(timed[r.identity], r) for r in after.records if r.status == "ok" and r.identity in timed]
    return [_change(old, new) for old, new in pairs]


def render(before: Document, after: Document) -> str:
    """What differs between the machines, the table of ratios, and what only one file has a figure for."""
    lines = [
        f"{fact}: {before.machine.get(fact)} -> {after.machine.get(fact)}"
        for fact in _FACTS
        if before.machine.get(fact) != after.machine.get(fact)
    ]
    rows = [
        (
            *change.after.identity,
            report.milliseconds(change.before.median_ms),
            report.milliseconds(change.after.median_ms),
            f"{change.speedup:.3f}",
            f"{change.low:.3f} to {change.high:.3f}",
            change.verdict,
        )
        for change in changes(before, after)
    ]
    header = ("case", "peer", "pass", "before, ms", "after, ms", "speed-up", "spread", "")
    lines.append(report.columns(header, rows) if rows else "no case, peer and pass has a figure in both files")
    for name, one, other in (("first", before, after), ("second", after, before)):
        timed = {record.identity for record in other.records if record.status == "ok"}
        only = [r.identity for r in one.records if r.status == "ok" and r.identity not in timed]
        lines += [f"only in the {name} file: {' '.join(identity)}" for identity in only]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=__doc__)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    args = parser.parse_args(argv)
    try:
        before, after = load(args.before), load(args.after)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(render(before, after))
    return 0


def _change(before: Record, after: Record) -> Change:
    (old_q1, old, old_q3), (new_q1, new, new_q3) = _quartiles(before), _quartiles(after)
    return Change(before, after, speedup=old / new, low=old_q1 / new_q3, high=old_q3 / new_q1)


def _quartiles(record: Record) -> tuple[float, float, float]:
    # A record that is "ok" has them all: `load` checks.
    assert record.q1_ms is not None and record.median_ms is not None and record.q3_ms is not None
    return record.q1_ms, record.median_ms, record.q3_ms


if __name__ == "__main__":
    sys.exit(main())
