"""LongGenLlamaForCausalLM: the same sparse model under every implementation, padding, packing and cache."""

import pytest
import torch
from model_cases import SINK_WINDOW, SMALL, STRIDED, VOCABULARY
from torch.nn.functional import pad
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DataCollatorWithFlattening,
    DynamicCache,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    StaticCache,
)
from transformers.masking_utils import create_causal_mask

from model_integration import LongGenLlamaConfig, LongGenLlamaForCausalLM
from model_integration.layout import SequenceLayout
from model_integration.training.activations import recompute_activations

IMPLEMENTATIONS = ["longgen", "sdpa", "eager"]
LENGTH = 41
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(scope="module")
def llama_dir(tmp_path_factory):
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(LlamaConfig(**SMALL)).save_pretrained(path)
    return path


@pytest.fixture(scope="module", params=[SINK_WINDOW, STRIDED], ids=["sink_window", "strided"])
def hybrid_dir(request, llama_dir, tmp_path_factory):
    path = tmp_path_factory.mktemp("hybrid")
    config = LongGenLlamaConfig.from_dense(LlamaConfig(**SMALL), sparse_pattern=request.param, full_layers=[1])
    LongGenLlamaForCausalLM.from_pretrained(llama_dir, config=config).save_pretrained(path)
    return path


@pytest.fixture(scope="module", params=IMPLEMENTATIONS)
def hybrid(request, hybrid_dir):
    return AutoModelForCausalLM.from_pretrained(hybrid_dir, attn_implementation=request.param)


@pytest.fixture
def tokens():
    return torch.randint(0, VOCABULARY, (2, LENGTH))


def logits(model, tokens, **kwargs):
    with torch.no_grad():
        return model(tokens, **kwargs).logits


# -- loading and saving -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_hybrid_of_full_layers_is_the_llama_checkpoint(llama_dir, tokens, implementation):
    config = LongGenLlamaConfig.from_dense(LlamaConfig(**SMALL), full_ratio=1.0)
    llama = LlamaForCausalLM.from_pretrained(llama_dir, attn_implementation=implementation)
    same, info = LongGenLlamaForCausalLM.from_pretrained(
        llama_dir, config=config, attn_implementation=implementation, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert list(same.state_dict()) == list(llama.state_dict())
    assert torch.equal(logits(same, tokens), logits(llama, tokens))


def test_full_layers_under_longgen_match_llama(llama_dir, tokens):
    config = LongGenLlamaConfig.from_dense(LlamaConfig(**SMALL), full_ratio=1.0)
    hybrid = LongGenLlamaForCausalLM.from_pretrained(llama_dir, config=config)
    torch.testing.assert_close(logits(hybrid, tokens), logits(LlamaForCausalLM.from_pretrained(llama_dir), tokens))


def test_a_reload_is_the_same_hybrid(hybrid_dir, tmp_path, tokens):
    """`attn_implementation` is never saved: a reload without it must come up as longgen, and sparse."""
    first = AutoModelForCausalLM.from_pretrained(hybrid_dir)
    first.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is LongGenLlamaForCausalLM
    assert again.config._attn_implementation == "longgen"
    assert again.config.layer_patterns == first.config.layer_patterns
    assert torch.equal(logits(again, tokens), logits(first, tokens))
    again.set_attn_implementation("sdpa")
    torch.testing.assert_close(logits(again, tokens), logits(first, tokens), **TOLERANCE)


def test_a_reload_is_bit_identical(hybrid, llama_dir, tmp_path, tokens):
    """Under every implementation, and sparse."""
    hybrid.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=hybrid.config._attn_implementation)
    assert torch.equal(logits(again, tokens), logits(hybrid, tokens))
    dense = logits(LlamaForCausalLM.from_pretrained(llama_dir), tokens)
    assert (logits(again, tokens) - dense).abs().max() > 1.0


