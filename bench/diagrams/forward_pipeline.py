"""The Hopper forward kernel's warps in time: docs/images/forward-pipeline.png.

A small model plays the producer and both math warpgroups of csrc/sm90/fwd with that kernel's waits. Stages and tiles
are read from its traits. The order of things is the kernel's; how long they take is only typical.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass, field
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.legend_handler import HandlerTuple
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from bench.diagrams.style import BLUE, DARK, GREEN, GREY, NORMAL, ORANGE, PALE, SAND, SMALL, WIDTH, box, diagram, size
from bench.pictures import Picture

TRAITS = "sm90/fwd/traits.cuh"
ITEMS = ((0, 1, 2), (0, 1, 2))  # the key tiles of an item, and the first ones of the next
SHOWN = 9900  # cycles of the drawing


@dataclass(frozen=True)
class Lengths:
    """Cycles. A product of 64 x 128 x 128 takes a multiprocessor's tensor cores 512; the others are assumed."""

    product: int = 512
    issue: int = 60  # of two products
    copy: int = 900
    ask: int = 130  # to find a tile and ask the copy engine for it
    softmax: int = 900
    maximum: int = 200  # more, in an item's first tile
    convert: int = 150  # weights to operands
    write: int = 600


LENGTHS = Lengths()


@dataclass(frozen=True)
class Span:
    """Something that a row of the drawing shows from `start` to `end`."""

    row: str
    text: str
    start: float
    end: float
    kind: str


@dataclass
class Timeline:
    """What happened, and when each turn was given: (by warpgroup, time)."""

    spans: list[Span] = field(default_factory=list)
    turns: list[tuple[int, float]] = field(default_factory=list)

    def add(self, row: str, text: str, start: float, length: float, kind: str) -> float:
        """Returns its end."""
        self.spans.append(Span(row, text, start, start + length, kind))
        return start + length


class Ring:
    """The stages of Q, K or V, each taken in turn."""

    def __init__(self, name: str, stages: int, shown: Timeline) -> None:
        self.name, self.shown = name, shown
        self.free = [0.0] * stages
        self.held: dict[int, tuple[str, float]] = {}  # tiles by number: the name, and when it was asked for

    def ask(self, n: int, tile: str, producer: float) -> tuple[float, float]:
        """Ask for tile n when the producer and its stage are free. Returns when that is done, and when it is there.

        ValueError where the stage's tile waits for something that the producer asks for later.
        """
        if any((n - other) % len(self.free) == 0 for other in self.held):
            raise ValueError(f"with so few stages of {self.name} ({len(self.free)}) the producer would wait for ever")
        start = max(producer, self.free[n % len(self.free)])
        done = self.shown.add("producer", "", start, LENGTHS.ask, self.name)
        self.held[n] = (tile, done)
        return done, done + LENGTHS.copy

    def release(self, n: int, time: float) -> None:
        """Both warpgroups are done with tile n."""
        tile, asked = self.held.pop(n)
        row = f"{self.name} stage {n % len(self.free)}"
        there = self.shown.add(row, "", asked, LENGTHS.copy, "on its way")
        length = max(time - there, 0.0)
        self.free[n % len(self.free)] = self.shown.add(row, f"{self.name} {tile}", there, length, self.name)


def play(q_stages: int, k_stages: int, v_stages: int) -> Timeline:
    """What `produce` and `MathWarpgroup::run` do, tile by tile, as long as no tile has to be done again."""
    shown = Timeline()
    names = [f"{tile}{mark}" for mark, tiles in zip(("", "\u2032"), ITEMS, strict=True) for tile in tiles]
    starts = (0, len(ITEMS[0]))  # the items' first tiles
    q, k, v = Ring("Q", q_stages, shown), Ring("K", k_stages, shown), Ring("V", v_stages, shown)
    producer = cores = given = 0.0  # when both are free; when the turn was given last
    ready = [0.0, 0.0]  # each math warpgroup, for its next turn

    def product(warpgroup: int, text: str, issued: float) -> float:
        nonlocal cores
        cores = shown.add("tensor cores", text, max(cores, issued), LENGTHS.product, f"warpgroup {warpgroup}")
        return cores

    def softmax(warpgroup: int, n: int, start: float) -> float:
        length = LENGTHS.softmax + (LENGTHS.maximum if n in starts else 0)
        return shown.add(f"warpgroup {warpgroup}", f"softmax {names[n]}", start, length, f"warpgroup {warpgroup}")

    def convert(warpgroup: int, start: float) -> float:
        return shown.add(f"warpgroup {warpgroup}", "", start, LENGTHS.convert, "convert")

    for n, name in enumerate(names):
        if n in starts:
            producer, _ = q.ask(starts.index(n), name.removeprefix("0"), producer)
        producer, k_there = k.ask(n, name, producer)
        if n == 0:  # before the first turn
            for w in (0, 1):
                ready[w] = convert(w, softmax(w, n, product(w, f"S {name}", k_there)))
            continue
        # A tile's V is copied after the K of the next one, as they are needed in this order.
        producer, v_there = v.ask(n - 1, names[n - 1], producer)
        turn, summed, done = [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]
        for w in (0, 1):  # issue the scores of tile n and the output of tile n - 1
            turn[w] = max(ready[w], given, k_there)
            scores = product(w, f"S {name}", turn[w])
            given = max(turn[w], v_there) + LENGTHS.issue
            shown.turns.append((w, given))
            summed[w] = product(w, f"PV {names[n - 1]}", given)
            done[w] = max(softmax(w, n, scores), summed[w])
            if n in starts:
                done[w] = shown.add(f"warpgroup {w}", "write O", done[w], LENGTHS.write, "write")
            ready[w] = convert(w, done[w])
        k.release(n - 1, max(turn))
        v.release(n - 1, max(summed))
        if n in starts:
            q.release(0, max(done))
    for ring in (q, k, v):  # the drawing ends
        for n in list(ring.held):
            ring.release(n, SHOWN)
    return shown


