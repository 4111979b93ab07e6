"""The evaluate command: its tasks say the truth, its scores are right, its files are complete, its errors are clear."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from model_cases import save_byte_llama
from torch.nn import functional as F
from transformers import GPT2Config, LlamaForCausalLM

from longgen_kernels import AttentionPattern
from model_integration import LongGenLlamaConfig, LongGenLlamaForCausalLM, evaluate
from model_integration.data import DataError, Document, byte_tokenizer
from model_integration.evaluation import scoring
from model_integration.evaluation.arguments import parse_arguments
from model_integration.evaluation.scoring import encode, encode_prompt, mean_by_position, score_answer, token_losses
from model_integration.evaluation.tasks import (
    MOVES,
    MULTIKEY_NEEDLES,
    NEEDLE,
    PEOPLE,
    RETRIEVAL_TASKS,
    Case,
    Haystack,
    Prompt,
    cut_near,
    insert_at_depths,
    make_cases,
    make_prompt,
)

TOKENIZER = byte_tokenizer()
HAYSTACK = Haystack(Document(f"{i}", f"Line {i} of a story\nthat has {i * i} lines more.\n" * 3) for i in range(400))


def count_bytes(text):
    return len(encode(TOKENIZER, text))


def prompt_of(task, length, depth=None, sample=0, seed=0, count=count_bytes):
    return make_prompt(Case(task, length, depth, sample), seed, HAYSTACK, count)


class Copier:
    """A model that has one skill: it finds where its last tokens stood before, and says what came there."""

    device = torch.device("cpu")
    memory = 12
    certainty = 50.0

    def logits(self, ids):
        """(vocabulary,) of what follows `ids`."""
        suffix = ids[-self.memory :]
        starts = (i for i in range(len(ids) - self.memory) if ids[i : i + self.memory] == suffix)
        start = next(starts, None)
        logits = torch.zeros(260)
        if start is not None:
            logits[ids[start + self.memory]] = self.certainty
        return logits

    def generate(self, input_ids, max_new_tokens, **options):
        ids = input_ids[0].tolist()
        for _ in range(max_new_tokens):
            ids.append(int(self.logits(ids).argmax()))
        return torch.tensor([ids])

    def __call__(self, input_ids, logits_to_keep, use_cache):
        ids = input_ids[0].tolist()
        ends = range(len(ids) - logits_to_keep + 1, len(ids) + 1)
        return SimpleNamespace(logits=torch.stack([self.logits(ids[:end]) for end in ends])[None])


class Forgetful(Copier):
    """Sees nothing twice, so that every token is as likely as any other."""

    memory = 10**6


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A dense Llama, the hybrid with its weights, and one without any full layer; each with a tokenizer."""
    path = tmp_path_factory.mktemp("checkpoints")
    config = save_byte_llama(path / "dense", max_position_embeddings=600)
    for name, full_layers in (("hybrid", [1]), ("sparse", [])):
        hybrid = LongGenLlamaConfig.from_dense(
            config, sparse_pattern=AttentionPattern.sink_window(4, 16), full_layers=full_layers
        )
        LongGenLlamaForCausalLM.from_pretrained(path / "dense", config=hybrid).save_pretrained(path / name)
        TOKENIZER.save_pretrained(path / name)
    GPT2Config().save_pretrained(path / "bare")
    return path


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "story.txt"
    path.write_text(HAYSTACK.text)
    return path


def run(checkpoint, text, out, *options):
    evaluate.main([str(checkpoint), "--data", str(text), "--out", str(out), "--device", "cpu", *options])
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def without_seconds(records):
    return [{name: value for name, value in record.items() if name != "seconds"} for record in records]


