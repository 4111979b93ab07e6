"""The finetune and generate commands: errors before any work, exact resumption, the whole way on a micro setting."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from model_cases import save_byte_llama
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationMixin, LlamaForCausalLM

from longgen_kernels import AttentionPattern
from model_integration import LongGenLlamaForCausalLM, finetune, generate
from model_integration.data import byte_tokenizer

MICRO = ["--device", "cpu", "--seq-length", "32", "--batch-size", "2", "--eval-blocks", "4", "--held-out", "0.3"]
STEPS = ["--max-steps", "8", "--log-steps", "1", "--save-steps", "4", "--eval-steps", "4"]


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts")
    for i in range(12):
        (path / f"{i}.py").write_text(f"def f{i}(x):\n    return x + {i}\n" * 20)
    return path


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A Llama checkpoint with a tokenizer, as a user would have one."""
    path = tmp_path_factory.mktemp("llama")
    save_byte_llama(path, max_position_embeddings=16)
    return path


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    """Where no option says otherwise, runs go to the working directory."""
    monkeypatch.chdir(tmp_path)


def history(run):
    entries = json.loads((run / "final" / "trainer_state.json").read_text())["log_history"]
    kept = ("step", "loss", "learning_rate", "grad_norm", "eval_loss", "eval_bits_per_byte")
    return [{k: v for k, v in entry.items() if k in kept} for entry in entries if "train_runtime" not in entry]


def test_the_whole_way(texts, tmp_path, capsys):
    run = tmp_path / "run"
    finetune.main(
        ["--data", str(texts), "--output-dir", str(run), *MICRO, *STEPS, "--stride", "2", "--block-size", "8"]
    )
    assert "bits per byte on held-out text" in capsys.readouterr().out
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    losses = [entry["loss"] for entry in history(run) if "loss" in entry]
    assert len(losses) == 8
    assert losses[-1] < losses[0]

    model = AutoModelForCausalLM.from_pretrained(run / "final")
    assert isinstance(model, LongGenLlamaForCausalLM)
    assert model.config.full_layer_indices == (2, 3)
    assert model.config.layer_patterns[0] == AttentionPattern.strided(2, 8, window=64, sink=16)
    assert model.config.use_cache  # off while Trainer trains

    outputs = []
    for implementation in ("longgen", "longgen", "sdpa"):
        arguments = ["--checkpoint", str(run / "final"), "--prompt", "def ", "--max-new-tokens", "16"]
        generate.main([*arguments, "--device", "cpu", "--attn-implementation", implementation])
        captured = capsys.readouterr()
        outputs.append(captured.out)
        assert re.search(r"^16 new tokens; the prompt took [\d.]+ s, then [\d.]+ tokens a second$", captured.err, re.M)
        short = "room for sink and window, which this short text does not fill; a dense model's [\\d.]+ MiB; "
        kept = f"{short}of 19 tokens it keeps 19 in 6 layers"
        whole = "every token in every layer" if implementation == "sdpa" else kept
        assert re.search(rf"^KV cache: [\d.]+ MiB, {whole}$", captured.err, re.M)
    assert outputs[0].startswith("def ")
    assert outputs[0] == outputs[1] == outputs[2]


