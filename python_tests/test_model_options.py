"""finetune's options: recipes, defaults, and one line for what cannot work, before anything is written."""

import sys
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, LlamaConfig

from longgen_kernels import AttentionPattern
from model_integration import LongGenLlamaForCausalLM, convert, evaluate, finetune, generate
from model_integration.training.arguments import parse_arguments

RECIPE = Path(__file__).parent.parent / "recipes" / "llama-2-7b-128k.yaml"


@pytest.fixture
def llama(tmp_path):
    """What the options read of a checkpoint: its config, and that there are weights."""
    path = tmp_path / "llama"
    small = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1}
    LlamaConfig(vocab_size=260, max_position_embeddings=16, **small).save_pretrained(path)
    (path / "model.safetensors").touch()
    return path


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    """Where no option says otherwise, runs would go to the working directory."""
    monkeypatch.chdir(tmp_path)


def test_the_recipe_of_the_paper(llama):
    args = parse_arguments(["--recipe", str(RECIPE), "--model", str(llama)])
    config = args.config
    assert config.full_layer_indices == (1,)
    assert config.rope_theta == 5e6
    assert config.max_position_embeddings == args.seq_length == 131072
    seen = config.layer_patterns[0].is_visible(torch.tensor(131071), torch.arange(131072))
    assert 2048 <= seen.sum() < 2304
    assert 5e9 <= args.max_steps * args.seq_length * args.batch_size * args.accumulate < 5.002e9
    training = finetune.training_arguments(args)
    assert training.lr_scheduler_type == "cosine_with_min_lr"


