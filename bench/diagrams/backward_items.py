"""How the Hopper backward kernel shares out its work, and what one item does: docs/images/backward-items.png.

Items come from `AttentionPattern.is_visible`; python_tests/test_backward_enumeration.py holds them to the kernel's own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from bench.diagrams.style import DARK, EMPTY, GREY, KINDS, NORMAL, PALE, SAND, SMALL, WIDTH, box, diagram, size
from bench.pictures import Picture
from longgen_kernels import AttentionPattern

PATTERN = AttentionPattern.strided(4, 128, window=384, sink=128)
TITLE = "sink 128 + window 384 + every 4th block of 128"
TOKENS = 2048
QUERY_TILE = 64  # at head_dim 128
MULTIPROCESSORS = 132


@dataclass(frozen=True)
class Item:
    """A key tile with query tiles that see it, in the order in which they pass."""

    kind: str  # of its keys: window, sink or strided
    key: int  # position of its first
    query_tiles: tuple[int, ...]

    @property
    def is_global(self) -> bool:
        return self.kind != "window"


def key_tile() -> int:
    """Its keys."""
    return size("attention/key_tiles.cuh", "kKeyTile")


def columns() -> list[Item]:
    """Every key tile with all query tiles that see it: global ones first, which see them from the last one down."""
    tile = key_tile()
    queries = torch.arange(TOKENS).view(-1, QUERY_TILE, 1)
    found = []
    for key in range(0, TOKENS, tile):
        keys = torch.arange(key, key + tile)
        far = torch.tensor(key + 1000 * TOKENS)
        is_global = bool(PATTERN.is_visible(far, keys).all())
        kind = "window" if not is_global else "sink" if key < PATTERN.sink else "strided"
        seen = PATTERN.is_visible(queries, keys).any(-1).any(-1).nonzero().flatten().tolist()
        found.append(Item(kind, key, tuple(reversed(seen)) if is_global else tuple(seen)))
    return [item for item in found if item.is_global] + [item for item in found if not item.is_global]


def items() -> list[Item]:
    """The items of one head in the order in which they are handed out."""
    whole = columns()
    globals_ = [item for item in whole if item.is_global]
    share = sum(len(item.query_tiles) for item in whole) // MULTIPROCESSORS  # of a multiprocessor
    steps = max(share // 2, size("sm90/bwd/plan.cu", "kShortestChunk"))
    chunks = range(0, TOKENS // QUERY_TILE, steps)
    divided = [Item(i.kind, i.key, i.query_tiles[at : at + steps]) for at in chunks for i in globals_]
    return [item for item in divided if item.query_tiles] + [item for item in whole if not item.is_global]


def picture() -> Picture:
    """Drawn from PATTERN and the sizes of csrc/sm90/bwd."""
    return diagram("backward-items", f"{PATTERN.to_dict()} {TOKENS} {items()}", drawn)


def drawn() -> Figure:
    """The items on the left, one of them on the right."""
    figure = Figure(figsize=(WIDTH, 5.1), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1.2, 1])
    figure.suptitle(f"{TITLE}, {TOKENS} tokens, one head", fontsize=NORMAL, color=DARK)
    draw_items(left)
    draw_one(right)
    entries = {f"{kind} keys": Patch(color=colour) for kind, colour in KINDS.items()}
    entries[f"tiles of {QUERY_TILE} queries that do not see the keys"] = Patch(facecolor=EMPTY, edgecolor="#cccccc")
    figure.legend(
        list(entries.values()), list(entries), loc="outside lower center", ncols=4, fontsize=SMALL, frameon=False
    )
    return figure


def draw_items(ax: Axes) -> None:
    """Key tiles to the right, query tiles down; each item a column with its number."""
    tile = key_tile()
    ax.set_facecolor(EMPTY)
    for number, item in enumerate(items(), 1):
        top, bottom = min(item.query_tiles) * QUERY_TILE, (max(item.query_tiles) + 1) * QUERY_TILE
        box(ax, item.key, top, tile, bottom - top, fill=KINDS[item.kind], linewidth=0)
        for query_tile in item.query_tiles[1:]:
            y = query_tile * QUERY_TILE + (QUERY_TILE if item.is_global else 0)
            ax.plot([item.key, item.key + tile], [y, y], color="white", linewidth=0.4, alpha=0.7)
        frame = Rectangle((item.key, top), tile, bottom - top, fill=False, edgecolor="white", linewidth=2)
        ax.add_patch(frame)
        first, last = (bottom, top) if item.is_global else (top, bottom)
        inset = 30 if item.is_global else -30
        arrow = {"arrowstyle": "-|>", "color": "white", "linewidth": 1.1, "shrinkA": 0, "shrinkB": 0}
        x = item.key + tile / 2
        ax.annotate("", (x, last + inset), (x, first - inset), arrowprops=arrow)
        disc = {"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none"}
        ax.text(x, (top + bottom) / 2, str(number), ha="center", va="center", fontsize=6.5, color=DARK, bbox=disc)
    ticks = range(0, TOKENS + 1, 512)
    ax.set(xlim=(0, TOKENS), ylim=(TOKENS, 0), aspect="equal")
    ax.set_xticks(ticks, list(map(str, ticks)), fontsize=SMALL)
    ax.set_yticks(ticks, list(map(str, ticks)), fontsize=SMALL)
    ax.set_xlabel("key position", fontsize=SMALL)
    ax.set_ylabel("query position", fontsize=SMALL)
    note = (
        "Sink and strided columns are\nlong: they come first, cut into\nchunks, and let the last queries\npass first."
    )
    ax.text(TOKENS * 0.97, TOKENS * 0.04, note, ha="right", va="top", fontsize=SMALL, color=DARK)
    ax.set_title(f"{len(items())} items, in the order in which blocks take them", fontsize=NORMAL, color=DARK)


def draw_one(ax: Axes) -> None:
    """What a thread block does with an item."""
    ax.set(xlim=(0, 10), ylim=(0, 10))
    ax.set_axis_off()
    ax.set_title("one item in a thread block", fontsize=NORMAL, color=DARK)
    ax.add_patch(Rectangle((0, 3.1), 10, 4.7, facecolor="none", edgecolor=GREY, linewidth=1, linestyle="--"))

    def arrow(start: tuple[float, float], end: tuple[float, float]) -> None:
        how = {"arrowstyle": "-|>", "color": DARK, "linewidth": 1.1, "shrinkA": 0, "shrinkB": 0}
        ax.annotate("", end, start, arrowprops=how)

    box(ax, 0.3, 8.5, 4.4, 1.3, f"K, V of {key_tile()} keys:\ncopied once", fill=GREY)
    box(ax, 5.3, 8.5, 4.4, 1.3, f"Q, dO of {QUERY_TILE} queries:\ntile after tile", fill=GREY)
    arrow((2.5, 8.5), (2.5, 7.5))
    arrow((7.5, 8.5), (7.5, 7.5))
    box(
        ax,
        0.3,
        5.9,
        9.4,
        1.6,
        "S = QK\u1d40   P = exp2(S \u2212 LSE)\ndP = dO V\u1d40   dS = P (dP \u2212 delta)",
        fill=PALE[GREY],
    )
    arrow((2.5, 5.9), (2.5, 5.0))
    arrow((7.5, 5.9), (7.5, 5.0))
    box(ax, 0.3, 3.4, 4.4, 1.6, "dV += P\u1d40 dO\ndK += dS\u1d40 Q\nstay in registers", fill=DARK)
    box(ax, 5.3, 3.4, 4.4, 1.6, "dQ = dS K\nof this tile's keys", fill=DARK)
    arrow((2.5, 3.4), (2.5, 2.0))
    arrow((7.5, 3.4), (7.5, 2.0))
    ax.text(2.65, 2.55, "at the end", fontsize=SMALL, color=DARK, va="center")
    ax.text(7.65, 2.55, "each tile: red.add", fontsize=SMALL, color=DARK, va="center")
    box(ax, 0.3, 0.4, 4.4, 1.6, "dK, dV; of a chunk:\nits own sums, added up\nin order afterwards", fill=SAND)
    box(ax, 5.3, 0.4, 4.4, 1.6, "dQ's sums in memory,\nfp32, from all items\nof the head", fill=SAND)
