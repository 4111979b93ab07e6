"""LongGenCache: `generate` keeps what the patterns can still show, and says the same as a full one."""

import copy
import re

import pytest
import torch
from model_cases import SINK_WINDOW, SMALL, STRIDED, VOCABULARY
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM, set_seed
from transformers.generation.streamers import BaseStreamer

from model_integration import LongGenCache, LongGenLlamaConfig, LongGenLlamaForCausalLM
from model_integration.generate import memory

PROMPT = 150
TOLERANCE = {"rtol": 1e-4, "atol": 5e-5}
OPTIONS = {
    "max_new_tokens": 24,
    "do_sample": False,
    "pad_token_id": 0,
    "eos_token_id": None,
    "return_dict_in_generate": True,
}


@pytest.fixture(scope="module", params=[SINK_WINDOW, STRIDED], ids=["sink_window", "strided"])
def hybrid_dir(request, tmp_path_factory):
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("hybrid")
    config = LongGenLlamaConfig(**SMALL, sparse_pattern=request.param, full_layers=[1])
    LongGenLlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def sparse(hybrid_dir):
    return AutoModelForCausalLM.from_pretrained(hybrid_dir)


@pytest.fixture(scope="module")
def masked(hybrid_dir):
    """The same checkpoint with a cache of every token and masks that hide them."""
    return AutoModelForCausalLM.from_pretrained(hybrid_dir, attn_implementation="sdpa")


@pytest.fixture
def tokens():
    return torch.randint(1, VOCABULARY, (2, PROMPT))  # 0 would be taken for padding


def padding(columns):
    """(2, PROMPT) ones, with zeros in these columns of the first row."""
    real = torch.ones(2, PROMPT, dtype=torch.long)
    real[0, columns] = 0
    return real


def assert_sparse(cache, seen):
    """The cache is in use, of the right length, and the sparse layers hold a fraction of it."""
    assert type(cache) is LongGenCache
    assert cache.get_seq_length() == seen
    kept = cache.tokens_kept()
    assert kept.shape[0] == 4
    for layer, pattern in enumerate(cache.layers):
        if pattern.pattern.is_dense:
            assert kept[layer].max() == seen
        else:
            assert 0 < kept[layer].max() < (0.3 if pattern.pattern == SINK_WINDOW else 0.6) * seen
    # What is allocated, not what is shown: a view would keep the whole prompt in memory.
    allocated = sum(x.untyped_storage().nbytes() for kv in cache.kv for x in (kv.k, kv.v))
    assert cache.nbytes == allocated < 0.75 * cache.full_nbytes


# -- generation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"do_sample": True, "temperature": 0.9, "top_k": 20},
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2, "do_sample": True},
        {"prefill_chunk_size": 33},
        {"prefill_chunk_size": 7},
        {"prompt_lookup_num_tokens": 5},
    ],
    ids=["greedy", "sampling", "beams", "sampled beams", "chunks", "small chunks", "prompt lookup"],
)
def test_generation_says_what_a_masked_full_cache_says(sparse, masked, tokens, how):
    if "prompt_lookup_num_tokens" in how:  # drafts only for one sequence, which has to repeat itself
        tokens = tokens[:1, :15].repeat(1, 10)
    outputs = []
    for model in (sparse, masked):
        set_seed(7)
        outputs.append(model.generate(tokens, **{**OPTIONS, **how}))
    assert outputs[0].sequences.tolist() == outputs[1].sequences.tolist()
    assert type(outputs[1].past_key_values) is DynamicCache
    assert_sparse(outputs[0].past_key_values, seen=PROMPT + OPTIONS["max_new_tokens"] - 1)


@pytest.mark.parametrize("how", [{}, {"num_beams": 2}, {"prefill_chunk_size": 20}], ids=["greedy", "beams", "chunks"])
@pytest.mark.parametrize("pads", [9, 40])  # of the second, the first chunk of the first row is all padding
def test_ragged_prompts(sparse, masked, tokens, how, pads):
    real = padding(slice(pads))
    output = sparse.generate(tokens, attention_mask=real, **OPTIONS, **how)
    expected = masked.generate(tokens, attention_mask=real, **OPTIONS, **how)
    alone = sparse.generate(tokens[:1, pads:], **OPTIONS, **how)
    assert output.sequences.tolist() == expected.sequences.tolist()
    assert output.sequences[0, pads:].tolist() == alone.sequences[0].tolist()
    assert_sparse(output.past_key_values, seen=PROMPT + OPTIONS["max_new_tokens"] - 1)


