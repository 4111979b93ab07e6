"""The records of bench/results beside what an H200 can do: docs/images/roofline.png.

A point is a figure of record: useful operations per byte that has to move at least once, against useful operations per
second. Bytes of attention are its tensors and LSE once each, those of decoding the kept keys and values.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import NullFormatter

from bench.decode import CASES
from bench.diagrams.style import BLUE, DARK, GREEN, GREY, NORMAL, ORANGE, ROOT, SAND, SMALL, WIDTH, diagram
from bench.pictures import Picture
from longgen_kernels.benchmark.results import Record, load

RESULTS = ROOT / "bench" / "results"
ATTENTION = ("attention-fwd", "attention-bwd", "attention-variants", "triton-attention")

# NVIDIA's data sheet of the H200 SXM: bf16 without sparsity, memory.
PEAK_TFLOPS = 989.0
PEAK_TBPS = 4.8

PEERS = {
    "cuda": ("Hopper kernels", BLUE),
    "cuda_fp8": ("Hopper kernels, fp8 cache", SAND),
    "triton": ("Triton kernels", GREEN),
    "flex": ("FlexAttention", ORANGE),
    "cudnn": ("cuDNN", GREY),
    "fa2_sdpa": ("FlashAttention-2", DARK),
}
SAME_KERNELS = (
    "cuda_append",
    "cuda_fp8_append",
    "cudnn_append",
    "triton_append",
    "triton_fp8",
    "flex_create_mask",
)  # as peers that are shown: their points would hide these
MARKERS = {"fwd": "o", "bwd": "v", "decode": "s"}


@dataclass(frozen=True)
class Point:
    """A figure of record."""

    peer: str
    which: str
    flops_per_byte: float
    tflops: float


def is_shown(peer: str) -> bool:
    """Whether a peer's figures are drawn; ValueError for one without a name and colour."""
    if peer not in PEERS and peer not in SAME_KERNELS:
        raise ValueError(f"the result files have figures of {peer!r}; bench.diagrams.roofline.PEERS has no name for it")
    return peer in PEERS


def attention_bytes(record: Record) -> float:
    """q, k, v and out, and in the backward pass their gradients too, and the LSE: each once."""
    case = record.case
    heads = 2 * (case["q_heads"] + case["kv_heads"])  # q and out, k and v
    tokens = case["batch"] * case["seqlen"]
    tensors = tokens * heads * case["head_dim"] * getattr(torch, case["dtype"]).itemsize
    return float(tensors * {"fwd": 1, "bwd": 2}[record.which] + tokens * case["q_heads"] * torch.float32.itemsize)


def attention_points() -> Iterator[Point]:
    """Of the forward and backward passes."""
    for record in (record for name in ATTENTION for record in load(RESULTS / f"h200-{name}.json").records):
        if record.flops is not None and record.tflops is not None and is_shown(record.peer):
            yield Point(record.peer, record.which, record.flops / attention_bytes(record), record.tflops)


def decode_points(records: list[dict[str, Any]]) -> Iterator[Point]:
    """Of decoding, without the token's append."""
    for record in records:
        if record["status"] == "ok" and is_shown(record["peer"]):
            flops = CASES[record["case"]].flops
            yield Point(record["peer"], "decode", flops / record["bytes"], flops / record["median_us"] * 1e-6)


def picture() -> Picture:
    """Drawn from the result files."""
    decode = json.loads((RESULTS / "h200-decode.json").read_text())
    points = [*attention_points(), *decode_points(decode["records"])]
    measured_tbps = decode["read_bandwidth"] * 1e-12
    shows = f"{PEAK_TFLOPS} {PEAK_TBPS} {measured_tbps} {[astuple(point) for point in points]}"
    return diagram("roofline", shows, lambda: drawn(points, measured_tbps))


def drawn(points: list[Point], measured_tbps: float) -> Figure:
    """All of it above, the two groups of points below."""
    figure = Figure(figsize=(WIDTH, 7.0), layout="constrained")
    axes: dict[str, Axes] = figure.subplot_mosaic([["all", "all"], ["decoding", "attention"]], height_ratios=[1, 1.15])
    whole, left, right = axes["all"], axes["decoding"], axes["attention"]
    scale(whole, (0.5, 1e5), (1, 2000))
    draw_roofs(whole, measured_tbps)
    name_roofs(whole, measured_tbps)
    draw_points(whole, points, 14)

    decoding = [point for point in points if point.which == "decode"]
    zoom(whole, left, decoding, "decoding a token", 0.0)
    draw_points(left, decoding, 26, apart=1.09)
    only = sorted({round(point.flops_per_byte, 3) for point in decoding})
    left.set_xticks(only, [f"{value:g}" for value in only])
    for x in only:  # beside points that stand apart a slope would mislead
        for tbps, style in ((PEAK_TBPS, "-"), (measured_tbps, "--")):
            left.plot([x / 1.3, x * 1.3], [x * tbps, x * tbps], style, color=DARK, lw=1)

    attention = [point for point in points if point.which != "decode"]
    zoom(whole, right, attention, "forward and backward passes", PEAK_TFLOPS)
    draw_points(right, attention, 26)
    draw_roofs(right, measured_tbps)
    legend(figure, points)
    return figure