@pytest.mark.parametrize("implementation", ["flash_attention_2", "paged|eager", "unheard_of"])
def test_implementations_that_would_run_dense_are_refused(hybrid_dir, implementation):
    with pytest.raises(ValueError, match="cannot run sparse layers"):
        AutoModelForCausalLM.from_pretrained(hybrid_dir, attn_implementation=implementation)
    model = AutoModelForCausalLM.from_pretrained(hybrid_dir)
    if implementation != "unheard_of":  # transformers itself refuses it then
        with pytest.raises(ValueError, match="cannot run sparse layers"):
            model.set_attn_implementation(implementation)
    assert model.config._attn_implementation == "longgen"


@pytest.mark.parametrize("implementation", ["longgen", "eager", "flex_attention"])
def test_continuous_batching_is_refused(hybrid_dir, tokens, implementation):
    """Its attention functions take no masks. With sdpa it starts, and the model refuses the cache: see below."""
    model = AutoModelForCausalLM.from_pretrained(hybrid_dir, attn_implementation=implementation)
    options = GenerationConfig(max_new_tokens=2, do_sample=False, eos_token_id=1, pad_token_id=0)
    with pytest.raises(ValueError, match=r"not supported for continuous batching|cannot run sparse layers"):
        model.generate_batch(inputs=[tokens[0].tolist()], generation_config=options)
    assert model.config._attn_implementation == implementation