def test_16_bits(hybrid_dir, tokens):
    """Rounding may tip a draw between two tokens: what is compared are the logits of the same tokens."""
    sparse, masked = (
        AutoModelForCausalLM.from_pretrained(hybrid_dir, attn_implementation=name, dtype=torch.bfloat16)
        for name in ("longgen", "sdpa")
    )
    assert sparse.generate(tokens, **OPTIONS).past_key_values.kv[0].k.dtype == torch.bfloat16
    exact = AutoModelForCausalLM.from_pretrained(hybrid_dir, attn_implementation="sdpa")
    with torch.no_grad():
        cache = LongGenCache(sparse.config)
        chunks = [sparse(chunk, past_key_values=cache).logits for chunk in tokens.split([100, 30, 1, 1, 18], dim=1)]
        want = exact(tokens).logits
        error = (torch.cat(chunks, dim=1).float() - want).square().mean()
        usual = (masked(tokens).logits.float() - want).square().mean()
    assert error < 2 * usual


def test_continuation_with_the_cache_of_an_earlier_call(sparse, masked, tokens):
    more = torch.randint(1, VOCABULARY, (2, 21))
    results = []
    for model in (sparse, masked):
        first = model.generate(tokens, **OPTIONS)
        whole = torch.cat([first.sequences, more], dim=1)
        second = model.generate(whole, past_key_values=first.past_key_values, **OPTIONS)
        assert second.past_key_values is first.past_key_values
        assert second.sequences.tolist() == model.generate(whole, **OPTIONS).sequences.tolist()
        results.append(second)
    assert results[0].sequences.tolist() == results[1].sequences.tolist()
    assert_sparse(results[0].past_key_values, seen=results[0].sequences.shape[1] - 1)


def test_an_assistant_that_is_a_hybrid_too(sparse, masked, tokens):
    torch.manual_seed(2)
    assistant = LongGenLlamaForCausalLM(
        LongGenLlamaConfig.from_dense(sparse.config, num_hidden_layers=2, full_layers=[])
    )
    for draft in (assistant, sparse):  # nearly all its drafts are wrong, or all of them right
        draft.generation_config.num_assistant_tokens = 16
        draft.generation_config.assistant_confidence_threshold = 0.0
        output = sparse.generate(tokens[:1], assistant_model=draft, **OPTIONS)
        assert output.sequences.tolist() == masked.generate(tokens[:1], **OPTIONS).sequences.tolist()
        assert_sparse(output.past_key_values, seen=PROMPT + OPTIONS["max_new_tokens"] - 1)


def test_who_asks_for_another_cache_gets_it(sparse, tokens):
    expected = sparse.generate(tokens, **OPTIONS)
    full = sparse.generate(tokens, cache_implementation="dynamic", **OPTIONS)
    assert type(full.past_key_values) is DynamicCache
    passed = sparse.generate(tokens, past_key_values=DynamicCache(config=sparse.config), **OPTIONS)
    none = sparse.generate(tokens, use_cache=False, **OPTIONS)
    assert none.get("past_key_values") is None
    for other in (full, passed, none):
        assert other.sequences.tolist() == expected.sequences.tolist()


class Lengths(BaseStreamer):
    """Asks the cache at every step what it keeps."""

    def __init__(self, cache):
        self.cache, self.kept = cache, []

    def put(self, value):
        self.kept.append((self.cache.get_seq_length(), self.cache.tokens_kept()))

    def end(self):
        pass


def test_a_sparse_layer_keeps_no_more_when_more_was_seen(sparse, tokens):
    cache = LongGenCache(sparse.config, max_length=400)
    streamer = Lengths(cache)
    sparse.generate(tokens[:1], past_key_values=cache, streamer=streamer, **{**OPTIONS, "max_new_tokens": 100})
    assert [seen for seen, _ in streamer.kept] == [0, *range(PROMPT, PROMPT + 100)]
    assert cache.nbytes < 0.75 * cache.full_nbytes
    if cache.layers[0].pattern == SINK_WINDOW:
        assert {int(kept[0].max()) for _, kept in streamer.kept[1:]} == {16 + 32}
        assert re.fullmatch(
            r"KV cache: \d\.\d\d MiB, 34% of a dense model's \d\.\d\d MiB; "
            r"of 249 tokens it keeps 48 in 3 layers, 249 in 1 layer",
            memory(cache),
        )


# -- forward passes with a cache --------------------------------------------------------------------------------------


def in_chunks(model, cache, tokens, sizes, real=None):
    logits, end = [], cache.get_seq_length()
    with torch.no_grad():
        for chunk in tokens.split(sizes, dim=1):
            end += chunk.shape[1]
            mask = None if real is None else real[:, :end]
            logits.append(model(chunk, past_key_values=cache, attention_mask=mask).logits)
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize(
    "hidden", [[], range(9), range(140, 150), [0, 1, 30, 31, 32, 100]], ids=["none", "left", "right", "scattered"]
)
def test_chunks_of_any_size_with_padding_anywhere(sparse, masked, tokens, hidden):
    real = padding(list(hidden))
    sizes = [60, 1, 16, 17, 5, 51]
    got = in_chunks(sparse, LongGenCache(sparse.config), tokens, sizes, real)
    want = in_chunks(masked, DynamicCache(config=masked.config), tokens, sizes, real)
    assert got.isfinite().all()
    torch.testing.assert_close(got[real.bool()], want[real.bool()], **TOLERANCE)


