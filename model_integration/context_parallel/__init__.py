"""Context parallelism: several ranks share each sequence, and attention exchanges what it needs.

sharding <- needs <- keys; sharding, exchange <- heads, keys; heads, needs <- traffic <- shard
"""

from model_integration.context_parallel.shard import EXCHANGES, SequenceShard
from model_integration.context_parallel.sharding import Sharding

__all__ = ["EXCHANGES", "SequenceShard", "Sharding"]
