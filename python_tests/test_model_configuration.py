"""LongGenLlamaConfig: schedules, patterns, the RoPE base, config.json."""

import json

import pytest
from transformers import AutoConfig, LlamaConfig

from longgen_kernels import AttentionPattern, BlockMask
from model_integration import LongGenLlamaConfig
from model_integration.configuration import place_full_layers

SINK_WINDOW = AttentionPattern.sink_window(sink=4, window=16)


@pytest.mark.parametrize(
    ("placement", "expected"),
    [("middle", (2, 3)), ("bottom", (0, 1)), ("top", (4, 5)), ("interleaved", (1, 4))],
)
def test_placements_of_six_layers(placement, expected):
    config = LongGenLlamaConfig(num_hidden_layers=6, full_placement=placement, sparse_pattern=SINK_WINDOW)
    assert config.full_layer_indices == expected
    dense = [i for i, pattern in enumerate(config.layer_patterns) if pattern.is_dense]
    assert tuple(dense) == expected
    assert {p for p in config.layer_patterns if not p.is_dense} == {SINK_WINDOW}


def test_default_schedule_of_llama_2_7b():
    assert LongGenLlamaConfig(num_hidden_layers=32).full_layer_indices == tuple(range(10, 21))


@pytest.mark.parametrize("layers", [1, 2, 3, 5, 7, 32, 80])
@pytest.mark.parametrize("ratio", [0.0, 0.1, 1 / 3, 0.5, 1.0])
@pytest.mark.parametrize("placement", ["middle", "bottom", "top", "interleaved"])
def test_placement_counts(layers, ratio, placement):
    placed = place_full_layers(layers, ratio, placement)
    assert len(placed) == len(set(placed)) == round(layers * ratio)
    assert all(0 <= i < layers for i in placed)
    assert list(placed) == sorted(placed)


def test_explicit_layers_win_over_the_ratio():
    config = LongGenLlamaConfig(num_hidden_layers=6, full_layers=[5, 0])
    assert config.full_layer_indices == (0, 5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"full_ratio": 1.5}, r"full_ratio must lie in \[0, 1\], got 1.5"),
        ({"full_placement": "centre"}, "full_placement must be one of .* got 'centre'"),
        ({"full_layers": [0, 6], "num_hidden_layers": 6}, r"full_layers .* \[0, 6\)"),
        ({"full_layers": [1, 1], "num_hidden_layers": 6}, "full_layers must be distinct"),
        ({"sparse_pattern": {"kind": "arithmetic", "windw": 3}}, "sparse_pattern=.*windw"),
        ({"sparse_pattern": AttentionPattern.bidirectional()}, "sparse_pattern must be causal"),
        ({"sparse_pattern": AttentionPattern.strided(4, 16, window=0)}, "sparse_pattern needs a window"),
        ({"attention_dropout": 0.1}, "attention_dropout must be 0"),
        ({"rope_theta": 3e6, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, "rope_theta=3000000.0"),
    ],
)
def test_what_cannot_work_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        LongGenLlamaConfig(**arguments)


def test_block_masks_are_refused():
    import torch

    mask = BlockMask.from_dense(torch.ones(1, 2, 2, dtype=torch.bool), block_size=16)
    with pytest.raises(ValueError, match="tied to one length"):
        LongGenLlamaConfig(sparse_pattern=mask.to_dict())


def test_config_json_round_trip(tmp_path):
    pattern = AttentionPattern.strided(4, 16, window=64, sink=8)
    config = LongGenLlamaConfig(
        num_hidden_layers=4, sparse_pattern=pattern, full_layers=[1], rope_theta=5e6, max_position_embeddings=131072
    )
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["model_type"] == "longgen_llama"
    assert written["sparse_pattern"] == pattern.to_dict()
    assert written["rope_parameters"]["rope_theta"] == 5e6
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, LongGenLlamaConfig)
    loaded.name_or_path = ""
    assert loaded.to_dict() == config.to_dict()
    assert loaded.layer_patterns == config.layer_patterns


def test_rope_base_is_never_ignored(tmp_path):
    """Stock transformers drops `from_pretrained(path, rope_theta=...)` and `config.rope_theta = ...` silently."""
    LongGenLlamaConfig().save_pretrained(tmp_path)
    assert LongGenLlamaConfig.from_pretrained(tmp_path, rope_theta=5e6).rope_parameters["rope_theta"] == 5e6
    config = LongGenLlamaConfig()
    assert config.rope_theta == 10000.0
    config.rope_theta = 1e6
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 1e6}
    with pytest.raises(ValueError, match="rope_theta must be above 1"):
        config.rope_theta = 0.0


def test_from_dense_keeps_the_fields_and_the_rope_scaling():
    scaling = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    llama = LlamaConfig(num_hidden_layers=3, hidden_size=96, num_attention_heads=3, rope_parameters=dict(scaling))
    hybrid = LongGenLlamaConfig.from_dense(llama, full_layers=[0], rope_theta=5e6)
    assert (hybrid.hidden_size, hybrid.head_dim, hybrid.model_type) == (96, 32, "longgen_llama")
    assert hybrid.rope_parameters == {**scaling, "rope_theta": 5e6}
    assert llama.rope_parameters["rope_theta"] == 500000.0
    again = LongGenLlamaConfig.from_dense(hybrid)
    assert again.full_layer_indices == (0,)


def test_no_layer_types():
    """DynamicCache obeys `layer_types`: with them it would drop keys that the full layers need."""
    assert not hasattr(LongGenLlamaConfig(), "layer_types")