def test_copies_selections_and_reset(sparse, tokens):
    cache, rest = LongGenCache(sparse.config), tokens[:, 100:]
    expected = in_chunks(sparse, LongGenCache(sparse.config), tokens, [100, 50])[:, 100:]
    in_chunks(sparse, cache, tokens[:, :100], [100])
    torch.testing.assert_close(in_chunks(sparse, copy.deepcopy(cache), rest, [50]), expected, **TOLERANCE)
    more = copy.deepcopy(cache)
    more.batch_repeat_interleave(2)
    rows = torch.tensor([0, 0, 1, 1])
    torch.testing.assert_close(in_chunks(sparse, more, rest[rows], [50]), expected[rows], **TOLERANCE)
    one = copy.deepcopy(cache)
    one.batch_select_indices(torch.tensor([1]))
    torch.testing.assert_close(in_chunks(sparse, one, rest[1:], [50]), expected[1:], **TOLERANCE)
    cache.reset()
    assert cache.get_seq_length() == 0
    torch.testing.assert_close(in_chunks(sparse, cache, tokens, [100, 50])[:, 100:], expected, **TOLERANCE)


def test_crop(sparse, tokens):
    cache = LongGenCache(sparse.config)
    expected = in_chunks(sparse, LongGenCache(sparse.config), tokens, [PROMPT])
    in_chunks(sparse, cache, tokens[:, :100], [100])
    in_chunks(sparse, cache, torch.zeros_like(tokens[:, :16]), [16])  # rejected drafts
    cache.crop(-16)
    assert cache.get_seq_length() == 100
    torch.testing.assert_close(in_chunks(sparse, cache, tokens[:, 100:], [50]), expected[:, 100:], **TOLERANCE)
    with pytest.raises(ValueError, match=r"may need keys that the cache has overwritten.* set num_assistant_tokens"):
        cache.crop(-60)
    assert cache.get_seq_length() == PROMPT
    assert {kv.seqlens.tolist()[0] for kv in cache.kv} == {PROMPT}
    with pytest.raises(ValueError, match="negative number of tokens to remove, down to -150; got 3"):
        cache.crop(3)


def test_crop_does_not_guess_about_padding(sparse, tokens):
    real = padding(slice(9))
    cache = LongGenCache(sparse.config)
    in_chunks(sparse, cache, tokens, [140, 10], real)
    cache.crop(-10)
    real[0, -3:] = 0
    in_chunks(sparse, cache, tokens[:, 140:], [10], real)
    with pytest.raises(ValueError, match="some row has padding up to 150"):
        cache.crop(-2)


# -- what is refused --------------------------------------------------------------------------------------------------


def test_what_the_cache_cannot_do_is_refused(sparse, masked, tokens):
    def cached():
        cache = LongGenCache(sparse.config)
        in_chunks(sparse, cache, tokens, [PROMPT])
        return cache

    more = {"input_ids": tokens[:, :4], "past_key_values": cached()}
    with torch.no_grad():
        with pytest.raises(ValueError, match="attention_mask hides or shows other tokens among the first 150"):
            sparse(**more, attention_mask=torch.cat([padding([3]), torch.ones(2, 4)], dim=1))
        with pytest.raises(ValueError, match="has 4 columns; 150 cached and 4 new tokens need 154"):
            sparse(**more, attention_mask=torch.ones(2, 4))
        for packing in ({"position_ids": torch.tensor([[0, 1, 0, 1]])}, {"cu_seq_lens_q": torch.tensor([0, 2, 8])}):
            with pytest.raises(ValueError, match="packed sequences cannot be cached together"):
                sparse(tokens[:, :4], past_key_values=LongGenCache(sparse.config), **packing)
        with pytest.raises(ValueError, match='only serves LongGen hybrids with attn_implementation="longgen"'):
            masked(**more)
        with pytest.raises(ValueError, match='only serves LongGen hybrids with attn_implementation="longgen"'):
            LlamaForCausalLM(LlamaConfig(**SMALL))(**more)
        other = LongGenCache(LongGenLlamaConfig.from_dense(sparse.config, full_layers=[2]))
        with pytest.raises(ValueError, match="layer 1 has another pattern"):
            sparse(tokens, past_key_values=other)
    with pytest.raises(RuntimeError, match=r"no gradient: call the model under torch.no_grad\(\)"):
        sparse(tokens, past_key_values=LongGenCache(sparse.config))


def test_training_is_as_before(sparse, masked, tokens):
    """`use_cache` is on by default there, and must not cut the gradient."""
    gradients = []
    for model in (sparse, masked):
        output = model(tokens, labels=tokens)
        assert type(output.past_key_values) is DynamicCache
        output.loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
        model.zero_grad()
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-5)
