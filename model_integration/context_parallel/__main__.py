"""Prints the table of docs/context_parallel.md: `python -m model_integration.context_parallel`."""

from __future__ import annotations

from longgen_kernels import AttentionPattern
from model_integration.context_parallel.sharding import Sharding
from model_integration.context_parallel.traffic import bytes_by_heads, bytes_by_keys

LENGTH = 131072

#: (name, query heads, KV heads, head_dim)
MODELS = (("Llama-2-7B", 32, 32, 128), ("Llama-3-8B", 32, 8, 128))

PATTERNS = {
    "sink 128 + window 2048": AttentionPattern.sink_window(sink=128, window=2048),
    "sink 128 + window 1024 + every 16th 64-token block": AttentionPattern.strided(16, 64, window=1024, sink=128),
}


def traffic_table() -> str:
    """Markdown: MiB that the busiest rank sends or receives in one layer's forward pass, bf16."""
    lines = [f"| model | ranks | heads | keys: {' | keys: '.join(PATTERNS)} |", "|---|---|---|---|---|"]
    for name, heads, kv_heads, head_dim in MODELS:
        for ranks in (2, 4, 8):
            sharding = Sharding.of(1, LENGTH, ranks)
            counts = [bytes_by_heads(sharding, heads, kv_heads, 2 * head_dim)]
            counts += [bytes_by_keys(sharding, pattern, kv_heads, 2 * head_dim) for pattern in PATTERNS.values()]
            lines.append(f"| {name} | {ranks} | {' | '.join(f'{count / (1 << 20):.1f}' for count in counts)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print("MiB that the busiest rank sends or receives in one layer's forward pass, 128K tokens, bf16:\n")
    print(traffic_table())