def test_longgen_needs_a_pattern(llama_dir, tokens):
    with pytest.raises(TypeError, match="LlamaAttention has no attention pattern"):
        LlamaForCausalLM.from_pretrained(llama_dir, attn_implementation="longgen")(tokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rope_base_reaches_the_frequencies(hybrid_dir, dtype):
    model = AutoModelForCausalLM.from_pretrained(hybrid_dir, rope_theta=5e6, dtype=dtype)
    head_dim = model.config.head_dim
    expected = 5e6 ** -(torch.arange(0, head_dim, 2) / head_dim)
    torch.testing.assert_close(model.model.rotary_emb.inv_freq, expected)
    assert model.config.rope_parameters["rope_theta"] == 5e6


def test_a_config_edited_too_late_is_noticed(hybrid_dir, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(hybrid_dir)
    model.config.rope_theta = 5e6
    with pytest.raises(RuntimeError, match=r"does not rotate with the config's rope_theta=5e\+06"):
        model.save_pretrained(tmp_path)


def test_a_base_that_is_lost_while_loading_is_noticed(hybrid_dir, monkeypatch):
    """No checkpoint holds the frequencies, so only a look at them tells."""
    load = PreTrainedModel.from_pretrained.__func__

    def late(cls, *args, **kwargs):
        model = load(cls, *args, **kwargs)
        model.config.rope_theta = 5e6  # as a stock config takes it: after the model was built
        return model

    assert not any("inv_freq" in name for name in AutoModelForCausalLM.from_pretrained(hybrid_dir).state_dict())
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(late))
    with pytest.raises(RuntimeError, match=r"does not rotate with the config's rope_theta=5e\+06"):
        AutoModelForCausalLM.from_pretrained(hybrid_dir)


# -- sparsity ---------------------------------------------------------------------------------------------------------


def test_every_implementation_gives_the_same_logits(hybrid, hybrid_dir, llama_dir, tokens):
    expected = logits(AutoModelForCausalLM.from_pretrained(hybrid_dir), tokens)
    torch.testing.assert_close(logits(hybrid, tokens), expected, **TOLERANCE)
    dense = logits(LlamaForCausalLM.from_pretrained(llama_dir), tokens)
    assert (dense - expected).abs().max() > 1.0


def attended_alone(model, layer, inputs_embeds):
    """What the attention of one layer puts out when it is the model's only layer."""
    outputs = []
    handle = layer.self_attn.register_forward_hook(lambda _module, _inputs, output: outputs.append(output[0]))
    layers, model.layers = model.layers, torch.nn.ModuleList([layer])
    with torch.no_grad():
        model(inputs_embeds=inputs_embeds, use_cache=False)
    model.layers = layers
    handle.remove()
    return outputs[0]


def test_sparse_layers_do_not_see_invisible_tokens(hybrid, tokens):
    """A changed token changes a layer's output exactly where the layer's pattern sees it in some head."""
    place = 9
    changed = tokens.clone()
    changed[:, place] = (changed[:, place] + 1) % VOCABULARY
    model = hybrid.model
    for layer, pattern in zip(model.layers, hybrid.config.layer_patterns, strict=True):
        before, after = (attended_alone(model, layer, model.embed_tokens(t)) for t in (tokens, changed))
        differs = (before - after).abs().amax((0, 2)) > 1e-6
        assert torch.equal(differs, pattern.visible(LENGTH, heads=2)[:, :, place].any(0))


def test_flex_mask_is_the_same_mask():
    """FlexAttention's own masks, which it evaluates per head: transformers' helper would only ask about head 0."""
    from model_integration.attention import attention_mask_for

    padding = torch.ones(2, 40, dtype=torch.long)
    padding[0, :5] = 0
    for layout in (
        SequenceLayout.of(2, 40),
        SequenceLayout.of(2, 40, attention_mask=padding),
        SequenceLayout.of(2, 3, seen=37, attention_mask=padding),
        SequenceLayout.of(1, 40, cu_seq_lens=torch.tensor([0, 9, 40])),
    ):
        like = torch.zeros(1)
        dense = attention_mask_for("sdpa", layout, STRIDED, heads=4, kv_heads=2, like=like)
        flex = attention_mask_for("flex_attention", layout, STRIDED, heads=4, kv_heads=2, like=like)
        b, h, q, k = (torch.arange(n) for n in (dense.shape[0], 4, layout.q_length, layout.kv_length))
        seen = flex.mask_mod(b[:, None, None, None], h[None, :, None, None], q[None, None, :, None], k)
        assert torch.equal(seen.expand_as(dense), dense)


@pytest.mark.gpu
def test_flex_attention_is_the_same_model(hybrid_dir, tokens):
    models = [
        AutoModelForCausalLM.from_pretrained(hybrid_dir, attn_implementation=name).to("cuda")
        for name in ("longgen", "flex_attention")
    ]
    tokens, real = tokens.to("cuda"), torch.ones_like(tokens, device="cuda")
    real[0, :5] = 0
    for mask, rows in ((None, slice(None)), (real, slice(5, None))):
        longgen, flex = (logits(m, tokens, attention_mask=mask)[:, rows] for m in models)
        torch.testing.assert_close(flex, longgen, rtol=2e-2, atol=2e-2)


def test_transformers_own_mask_helper_keeps_the_padding(hybrid_dir, tokens):
    """A name without a mask function gets None from it, and padding would be lost without a word."""
    config = AutoConfig.from_pretrained(hybrid_dir)
    config._attn_implementation = "longgen"
    real = torch.ones_like(tokens)
    inputs = {"inputs_embeds": torch.zeros(*tokens.shape, 1), "past_key_values": None}
    assert create_causal_mask(config, attention_mask=real, **inputs) is None
    real[0, :5] = 0
    assert torch.equal(create_causal_mask(config, attention_mask=real, **inputs), real.bool())


# -- padding and packing ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(hybrid, tokens, side):
    real = torch.ones_like(tokens)
    pads = 6
    inside = slice(pads, None) if side == "left" else slice(None, -pads)
    real[0] = 0
    real[0, inside] = 1
    padded = logits(hybrid, tokens, attention_mask=real)
    assert padded.isfinite().all()
    torch.testing.assert_close(padded[:1, inside], logits(hybrid, tokens[:1, inside]), **TOLERANCE)
    torch.testing.assert_close(padded[1:], logits(hybrid, tokens[1:]), **TOLERANCE)


@pytest.mark.parametrize("how", ["position_ids", "cu_seq_lens"])
@pytest.mark.parametrize("use_cache", [False, True])  # stock Llama loses packing without a word when a cache is made
def test_packed_sequences_do_not_see_each_other(hybrid, tokens, how, use_cache):
    lengths = [1, 22, 18]
    parts = tokens[:1].split(lengths, dim=1)
    collator = DataCollatorWithFlattening(return_position_ids=how == "position_ids", return_flash_attn_kwargs=True)
    batch = collator([{"input_ids": part[0]} for part in parts])
    if how == "position_ids":
        for name in ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"):
            del batch[name]
    del batch["labels"]
    packed = logits(hybrid, batch.pop("input_ids"), use_cache=use_cache, **batch)
    torch.testing.assert_close(packed, torch.cat([logits(hybrid, p) for p in parts], dim=1), **TOLERANCE)


def test_packed_rows_of_a_batch(hybrid, tokens):
    position_ids = torch.stack([torch.cat([torch.arange(n), torch.arange(LENGTH - n)]) for n in (13, 30)])
    packed = logits(hybrid, tokens, position_ids=position_ids)
    for row, n in enumerate((13, 30)):
        parts = tokens[row : row + 1].split([n, LENGTH - n], dim=1)
        alone = torch.cat([logits(hybrid, p) for p in parts], dim=1)
        torch.testing.assert_close(packed[row : row + 1], alone, **TOLERANCE)


def test_gradients_of_packed_and_padded_batches_agree(hybrid, tokens):
    """Two sequences as a packed row and as rows padded on either side: one loss, one gradient."""
    lengths = [17, 24]
    parts = tokens[:1].split(lengths, dim=1)
    gradients = []
    for layout in ("packed", "left", "right"):
        hybrid.zero_grad()
        if layout == "packed":
            position_ids = torch.cat([torch.arange(n) for n in lengths])[None]
            labels = tokens[:1].clone()
            labels[0, lengths[0]] = -100
            loss = hybrid(tokens[:1], position_ids=position_ids, labels=labels, use_cache=False).loss
        else:
            width = max(lengths)
            pads = [(width - n, 0) if layout == "left" else (0, width - n) for n in lengths]
            ids = torch.cat([pad(part, p) for part, p in zip(parts, pads, strict=True)])
            mask = torch.cat([pad(torch.ones_like(part), p) for part, p in zip(parts, pads, strict=True)])
            labels = ids.masked_fill(mask == 0, -100)
            if layout == "left":
                labels[0, width - lengths[0]] = -100  # predicted from a pad
            loss = hybrid(ids, attention_mask=mask, labels=labels, use_cache=False).loss
        loss.backward()
        gradients.append({name: p.grad.clone() for name, p in hybrid.named_parameters()})
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], rtol=1e-3, atol=1e-5)
    hybrid.zero_grad()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attention_mask": torch.ones(2, 1, LENGTH, LENGTH)}, "must be 2-D"),
        ({"attention_mask": torch.ones(2, LENGTH - 1)}, "has 40 columns"),
        ({"cu_seq_lens_q": torch.tensor([0, 5, 40])}, "ends at 40, but there are 82 tokens"),
        ({"cache": object()}, "continuous batching"),
        ({"cache": DynamicCache(), "past_key_values": DynamicCache()}, "by one name"),
    ],
)
def test_ambiguous_masks_are_refused(hybrid, tokens, arguments, message):
    with pytest.raises(ValueError, match=message):
        hybrid(tokens, **arguments)


