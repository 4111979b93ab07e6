"""Pictures of patterns, drawn from the same predicate that the kernels obey."""

from __future__ import annotations

from typing import TYPE_CHECKING

from longgen_kernels.patterns.base import Pattern

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_pattern(pattern: Pattern, seqlen: int, *, head: int = 0, ax: Axes | None = None) -> Axes:
    """Draw the (seqlen, seqlen) mask of one head; filled cells are visible. Needs matplotlib."""
    try:
        import matplotlib.pyplot as plt
        from matplotlib.colors import ListedColormap
    except ImportError as error:
        raise ImportError("pattern.plot() needs matplotlib: pip install matplotlib") from error
    if ax is None:
        _, ax = plt.subplots(figsize=(4, 4), layout="constrained")
    mask = pattern.visible(seqlen, heads=head + 1)[head]
    ax.imshow(mask.numpy(), cmap=ListedColormap(["#f2f2f2", "#2a6f97"]), vmin=0, vmax=1, interpolation="nearest")
    ax.set_xlabel("key position")
    ax.set_ylabel("query position")
    ax.set_title(f"head {head}: {mask.float().mean():.0%} of all pairs", fontsize=9)
    return ax