def rows(q_stages: int, k_stages: int, v_stages: int) -> dict[str, str]:
    """The rows from the top, and what is written beside them."""
    stages = [f"{ring} stage {i}" for ring, n in (("Q", q_stages), ("K", k_stages), ("V", v_stages)) for i in range(n)]
    return {
        "producer": "producer warp\nasks for tiles (TMA)",
        **{stage: stage for stage in stages},
        "warpgroup 0": "warpgroup 0\nqueries 0 to 63",
        "tensor cores": "tensor cores",
        "warpgroup 1": "warpgroup 1\nqueries 64 to 127",
    }


def picture() -> Picture:
    """Drawn from the traits of csrc/sm90/fwd at head_dim 128."""
    stages = [size(TRAITS, name) for name in ("kQueryStages", "kKeyStages", "kValueStages")]
    tile = size(TRAITS, "kBlockM"), size(TRAITS, "kBlockN")
    shown = play(*stages)
    shows = f"{tile} {list(rows(*stages))} {[astuple(span) for span in shown.spans]} {shown.turns}"
    return diagram("forward-pipeline", shows, lambda: drawn(shown, rows(*stages), tile))


FILLS = {
    "K": GREEN,
    "V": GREY,
    "Q": DARK,
    "on its way": PALE[GREY],
    "warpgroup 0": BLUE,
    "warpgroup 1": ORANGE,
    "convert": SAND,
    "write": "#5b8a72",
}


def drawn(shown: Timeline, labels: dict[str, str], tile: tuple[int, int]) -> Figure:
    """The timeline, a row for each label."""
    figure = Figure(figsize=(WIDTH, 5.6), layout="constrained")
    ax = figure.subplots()
    ax.set_axis_off()
    heights = {row: 0.4 if row == "producer" else 0.45 if "stage" in row else 0.9 for row in labels}
    bottoms, y = {}, 0.0
    for row in labels:
        y -= heights[row] + (0.35 if row in ("Q stage 0", "warpgroup 0") else 0.1 if "stage" in row else 0.22)
        bottoms[row] = y
        ax.text(-120, y + heights[row] / 2, labels[row], ha="right", va="center", fontsize=SMALL, color=DARK)
    for span in shown.spans:
        if span.start < SHOWN:
            length = min(span.end, SHOWN) - span.start
            text = span.text if length > 300 else ""
            box(ax, span.start, bottoms[span.row], length, heights[span.row], text, fill=FILLS[span.kind])
    before = [span.end for span in shown.spans if span.row == "producer" and span.end < 10 * LENGTHS.ask]
    at = max(before) + 100, bottoms["producer"] + heights["producer"] / 2
    ax.text(*at, "waits until a stage is free", va="center", fontsize=SMALL, color=DARK)
    draw_turns(ax, shown, bottoms["warpgroup 0"], bottoms["warpgroup 1"] + heights["warpgroup 1"])
    ax.set_xlim(-1750, SHOWN)
    ax.set_ylim(y - 0.1, 0)
    title = (
        f"A tile of {tile[0]} queries meets {len(ITEMS[0])} tiles of {tile[1]} keys, then the next one (\u2032) its own"
    )
    ax.set_title(f"{title}. Time goes to the right.", fontsize=NORMAL, color=DARK, loc="left", x=0.0)
    legend(figure)
    return figure


def draw_turns(ax: Axes, shown: Timeline, upper: float, lower: float) -> None:
    """An arrow from the warpgroup that gives the turn to the other one."""
    for warpgroup, time in shown.turns:
        if time < SHOWN:
            start, end = (upper, lower) if warpgroup == 0 else (lower, upper)
            arrow = {"arrowstyle": "-|>", "color": DARK, "linewidth": 0.9, "shrinkA": 0, "shrinkB": 0}
            ax.annotate("", (time, end), (time, start), arrowprops=arrow)


def legend(figure: Figure) -> None:
    """What the colours and arrows are."""
    entries: dict[str, Any] = {
        "on its way": Patch(color=FILLS["on its way"]),
        "Q, K, V: there until given back": tuple(Patch(color=FILLS[ring]) for ring in "QKV"),
        "the turn to issue (named barrier)": Line2D([], [], color=DARK, marker=r"$\downarrow$", ls="none", ms=9),
        "weights to operands": Patch(color=FILLS["convert"]),
    }
    figure.legend(
        list(entries.values()), list(entries), loc="outside lower center", ncols=4, fontsize=SMALL, frameon=False,
        handler_map={tuple: HandlerTuple(None)},
    )  # fmt: skip
