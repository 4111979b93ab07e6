"""Write the figures of README.md and docs/ from bench/results, tables and pictures: `python -m bench.tables`.

A table stands between `<!-- table: NAME -->` and `<!-- end of table -->` in its page; pictures go to docs/images, those
of bench/diagrams too. `--check` writes nothing and exits with 1 where a page or picture is not what it is made from.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench import diagrams, pictures
from longgen_kernels import AttentionPattern, SparseKVCache
from longgen_kernels.benchmark.results import load

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
Figures = Mapping[tuple[str, str, str], float]  # by case, peer and pass

SINK_WINDOW = "sink 128 + window 2048"
STRIDED = "window 1024 + every 16th 64-token block, a phase per head"


@dataclass(frozen=True)
class Table:
    """Figures of result files: a row for each case, a column for each peer."""

    name: str
    page: str
    files: tuple[str, ...]
    corner: str
    """The heading of the first column."""
    quantity: str
    """What the figures are, for a picture's axis; no picture of a table of several quantities."""
    columns: Mapping[str, str]
    """Peers by their headings."""
    rows: Mapping[str, str]
    """Cases by their labels."""
    passes: tuple[str, ...] = ("fwd",)
    digits: int = 0
    unit: str | None = None
    """The peer whose figure is 1 in the picture, where cases differ too much to be seen side by side."""
    quotient: tuple[str, str] | None = None
    """Peers, by their headings: a last column of the one's figures over the other's."""

    @property
    def paths(self) -> list[Path]:
        return [RESULTS / name for name in self.files]

    def markdown(self, figures: Figures) -> str:
        """The table; a cell without a figure is empty. ValueError for a row or column without any."""
        headings = [self.corner, *self.columns, *([" / ".join(self.quotient)] if self.quotient else [])]
        lines = [f"| {' | '.join(headings)} |", f"|{'---|' * len(headings)}"]
        filled: set[str] = set()
        for label, case in self.rows.items():
            cells = []
            for peer in self.columns.values():
                values = [figures.get((case, peer, which)) for which in self.passes]
                if None not in values:
                    filled |= {case, peer}
                cells.append("" if None in values else " / ".join(f"{value:.{self.digits}f}" for value in values))
            if self.quotient:
                over, under = (figures[case, self.columns[heading], self.passes[0]] for heading in self.quotient)
                cells.append(f"{over / under:.2f}")
            lines.append("|".join(["", *(f" {cell} " if cell else " " for cell in (label, *cells)), ""]))
        empty = {*self.columns.values(), *self.rows.values()} - filled
        if empty:
            raise ValueError(f"table {self.name}, {', '.join(self.files)}: no figure for {', '.join(sorted(empty))}")
        return "\n".join(lines)

    def panels(self, figures: Figures) -> dict[str, pictures.Bars]:
        """For each pass the bars: by peer's heading, by case's label."""
        return {
            which: {
                heading: {label: self._drawn(figures, case, peer, which) for label, case in self.rows.items()}
                for heading, peer in self.columns.items()
            }
            for which in self.passes
        }

    def _drawn(self, figures: Figures, case: str, peer: str, which: str) -> float | None:
        value = figures.get((case, peer, which))
        return value if self.unit is None or value is None else value / figures[case, self.unit, which]


ATTENTION = {
    f"{SINK_WINDOW}, 16K tokens": "sink_window/16K/mha",
    f"{SINK_WINDOW}, 128K tokens": "sink_window/128K/mha",
    "sink 128 + window of 16 whole 128-token blocks, 128K": "sink_window_blocks/128K/mha",
    f"{STRIDED}, 16K": "strided/16K/mha",
    f"{STRIDED}, 128K": "strided/128K/mha",
    "window 2048 + every 16th 128-token block, 128K": "strided_128/128K/mha",
    "dense causal, 16K": "causal/16K/mha",
    "dense causal, 128K": "causal/128K/mha",
}
SWEEP = Table(
    name="decode_rows",
    page="docs/kv-cache.md",
    files=("h200-decode-rows.json",),
    corner="keys kept, KV heads",
    quantity="time, the CUDA kernel's being 1",
    columns={"CUDA": "cuda", "with append": "cuda_append", "cuDNN": "cudnn"},
    rows={
        "4096, 8 of 32 query heads, batch 9": "gqa4_4096_batch_9",
        "9216, 8 of 32, batch 9": "gqa4_9216_batch_9",
        "4096, 8 of 128, batch 12": "gqa16_4096_batch_12",
        "4096, 8 of 128, batch 13": "gqa16_4096_batch_13",
        "4096, 8 of 128, batch 15": "gqa16_4096_batch_15",
        "4096, 8 of 128, batch 17": "gqa16_4096_batch_17",
        "2048, 8 of 32, batch 20": "gqa4_2048_batch_20",
        "2048, 8 of 128, batch 20": "gqa16_2048_batch_20",
        "9216, 8 of 128, batch 28": "gqa16_9216_batch_28",
        "9216, 8 of 128, batch 32": "gqa16_9216_batch_32",
        "2048, 8 of 128, batch 36": "gqa16_2048_batch_36",
        "4096, 8 of 128, batch 40": "gqa16_4096_batch_40",
        "3072, 8 of 128, batch 52": "gqa16_3072_batch_52",
        "4096, 8 of 128, batch 60": "gqa16_4096_batch_60",
        "2048, 8 of 32, batch 64": "gqa4_2048_batch_64",
    },
    passes=("step",),
    digits=1,
    unit="cuda",
    quotient=("CUDA", "cuDNN"),
)

