"""Pictures that explain the kernels, drawn from patterns, cache layouts, sizes in csrc and result files."""

from __future__ import annotations

from bench.diagrams import backward_items, cache_slots, forward_pipeline, key_tiles, roofline
from bench.pictures import Picture


def drawings() -> list[Picture]:
    """Every diagram, for docs/images."""
    return [module.picture() for module in (forward_pipeline, key_tiles, backward_items, cache_slots, roofline)]
