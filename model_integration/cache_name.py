"""What transformers calls the KV cache among a model's arguments and results."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from transformers import Cache, LlamaModel

#: "past_key_values" up to transformers 5.23, "cache" from 5.24 on.
CACHE_NAME = "cache" if "cache" in inspect.signature(LlamaModel.forward).parameters else "past_key_values"

Forward = TypeVar("Forward", bound=Callable[..., Any])


def takes_either_name(forward: Forward) -> Forward:
    """Lets a model's `forward`, whose argument is `cache`, be called by either name, whichever transformers it is.

    Raises ValueError for a cache by both names, and for a paged one: with continuous batching transformers' own
    attention functions would read it, and run dense.
    """

    @functools.wraps(forward)
    def with_either_name(self: Any, *args: Any, **kwargs: Any) -> Any:
        if "past_key_values" in kwargs:
            given, cache = kwargs.pop("past_key_values"), kwargs.get("cache")
            if cache is not None and given is not None:
                raise ValueError("give the KV cache by one name, cache or past_key_values, not by both")
            kwargs["cache"] = given if cache is None else cache
        cache = kwargs.get("cache")
        if cache is not None and not isinstance(cache, Cache):
            raise ValueError(
                f"cache must be a transformers Cache, got {type(cache).__name__}; continuous batching (a paged cache) "
                "is not supported: its attention functions would run dense"
            )
        return forward(self, *args, **kwargs)

    return with_either_name  # type: ignore[return-value]
