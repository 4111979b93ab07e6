"""GraphDecoder, and `generate` with its steps: the same tokens, with one captured step replayed."""

import copy
from unittest import mock

import pytest
import torch
from model_cases import SINK_WINDOW, SMALL, STRIDED, VOCABULARY
from transformers import CompileConfig, DynamicCache, GenerationConfig, set_seed
from transformers.generation.streamers import BaseStreamer

from longgen_kernels import SparseKVCache
from model_integration import (
    GraphDecoder,
    LongGenCache,
    LongGenLlamaConfig,
    LongGenLlamaForCausalLM,
    decoding,
)
from model_integration.cache_name import CACHE_NAME

PROMPT = 150
OPTIONS = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
PATTERNS = [SINK_WINDOW, STRIDED]


def make_model(pattern=PATTERNS[0], **changes):
    torch.manual_seed(1)
    config = LongGenLlamaConfig(**{**SMALL, **changes}, sparse_pattern=pattern, full_layers=[1])
    return LongGenLlamaForCausalLM(config).eval()


@pytest.fixture(scope="module", params=PATTERNS, ids=["sink_window", "strided"])
def model(request):
    return make_model(request.param)


@pytest.fixture
def tokens():
    return torch.randint(1, VOCABULARY, (2, PROMPT))


class Graphs:
    """Stands in for `captured` on a CPU: a capture changes the host's counts alone, a replay the tensors alone."""

    def __init__(self):
        self.captures = self.replays = 0

    def captured(self, call, device):
        self.captures += 1
        cache = call.__self__.cache
        before = [copy.deepcopy(kv.state_dict()) for kv in cache.kv]
        static = call()
        for kv, state in zip(cache.kv, before, strict=True):
            for name in ("k", "v", "seqlens"):
                getattr(kv, name).copy_(state[name])
        static.fill_(torch.nan)

        def replay():
            self.replays += 1
            host = [(layer.seen, layer.kv._longest, layer.kv._cropped) for layer in cache.layers]
            with mock.patch.object(SparseKVCache, "reserve"):  # a graph makes no room
                static.copy_(call())
            for layer, (seen, longest, cropped) in zip(cache.layers, host, strict=True):
                layer.seen, layer.kv._longest, layer.kv._cropped = seen, longest, cropped
            return static

        return replay


@pytest.fixture
def graphs(monkeypatch):
    graphs = Graphs()
    monkeypatch.setattr(decoding, "captured", graphs.captured)
    init = GraphDecoder.__init__

    def capturing(self, model, cache):
        init(self, model, cache)
        self._captures = True

    monkeypatch.setattr(GraphDecoder, "__init__", capturing)

    def on_a_gpu(model, model_kwargs, generation_config):
        return isinstance(model_kwargs.get(CACHE_NAME), LongGenCache) and not generation_config.disable_compile

    monkeypatch.setattr(LongGenLlamaForCausalLM, "_valid_auto_compile_criteria", on_a_gpu)
    return graphs


def prefilled(model, tokens, max_length=PROMPT + 50):
    cache = LongGenCache(model.config, max_length=max_length)
    with torch.no_grad():
        return cache, model(tokens, past_key_values=cache).logits[:, -1].argmax(-1)


def host_counts(cache):
    return [(layer.seen, layer.kv._longest, layer.kv.max_seqlen) for layer in cache.layers]


class Collected(BaseStreamer):
    def __init__(self):
        self.tokens, self.ended = [], False

    def put(self, value):
        self.tokens.append(value.tolist())

    def end(self):
        self.ended = True


# -- steps ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("room", [PROMPT + 50, PROMPT, PROMPT + 3], ids=["room", "grows at once", "grows later"])
def test_steps_are_those_of_the_model(model, tokens, graphs, room):
    cache, token = prefilled(model, tokens, room)
    usual, _ = prefilled(model, tokens, room)
    decoder = GraphDecoder(model, cache)
    for _ in range(10):
        with torch.no_grad():
            expected = model(token[:, None], past_key_values=usual).logits[:, -1]
        got = decoder.step(token)
        torch.testing.assert_close(got, expected, rtol=0, atol=0)
        token = expected.argmax(-1)
        assert host_counts(cache) == host_counts(usual)
        assert [kv.seqlens.tolist() for kv in cache.kv] == [kv.seqlens.tolist() for kv in usual.kv]
    # A capture for each piece of memory that saw a second step; the step before it compiles and is not replayed.
    assert (graphs.captures, graphs.replays) == {PROMPT + 3: (2, 8)}.get(room, (1, 9))