@pytest.mark.parametrize("task", ["niah", "multikey", "whereabouts", "aggregation"])
def test_prompts_depend_on_the_case_and_the_seed_alone(task):
    depth = 0.5 if task in RETRIEVAL_TASKS else None
    assert prompt_of(task, 1024, depth) == prompt_of(task, 1024, depth)
    variants = [
        prompt_of(task, 1024, depth, sample=1),
        prompt_of(task, 1024, depth, seed=1),
        prompt_of(task, 1100, depth),
        prompt_of(task, 1024, depth),
    ]
    assert len(set(variants)) == 4
    if task != "whereabouts":  # which has eight answers only
        assert len({prompt.answer for prompt in variants}) == 4


@pytest.mark.parametrize("task", ["niah", "multikey"])
@pytest.mark.parametrize("depth", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("sample", range(3))
def test_the_needle_stands_at_its_depth_and_the_answer_once(task, depth, sample):
    prompt = prompt_of(task, 8000, depth, sample)
    answer = prompt.answer.strip()
    assert len(answer) == 7
    assert prompt.text.count(answer) == 1
    assert prompt.text.count("The magic number of") == (MULTIKEY_NEEDLES if task == "multikey" else 1) + 1
    key = prompt.text.removesuffix(" is").rpartition(" ")[2]
    needle = NEEDLE.format(key=key, value=answer)
    assert prompt.text.count(needle) == 1
    before, _, after = prompt.text.partition(needle)
    assert before.endswith("\n")
    text_before = before.split("\n\n", 1)[1]
    text_after = after.rpartition("\n\n")[0]
    assert len(text_before) / len(text_before + text_after) == pytest.approx(depth, abs=0.05)


@pytest.mark.parametrize("sample", range(20))
def test_whereabouts_asks_where_the_thing_was_carried(sample):
    """Told line by line: where everybody is, and the thing with who took it."""
    prompt = prompt_of("whereabouts", 4000, sample=sample)
    facts = re.findall(r"^(\w+) (went to|took) the (\w+)\.$", prompt.text, re.MULTILINE)
    where = {person: object_ for person, verb, object_ in facts if verb == "went to"}  # the last place of each
    ((at, (holder, _, thing)),) = [(i, fact) for i, fact in enumerate(facts) if fact[1] == "took"]
    assert (len(facts), len(where)) == (PEOPLE * MOVES + 1, PEOPLE)
    assert prompt.answer == f" {where[holder]}"
    assert prompt.text.endswith(f"The {thing} is in the")
    assert holder in {person for person, *_ in facts[at + 1 :]}, "the thing was carried on"


def test_aggregation_asks_for_the_most_common_word():
    prompt = prompt_of("aggregation", 4000)
    words = prompt.text.split("\n\n")[1].split()
    counts = {word: words.count(word) for word in words}
    assert max(counts, key=counts.get) == prompt.answer.strip()
    assert sorted(counts.values())[-1] == len(words) // 4
    assert set(sorted(counts.values())[:-1]) == {2}


@pytest.mark.parametrize("task", ["niah", "multikey", "whereabouts", "aggregation"])
@pytest.mark.parametrize("length", [1800, 4096, 20000])
@pytest.mark.parametrize("count", [count_bytes, lambda text: 1 + len(text) // 2, lambda text: 2 * len(text)])
def test_prompts_fill_their_length_and_never_more(task, length, count):
    prompt = prompt_of(task, length, 0.5 if task in RETRIEVAL_TASKS else None, count=count)
    assert length - max(140, length // 100) <= count(prompt.text + prompt.answer) <= length


def test_what_does_not_fit_says_so():
    with pytest.raises(DataError, match=r"--lengths 100: too short for --task niah, which needs 2\d\d tokens"):
        prompt_of("niah", 100, 0.5)
    with pytest.raises(DataError, match=r"the haystack has \d\d,\d+ characters, too few"):
        prompt_of("niah", 10**6, 0.5)


def test_cuts_prefer_lines_then_words():
    assert cut_near("one two\nthree", 10) == 8
    assert cut_near("a" * 300 + " " + "b" * 300, 500) == 500
    assert insert_at_depths("a\nb\nc\nd\n", {"X\n": 1.0, "Y\n": 0.0, "Z\n": 0.5}) == "Y\na\nb\nZ\nc\nd\nX\n"
    assert insert_at_depths("ab cd", {"X\n": 1.0}) == "ab cd\nX\n"


def test_cases_go_from_short_to_long():
    cases = make_cases(["niah", "ppl"], [64, 32], [0.0, 1.0], 2)
    assert [case.length for case in cases] == [32] * 6 + [64] * 6
    assert [case.depth for case in cases[:6]] == [0.0, 0.0, 1.0, 1.0, None, None]
    assert len(set(cases)) == 12


@pytest.mark.parametrize("task", ["niah", "multikey"])
def test_a_model_that_copies_is_right(task):
    prompt = prompt_of(task, 1500, 0.5)
    ids = encode_prompt(TOKENIZER, prompt)
    assert TOKENIZER.decode(ids[0]) == prompt.text
    assert TOKENIZER.decode(ids[1]) == prompt.answer
    score = score_answer(Copier(), TOKENIZER, *ids)
    assert score.got == prompt.answer
    assert score.correct
    assert score.logprob == pytest.approx(0.0, abs=1e-6)

    score = score_answer(Forgetful(), TOKENIZER, *ids)
    assert not score.correct
    assert score.logprob == pytest.approx(-8 * torch.log(torch.tensor(260.0)).item(), rel=1e-5)


def test_an_answer_that_merges_with_the_prompt_keeps_its_tokens():
    class Merging:
        """Pairs of characters are tokens."""

        bos_token_id = 7

        def __call__(self, text, **options):
            return SimpleNamespace(input_ids=[text[i : i + 2] for i in range(0, len(text), 2)])

    assert encode_prompt(Merging(), Prompt("abc", "de")) == ([7, "ab"], ["cd", "e"])


@pytest.mark.parametrize("name", ["dense", "hybrid"])
def test_losses_are_those_of_full_logits_that_never_exist(name, checkpoints, monkeypatch):
    model = (LlamaForCausalLM if name == "dense" else LongGenLlamaForCausalLM).from_pretrained(checkpoints / name)
    ids = torch.randint(0, 256, (100,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = F.cross_entropy(model(input_ids=ids[None]).logits[0, :-1], ids[1:], reduction="none")
    rows = []
    model.lm_head.register_forward_hook(lambda _, inputs, output: rows.append(output.numel() // output.shape[-1]))
    monkeypatch.setattr(scoring, "LOGITS_CHUNK", 16)
    torch.testing.assert_close(token_losses(model, ids), expected)
    assert max(rows) == 16

    rows.clear()
    score = score_answer(model, TOKENIZER, ids[:90].tolist(), ids[90:].tolist())
    assert score.logprob == pytest.approx(-float(expected[89:].sum()), rel=1e-5)
    assert max(rows) == 10


def test_losses_are_averaged_between_powers_of_two():
    losses = torch.arange(1, 200, dtype=torch.float32)  # the token at position p has loss p
    ends, means = mean_by_position(losses)
    assert ends == [64, 128, 200]
    assert means == [32.0, 95.5, 163.5]
    assert mean_by_position(torch.tensor([3.0])) == ([2], [3.0])


@pytest.mark.parametrize("name", ["dense", "hybrid", "sparse"])
def test_the_whole_way(name, checkpoints, text, tmp_path, capsys):
    options = ["--task", "niah,aggregation,ppl", "--lengths", "400,0512", "--depths", "0,100", "--samples", "1"]
    records = run(checkpoints / name, text, tmp_path / "out", *options)
    assert [(record["task"], record["length"], record["depth"]) for record in records] == [
        (task, length, depth)
        for length in (400, 512)
        for task, depth in (("niah", 0.0), ("niah", 1.0), ("aggregation", None), ("ppl", None))
    ]
    for record in records:
        assert record["seed"] == record["sample"] == 0
        assert record["seconds"] > 0.0
        assert record["tokens"] <= record["length"]
        # Small random weights hardly prefer any of the 260 tokens.
        assert -record["logprob"] / record["answer_tokens"] == pytest.approx(5.56, abs=0.3)
        if record["task"] == "ppl":
            assert record["expected"] is record["got"] is record["correct"] is None
            assert record["tokens"] == record["answer_tokens"] + 1 == record["positions"][-1] == record["length"]
            assert len(record["positions"]) == len(record["losses"]) == 4
        else:
            assert record["correct"] is (record["expected"] == record["got"])
    for picture in ("niah.png", "ppl.png"):
        assert (tmp_path / "out" / picture).read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "out" / "multikey.png").exists()
    output = capsys.readouterr().out
    assert "perplexity" in output and "aggregation" in output

    again = run(checkpoints / name, text, tmp_path / "again", *options, "--compare", str(tmp_path / "out"))
    assert without_seconds(again) == without_seconds(records)
    assert "again" in (table := capsys.readouterr().out) and "run" in table


def test_resumes_after_a_kill_and_grows(checkpoints, text, tmp_path, capsys):
    options = ["--task", "niah,ppl", "--lengths", "300", "--depths", "50"]
    whole = run(checkpoints / "dense", text, tmp_path / "whole", *options, "--samples", "3")
    cut = tmp_path / "cut"
    run(checkpoints / "dense", text, cut, *options, "--samples", "2")
    lines = (cut / "results.jsonl").read_text().splitlines(keepends=True)
    (cut / "results.jsonl").write_text("".join(lines[:2]) + lines[2][:20])  # killed while it wrote the third
    grown = run(checkpoints / "dense", text, cut, *options, "--samples", "3", "--resume")
    assert grown[:2] == [json.loads(line) for line in lines[:2]]

    def key(record):
        return record["task"], record["sample"]

    assert without_seconds(sorted(grown, key=key)) == without_seconds(sorted(whole, key=key))
    again = run(checkpoints / "dense", text, cut, *options, "--samples", "3", "--resume")
    assert again == grown

    capsys.readouterr()
    with pytest.raises(SystemExit):
        run(checkpoints / "dense", text, cut, *options, "--resume", "--seed", "1")
    assert "seed was 0, is 1" in capsys.readouterr().err
    (cut / "cat.png").touch()
    assert len(run(checkpoints / "dense", text, cut, "--task", "ppl", "--lengths", "64", "--overwrite")) == 4
    assert not (cut / "niah.png").exists()
    assert (cut / "cat.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("{tmp}/nowhere", "CHECKPOINT {tmp}/nowhere: no such directory"),
        ("{tmp}", "no config.json"),
        ("{models}/bare", "no weights"),
        (
            "{models}/dense --task babi",
            "--task: 'babi' is no task; valid are niah, multikey, whereabouts, aggregation, ppl",
        ),
        ("{models}/dense --lengths 4x", "--lengths: '4x' is no length; valid are numbers"),
        ("{models}/dense --lengths 100,0k", "'0k' is no length"),
        ("{models}/dense --lengths 500,1k", "--lengths 1024: {models}/dense is made for at most 600 tokens"),
        ("{models}/dense --depths 0,101", "--depths: '101' is no depth; valid are percentages from 0 to 100"),
        ("{models}/dense --depths middle", "'middle' is no depth"),
        ("{models}/dense --samples 0", "--samples must be at least 1, got 0"),
        ("{models}/dense --held-out 1", "--held-out must lie between 0 and 1, got 1.0"),
        ("{models}/dense --tokenizer {tmp}/nowhere", "--tokenizer {tmp}/nowhere: no such directory"),
        ("{models}/dense --data {tmp}/nowhere", "no such file or directory"),
        ("{models}/dense --device tpu9", "--device tpu9: no such device; valid are cpu, cuda and cuda:N"),
        ("{models}/dense --device cuda:99", "--device cuda:99: this machine has"),
        ("{models}/dense --dtype int8", "invalid choice: 'int8'"),
        ("{models}/dense --attn-implementation longgen", "needs a LongGen checkpoint"),
        ("{models}/dense --backend reference", "--backend reference needs --attn-implementation longgen, not sdpa"),
        ("{models}/hybrid --backend triton", "--backend triton needs a CUDA GPU"),
        ("{models}/hybrid --attn-implementation flash_attention_2", "invalid choice: 'flash_attention_2'"),
        ("{models}/dense --out {tmp}/used", "already holds a run: --resume continues it, --overwrite starts again"),
        ("{models}/dense --out {tmp}/file", "--out {tmp}/file is not a directory"),
        ("{models}/dense --out {tmp}/new --resume", "--resume: no results in {tmp}/new"),
        ("{models}/dense --out {tmp}/used --resume", "--resume: no evaluate.json in {tmp}/used"),
        ("{models}/dense --resume --overwrite", "exclude each other"),
        ("{models}/dense --compare {tmp}/new", "--compare {tmp}/new: no results.jsonl in it"),
        ("{models}/dense --compare {tmp}/used --lengths 512", "results.jsonl:1: not a result of this command"),
        ("{models}/dense --lengths 100 --data {text}", "--lengths 100: too short for --task niah"),
        ("{models}/dense --lengths 512 --task ppl --data {tmp}/short.txt", "--lengths 512: the held-out text has"),
        ("{models}/dense --lengths 512 --data {tmp}/short.txt", "the haystack has 9 characters"),
    ],
)
def test_what_cannot_work_ends_in_one_line(arguments, message, checkpoints, text, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "results.jsonl").write_text("{}\n")
    (tmp_path / "file").touch()
    (tmp_path / "short.txt").write_text("one line\n")
    places = {"tmp": tmp_path, "models": checkpoints, "text": text}
    given = arguments.format(**places).split()
    for option, value in (("--device", "cpu"), ("--data", str(text)), ("--lengths", "512")):
        if option not in given:
            given += [option, value]
    with pytest.raises(SystemExit) as exit_status:
        evaluate.main(given)
    assert exit_status.value.code == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("python -m")]
    assert len(error) == 1
    assert error[0].startswith("python -m model_integration.evaluate: error: ")
    assert message.format(**places) in error[0]


def test_what_a_later_task_cannot_do_is_said_before_the_first(checkpoints, text, tmp_path, capsys):
    """niah has room in 300 tokens, multikey with its eight needles not."""
    with pytest.raises(SystemExit):
        run(checkpoints / "dense", text, tmp_path / "out", "--task", "niah,multikey", "--lengths", "300,600")
    assert "--lengths 300: too short for --task multikey" in capsys.readouterr().err
    assert (tmp_path / "out" / "results.jsonl").read_text() == ""


def test_a_run_goes_by_the_name_of_its_training(checkpoints, tmp_path):
    """finetune calls every checkpoint final/: their evaluations would meet in one directory."""
    shutil.copytree(checkpoints / "dense", tmp_path / "stdlib" / "final")
    for checkpoint, name in ((tmp_path / "stdlib" / "final", "stdlib"), (checkpoints / "hybrid", "hybrid")):
        args = parse_arguments([str(checkpoint), "--lengths", "512", "--device", "cpu"])
        assert args.out == Path("runs", "evaluate", name)


def test_heads_that_do_more_are_refused_for_perplexity(checkpoints):
    model = LlamaForCausalLM.from_pretrained(checkpoints / "dense")
    scoring.check_plain_head(model)
    forward = model.forward

    def scaled(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits *= 2
        return output

    model.forward = scaled
    with pytest.raises(DataError, match="--task ppl does not support llama models"):
        scoring.check_plain_head(model)
