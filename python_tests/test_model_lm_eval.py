"""lm-evaluation-harness on a hybrid: HFLM takes the model object, and generates with the sparse cache."""

import pytest
import torch

pytest.importorskip("lm_eval", reason="lm_eval is not installed (pip install lm_eval)")

import lm_eval
from datasets import Dataset
from lm_eval.models.huggingface import HFLM

from longgen_kernels import AttentionPattern
from model_integration import LongGenCache, LongGenLlamaConfig, LongGenLlamaForCausalLM
from model_integration.data import byte_tokenizer

WINDOW = 24
TASK = {
    "task": "continue",
    "custom_dataset": lambda **_: {
        "test": Dataset.from_list([{"text": "long " * n, "answer": "x"} for n in (40, 25, 31)])
    },
    "test_split": "test",
    "output_type": "generate_until",
    "doc_to_text": "{{text}}",
    "doc_to_target": "{{answer}}",
    "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 12, "do_sample": False},
    "process_results": lambda doc, results: {"length": len(results[0])},
    "metric_list": [{"metric": "length", "aggregation": "mean", "higher_is_better": True}],
}


def make_model(attn_implementation):
    torch.manual_seed(1)
    config = LongGenLlamaConfig(
        vocab_size=len(byte_tokenizer()),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,
        sparse_pattern=AttentionPattern.sink_window(sink=2, window=WINDOW),
        attn_implementation=attn_implementation,
    )
    return LongGenLlamaForCausalLM(config).eval()


def answers(model):
    lm = HFLM(pretrained=model, tokenizer=byte_tokenizer(), batch_size=2, max_length=400)
    results = lm_eval.simple_evaluate(lm, tasks=[TASK], bootstrap_iters=0)
    assert results["results"]["continue"]["sample_len"] == 3
    return [sample["resps"] for sample in results["samples"]["continue"]]


@pytest.fixture
def caches(monkeypatch):
    """Every LongGenCache that is made."""
    made = []
    init = LongGenCache.__init__

    def noted(self, *args, **options):
        made.append(self)
        init(self, *args, **options)

    monkeypatch.setattr(LongGenCache, "__init__", noted)
    return made


def assert_sparse(cache, fewest):
    """The cache saw at least `fewest` tokens; the full layer in the middle has all of them, the others few."""
    kept = cache.tokens_kept().amax((1, 2)).tolist()
    assert kept[1] == cache.get_seq_length() >= fewest
    assert kept[0] == kept[2] == 16 + 48  # sink, and window with the 15 tokens beyond it, rounded up


def test_a_generated_task_uses_the_sparse_cache(caches):
    models = [make_model(implementation) for implementation in ("longgen", "sdpa")]
    got = answers(models[0])
    assert len(caches) == 2  # of two prompts, padded on the left, and of one
    for cache in caches:
        assert_sparse(cache, fewest=100)
    assert got == answers(models[1])
    assert len(caches) == 2


def test_tasks_of_ruler_use_the_sparse_cache(caches, tmp_path):
    """Of the benchmark's tasks two that make their own texts; a list of common words needs 8K bytes at least."""
    pytest.importorskip("wonderwords", reason='the tasks need pip install "lm_eval[ruler]"')
    pytest.importorskip("nltk", reason='the tasks need pip install "lm_eval[ruler]"')
    byte_tokenizer().save_pretrained(tmp_path)
    lm = HFLM(pretrained=make_model("longgen"), tokenizer=byte_tokenizer(), batch_size=1, max_length=8192 + 256)
    sizes = {"tokenizer": str(tmp_path), "max_seq_lengths": [8192]}
    tasks = ["niah_single_1", "ruler_cwe"]
    results = lm_eval.simple_evaluate(lm, tasks=tasks, limit=2, bootstrap_iters=0, metadata=sizes)
    assert [results["results"][task]["8192,none"] for task in tasks] == [0.0, 0.0]  # of random weights
    assert len(caches) == 4
    for cache in caches:
        assert_sparse(cache, fewest=4000)