def zoom(whole: Axes, part: Axes, points: list[Point], title: str, reach: float) -> None:
    """Scale `part` to points, up to `reach` at least, and frame them in `whole`."""
    across, up = [point.flops_per_byte for point in points], [point.tflops for point in points]
    x, y = (min(across) / 1.6, max(across) * 1.6), (min(up) / 1.2, max(*up, reach) * 1.3)
    scale(part, x, y)
    part.set_title(title, fontsize=NORMAL, color=DARK)
    frame = Rectangle((x[0], y[0]), x[1] - x[0], y[1] - y[0], fill=False, edgecolor=DARK, linestyle=":")
    whole.add_patch(frame)
    whole.text(x[0], y[0] * 0.92, title, fontsize=SMALL, color=DARK, va="top")


def scale(ax: Axes, x: tuple[float, float], y: tuple[float, float]) -> None:
    """Logarithmic axes with plain numbers."""
    ax.set(xscale="log", yscale="log", xlim=x, ylim=y)
    for axis, (low, high) in ((ax.xaxis, x), (ax.yaxis, y)):
        ticks = [tick * 10**power for power in range(6) for tick in ((1,) if high / low > 1e3 else (1, 2, 5))]
        axis.set_ticks([tick for tick in ticks if low <= tick <= high])
        axis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axis.set_minor_formatter(NullFormatter())
    ax.set_xlabel("useful FLOP per byte that has to move", fontsize=SMALL)
    ax.set_ylabel("useful TFLOP/s", fontsize=SMALL)
    ax.tick_params(labelsize=SMALL)
    ax.grid(color=GREY, alpha=0.3, linewidth=0.5)
    ax.spines[["top", "right"]].set_visible(False)


def draw_roofs(ax: Axes, measured_tbps: float) -> None:
    """What can be reached, by the data sheet and with the measured bandwidth."""
    x = ax.get_xlim()
    for tbps, style in ((PEAK_TBPS, "-"), (measured_tbps, "--")):
        ridge = PEAK_TFLOPS / tbps
        left = min(x[0], ridge)
        ax.plot([left, ridge, x[1]], [left * tbps, PEAK_TFLOPS, PEAK_TFLOPS], style, color=DARK, lw=1)
    ax.set_xlim(x)


def name_roofs(ax: Axes, measured_tbps: float) -> None:
    """What the lines are."""
    ridge = PEAK_TFLOPS / PEAK_TBPS
    ax.text(ridge * 0.85, PEAK_TFLOPS, f"data sheet: {PEAK_TFLOPS:.0f} TFLOP/s", fontsize=SMALL, color=DARK, ha="right")
    ax.text(18, 18 * PEAK_TBPS * 1.3, f"data sheet: {PEAK_TBPS} TB/s", fontsize=SMALL, color=DARK, ha="right")
    measured = f"reading alone, measured: {measured_tbps:.2f} TB/s"
    ax.text(22, 22 * measured_tbps * 0.75, measured, fontsize=SMALL, color=DARK, va="top")


def draw_points(ax: Axes, points: list[Point], marker_size: float, apart: float = 1.0) -> None:
    """The points; with `apart` each peer's a little further to the right than the one's before."""
    peers = [peer for peer in PEERS if any(point.peer == peer for point in points)]
    for point in points:
        aside = apart ** (peers.index(point.peer) - (len(peers) - 1) / 2)
        ax.scatter(
            point.flops_per_byte * aside, point.tflops, marker_size, color=PEERS[point.peer][1],
            marker=MARKERS[point.which], edgecolor="white", linewidth=0.4, zorder=3,
        )  # fmt: skip


def legend(figure: Figure, points: list[Point]) -> None:
    """Peers by colour, passes by marker."""
    shown = {point.peer for point in points}
    words = {"fwd": "forward", "bwd": "backward", "decode": "decoding"}
    handles = [
        *(
            Line2D([], [], marker="o", ls="none", color=c, label=name)
            for peer, (name, c) in PEERS.items()
            if peer in shown
        ),
        *(Line2D([], [], marker=m, ls="none", mfc="none", color=DARK, label=words[w]) for w, m in MARKERS.items()),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=SMALL, frameon=False)
