"""Context parallelism and train_parallel: what ranks need, what they send, and that together they equal one process."""

import json
import shutil
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import parallel_cases
import pytest
import torch
from parallel_cases import (
    BLOCKS,
    CASES,
    CONTINUED,
    FIRST_RUN,
    SINK_WINDOW,
    STRIDED,
    WIDE,
    run_directory,
    spawn,
    training_options,
)
from torch.nn.utils import get_total_norm
from transformers import AutoModelForCausalLM

from longgen_kernels import AttentionPattern
from model_integration import LongGenLlamaConfig, LongGenLlamaForCausalLM
from model_integration.context_parallel import SequenceShard, Sharding
from model_integration.context_parallel.__main__ import traffic_table
from model_integration.context_parallel.heads import head_ranges
from model_integration.context_parallel.needs import EarlierKeys, needs_of
from model_integration.context_parallel.shard import cheaper_exchange
from model_integration.context_parallel.traffic import bytes_by_heads, bytes_by_keys
from model_integration.data import DataError, TokenBlocks, byte_tokenizer
from model_integration.finetune import build_model, load_documents, load_tokenizer
from model_integration.train_parallel import main, parse_parallel_arguments
from model_integration.training.parallel_trainer import sequences_of_step
from model_integration.training.reporting import BITS_PER_BYTE
from model_integration.training.sharded_checkpoint import load_checkpoint

PATTERNS = {
    "sink and window": SINK_WINDOW,
    "strided, phases": STRIDED,
    "blocks, phases": BLOCKS,
    "wide": WIDE,
    "sink alone outlives the window": AttentionPattern.sink_window(sink=9, window=1),
    "strided, one phase": AttentionPattern.strided(2, 8, window=3, head_phase_step=0),
    "dense": AttentionPattern.causal(),
}
RUNS = [(1, 2), (3, 20), (8, 9), (16, 40), (31, 33), (40, 64)]


# -- what a rank needs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start_stop", RUNS, ids=str)
@pytest.mark.parametrize("name", PATTERNS)
def test_earlier_keys_are_those_that_the_pattern_shows(name, start_stop):
    (start, stop), pattern, heads = start_stop, PATTERNS[name], 3
    keys = EarlierKeys.of(pattern, start, stop, heads)
    visible = pattern.visible(stop - start, start, heads=heads, q_start=start)  # (heads, queries, keys)
    window, far = visible[..., keys.window_start :], visible[..., : keys.window_start]
    assert torch.equal(far, keys.far[:, None].expand_as(far)), "every query sees the far keys, and no other before"
    assert window.any(1).any(0).all(), "no key of the window is sent for nothing"


def test_only_cache_friendly_patterns_can_be_sharded():
    with pytest.raises(ValueError, match="needs a causal pattern"):
        EarlierKeys.of(AttentionPattern.bidirectional(), 4, 8, 1)


@pytest.mark.parametrize("name", PATTERNS)
def test_needs_are_the_visible_keys_of_other_ranks(name):
    """Over two packed rows, by the mask of the whole batch."""
    pattern, heads, length = PATTERNS[name], 2, 27
    sharding = Sharding.of(2, length, 4, cu_seq_lens=torch.tensor([0, 2, 27, 31, 54], dtype=torch.int32))
    mask = torch.zeros(heads, 2 * length, 2 * length, dtype=torch.bool)
    for begin, end in pairwise(sharding.documents):
        mask[:, begin:end, begin:end] = pattern.visible(end - begin, heads=heads)
    for rank in range(4):
        needs = needs_of(sharding, pattern, heads, rank)
        bounds = torch.tensor(sharding.bounds)
        got = torch.zeros(heads, 2, length, dtype=torch.bool)
        got[needs.head, needs.row, needs.column + bounds[needs.owner]] = True
        assert int(got.sum()) == len(needs.owner), "no key twice"
        own = slice(sharding.bounds[rank], sharding.bounds[rank + 1])
        rows = mask.unflatten(1, (2, length)).unflatten(3, (2, length))
        expected = rows[:, :, own].any(2)  # (heads, row of queries, row of keys, keys)
        expected = torch.stack([expected[:, row, row] for row in range(2)], dim=1)
        expected[:, :, own] = False
        assert torch.equal(got, expected)
        assert not torch.isin(needs.owner, torch.arange(rank, 4)).any()


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("heads", [(8, 8), (8, 2), (9, 3), (12, 4), (8, 1)])
def test_every_query_head_finds_its_kv_head(heads, ranks):
    group, seen = heads[0] // heads[1], []
    for one in head_ranges(*heads, ranks):
        for run in one.runs():
            assert run.q_heads % run.kv_heads == 0
            local_group = run.q_heads // run.kv_heads
            for local in range(run.q_heads):
                assert run.kv_start + local // local_group == (run.q_start + local) // group
                seen.append(run.q_start + local)
    assert seen == list(range(heads[0]))