def test_the_cache_may_be_used_between_steps(model, tokens, graphs):
    cache, token = prefilled(model, tokens)
    usual, _ = prefilled(model, tokens)
    decoder = GraphDecoder(model, cache)

    def step():
        with torch.no_grad():
            expected = model(token[:, None], past_key_values=usual).logits[:, -1]
        torch.testing.assert_close(decoder.step(token), expected, rtol=0, atol=0)

    for _ in range(4):
        step()
    for each in (cache, usual):
        each.crop(-3)
        with torch.no_grad():
            model(tokens[:, :20], past_key_values=each)
    step()
    for each in (cache, usual):
        each.reorder_cache(torch.tensor([1, 1]))
    step()
    assert graphs.captures == 1
    assert host_counts(cache) == host_counts(usual)


def test_without_a_gpu_each_step_is_computed(model, tokens):
    cache, token = prefilled(model, tokens)
    decoder = GraphDecoder(model, cache)
    for _ in range(3):
        decoder.step(token[:, None])
    assert cache.get_seq_length() == PROMPT + 3
    assert decoder._replay is None


# -- generation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"do_sample": True, "temperature": 0.9, "top_k": 20, "top_p": 0.9},
        {"do_sample": True, "num_return_sequences": 2},
        {"prefill_chunk_size": 33},
        {"repetition_penalty": 1.3},
        {"max_new_tokens": 1},
        {"max_new_tokens": 2},
        {"eos_token_id": list(range(1, VOCABULARY, 9)), "do_sample": True},
        {"output_scores": True, "output_logits": True},
    ],
    ids=["greedy", "sampling", "several samples", "chunks", "penalty", "one token", "two", "end of text", "scores"],
)
@pytest.mark.parametrize("pads", [0, 9])
def test_generation_says_the_same_with_a_graph(model, tokens, graphs, how, pads):
    real = torch.ones_like(tokens)
    real[0, :pads] = 0
    options = {**OPTIONS, "return_dict_in_generate": True, **how}
    rows = tokens[:1] if "num_return_sequences" in how else tokens
    options["attention_mask"] = real[: len(rows)]
    results = []
    for without in (True, False):
        set_seed(7)
        results.append(model.generate(rows, disable_compile=without, **options))
    assert results[0].sequences.tolist() == results[1].sequences.tolist()
    for name in ("scores", "logits"):
        torch.testing.assert_close(results[0].get(name), results[1].get(name), rtol=0, atol=0)
    caches = [result[CACHE_NAME] for result in results]
    assert type(caches[1]) is LongGenCache
    assert host_counts(caches[0]) == host_counts(caches[1])
    # The model's own step checks mask and positions, the decoder's first is not captured yet.
    replays = max(0, results[0].sequences.shape[1] - PROMPT - 3)
    assert (graphs.captures, graphs.replays) == (int(replays > 0), replays)


def test_streams_what_generate_streams(model, tokens, graphs):
    streams = []
    for without in (True, False):
        streams.append(Collected())
        model.generate(tokens[:1], streamer=streams[-1], disable_compile=without, **OPTIONS)
    assert streams[0].tokens == streams[1].tokens
    assert len(streams[1].tokens) == 1 + OPTIONS["max_new_tokens"]
    assert streams[0].ended and streams[1].ended
    assert graphs.replays > 0


def test_continues_with_the_cache_of_an_earlier_call(model, tokens, graphs):
    options = {**OPTIONS, "return_dict_in_generate": True}
    first = model.generate(tokens, **options)
    longer = torch.cat([first.sequences, tokens[:, :21]], dim=1)
    second = model.generate(longer, **{CACHE_NAME: first[CACHE_NAME]}, **options)
    assert second[CACHE_NAME] is first[CACHE_NAME]
    assert second.sequences.tolist() == model.generate(longer, disable_compile=True, **options).sequences.tolist()
    assert graphs.captures == 2


@pytest.mark.parametrize(
    "how",
    [
        {"num_beams": 2},
        {"prompt_lookup_num_tokens": 3},
        {"use_cache": False},
        {"cache_implementation": "dynamic"},
        {"output_hidden_states": True, "return_dict_in_generate": True},
    ],
    ids=lambda how: next(iter(how)),
)
def test_other_ways_of_generating_take_the_models_own_steps(how, tokens, graphs):
    model, results = make_model(), []
    for without in (True, False):
        output = model.generate(tokens[:1], **OPTIONS, **how, disable_compile=without)
        results.append(output.tolist() if isinstance(output, torch.Tensor) else output.sequences.tolist())
    assert results[0] == results[1]
    # Of prompt lookup, transformers compiles steps of a single token from 5.24 on.
    assert graphs.captures == 0 or "prompt_lookup_num_tokens" in how


