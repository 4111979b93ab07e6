"""Every architecture as a hybrid: the dense model where all layers are full, one sparse model under all else."""

import pytest
import torch
import transformers
from transformers import AutoModel, AutoModelForCausalLM

import model_integration
from longgen_kernels import AttentionPattern
from model_integration import LongGenCache, convert
from model_integration.training.activations import recompute_activations

# num_hidden_layers - 1 is a full layer; Qwen3's heads are wider than hidden_size / num_attention_heads.
ARCHITECTURES = {"Llama": {}, "Mistral": {"sliding_window": None}, "Qwen2": {}, "Qwen3": {"head_dim": 32}}
SMALL = {
    "vocab_size": 89,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}
PATTERN = AttentionPattern.strided(3, 4, window=6, sink=1)
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(scope="module", params=ARCHITECTURES)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def dense(name, tmp_path_factory):
    """The directory of a dense checkpoint. Biases and norms are random too, so that none can be forgotten."""
    torch.manual_seed(1)
    config = getattr(transformers, f"{name}Config")(**SMALL, **ARCHITECTURES[name])
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data.normal_(1.0, 0.5)
    model.save_pretrained(path := tmp_path_factory.mktemp(name))
    return path


@pytest.fixture(scope="module")
def hybrid(name, dense, tmp_path_factory):
    """The directory of a sparse hybrid, as the command writes it."""
    path = tmp_path_factory.mktemp("hybrid") / name
    options = "--full-layers 2 --stride 3 --block-size 4 --window 6 --sink 1 --rope-base 5e6"
    convert.main([str(dense), str(path), *options.split()])
    return path


@pytest.fixture
def tokens():
    return torch.randint(0, SMALL["vocab_size"], (2, 41))


def logits(model, tokens, **kwargs):
    with torch.no_grad():
        return model(tokens, **kwargs).logits


def test_a_hybrid_of_full_layers_is_the_dense_model(name, dense, tokens):
    config_class = getattr(model_integration, f"LongGen{name}Config")
    config = config_class.from_dense(transformers.AutoConfig.from_pretrained(dense), full_ratio=1.0)
    expected = logits(AutoModelForCausalLM.from_pretrained(dense, attn_implementation="sdpa"), tokens)
    for implementation in ("sdpa", "longgen"):
        model, info = AutoModelForCausalLM.from_pretrained(
            dense, config=config, attn_implementation=implementation, output_loading_info=True
        )
        assert type(model) is getattr(model_integration, f"LongGen{name}ForCausalLM")
        assert not any(info.values())
        torch.testing.assert_close(logits(model, tokens), expected, **TOLERANCE)


def test_every_implementation_is_the_same_sparse_model(name, dense, hybrid, tokens):
    model = AutoModelForCausalLM.from_pretrained(hybrid)
    assert type(model) is getattr(model_integration, f"LongGen{name}ForCausalLM")
    assert model.config.layer_patterns == (PATTERN, PATTERN, AttentionPattern.causal())
    expected = logits(model, tokens)
    as_dense = AutoModelForCausalLM.from_pretrained(dense, rope_parameters=model.config.rope_parameters)
    assert (logits(as_dense, tokens) - expected).abs().max() > 1.0
    for implementation in ("sdpa", "eager"):
        other = AutoModelForCausalLM.from_pretrained(hybrid, attn_implementation=implementation)
        torch.testing.assert_close(logits(other, tokens), expected, **TOLERANCE)
    padded = torch.nn.functional.pad(tokens, (6, 0))
    real = torch.nn.functional.pad(torch.ones_like(tokens), (6, 0))
    torch.testing.assert_close(logits(model, padded, attention_mask=real)[:, 6:], expected, **TOLERANCE)
    assert model.get_decoder() is model.model
    decoder = AutoModel.from_pretrained(hybrid)
    assert type(decoder) is type(model.model)
    with torch.no_grad():
        torch.testing.assert_close(model.lm_head(decoder(tokens).last_hidden_state), expected)


def test_generation_with_the_sparse_cache(hybrid):
    tokens = torch.randint(0, SMALL["vocab_size"], (2, 200))
    model = AutoModelForCausalLM.from_pretrained(hybrid)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    sparse = model.generate(tokens, return_dict_in_generate=True, **options)
    assert isinstance(sparse.past_key_values, LongGenCache)
    assert sparse.past_key_values.nbytes < sparse.past_key_values.full_nbytes
    full = model.generate(tokens, cache_implementation="dynamic", **options)
    assert sparse.sequences.tolist() == full.tolist()


def test_training_and_saving(hybrid, tokens, tmp_path):
    gradients = []
    for checkpointing in (False, True):
        model = AutoModelForCausalLM.from_pretrained(hybrid).train()
        if checkpointing:
            recompute_activations(model)
        model(tokens, labels=tokens, use_cache=False, logits_to_keep=None if checkpointing else 0).loss.backward()
        gradients.append({parameter: value.grad for parameter, value in model.named_parameters()})
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path), tokens), logits(model, tokens))


def test_the_rope_base_is_verified(hybrid, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(hybrid)
    model.config.rope_theta = 1e4
    with pytest.raises(RuntimeError, match="does not rotate with the config's rope_theta=10000"):
        model.save_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("name", "window"),
    [("Mistral", {}), ("Qwen2", {"use_sliding_window": True}), ("Qwen3", {"use_sliding_window": True})],
)
def test_sliding_windows_of_the_dense_model_are_refused(name, window):
    dense = getattr(transformers, f"{name}Config")(**SMALL, **window)
    with pytest.raises(ValueError, match="sliding_window must be None: what a layer sees is its pattern's; got 4096"):
        getattr(model_integration, f"LongGen{name}Config").from_dense(dense)