def test_positions_and_pieces_cover_each_rank():
    sharding = Sharding.of(2, 11, 3, cu_seq_lens=torch.tensor([0, 5, 5, 11, 22], dtype=torch.int32))
    positions = torch.cat([sharding.position_ids(rank) for rank in range(3)], dim=1)
    assert positions.tolist() == [[*range(5), *range(6)], list(range(11))]
    assert [sharding.tokens(rank) for rank in range(3)] == [3, 4, 4]
    assert [p.position for p in sharding.pieces(1)] == [3, 0, 3]


# -- what they send ---------------------------------------------------------------------------------------------------


def test_bytes_by_heads():
    """4 ranks, 8 tokens each: to each of the 3 others q of 2 heads, k and v of 1; then the output of 2 heads back."""
    assert bytes_by_heads(Sharding.of(1, 32, 4), heads=8, kv_heads=4, vector_bytes=10) == 3 * 8 * (2 + 1 + 1 + 2) * 10


def test_bytes_by_keys():
    """The second rank gets sink and window, k and v, in 3 KV heads; the first sends sinks to three and its window."""
    sharding, pattern = Sharding.of(1, 64, 4), AttentionPattern.sink_window(sink=2, window=5)
    assert bytes_by_keys(sharding, pattern, kv_heads=3, vector_bytes=10) == (3 * 2 + 4) * 2 * 3 * 10


def test_auto_takes_what_sends_less():
    sharding = Sharding.of(1, 64, 4)
    assert cheaper_exchange(sharding, SINK_WINDOW, 8, 2) == "keys"
    assert cheaper_exchange(sharding, AttentionPattern.strided(1, 1, window=1), 4, 4) == "heads"  # dense but in name
    assert cheaper_exchange(sharding, AttentionPattern.causal(), 8, 2) == "heads"
    assert cheaper_exchange(sharding, AttentionPattern.causal(), 2, 2) == "keys"  # too few heads


def test_the_table_in_the_docs():
    page = Path(__file__).parent.parent / "docs" / "context_parallel.md"
    assert traffic_table() in page.read_text()


# -- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 1, "length": 3}, "at least one token for each of 4 ranks, got 3"),
        ({"batch_size": 2, "length": 8, "cu_seq_lens": torch.tensor([0, 16])}, "boundary at every row's end"),
        ({"batch_size": 1, "length": 8, "exchange": "rings"}, "exchange must be one of auto, heads, keys; got 'rings'"),
    ],
)
def test_a_shard_that_makes_no_sense(arguments, message):
    with pytest.raises(ValueError, match=message):
        SequenceShard.of(SimpleNamespace(rank=lambda: 0, size=lambda: 4), **arguments)


