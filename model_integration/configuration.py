"""The hybrids' configurations: a dense model's plus which layers are sparse and what they see."""

from __future__ import annotations

from typing import Any, Self

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

from longgen_kernels import AttentionPattern, pattern_from_dict

FULL_PLACEMENTS = ("middle", "bottom", "top", "interleaved")

#: What the sparse layers see when the config does not say: 128 sink tokens and the last 2048.
DEFAULT_SPARSE_PATTERN = AttentionPattern.sink_window(sink=128, window=2048)


def place_full_layers(num_layers: int, full_ratio: float, placement: str) -> tuple[int, ...]:
    """Indices of the layers that keep full attention: `round(num_layers * full_ratio)` of them.

    `bottom` is the embedding's side, `top` the output's; `interleaved` spreads them evenly.

    >>> place_full_layers(6, 1 / 3, "middle"), place_full_layers(6, 1 / 3, "interleaved")
    ((2, 3), (1, 4))
    """
    if not 0.0 <= full_ratio <= 1.0:
        raise ValueError(f"full_ratio must lie in [0, 1], got {full_ratio}")
    if placement not in FULL_PLACEMENTS:
        raise ValueError(f"full_placement must be one of {', '.join(FULL_PLACEMENTS)}; got {placement!r}")
    full = round(num_layers * full_ratio)
    if placement == "interleaved":
        return tuple((2 * i + 1) * num_layers // (2 * full) for i in range(full))
    first = {"bottom": 0, "middle": (num_layers - full) // 2, "top": num_layers - full}[placement]
    return tuple(range(first, first + full))


class LongGenConfig(PreTrainedConfig):
    """A dense model's config and what makes a hybrid of it: full attention in some layers, a pattern in the others.

    The classes to use are LongGenLlamaConfig, LongGenMistralConfig, LongGenQwen2Config and LongGenQwen3Config.

    Args:
        sparse_pattern: what the sparse layers see: an `AttentionPattern`, or its `to_dict()`; it is kept as the dict,
            so that it goes into config.json. Default: 128 sink tokens and a window of 2048.
        full_ratio: share of the layers that keep full attention.
        full_placement: where those layers are: middle (LongGen), bottom, top or interleaved.
        full_layers: their indices, instead of ratio and placement.
        rope_theta: the RoPE base, as a plain attribute that can be read, set and passed to `from_pretrained`. (A stock
            LlamaConfig takes `rope_theta=...` there and keeps the old base without a word.)

    Everything else is the dense model's. Raises ValueError for layer indices out of range, a ratio outside [0, 1], an
    unknown placement, a pattern that is not causal or in which a token may not see itself, for a sliding window of the
    dense model's, which the patterns replace, and for attention dropout, which the kernels do not have.

    Source: LongGen (Ge et al., ICLR 2025, arXiv 2410.01485).

    >>> config = LongGenLlamaConfig(num_hidden_layers=6, sparse_pattern=AttentionPattern.sink_window(4, 64))
    >>> config.full_layer_indices, config.sparse_pattern
    ((2, 3), {'kind': 'arithmetic', 'sink': 4, 'window': 64})
    """

    sparse_pattern: dict | None = None
    full_ratio: float = 1 / 3
    full_placement: str = "middle"
    full_layers: list[int] | None = None
    rope_parameters: dict | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "sparse_pattern" and isinstance(value, AttentionPattern):
            value = value.to_dict()
        super().__setattr__(name, value)

    def __post_init__(self, **kwargs: Any) -> None:
        base = kwargs.get("rope_theta")
        if self.sparse_pattern is None:
            self.sparse_pattern = DEFAULT_SPARSE_PATTERN.to_dict()
        super().__post_init__(**kwargs)
        if base is not None and base != self.rope_theta:
            raise ValueError(f"rope_theta={base} contradicts rope_parameters, which say {self.rope_theta}")
        self.validate_hybrid()

    @classmethod
    def from_dense(cls, config: PreTrainedConfig, **changes: Any) -> Self:
        """The hybrid of a dense config (or of another hybrid's), with `changes` applied.

        >>> LongGenLlamaConfig.from_dense(LlamaConfig(num_hidden_layers=4), full_layers=[0]).full_layer_indices
        (0,)
        """
        fields = {k: v for k, v in config.to_dict().items() if k not in ("model_type", "architectures", "auto_map")}
        if "rope_theta" in changes:
            fields["rope_parameters"] = {**(fields["rope_parameters"] or {}), "rope_theta": changes.pop("rope_theta")}
        return cls(**{**fields, **changes})

    @property
    def rope_theta(self) -> float:
        """The RoPE base. Setting it changes `rope_parameters`; a model that is already built keeps its own."""
        base: float = {"rope_theta": self.default_theta, **(self.rope_parameters or {})}["rope_theta"]
        return base

    @rope_theta.setter
    def rope_theta(self, base: float) -> None:
        self.rope_parameters = {**(self.rope_parameters or {"rope_type": "default"}), "rope_theta": float(base)}
        self.validate_hybrid()

    @property
    def full_layer_indices(self) -> tuple[int, ...]:
        """Indices of the layers with full attention, ascending."""
        if self.full_layers is not None:
            return tuple(sorted(self.full_layers))
        return place_full_layers(self.num_hidden_layers, self.full_ratio, self.full_placement)

    @property
    def layer_patterns(self) -> tuple[AttentionPattern, ...]:
        """What each layer sees: `num_hidden_layers` patterns."""
        full, sparse = AttentionPattern.causal(), _sparse_pattern(self.sparse_pattern)
        return tuple(full if i in self.full_layer_indices else sparse for i in range(self.num_hidden_layers))

    def validate_hybrid(self) -> None:
        """Raise ValueError where the class docstring says so. `@strict` runs this again before saving."""
        place_full_layers(self.num_hidden_layers, self.full_ratio, self.full_placement)
        if self.full_layers is not None:
            wrong = [i for i in self.full_layers if not 0 <= i < self.num_hidden_layers]
            if wrong or len(set(self.full_layers)) != len(self.full_layers):
                raise ValueError(
                    f"full_layers must be distinct indices in [0, {self.num_hidden_layers}), got {self.full_layers}"
                )
        _sparse_pattern(self.sparse_pattern)
        if not self.rope_theta > 1.0:
            raise ValueError(f"rope_theta must be above 1, got {self.rope_theta}")
        if self.attention_dropout:
            raise ValueError(f"attention_dropout must be 0: the kernels have none; got {self.attention_dropout}")
        if getattr(self, "sliding_window", None) is not None:
            raise ValueError(
                f"sliding_window must be None: what a layer sees is its pattern's; got {self.sliding_window}"
            )


@strict
class LongGenLlamaConfig(LongGenConfig, LlamaConfig):
    """A hybrid Llama's LongGenConfig."""

    model_type = "longgen_llama"


@strict
class LongGenMistralConfig(LongGenConfig, MistralConfig):
    """A hybrid Mistral's LongGenConfig. Version 0.1 of Mistral-7B has a sliding window and is refused."""

    model_type = "longgen_mistral"
    sliding_window: int | None = None


@strict
class LongGenQwen2Config(LongGenConfig, Qwen2Config):
    """A hybrid Qwen2's (and Qwen2.5's) LongGenConfig."""

    model_type = "longgen_qwen2"


@strict
class LongGenQwen3Config(LongGenConfig, Qwen3Config):
    """A hybrid Qwen3's LongGenConfig."""

    model_type = "longgen_qwen3"


#: The hybrid's config for a dense or a hybrid config's model_type.
HYBRID_CONFIGS: dict[str, type[LongGenConfig]] = {
    model_type: hybrid
    for hybrid in (LongGenLlamaConfig, LongGenMistralConfig, LongGenQwen2Config, LongGenQwen3Config)
    for model_type in (hybrid.model_type.removeprefix("longgen_"), hybrid.model_type)
}


def _sparse_pattern(fields: dict | None) -> AttentionPattern:
    """The checked pattern of a config's `sparse_pattern`."""
    try:
        pattern = DEFAULT_SPARSE_PATTERN if fields is None else pattern_from_dict(fields)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"sparse_pattern={fields}: {error}") from error
    if not isinstance(pattern, AttentionPattern):
        raise ValueError("sparse_pattern must be an arithmetic AttentionPattern: a block mask is tied to one length")
    if not pattern.is_causal:
        raise ValueError(f"sparse_pattern must be causal, got {fields}")
    if not pattern.is_dense and not (pattern.window or pattern.window_blocks):
        raise ValueError(f"sparse_pattern needs a window, or a token could see nothing, not even itself; got {fields}")
    return pattern