def test_resumes_exactly(texts, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    common = ["--data", str(texts), *MICRO, *STEPS, "--accumulate", "2"]
    finetune.main([*common, "--output-dir", str(whole)])
    shutil.copytree(whole, cut)  # as if the run had ended after the first checkpoint
    shutil.rmtree(cut / "checkpoint-8")
    shutil.rmtree(cut / "final")
    (cut / "checkpoint-6").mkdir()  # and another had been cut off while it was written
    finetune.main([*common, "--output-dir", str(cut), "--resume"])
    assert history(cut) == history(whole)
    for name, weights in AutoModelForCausalLM.from_pretrained(whole / "final").state_dict().items():
        assert torch.equal(weights, AutoModelForCausalLM.from_pretrained(cut / "final").state_dict()[name]), name


def test_resumes_exactly_after_a_kill(texts, tmp_path):
    """SIGKILL from the second checkpoint on: every step comes once, with the loss of a run left alone."""
    whole, killed, corpus = tmp_path / "whole", tmp_path / "killed", tmp_path / "corpus"
    shutil.copytree(texts, corpus)
    steps = ["--max-steps", "40", "--log-steps", "1", "--save-steps", "4", "--eval-steps", "20"]
    common = ["--data", str(corpus), *MICRO, *steps]
    command = [sys.executable, "-m", "model_integration.finetune", *common, "--output-dir", str(killed)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and not (killed / "checkpoint-8").exists():
            time.sleep(0.01)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert not (killed / "final").exists()
    (killed / "checkpoint-36").mkdir()  # as if cut off while it wrote its last file
    (killed / "checkpoint-36" / "trainer_state.json").write_text('{"step": 5')

    finetune.main([*common, "--output-dir", str(whole)])
    shutil.rmtree(corpus)  # the tokens are kept: a resumed run reads the same ones, and none twice
    (corpus / "nothing").mkdir(parents=True)
    (corpus / "0.py").write_text("other text")
    finetune.main([*common, "--output-dir", str(killed), "--resume"])
    assert [entry["step"] for entry in history(killed) if "loss" in entry] == list(range(1, 41))
    assert history(killed) == history(whole)
    weights = [load_file(run / "final" / "model.safetensors") for run in (whole, killed)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_llama_checkpoint_becomes_a_hybrid(llama, texts, tmp_path):
    run = tmp_path / "run"
    arguments = ["--model", str(llama), "--data", str(texts), "--output-dir", str(run), *MICRO, *STEPS]
    schedule = ["--full-layers", "0", "--window-blocks", "2", "--block-size", "8", "--sink", "4", "--rope-base", "5e5"]
    training = ["--learning-rate", "1e-12", "--gradient-checkpointing", "--precision", "bf16"]
    finetune.main([*arguments, *schedule, *training])
    tuned = AutoModelForCausalLM.from_pretrained(run / "final")
    assert tuned.config.full_layer_indices == (0,)
    assert tuned.config.layer_patterns[1] == AttentionPattern.sink_window(4, window_blocks=2, block_size=8)
    assert tuned.config.rope_theta == 5e5
    assert tuned.config.max_position_embeddings == 32
    before = LlamaForCausalLM.from_pretrained(llama).state_dict()
    for name, weights in tuned.state_dict().items():
        torch.testing.assert_close(weights, before[name], rtol=0, atol=1e-9)
    assert len(AutoTokenizer.from_pretrained(run / "final")) == 257


LORA = ["--lora-rank", "2", "--learning-rate", "1e-2", "--window", "8", "--sink", "2"]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16-weights"])
def test_adapters_are_trained_and_merged(precision, llama, texts, tmp_path, capsys):
    """`final` is a whole checkpoint: the linear layers of the decoder differ from the start by matrices of rank 2."""
    pytest.importorskip("peft")
    run = tmp_path / "run"
    arguments = ["--model", str(llama), "--data", str(texts), "--output-dir", str(run), *MICRO, *STEPS, *LORA]
    finetune.main([*arguments, "--precision", precision, "--gradient-checkpointing"])
    assert re.search(r"^[\d,]+ parameters, 2,784 of them trained; ", capsys.readouterr().out, re.M)
    losses = [entry["loss"] for entry in history(run) if "loss" in entry]
    assert losses[-1] < losses[0]
    assert (run / "checkpoint-8" / "adapter_model.safetensors").is_file()
    assert not (run / "checkpoint-8" / "model.safetensors").exists()

    tuned, info = AutoModelForCausalLM.from_pretrained(run / "final", output_loading_info=True, dtype=torch.float32)
    assert isinstance(tuned, LongGenLlamaForCausalLM)
    assert not any(info.values())
    assert tuned.config.use_cache
    before = LlamaForCausalLM.from_pretrained(llama).state_dict()
    dtype = torch.bfloat16 if precision == "bf16-weights" else torch.float32
    for name, weights in tuned.state_dict().items():
        change = weights - before[name].to(dtype).float()
        if "proj" not in name:
            assert not change.any(), name
        elif precision == "bf16-weights":
            assert change.any(), name
        else:
            assert torch.linalg.matrix_rank(change, rtol=1e-3) == 2, name


def test_adapters_resume_exactly(llama, texts, tmp_path):
    pytest.importorskip("peft")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    common = ["--model", str(llama), "--data", str(texts), *MICRO, *STEPS, *LORA]
    finetune.main([*common, "--output-dir", str(whole)])
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "checkpoint-8")
    shutil.rmtree(cut / "final")
    finetune.main([*common, "--output-dir", str(cut), "--resume"])
    assert history(cut) == history(whole)


def test_adapters_compiled_checkpointed_in_bf16(llama, texts, tmp_path, monkeypatch):
    """All together give the losses of adapters alone, to what bf16 can tell."""
    pytest.importorskip("peft")
    # A compiler of C++ would take a minute; what is traced is the same.
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compile_module(module, backend="aot_eager"))
    common = ["--model", str(llama), "--data", str(texts), *MICRO, *STEPS, *LORA]
    finetune.main([*common, "--output-dir", str(tmp_path / "plain")])
    torch._dynamo.utils.counters.clear()
    together = ["--compile", "--gradient-checkpointing", "--keep-attention", "--precision", "bf16"]
    finetune.main([*common, "--output-dir", str(tmp_path / "together"), *together])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    plain, compiled = (
        [value for entry in history(tmp_path / run) for name, value in entry.items() if name.endswith("loss")]
        for run in ("plain", "together")
    )
    assert compiled == pytest.approx(plain, rel=2e-3)
    assert isinstance(AutoModelForCausalLM.from_pretrained(tmp_path / "together" / "final"), LongGenLlamaForCausalLM)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seq-length", "100000"], "the training text is shorter than one sequence of 100000 tokens"),
        (["--held-out", "1e-9"], "the held-out text is shorter than one sequence of 32 tokens"),
        (["--resume", "--learning-rate", "1"], "learning_rate was 0.0025, is 1.0"),
    ],
)
def test_errors_that_need_the_data(arguments, message, texts, tmp_path, capsys):
    if "--resume" in arguments:
        finetune.main(["--data", str(texts), "--output-dir", str(tmp_path), *MICRO, *STEPS, "--max-steps", "4"])
        arguments = [*arguments, "--max-steps", "4"]
    with pytest.raises(SystemExit) as exit_status:
        finetune.main(["--data", str(texts), "--output-dir", str(tmp_path), *MICRO, *STEPS, *arguments])
    assert exit_status.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_large_tokenizer_is_refused(llama, texts, tmp_path, capsys):
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([f"<{i}>" for i in range(9)])
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    options = ["--model", str(llama), "--tokenizer", str(tmp_path / "tokenizer"), "--data", str(texts)]
    with pytest.raises(SystemExit):
        finetune.main([*options, "--output-dir", str(tmp_path / "run")])
    assert "has 266 tokens, the model only embeds 260" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_as_a_user_runs_it(tmp_path):
    """Without arguments but for size, in a process of its own, on the standard library."""
    command = [sys.executable, "-m", "model_integration.finetune", *MICRO, *STEPS, "--held-out", "0.05"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=True)
    assert "training documents" in result.stdout
    assert (tmp_path / "runs" / "stdlib" / "final" / "model.safetensors").is_file()
    assert (tmp_path / "runs" / "stdlib" / "loss.png").is_file()
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert again.returncode == 2
    assert again.stderr.splitlines()[-1].endswith("--resume continues it, --overwrite starts again")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--checkpoint {tmp} --prompt x", "no config.json"),
        ("--checkpoint {tmp}/bare --prompt x", "--checkpoint {tmp}/bare: no tokenizer: "),
        ("--checkpoint {tmp}/cut --prompt x", "--checkpoint {tmp}/cut: Error while deserializing header"),
        ("--checkpoint {llama} --prompt=", "--prompt must not be empty"),
        ("--checkpoint {llama} --prompt x --temperature -1", "--temperature >= 0"),
        ("--checkpoint {llama} --prompt x --temperature nan", "--temperature >= 0"),
        ("--checkpoint {llama} --prompt x --max-new-tokens 1073741824", "a sequence has 1073741824 tokens at most"),
        ("--checkpoint {llama} --prompt x --seed -1", "'-1' is no seed"),
        ("--checkpoint {llama} --prompt x --device tpu9", "--device tpu9: no such device"),
        ("--checkpoint {llama} --prompt x --device cuda:99", "--device cuda:99: this machine has"),
        ("--checkpoint {llama} --prompt x --attn-implementation longgen", "{llama} is llama; valid for it are sdpa"),
    ],
)
def test_generate_errors(arguments, message, llama, tmp_path, capsys):
    shutil.copytree(llama, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    shutil.copytree(llama, tmp_path / "cut")
    (tmp_path / "cut" / "model.safetensors").write_bytes((llama / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(SystemExit) as exit_status:
        generate.main(arguments.format(tmp=tmp_path, llama=llama).split())
    assert exit_status.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("python -m model_integration.generate: error: ")
    assert error.count("\n") == 1
    assert message.format(tmp=tmp_path, llama=llama) in error


@pytest.mark.parametrize("message", ["CUDA out of memory. Tried to allocate 9 GiB", "you tried to allocate 9 bytes"])
def test_generate_without_memory(message, llama, monkeypatch, capsys):
    def generate_nothing(self, **options):
        raise RuntimeError(message)

    monkeypatch.setattr(GenerationMixin, "generate", generate_nothing)
    with pytest.raises(SystemExit) as exit_status:
        generate.main(["--checkpoint", str(llama), "--prompt", "x", "--max-new-tokens", "9000000", "--device", "cpu"])
    assert exit_status.value.code == 2
    assert "--max-new-tokens 9000000 behind 1 of the prompt: cpu has not the memory" in capsys.readouterr().err


def test_generate_takes_a_dense_model_too(llama, capsys):
    """To see the two side by side: the memory of a full cache is what a hybrid's is compared with."""
    generate.main(["--checkpoint", str(llama), "--prompt", "def ", "--max-new-tokens", "9", "--device", "cpu"])
    captured = capsys.readouterr()
    assert captured.out.startswith("def ")
    assert re.search(r"^KV cache: [\d.]+ MiB, every token in every layer$", captured.err, re.M)