def test_options_win_over_a_recipe(llama, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "full-layers: [0, 2]\nsink: 3\nwindow: 9\nmax-tokens: 1000\nseq-length: 8\ncompile: true\ndata:\n"
    )
    args = parse_arguments(["--recipe", str(recipe), "--model", str(llama), "--sink", "4", "--max-steps", "200"])
    assert args.config.full_layer_indices == (0, 2)
    assert args.config.layer_patterns[1] == AttentionPattern.sink_window(4, 9)
    assert (args.max_steps, args.warmup_steps, args.compile, args.data) == (125, 25, True, None)
    assert parse_arguments([f"--recipe={recipe}", "--max-steps", "7"]).max_steps == 7


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "No such file or directory"),
        ("a: [", "--recipe"),
        ("- sink", "not a mapping of options"),
        ("recipe: other.yaml", "not a mapping of options (other than recipe)"),
        ("windw: 3", "unrecognized arguments: --windw=3"),
        ("window: wide", "invalid int value: 'wide'"),
        ("sink: -1", "sink"),
        ("max-tokens: many", "'many' is no number of tokens such as 5e9"),
    ],
)
def test_recipes_that_cannot_work(text, message, tmp_path, capsys):
    if text is not None:
        (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(SystemExit):
        finetune.main(["--recipe", str(tmp_path / "recipe.yaml")])
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--model {tmp}/nowhere", "no such directory"),
        ("--model {tmp}", "no config.json"),
        ("--model {tmp}/bare", "no weights"),
        ("--model {tmp}/gpt2", "a gpt2 model; what can become a hybrid is llama, longgen_llama, "),
        ("--model {llama} --full-layers 3", "full_layers must be distinct indices in [0, 3)"),
        ("--data {tmp}/nowhere.txt", "no such file or directory"),
        ("--data {tmp}/empty", "no .txt, .md, .py, .jsonl files"),
        ("--data {tmp}/text.py --dataset x", "exclude each other"),
        ("--keep-attention", "--gradient-checkpointing leaves out: give both"),
        ("--tokenizer {tmp}/nowhere", "--tokenizer"),
        ("--full-ratio 1.5", "full_ratio must lie in [0, 1]"),
        ("--full-layers 1 --full-ratio 0.5", "--full-layers excludes"),
        ("--window 4 --window-blocks 2 --block-size 16", "window_blocks, not both"),
        ("--stride 4", "--stride and --window-blocks count blocks: give their --block-size"),
        ("--window-blocks 4", "give their --block-size"),
        ("--stride 4 --block-size 24", "power of two"),
        ("--stride 4 --block-size 16 --window 0", "needs a window"),
        ("--seq-length 1", "--seq-length must be at least 2"),
        ("--max-steps 0", "--max-steps must be at least 1"),
        ("--max-tokens 0", "'0' is no number of tokens"),
        ("--max-tokens 1e3 --batch-size 0", "--batch-size must be at least 1"),
        ("--recipe", "expected one argument"),
        ("--save-steps 15", "must be a multiple of --log-steps"),
        ("--warmup-steps 9 --max-steps 8", "--warmup-steps must lie in"),
        ("--learning-rate 0", "--learning-rate must be positive"),
        ("--learning-rate inf", "--learning-rate must be positive and finite, got inf"),
        ("--weight-decay nan", "--weight-decay must be at least 0 and finite, got nan"),
        ("--seed -1", "'-1' is no seed; valid are whole numbers from 0 to 2^32 - 1"),
        ("--seed 4294967296", "is no seed"),
        ("--held-out 1", "--held-out must lie between"),
        ("--rope-base 0.5", "rope_theta must be above 1"),
        ("--lora-rank 4", "--lora-rank needs --model"),
        ("--model {llama} --lora-rank 0", "--lora-rank must be at least 1, got 0"),
        ("--model {llama} --lora-alpha 8", "--lora-alpha needs --lora-rank"),
        ("--model {llama} --lora-rank 4 --lora-alpha 0", "--lora-alpha must be positive, got 0.0"),
        ("--backend triton --device cpu", "needs a CUDA GPU"),
        ("--backend cuda --device cpu", "needs a CUDA GPU"),
        ("--backend reference --attn-implementation sdpa", "needs --attn-implementation longgen"),
        ("--attn-implementation flex_attention --device cpu", "cannot train on a CPU"),
        ("--attn-implementation flash_attention_2", "invalid choice"),
        ("--output-dir {tmp}/text.py", "is not a directory"),
        ("--output-dir {tmp} --resume", "no checkpoint in"),
        ("--output-dir {tmp}/used", "already holds a run"),
        ("--resume --overwrite", "exclude each other"),
        ("--no-such-option", "unrecognized arguments"),
    ],
)
def test_what_cannot_work_ends_in_one_line(arguments, message, llama, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.py").touch()
    (tmp_path / "used" / "checkpoint-4").mkdir(parents=True)
    for name, config in (("bare", LlamaConfig()), ("gpt2", GPT2Config())):
        config.save_pretrained(tmp_path / name)
    (tmp_path / "gpt2" / "model.safetensors").touch()
    with pytest.raises(SystemExit) as exit_status:
        finetune.main(arguments.format(tmp=tmp_path, llama=llama).split())
    assert exit_status.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("python -m model_integration.finetune: error: ")
    assert error.count("\n") == 1
    assert message in error


def test_an_optimizer_without_its_package_is_refused_before_any_work(tmp_path, monkeypatch, capsys):
    """--optimizer names what Trainer knows, of which most is in packages of their own."""

    def absent(training, model=None):
        raise ImportError(f"pip install\nwhat {training.optim.value} is in")

    monkeypatch.setattr(finetune.Trainer, "get_optimizer_cls_and_kwargs", absent)
    with pytest.raises(SystemExit) as exit_status:
        finetune.main(["--optimizer", "adamw_torch_8bit", "--device", "cpu", "--output-dir", str(tmp_path / "run")])
    assert exit_status.value.code == 2
    error = "error: --optimizer adamw_torch_8bit: pip install what adamw_torch_8bit is in"
    assert capsys.readouterr().err == f"python -m model_integration.finetune: {error}\n"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", [convert, evaluate, finetune, generate], ids=lambda module: module.__name__)
def test_help_names_defaults_once(command, capsys):
    """An option whose default depends on others says so itself: "(default: None)" behind that would contradict it."""
    with pytest.raises(SystemExit) as exit_status:
        command.main(["--help"])
    assert exit_status.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "(default: None)" not in text
    assert "(default: False)" not in text
    assert "(default: [])" not in text
    expected = {generate: "(default: 240)", evaluate: "(default: 4k)", finetune: "(default: adamw_torch)"}
    assert expected.get(command, "") in text


def test_adapters_need_peft(llama, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(SystemExit):
        finetune.main(["--model", str(llama), "--lora-rank", "2"])
    assert "--lora-rank needs the peft package: pip install peft" in capsys.readouterr().err


def test_a_hybrid_keeps_its_schedule_and_pattern(llama, tmp_path):
    first = parse_arguments(["--model", str(llama), "--full-layers", "2", "--sink", "3", "--window", "5"])
    LongGenLlamaForCausalLM(first.config).save_pretrained(tmp_path / "hybrid")
    again = parse_arguments(["--model", str(tmp_path / "hybrid"), "--rope-base", "1e6"])
    assert again.config.layer_patterns == first.config.layer_patterns
    assert again.config.rope_theta == 1e6
    assert parse_arguments(["--model", str(tmp_path / "hybrid"), "--full-ratio", "1"]).config.full_layer_indices == (
        0,
        1,
        2,
    )