@pytest.mark.parametrize(
    ("config", "inputs", "error"),
    [
        ({}, {"input_ids": torch.zeros(1, 8, dtype=torch.int64)}, r"rank 1 .* holds \(1, 2\).* got \(1, 8\)"),
        ({}, {"attention_mask": torch.ones(1, 2)}, "excludes attention_mask"),
        ({}, {"cu_seq_lens_q": torch.tensor([0, 2])}, "excludes cu_seq_lens_q"),
        ({"attn_implementation": "sdpa"}, {}, "needs attn_implementation='longgen', got 'sdpa'"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, {}, "rope_type='dynamic'"),
    ],
)
def test_a_model_refuses_what_a_shard_excludes(config, inputs, error):
    small = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}
    model = LongGenLlamaForCausalLM._from_config(LongGenLlamaConfig(**small, num_hidden_layers=1, **config))
    shard = SequenceShard.of(SimpleNamespace(rank=lambda: 1, size=lambda: 4), 1, 8)
    with pytest.raises((ValueError, NotImplementedError), match=error):
        model(**{"input_ids": torch.zeros(1, 2, dtype=torch.int64), "sequence_shard": shard, **inputs})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--sequence-parallel 3", "--sequence-parallel must divide the 4 processes, got 3"),
        ("--sequence-parallel 2 --batch-size 3", "--batch-size must be a multiple of 2"),
        ("--seq-length 3 --max-steps 5", "--seq-length must be at least --sequence-parallel=4"),
        ("--attn-implementation sdpa", "needs --attn-implementation longgen, not sdpa"),
        ("--optimizer adafactor", "--optimizer must be one of adamw_torch, adamw_torch_fused here, got adafactor"),
        ("--compile", "--lora-rank and --compile are for finetune"),
        ("--exchange rings", "invalid choice"),
    ],
)
def test_options_that_cannot_work_end_in_one_line(options, message, capsys):
    with pytest.raises(SystemExit) as exit_status:
        parse_parallel_arguments(["--device", "cpu", *options.split()], processes=4)
    assert exit_status.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("torchrun -m model_integration.train_parallel: error: ")
    assert message in error and error.count("\n") == 1


def test_without_torchrun(monkeypatch, capsys):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(SystemExit):
        main([])
    assert "start it with torchrun" in capsys.readouterr().err
    with pytest.raises(SystemExit) as exit_status:
        main(["--help"])
    assert exit_status.value.code == 0
    assert "--sequence-parallel N" in capsys.readouterr().out


def test_a_checkpoint_of_another_command(tmp_path):
    with pytest.raises(DataError, match="is no sharded checkpoint"):
        load_checkpoint(tmp_path, None)


def test_every_epoch_reads_every_sequence_once():
    first, second = (
        [i for step in epoch for i in sequences_of_step(step, 3, 12, seed=5)] for epoch in ((0, 1, 2, 3), (4, 5, 6, 7))
    )
    assert sorted(first) == sorted(second) == list(range(12))
    assert first != second


# -- several processes ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Directory and results of one spawn for each number of processes: the cases, and a training or its end."""
    directory = tmp_path_factory.mktemp("parallel")
    (directory / "texts").mkdir()
    for i in range(12):
        (directory / "texts" / f"{i}.py").write_text(f"def f{i}(x):\n    return x + {i}\n" * 12)
    (directory / "short texts").mkdir()
    for i in range(60):
        (directory / "short texts" / f"{i}.txt").write_text(f"{i}, " * (1 + i % 7))
    first = FIRST_RUN[0]
    results = {first: spawn(first, parallel_cases.first_run, directory)}
    for ranks in CONTINUED:
        cut = run_directory(directory, ranks)
        shutil.copytree(run_directory(directory, first), cut)  # as if the run had ended after the first checkpoint
        for later in ("checkpoint-6", "final"):
            shutil.rmtree(cut / later)
        results[ranks] = spawn(ranks, parallel_cases.continued_run, directory)
    return directory, results


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_together_equal_one_process(runs, ranks, case):
    for cases, _ in runs[1][ranks]:
        loss, gradient = cases[case.name]
        assert loss < 1e-5
        assert gradient < 1e-4