def test_packing_inside_left_padding_is_refused(hybrid, tokens):
    real = torch.ones_like(tokens)
    real[0, :4] = 0
    position_ids = torch.cat([torch.arange(20), torch.arange(LENGTH - 20)])[None]
    with pytest.raises(ValueError, match=r"packed sequences .* need rows without left padding"):
        hybrid(tokens, attention_mask=real, position_ids=position_ids)


def test_packing_behind_a_cache_is_refused(hybrid, tokens):
    cache = hybrid(tokens, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="an empty cache"):
        hybrid(tokens[:, :4], past_key_values=cache, position_ids=torch.tensor([[41, 42, 0, 1]]))


# -- caches and generation --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache_class", [DynamicCache, StaticCache])
def test_chunks_behind_a_cache_match_one_pass(hybrid, tokens, cache_class):
    config = hybrid.config
    cache = DynamicCache(config=config) if cache_class is DynamicCache else StaticCache(config=config, max_cache_len=64)
    chunks = [logits(hybrid, chunk, past_key_values=cache) for chunk in tokens.split([20, 1, 13, 7], dim=1)]
    torch.testing.assert_close(torch.cat(chunks, dim=1), logits(hybrid, tokens), **TOLERANCE)


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"cache_implementation": "static", "disable_compile": True}])
def test_generation_is_the_same_everywhere(hybrid, hybrid_dir, tokens, how):
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    padded = torch.ones_like(tokens)
    padded[0, :9] = 0
    sequences = hybrid.generate(tokens, attention_mask=padded, **options, **how)
    alone = hybrid.generate(tokens[:1, 9:], **options, **how)
    assert sequences[0, 9:].tolist() == alone[0].tolist()
    longgen = AutoModelForCausalLM.from_pretrained(hybrid_dir)
    assert sequences.tolist() == longgen.generate(tokens, attention_mask=padded, **options, **how).tolist()


