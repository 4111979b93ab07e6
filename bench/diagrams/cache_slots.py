"""Where a compact KV cache keeps its tokens, before and after its ring has wrapped: docs/images/cache-addressing.png.

Every slot comes from `CacheLayout`.
"""

from __future__ import annotations

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Polygon

from bench.diagrams.style import BLUE, DARK, EMPTY, KINDS, NORMAL, PALE, SMALL, WIDTH, box, diagram
from bench.pictures import Picture
from longgen_kernels import AttentionPattern
from longgen_kernels.cache_layout import GRANULE, CacheLayout

PATTERN = AttentionPattern.strided(3, 16, window=40, sink=16)
LAYOUT = CacheLayout.compact(PATTERN)
TITLE = "sink 16, window 40, every third block of 16 tokens"
SEEN = (56, 136)  # tokens of the two drawings
OLD = PALE[BLUE]  # left the window; its slot waits for a later token
FILLS = {**KINDS, "old": OLD, "gone": EMPTY}


def slots() -> int:
    """Of the cache at the end."""
    return LAYOUT.slots(max(SEEN), kv_heads=1)


def kept(tokens: int) -> list[int]:
    """The token in each slot after `tokens` of them, or -1."""
    return LAYOUT.positions(torch.tensor(tokens), torch.tensor(0), slots()).tolist()


def kind(position: int, tokens: int) -> str:
    """What a token is to the query that was last."""
    if not bool(LAYOUT.is_permanent(torch.tensor(position), torch.tensor(0))):
        if bool(PATTERN.is_visible(torch.tensor(tokens - 1), torch.tensor(position))):
            return "window"
        return "old" if position in kept(tokens) else "gone"
    return "sink" if position < LAYOUT.sink_slots else "strided"


def runs(tokens: int) -> list[tuple[int, int, str, int | None]]:
    """Neighbouring tokens of one kind in one granule and neighbouring slots: (first, count, kind, first slot)."""
    slot_of = {position: slot for slot, position in enumerate(kept(tokens)) if position >= 0}
    found: list[tuple[int, int, str, int | None]] = []
    for position in range(tokens):
        what, slot = kind(position, tokens), slot_of.get(position)
        if found:
            first, count, last_kind, last_slot = found[-1]
            follows = slot is None if last_slot is None else slot == last_slot + count
            if what == last_kind and follows and position % GRANULE:
                found[-1] = (first, count + 1, what, last_slot)
                continue
        found.append((position, 1, what, slot))
    return found


def picture() -> Picture:
    """Drawn from LAYOUT."""
    return diagram("cache-addressing", f"{PATTERN.to_dict()} {LAYOUT.ring} {slots()} {[runs(n) for n in SEEN]}", drawn)


def drawn() -> Figure:
    """A drawing for each number of tokens."""
    figure = Figure(figsize=(WIDTH, 5.0), layout="constrained")
    for ax, tokens in zip(figure.subplots(len(SEEN), 1), SEEN, strict=True):
        draw_cache(ax, tokens)
    figure.suptitle(TITLE, fontsize=NORMAL, color=DARK)
    entries = {
        "sink": Patch(color=KINDS["sink"]),
        "strided block": Patch(color=KINDS["strided"]),
        "in the window": Patch(color=KINDS["window"]),
        "left the window, still held": Patch(color=OLD),
        "dropped": Patch(facecolor=EMPTY, edgecolor="#cccccc"),
    }
    figure.legend(
        list(entries.values()), list(entries), loc="outside lower center", ncols=5, fontsize=SMALL, frameon=False
    )
    return figure


def draw_cache(ax: Axes, tokens: int) -> None:
    """The sequence above, its slots below, and where each run of tokens is kept."""
    ring = LAYOUT.ring or 0
    for first, count, what, slot in runs(tokens):
        label = f"{first}\u2013{chr(10) if count < GRANULE else ''}{first + count - 1}"
        box(ax, first, 3.0, count, 0.8, label, fill=FILLS[what])
        if slot is None:
            continue
        left = place(slot)
        corners = [(first, 3.0), (first + count, 3.0), (left + count, 0.8), (left, 0.8)]
        ax.add_patch(Polygon(corners, facecolor=FILLS[what], alpha=0.5 if what == "old" else 0.25, linewidth=0))
        box(ax, left, 0.0, count, 0.8, label, fill=FILLS[what])
    for slot in range(0, slots(), GRANULE):
        box(ax, place(slot), 0.0, GRANULE, 0.8, fill="none", edgecolor=DARK)
        ax.text(place(slot), -0.15, str(slot), fontsize=SMALL, color=DARK, va="top", ha="center")
    names = {f"ring: slot = position mod {ring}": (0, ring), "permanent: in order": (ring, slots() - ring)}
    for name, (slot, count) in names.items():
        ax.text(place(slot) + count / 2, -0.75, name, fontsize=SMALL, color=DARK, va="top", ha="center")
    ax.text(-2, 3.4, "tokens", fontsize=SMALL, color=DARK, va="center", ha="right")
    ax.text(-2, 0.4, "slots", fontsize=SMALL, color=DARK, va="center", ha="right")
    ax.set_title(f"after {tokens} tokens", fontsize=NORMAL, color=DARK, loc="left")
    ax.set(xlim=(-12, max(place(slots()), *SEEN) + 1), ylim=(-1.5, 4.0))
    ax.set_axis_off()


def place(slot: int) -> int:
    """Where a slot is drawn: the permanent ones stand apart."""
    return slot if slot < (LAYOUT.ring or 0) else slot + 10