def test_position_ids_that_do_not_count_the_tokens_are_obeyed(model, tokens, graphs):
    """A graph's positions are the cache's lengths; a caller's own gap before the prompt is not there to be seen."""
    positions = torch.arange(PROMPT)[None].expand(2, -1) + 40
    results = [
        model.generate(tokens, position_ids=positions, disable_compile=without, **OPTIONS).tolist()
        for without in (True, False)
    ]
    assert results[0] == results[1]
    assert graphs.captures == 0


def test_when_generate_takes_a_graph(monkeypatch):
    hybrid, masked = make_model(), make_model(attn_implementation="sdpa")
    sparse, dense = {CACHE_NAME: LongGenCache(hybrid.config)}, {CACHE_NAME: DynamicCache()}

    def takes(model, cache, **options):
        return model._valid_auto_compile_criteria(cache, GenerationConfig(**options))

    assert not takes(hybrid, sparse)
    monkeypatch.setattr(LongGenLlamaForCausalLM, "device", torch.device("cuda"))
    assert takes(hybrid, sparse)
    assert not takes(hybrid, dense)
    assert not takes(masked, sparse)
    assert not takes(hybrid, sparse, disable_compile=True)
    assert not takes(hybrid, sparse, compile_config=CompileConfig())


# -- what is refused --------------------------------------------------------------------------------------------------


def test_models_whose_step_cannot_be_captured_are_refused(tokens):
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    for model, message in (
        (make_model(attn_implementation="sdpa"), "attn_implementation='sdpa' keeps every token"),
        (make_model(rope_parameters=dynamic), "rope_type='dynamic' changes its frequencies with the length"),
    ):
        with pytest.raises(NotImplementedError, match=message):
            GraphDecoder(model, LongGenCache(model.config))
        assert model.generate(tokens, **OPTIONS).shape == (2, PROMPT + OPTIONS["max_new_tokens"])


def test_bad_arguments(tokens):
    model = make_model()
    with pytest.raises(TypeError, match="model must be a LongGen hybrid with a language-modelling head, got Linear"):
        GraphDecoder(torch.nn.Linear(1, 1), LongGenCache(model.config))
    with pytest.raises(TypeError, match="cache must be a LongGenCache, got DynamicCache"):
        GraphDecoder(model, DynamicCache(config=model.config))
    with pytest.raises(ValueError, match="cache is empty: let the model read the prompt"):
        GraphDecoder(model, LongGenCache(model.config))
    cache, token = prefilled(model, tokens)
    decoder = GraphDecoder(model, cache)
    for wrong in (token[:1], token.int(), token[None]):
        with pytest.raises(ValueError, match=r"tokens must be int64 \(2,\), got torch.int"):
            decoder.step(wrong)
    assert cache.get_seq_length() == PROMPT


# -- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("pattern", PATTERNS, ids=["sink_window", "strided"])
@pytest.mark.parametrize("pads", [0, 9])
def test_captured_steps_are_those_of_the_model(pattern, pads):
    """Real captures: of the model's own kernels, with growth between two graphs, ragged rows, and in `generate`."""
    model = make_model(pattern, head_dim=64).to("cuda", torch.bfloat16)
    tokens = torch.randint(1, VOCABULARY, (2, PROMPT), device="cuda")
    real = torch.ones_like(tokens)
    real[0, :pads] = 0
    caches = [LongGenCache(model.config, max_length=PROMPT + 5) for _ in range(2)]
    with torch.no_grad():
        token, _ = (
            model(tokens, attention_mask=real, past_key_values=each).logits[:, -1].argmax(-1) for each in caches
        )
        decoder, mask = GraphDecoder(model, caches[0]), real
        for _ in range(30):
            mask = torch.cat([mask, mask.new_ones(2, 1)], dim=1)
            positions = mask.sum(1, keepdim=True) - 1
            expected = model(
                token[:, None], attention_mask=mask, position_ids=positions, past_key_values=caches[1]
            ).logits[:, -1]
            torch.testing.assert_close(decoder.step(token), expected, rtol=0, atol=0)
            token = expected.argmax(-1)
    assert decoder._replay is not None
    assert host_counts(caches[0]) == host_counts(caches[1])
    assert [kv.seqlens.tolist() for kv in caches[0].kv] == [kv.seqlens.tolist() for kv in caches[1].kv]
    for how in ({}, {"do_sample": True, "top_k": 20}):
        results = []
        for without in (True, False):
            set_seed(7)
            options = {**OPTIONS, **how, "disable_compile": without}
            with mock.patch.object(decoding, "captured", wraps=decoding.captured) as capture:
                results.append(model.generate(tokens, attention_mask=real, **options).tolist())
            assert capture.call_count == int(not without)
        assert results[0] == results[1]
