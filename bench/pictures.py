"""Pictures of figures and patterns for README.md and docs/, with matplotlib."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from longgen_kernels import AttentionPattern, BlockMask

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Bars = Mapping[str, Mapping[str, float | None]]  # heights by series and label

COLOURS = ("#2a6f97", "#e07a5f", "#8d99ae", "#3d405b", "#81b29a", "#f2cc8f")
PASSES = {"fwd": "forward", "bwd": "backward", "step": ""}
_KEY = "Fingerprint"  # of the PNG's text chunk


@dataclass(frozen=True)
class Picture:
    """A figure to be drawn, and the text of what it shows.

    The pixels differ between versions of matplotlib and of its fonts, so a PNG file is known by the fingerprint of that
    text, which it carries.
    """

    name: str
    shows: str
    draw: Callable[[], Figure]

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(self.shows.encode()).hexdigest()[:16]

    def is_up_to_date(self, path: Path) -> bool:
        """Whether the file shows the same."""
        from PIL import Image  # comes with matplotlib

        if not path.exists():
            return False
        with Image.open(path) as image:
            return image.info.get(_KEY) == self.fingerprint

    def save(self, path: Path) -> None:
        """Draw it and write a PNG file."""
        self.draw().savefig(path, dpi=100, metadata={_KEY: self.fingerprint})


def of_bars(name: str, quantity: str, panels: Mapping[str, Bars], shows: str) -> Picture:
    """Horizontal bars, a panel for each pass."""

    def draw() -> Figure:
        from matplotlib.figure import Figure

        labels = list(next(iter(next(iter(panels.values())).values())))
        figure = Figure(figsize=(4.2 + 3.4 * len(panels), 1.0 + 0.55 * len(labels)), layout="constrained")
        axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for ax, (which, series) in zip(axes, panels.items(), strict=True):
            height = 0.8 / len(series)
            for i, (heading, bars) in enumerate(series.items()):
                there = [(row, value) for row, value in enumerate(bars.values()) if value is not None]
                at = [row + (i - (len(series) - 1) / 2) * height for row, _ in there]
                ax.barh(at, [value for _, value in there], height, label=heading, color=COLOURS[i])
            ax.set_yticks(range(len(labels)), labels, fontsize=8)
            ax.set_xlabel(f"{PASSES[which]}: {quantity}" if PASSES[which] else quantity)
            ax.spines[["top", "right"]].set_visible(False)
        axes[0].invert_yaxis()
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, fontsize=8)
        return figure

    return Picture(name, shows, draw)


def of_patterns() -> Picture:
    """Four patterns at 256 tokens, by `pattern.plot`."""
    length = 256
    row, column = torch.arange(16)[:, None], torch.arange(16)
    blocks = (row == column) | ((row * 5 + column * 3) % 7 < 2)
    shown = {
        "sink 16 + window 64": (AttentionPattern.sink_window(sink=16, window=64), 0),
        "window 32 + every 4th block of 16": (AttentionPattern.strided(4, 16, window=32), 0),
        "the same, the next KV head": (AttentionPattern.strided(4, 16, window=32), 1),
        "a block mask": (BlockMask.from_dense(blocks, block_size=16), 0),
    }

    def draw() -> Figure:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(10, 2.9), layout="constrained")
        for ax, (title, (pattern, head)) in zip(figure.subplots(1, len(shown)), shown.items(), strict=True):
            pattern.plot(length, head=head, ax=ax)
            ax.set_title(title, fontsize=8)
            ax.set_xlabel("key position", fontsize=7)
            ax.set_ylabel("query position", fontsize=7)
            ax.tick_params(labelsize=6)
        return figure

    shows = f"{length} {[(title, pattern.to_dict(), head) for title, (pattern, head) in shown.items()]}"
    return Picture("patterns", shows, draw)