TABLES = (
    Table(
        name="forward",
        page="README.md",
        files=("h200-attention-fwd.json",),
        corner="forward",
        quantity="useful TFLOP/s",
        columns={"Hopper kernel": "cuda", "FlexAttention": "flex", "cuDNN, dense causal": "cudnn"},
        rows=ATTENTION,
    ),
    Table(
        name="backward",
        page="README.md",
        files=("h200-attention-bwd.json",),
        corner="backward",
        quantity="useful TFLOP/s",
        columns={"Hopper kernel": "cuda", "cuDNN, dense causal": "cudnn"},
        rows={label: case for label, case in ATTENTION.items() if "blocks" not in case},
        passes=("bwd",),
    ),
    Table(
        name="triton",
        page="README.md",
        files=("h200-triton-attention.json",),
        corner="forward / backward",
        quantity="useful TFLOP/s",
        columns={"Triton kernels": "triton", "FlexAttention": "flex", "cuDNN, dense causal": "cudnn"},
        rows={
            f"{SINK_WINDOW}, 16K tokens": "sink_window/16K/mha",
            f"{SINK_WINDOW}, 128K tokens": "sink_window/128K/mha",
            f"{STRIDED}, 16K tokens": "strided/16K/mha",
            f"{STRIDED}, 128K tokens": "strided/128K/mha",
            "dense causal, 16K tokens": "causal/16K/mha",
            "dense causal, 128K tokens": "causal/128K/mha",
        },
        passes=("fwd", "bwd"),
    ),
    Table(
        name="decode",
        page="docs/kv-cache.md",
        files=("h200-decode.json",),
        corner="keys kept, KV heads",
        quantity="time, the CUDA kernel's being 1",
        columns={
            "CUDA": "cuda",
            "with append": "cuda_append",
            "e4m3 cache": "cuda_fp8",
            "cuDNN": "cudnn",
            "cuDNN with append": "cudnn_append",
            "PyTorch's FlashAttention-2": "fa2_sdpa",
        },
        rows={
            "2048, 32": "mha_2048",
            "2048, 8": "gqa_2048",
            "9216, 32": "mha_9216",
            "9216, 8": "gqa_9216",
            "131072, 1 of 8 query heads": "mqa_128K",
            "131072, 8": "gqa_128K",
            "131072, 32": "mha_128K",
            "2048, 32, batch 5": "mha_2048_batch_5",
            "2048, 32, batch 8": "mha_2048_batch_8",
            "9216, 32, batch 8": "mha_9216_batch_8",
            "131072, 1 of 16 query heads, batch 8": "mqa_128K_batch_8",
            "131072, 8, batch 8": "gqa_128K_batch_8",
            "16384 to 131072, 8, batch 8": "gqa_128K_ragged_batch_8",
        },
        passes=("step",),
        digits=1,
        unit="cuda",
    ),
    SWEEP,
    replace(
        SWEEP,
        name="decode_rows_uneven",
        files=("h200-decode-rows-uneven.json",),
        rows={
            "4096, 8 of 128 query heads, batch 16": "gqa16_4096_batch_16",
            "4096, 8 of 128, batch 44": "gqa16_4096_batch_44",
            "2048, 8 of 32, batch 52": "gqa4_2048_batch_52",
            "3072, 8 of 128, batch 52": "gqa16_3072_batch_52",
            "4096, 8 of 128, batch 56": "gqa16_4096_batch_56",
            "3072, 8 of 128, batch 60": "gqa16_3072_batch_60",
            "2048, 8 of 128, batch 64": "gqa16_2048_batch_64",
        },
        quantity="",
        unit=None,
    ),
    Table(
        name="model",
        page="README.md",
        files=("h200-end-to-end.json", "h200-end-to-end-train.json"),
        corner="Llama-2-7B, 128K tokens",
        quantity="",
        columns={"hybrid": "hybrid", "dense, cuDNN": "dense"},
        rows={
            "reading the prompt, s": "prefill",
            "a token behind it, ms": "decode",
            "KV cache, GiB": "cache",
            "training step, forward and backward, s": "train",
        },
        passes=("model",),
        digits=1,
        quotient=("dense, cuDNN", "hybrid"),
    ),
)


