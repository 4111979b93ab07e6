"""What the diagrams have in common: colours by meaning, and sizes as csrc states them."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from bench.pictures import COLOURS, Picture

ROOT = Path(__file__).resolve().parents[2]

BLUE, ORANGE, GREY, DARK, GREEN, SAND = COLOURS

PALE = {BLUE: "#c3d9e6", ORANGE: "#f6d5cb", GREEN: "#d5e5dc", GREY: "#dde1e8"}
EMPTY = "#f2f2f2"
KINDS = {"window": BLUE, "sink": GREEN, "strided": ORANGE}  # of keys

WIDTH = 8.0  # inches, 800 pixels: what a page of the site shows without shrinking it much
SMALL, NORMAL = 7.5, 8.5


def diagram(name: str, shows: str, draw: Callable[[], Figure]) -> Picture:
    """A picture known by what it shows and by the code that draws it: its words and shapes stand there."""
    return Picture(name, "\n".join([shows, Path(inspect.getfile(draw)).read_text(), Path(__file__).read_text()]), draw)


def size(file: str, name: str) -> int:
    """An integer constant of a file in csrc, for head_dim 128 where it depends on that.

    ValueError where the file defines none of that name.
    """
    text = (ROOT / "csrc" / file).read_text()
    found = re.search(rf"constexpr int {name} = (?:kHeadDim == 64 \? \d+ : )?(\d+);", text)
    if found is None:
        raise ValueError(f"csrc/{file} defines no {name} by a number, or by one for head_dim 64 and one for 128")
    return int(found[1])


def box(ax: Axes, x: float, y: float, width: float, height: float, text: str = "", *, fill: str, **how: Any) -> None:
    """A rectangle with its text in the middle: white on dark colours, dark on pale ones."""
    on_dark = fill not in (EMPTY, SAND, *PALE.values())
    settings: dict[str, Any] = {"edgecolor": "white", "linewidth": 0.8, **how}
    ax.add_patch(Rectangle((x, y), width, height, facecolor=fill, **settings))
    colour = "white" if on_dark else DARK
    if text:
        ax.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=SMALL, color=colour)
