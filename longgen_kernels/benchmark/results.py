"""Result files: their schema, reading and writing."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

SCHEMA = 1
STATUSES = ("ok", "unsupported", "refused", "error")


@dataclass
class Record:
    """One peer's one pass over one case.

    `status` is "ok" (timed), "unsupported" (the peer cannot express the case), "refused" (wrong, so not timed) or
    "error" (it raised); all but "ok" have a `reason` and no figures. Times are milliseconds; `tflops` counts useful
    operations only. `first_call_s` is the first call at this length, compilation included, and for a backward pass the
    forward before it. `extra_bytes` is the most memory that one call takes beyond what was allocated before it, its
    results included; `peak_bytes` is the most in the process during that call. `setup` holds seconds by name.
    """

    key: str
    case: dict[str, Any]
    peer: str
    which: str
    status: str
    reason: str | None = None
    median_ms: float | None = None
    q1_ms: float | None = None
    q3_ms: float | None = None
    min_ms: float | None = None
    repeats: int | None = None
    tflops: float | None = None
    flops: float | None = None
    first_call_s: float | None = None
    peak_bytes: int | None = None
    extra_bytes: int | None = None
    setup: dict[str, float] = field(default_factory=dict)

    @property
    def identity(self) -> tuple[str, str, str]:
        """What two files are compared by: case, peer and pass."""
        return self.key, self.peer, self.which


@dataclass
class Document:
    """A result file: where it was measured, how, and the records."""

    machine: dict[str, Any]
    settings: dict[str, Any]
    peers: dict[str, str | None]
    """Each peer that was asked for: None if it is there, otherwise why not."""
    clocks: dict[str, Any] = field(default_factory=lambda: {"before": None, "after": None})
    records: list[Record] = field(default_factory=list)
    matmul_tflops: float | None = None
    """What a large matrix product reached in the same run; None where that was not measured."""
    schema: int = SCHEMA

    def save(self, path: Path) -> None:
        """Write the file whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(path.name + ".part")
        draft.write_text(json.dumps(asdict(self), indent=1, allow_nan=False) + "\n")
        draft.replace(path)


def load(path: Path) -> Document:
    """Reads a result file.

    Raises OSError if it cannot be read, ValueError if it is not a result file of this schema; the message says why.
    """
    try:
        data = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        found = data.get("schema") if isinstance(data, dict) else None
        raise ValueError(f"{path} is no result file of schema {SCHEMA} (its schema: {found})")
    try:
        records = [Record(**record) for record in data.pop("records")]
        document = Document(records=records, **data)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} does not fit schema {SCHEMA}: {error}") from None
    for record in records:
        problem = _problem(record)
        if problem:
            raise ValueError(f"{path}: {record.key} {record.peer} {record.which}: {problem}")
    return document


def _problem(record: Record) -> str | None:
    """What contradicts itself in a record, or None."""
    if record.status not in STATUSES:
        return f"unknown status {record.status!r}"
    figures = (record.median_ms, record.q1_ms, record.q3_ms, record.min_ms, record.repeats, record.tflops, record.flops)
    if record.status == "ok":
        return "a figure is missing" if None in figures else None
    if any(figure is not None for figure in figures):
        return f'has figures although its status is "{record.status}"'
    return None if record.reason else f'has status "{record.status}" without a reason'