def history(run):
    return json.loads((run / "final" / "trainer_state.json").read_text())["log_history"]


@pytest.mark.parametrize("ranks", CONTINUED)
def test_a_run_continues_on_another_number_of_processes(runs, ranks):
    directory, results = runs
    assert [status for result in results.values() for _, status in result] == [0] * (FIRST_RUN[0] + sum(CONTINUED))
    whole, continued = run_directory(directory, FIRST_RUN[0]), run_directory(directory, ranks)
    expected, got = history(whole), history(continued)
    assert [entry["step"] for entry in got] == [1, 2, 3, 3, 4, 5, 6, 6]
    assert expected[0]["loss"] > expected[6]["loss"]
    for one, other in zip(expected, got, strict=True):
        assert one == pytest.approx(other, rel=1e-4)
    weights = AutoModelForCausalLM.from_pretrained(whole / "final").state_dict()
    for name, tensor in AutoModelForCausalLM.from_pretrained(continued / "final").state_dict().items():
        torch.testing.assert_close(tensor, weights[name], rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("apart", [False, True], ids=["joined", "documents apart"])
def test_the_first_step_is_that_of_one_process(runs, apart):
    """Loss and gradient over a whole step's sequences, without sharding, FSDP or accumulation."""
    directory, _ = runs
    run = directory / "apart" if apart else run_directory(directory, FIRST_RUN[0])
    data = ["--data", str(directory / "short texts")] if apart else []
    args = parse_parallel_arguments(training_options(directory, run, ["--overwrite", *data]), processes=1)
    tokenizer = load_tokenizer(args)
    train = TokenBlocks(load_documents(args)[0], tokenizer, args.seq_length)
    model = build_model(args)
    indices = sequences_of_step(0, args.batch_size * args.accumulate, len(train), args.seed)
    ids = torch.stack([train[i]["input_ids"] for i in indices])
    positions = torch.stack([train.apart(tokenizer.eos_token_id)[i]["position_ids"] for i in indices])
    assert not apart or (positions.diff(dim=1) != 1).any()
    loss = model(input_ids=ids, labels=ids, position_ids=positions if apart else None).loss
    loss.backward()
    logged = history(run)[0]
    assert logged["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    assert logged["grad_norm"] == pytest.approx(float(get_total_norm([p.grad for p in model.parameters()])), rel=1e-4)


def test_bf16_computes_the_same_but_for_rounding(runs):
    directory, _ = runs
    fp32, bf16 = history(run_directory(directory, FIRST_RUN[0])), history(directory / "bf16")
    assert bf16[0]["loss"] == pytest.approx(fp32[0]["loss"], rel=1e-2)
    assert bf16[0]["loss"] != fp32[0]["loss"]
    weights = AutoModelForCausalLM.from_pretrained(directory / "bf16" / "final").state_dict()
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


def test_the_saved_model_has_the_logged_loss(runs):
    run = run_directory(runs[0], FIRST_RUN[0])
    model = AutoModelForCausalLM.from_pretrained(run / "final")
    assert type(model) is LongGenLlamaForCausalLM
    assert model.config.architectures == ["LongGenLlamaForCausalLM"]
    options = SimpleNamespace(data=[runs[0] / "texts"], text_field="text", held_out=0.3)
    held_out = TokenBlocks(load_documents(options)[1], byte_tokenizer(), 30).thinned(5)
    ids = torch.stack([held_out[i]["input_ids"] for i in range(len(held_out))])
    with torch.no_grad():
        loss = float(model(input_ids=ids, labels=ids).loss)
    logged = history(run)[-1]
    assert logged["eval_loss"] == pytest.approx(loss, rel=1e-5)
    assert logged[BITS_PER_BYTE] == pytest.approx(loss / 0.6931472 / held_out.bytes_per_token, rel=1e-5)
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_other_settings_are_refused_on_every_process(runs):
    assert spawn(2, parallel_cases.refused_run, runs[0]) == [2, 2]
