"""Pictures of masks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_mask(mask: Tensor, title: str, ax: Axes | None = None) -> Axes:
    """Draw a bool (queries, keys) mask; filled cells are visible. Needs matplotlib."""
    try:
        import matplotlib.pyplot as plt
        from matplotlib.colors import ListedColormap
    except ImportError as error:
        raise ImportError("pattern.plot() needs matplotlib: pip install matplotlib") from error
    if ax is None:
        _, ax = plt.subplots(figsize=(4, 4), layout="constrained")
    ax.imshow(mask.numpy(), cmap=ListedColormap(["#f2f2f2", "#2a6f97"]), vmin=0, vmax=1, interpolation="nearest")
    ax.set_xlabel("key position")
    ax.set_ylabel("query position")
    ax.set_title(title, fontsize=9)
    return ax