# -- training ---------------------------------------------------------------------------------------------------------


def test_gradient_checkpointing_changes_nothing(hybrid, tokens):
    gradients = []
    hybrid.train()
    for checkpointing in (False, True):
        hybrid.zero_grad()
        if checkpointing:
            recompute_activations(hybrid)
        assert {layer.gradient_checkpointing for layer in hybrid.model.layers} == {checkpointing}
        hybrid(tokens, labels=tokens, use_cache=False).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in hybrid.named_parameters()})
    recompute_activations(hybrid, on=False)
    hybrid.eval()
    hybrid.zero_grad()
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=0)


class Counted(TorchDispatchMode):
    """How often attention is computed, whoever computes it."""

    OPERATORS = (
        torch.ops.longgen_kernels.attn_fwd.default,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    )

    def __init__(self):
        super().__init__()
        self.times = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.times += operator in self.OPERATORS
        return operator(*args, **(kwargs or {}))


def test_kept_attention_of_full_layers_is_not_computed_again(hybrid, tokens):
    hybrid.train()
    gradients, times = [], []
    for kept in (False, True):
        hybrid.zero_grad()
        recompute_activations(hybrid, keep_attention=kept)
        with Counted() as counted:
            hybrid(tokens, labels=tokens, use_cache=False).loss.backward()
        times.append(counted.times)
        gradients.append({name: p.grad.clone() for name, p in hybrid.named_parameters()})
    recompute_activations(hybrid, on=False)
    hybrid.eval()
    hybrid.zero_grad()
    layers, full = hybrid.config.num_hidden_layers, len(hybrid.config.full_layers)
    whose = hybrid.config._attn_implementation  # others consist of operators that are not attention's alone
    assert times == ([2 * layers, 2 * layers - full] if whose in ("longgen", "sdpa") else [0, 0])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=0)


def test_autocast(hybrid, tokens):
    """RoPE leaves q and k in fp32 there, v is bf16."""
    with torch.autocast("cpu", torch.bfloat16):
        loss = hybrid(tokens, labels=tokens).loss
    loss.backward()
    hybrid.zero_grad()
    expected = hybrid(tokens, labels=tokens).loss
    assert abs(loss.item() - expected.item()) < 0.05 * expected.item()
