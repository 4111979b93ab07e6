"""Which key tiles a tile of queries visits in the Hopper forward kernel, and in which order: docs/images/tiles.png.

All from `AttentionPattern.is_visible`; python_tests/test_key_enumeration.py holds `visits` to the kernel's enumeration.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from torch import Tensor

from bench.diagrams.style import BLUE, DARK, EMPTY, KINDS, NORMAL, PALE, SMALL, WIDTH, box, diagram, size
from bench.pictures import Picture
from longgen_kernels import AttentionPattern

TRAITS = "sm90/fwd/traits.cuh"


@dataclass(frozen=True)
class Box:
    """Consecutive keys that a query tile visits: a key tile, or one of several blocks that make one."""

    position: int
    kind: str  # why it is visited: window, sink or strided
    full: bool  # every query sees every key


@dataclass(frozen=True)
class Example:
    """A pattern at a length, and the query tile whose visits are numbered."""

    title: str
    pattern: AttentionPattern
    seqlen: int
    shown: int

    @property
    def tile(self) -> int:
        """Queries, or keys, of a tile."""
        return size(TRAITS, "kBlockM")

    @property
    def box(self) -> int:
        """Keys that the copy engine brings at once: a tile, or a block where the pattern has smaller ones."""
        return min(self.tile, self.pattern.block_size or self.tile)

    @property
    def tiles(self) -> int:
        return self.seqlen // self.tile


EXAMPLES = (
    Example("sink 128 + window 384", AttentionPattern.sink_window(sink=128, window=384), 1280, 8),
    Example("window 256 + every 4th block of 64", AttentionPattern.strided(4, 64, window=256), 1280, 9),
)


def boxes(example: Example, query_tile: int) -> list[Box]:
    """The boxes with a visible pair, in order of position: those of sink and strided blocks lie before the window's."""
    pattern = example.pattern
    window = replace(pattern, sink=0, stride=None, block_size=None, head_phase_step=0)  # alone, in tokens
    queries = torch.arange(query_tile * example.tile, (query_tile + 1) * example.tile)[:, None]
    found = []
    for position in range(0, example.seqlen, example.box):
        keys = torch.arange(position, position + example.box)
        visible = pattern.is_visible(queries, keys)
        if visible.any():
            is_near = bool(window.is_visible(queries, keys).any())
            kind = "window" if is_near else "sink" if position < pattern.sink else "strided"
            found.append(Box(position, kind, bool(visible.all())))
    return found


def visits(example: Example, query_tile: int) -> list[list[Box]]:
    """The key tiles in the order of their visits: the first keys, then from the diagonal leftwards."""
    found = boxes(example, query_tile)
    per_tile = example.tile // example.box
    tiles = [found[i : i + per_tile] for i in range(0, len(found), per_tile)]
    return [tiles[0], *reversed(tiles[1:])]


def is_masked(example: Example, tile: list[Box]) -> bool:
    """Whether a key tile needs a mask: some pair is not visible, or the tile has room for more boxes."""
    return len(tile) < example.tile // example.box or not all(found.full for found in tile)


def picture() -> Picture:
    """Drawn from the examples."""
    shows = f"{[(e, [visits(e, tile) for tile in range(e.tiles)]) for e in EXAMPLES]}"
    return diagram("tiles", shows, drawn)


def drawn() -> Figure:
    """A map for each example, and its query tile's key tiles in order."""
    figure = Figure(figsize=(WIDTH, 5.6), layout="constrained")
    maps, orders = figure.subplots(2, len(EXAMPLES), height_ratios=[4.3, 1])
    for example, ax, order in zip(EXAMPLES, maps, orders, strict=True):
        draw_map(ax, example)
        draw_order(order, example)
    entries = {
        **{kind: Patch(color=colour) for kind, colour in KINDS.items()},
        "computed, then masked": Patch(color=PALE[BLUE]),
        "not visited": Patch(facecolor=EMPTY, edgecolor="#cccccc"),
    }
    figure.legend(
        list(entries.values()), list(entries), loc="outside lower center", ncols=5, fontsize=SMALL, frameon=False
    )
    return figure


def image(example: Example) -> Tensor:
    """Each (query, key) pair's colour."""
    colours = torch.tensor(to_rgb(EMPTY)).expand(example.seqlen, example.seqlen, 3).clone()
    position = torch.arange(example.seqlen)
    visible = example.pattern.is_visible(position[:, None], position)
    for tile in range(example.tiles):
        rows = slice(tile * example.tile, (tile + 1) * example.tile)
        for found in boxes(example, tile):
            columns = slice(found.position, found.position + example.box)
            dark, pale = (torch.tensor(to_rgb(colour)) for colour in (KINDS[found.kind], PALE[KINDS[found.kind]]))
            colours[rows, columns] = torch.where(visible[rows, columns, None], dark, pale)
    return colours


def draw_map(ax: Axes, example: Example) -> None:
    """Queries down, keys to the right; the visited boxes outlined."""
    ax.imshow(image(example), extent=(0, example.seqlen, example.seqlen, 0), interpolation="nearest")
    for tile in range(example.tiles):
        for found in boxes(example, tile):
            corner = found.position, tile * example.tile
            ax.add_patch(Rectangle(corner, example.box, example.tile, fill=False, edgecolor="white", linewidth=1.2))
    top = example.shown * example.tile
    for number, visited in enumerate(visits(example, example.shown), 1):
        for found in visited:
            corner = found.position, top
            ax.add_patch(Rectangle(corner, example.box, example.tile, fill=False, edgecolor=DARK, linewidth=1.2))
            middle = found.position + example.box / 2, top + example.tile / 2
            disc = {"boxstyle": "circle,pad=0.12", "facecolor": "white", "edgecolor": "none"}
            ax.text(
                *middle, str(number), ha="center", va="center", fontsize=SMALL, color=DARK, weight="bold", bbox=disc
            )
    ticks = range(0, example.seqlen + 1, 2 * example.tile)
    ax.set_xticks(ticks, list(map(str, ticks)), fontsize=SMALL)
    ax.set_yticks(ticks, list(map(str, ticks)), fontsize=SMALL)
    ax.set_title(example.title, fontsize=NORMAL, color=DARK)
    ax.set_xlabel("key position", fontsize=SMALL)
    ax.set_ylabel("query position", fontsize=SMALL)


def draw_order(ax: Axes, example: Example) -> None:
    """The key tiles that the numbered query tile visits, one beside the other."""
    tiles = visits(example, example.shown)
    for number, tile in enumerate(tiles):
        for i, found in enumerate(tile):
            width = 0.94 / len(tile)
            fill = KINDS[found.kind] if found.full else PALE[KINDS[found.kind]]
            box(ax, number + i * width, 0, width, 1, str(found.position), fill=fill)
        mask = "mask" if is_masked(example, tile) else "no mask"
        ax.text(number + 0.47, -0.12, mask, ha="center", va="top", fontsize=SMALL, color=DARK)
        ax.text(number + 0.47, 1.08, str(number + 1), ha="center", fontsize=NORMAL, color=DARK, weight="bold")
    first = example.shown * example.tile
    ax.set_title(
        f"tiles of queries {first} to {first + example.tile - 1} in order, by first key", fontsize=NORMAL, color=DARK
    )
    ax.set_xlim(-0.1, len(tiles) + 0.04)
    ax.set_ylim(-0.5, 1.4)
    ax.set_axis_off()
