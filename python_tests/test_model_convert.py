"""The convert command: the weights' bytes, the config, what reloads, and errors before anything is written."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, LlamaConfig, LlamaForCausalLM, MistralConfig

from longgen_kernels import AttentionPattern
from model_integration import LongGenLlamaForCausalLM, convert
from model_integration.data import byte_tokenizer

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def save_llama(path, shard_size="1GB", **fields):
    torch.manual_seed(3)
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 6, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=260, max_position_embeddings=512, **{**small, "num_key_value_heads": 2, **fields})
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path, max_shard_size=shard_size)
    byte_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("llama"), shard_size="20KB", rope_parameters=LLAMA3_ROPE)


@pytest.mark.parametrize("link", [False, True])
def test_a_sharded_grouped_query_checkpoint_with_llama3_rope(llama, link, tmp_path, capsys):
    for other_form in ("consolidated.00.pth", "pytorch_model.bin"):
        (llama / other_form).write_text("weights in another form")
    hybrid = tmp_path / "hybrid"
    options = "--full-ratio 1/3 --stride 3 --block-size 4 --window 8 --sink 2 --rope-base 5e6 --max-positions 4096"
    convert.main([str(llama), str(hybrid), *options.split(), *(["--link"] if link else [])])
    assert "layers 2, 3 of 6 full" in capsys.readouterr().out

    shards = sorted(path.name for path in llama.glob("*.safetensors"))
    assert len(shards) > 2
    expected = [*shards, "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json"]
    assert {path.name for path in hybrid.iterdir()} == {*expected, "config.json", "generation_config.json"}
    for name in expected:
        assert (hybrid / name).read_bytes() == (llama / name).read_bytes(), name
        assert (hybrid / name).samefile(llama / name) == link

    model, info = AutoModelForCausalLM.from_pretrained(hybrid, output_loading_info=True)
    assert isinstance(model, LongGenLlamaForCausalLM)
    assert not any(info.values())
    assert model.dtype == torch.bfloat16
    assert model.config.full_layer_indices == (2, 3)
    assert model.config.layer_patterns[0] == AttentionPattern.strided(3, 4, window=8, sink=2)
    assert model.config.rope_parameters == {**LLAMA3_ROPE, "rope_theta": 5e6}
    assert model.config.max_position_embeddings == 4096
    assert model.config.architectures == ["LongGenLlamaForCausalLM"]
    prompt = AutoTokenizer.from_pretrained(hybrid)("def f(x):", return_tensors="pt").input_ids
    assert model.generate(prompt, max_new_tokens=8, do_sample=False, eos_token_id=None).shape == (1, 17)


@pytest.mark.parametrize("fields", [{}, {"num_key_value_heads": 4, "tie_word_embeddings": True}])
def test_a_hybrid_of_full_layers_is_the_checkpoint(fields, tmp_path):
    llama = save_llama(tmp_path / "llama", **fields)
    convert.main([str(llama), str(tmp_path / "hybrid"), "--full-ratio", "1"])
    tokens = torch.randint(0, 260, (2, 40))
    with torch.no_grad():
        expected = LlamaForCausalLM.from_pretrained(llama, attn_implementation="sdpa")(tokens).logits
        hybrid = AutoModelForCausalLM.from_pretrained(tmp_path / "hybrid", attn_implementation="sdpa")
        assert torch.equal(hybrid(tokens).logits, expected)


def test_a_hybrid_keeps_what_no_option_speaks_of(llama, tmp_path):
    convert.main([str(llama), str(tmp_path / "first"), "--full-layers", "5", "--window", "7"])
    convert.main([str(tmp_path / "first"), str(tmp_path / "second"), "--rope-base", "1e6"])
    first, second = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("first", "second"))
    assert second["rope_parameters"].pop("rope_theta") == 1e6
    assert first["rope_parameters"].pop("rope_theta") == 500000.0
    assert first == second
    assert first["sparse_pattern"] == AttentionPattern.sink_window(128, 7).to_dict()


def test_weights_of_pytorch_are_copied_too(llama, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_bytes((llama / "config.json").read_bytes())
    torch.save(LlamaForCausalLM.from_pretrained(llama).state_dict(), source / "pytorch_model.bin")
    convert.main([str(source), str(tmp_path / "hybrid")])
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "hybrid", output_loading_info=True)
    assert isinstance(model, LongGenLlamaForCausalLM)
    assert not any(info.values())


def without_head(path):
    model = LlamaForCausalLM.from_pretrained(save_llama(path))
    model.save_pretrained(path, state_dict={k: v for k, v in model.state_dict().items() if k != "lm_head.weight"})


def without_a_shard(path):
    save_llama(path, shard_size="20KB")
    sorted(path.glob("*.safetensors"))[1].unlink()


def cut_off(path):
    save_llama(path)
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])


def of_another_kind(path):
    GPT2Config().save_pretrained(path)
    (path / "model.safetensors").touch()


def mistral_with_a_window(path):
    MistralConfig(sliding_window=4096).save_pretrained(path)
    (path / "model.safetensors").touch()


@pytest.mark.parametrize(
    ("make_source", "options", "message"),
    [
        (lambda path: None, "", "no such directory"),
        (lambda path: path.mkdir(), "", "no config.json"),
        (lambda path: LlamaConfig().save_pretrained(path), "", "no weights"),
        (of_another_kind, "", "a gpt2 model; what can become a hybrid is llama, longgen_llama, "),
        (mistral_with_a_window, "", "sliding_window must be None"),
        (without_head, "", "the weights lack lm_head.weight"),
        (without_a_shard, "", "which are not there"),
        (cut_off, "", "model.safetensors cannot be read"),
        (save_llama, "--full-ratio 2", "full_ratio must lie in [0, 1], got 2.0"),
        (save_llama, "--full-ratio half", "'half' is no number and no fraction such as 1/3"),
        (save_llama, "--full-ratio 1/0", "'1/0' is no number"),
        (save_llama, "--full-layers 6", "full_layers must be distinct indices in [0, 6), got [6]"),
        (save_llama, "--full-layers 1 --full-placement top", "--full-layers excludes"),
        (save_llama, "--stride 4", "give their --block-size"),
        (save_llama, "--sink -1", "sink"),
        (save_llama, "--rope-base 1", "rope_theta must be above 1"),
        (save_llama, "--max-positions 0", "--max-positions must be at least 1, got 0"),
    ],
)
def test_what_cannot_work_ends_in_one_line(make_source, options, message, tmp_path, capsys):
    make_source(tmp_path / "source")
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_status:
        convert.main([str(tmp_path / "source"), str(tmp_path / "hybrid"), *options.split()])
    assert exit_status.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("python -m model_integration.convert: error: ")
    assert error.count("\n") == 1
    assert message in error
    assert not (tmp_path / "hybrid").exists()


@pytest.mark.parametrize("destination", ["used", "file", "."])
def test_nothing_is_overwritten(destination, llama, tmp_path, capsys):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.txt").touch()
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit):
        convert.main([str(llama), str(llama if destination == "." else tmp_path / destination)])
    assert "exists already, and is no empty directory" in capsys.readouterr().err