def figures_of(*paths: Path) -> Figures:
    """What tables show of these files together."""
    return {case: figure for path in paths for case, figure in figures_of_file(path).items()}


def figures_of_file(path: Path) -> Figures:
    """Of `bench.run` TFLOP/s of the passes, of `bench.decode` microseconds of the steps."""
    data = json.loads(path.read_text())
    if "transformers" in data:
        return figures_of_models(data["records"])
    if "read_bandwidth" in data:
        timed = [record for record in data["records"] if record["status"] == "ok"]
        return {(record["case"], record["peer"], "step"): record["median_us"] for record in timed}
    return {record.identity: record.tflops for record in load(path).records if record.tflops is not None}


def figures_of_models(records: Sequence[Mapping[str, Any]]) -> Figures:
    """Seconds of a prompt and of a training step, milliseconds of a token by CUDA graph, GiB of the allocated cache."""
    figures: dict[tuple[str, str, str], float] = {}
    for record in records:
        peer = record["peer"]
        if record["part"] == "prefill":
            figures["prefill", peer, "model"] = record["median_s"]
            figures["cache", peer, "model"] = record["kv_allocated_bytes"] / (1 << 30)
        elif record["part"] == "decode":
            figures["decode", peer, "model"] = record["median_graph_ms"]
        elif record["part"] == "train":
            figures["train", peer, "model"] = record["median_s"]
    return figures


def slots_table() -> str:
    """What a cache keeps of 128K tokens: counted, not measured."""
    tokens = 131072
    patterns = {
        SINK_WINDOW: AttentionPattern.sink_window(sink=128, window=2048),
        "window 1024, every 16th block of 64": AttentionPattern.strided(16, 64, window=1024),
        "dense": AttentionPattern.causal(),
    }
    lines = [f"| {tokens:,} tokens seen | slots a head |", "|---|---|"]
    for label, pattern in patterns.items():
        cache = SparseKVCache(pattern, batch=1, kv_heads=1, head_dim=1, max_seqlen=tokens, device="meta")
        lines.append(f"| {label} | {cache.slots} |")
    return "\n".join(lines)


def tables() -> dict[str, dict[str, str]]:
    """The markdown of every table, by page and name."""
    written: dict[str, dict[str, str]] = {"docs/kv-cache.md": {"slots": slots_table()}}
    for table in TABLES:
        written.setdefault(table.page, {})[table.name] = table.markdown(figures_of(*table.paths))
    return written


def filled_in(page: str, text: str, written: Mapping[str, str]) -> str:
    """A page's text with its tables between their markers; ValueError for a table without a place, or without text."""
    places = re.findall(r"<!-- table: (\w+) -->", text)
    if sorted(places) != sorted(written):
        raise ValueError(f"{page} has places for the tables {sorted(places)}; bench.tables writes {sorted(written)}")
    for name, table in written.items():
        start, end = f"<!-- table: {name} -->\n", "<!-- end of table -->"
        before, _, rest = text.partition(start)
        text = f"{before}{start}\n{table}\n\n{end}{rest.partition(end)[2]}"
    return text


def drawings() -> list[pictures.Picture]:
    """Every picture: the diagrams, and the tables' figures as bars."""
    drawn = [pictures.of_patterns(), *diagrams.drawings()]
    for table in (table for table in TABLES if table.quantity):
        figures = figures_of(*table.paths)
        drawn.append(pictures.of_bars(table.name, table.quantity, table.panels(figures), table.markdown(figures)))
    return drawn


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.tables", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; 1 where something would change")
    args = parser.parse_args(argv)
    changed = []
    for page, written in tables().items():
        text = (ROOT / page).read_text()
        new = filled_in(page, text, written)
        if new != text:
            changed.append(page)
            if not args.check:
                (ROOT / page).write_text(new)
    for picture in drawings():
        path = ROOT / "docs" / "images" / f"{picture.name}.png"
        if picture.is_up_to_date(path):
            continue
        changed.append(str(path.relative_to(ROOT)))
        if not args.check:
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(path)
    for name in changed:
        print(f"{name}: {'is not what it is made from; run python -m bench.tables' if args.check else 'written'}")
    return int(args.check and bool(changed))


if __name__ == "__main__":
    sys.exit(main())
