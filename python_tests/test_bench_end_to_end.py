"""bench.end_to_end: what it measures is the models' own work, and what fails is a record."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

# `bench` is run from the repository's root and is not installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
pytest.importorskip("bench", reason="the sources have no bench/")

from bench import end_to_end, whole_models
from bench.whole_models import Contender, Dense, Hybrid, contenders
from longgen_kernels import AttentionPattern

CPU = torch.device("cpu")
LENGTH = 150


def make(name: str, shape: str = "tiny", device: torch.device = CPU, dtype: torch.dtype = torch.float32) -> Contender:
    torch.manual_seed(0)
    kind, config = contenders(shape, AttentionPattern.sink_window(4, 60))[name]
    return kind(config, device, dtype)


def run(tmp_path: Path, *arguments: str) -> tuple[int, dict[tuple[str, str], dict[str, object]]]:
    """Exit code, and the records by contender and part."""
    out = tmp_path / "figures" / "end_to_end.json"
    code = end_to_end.main(["--quick", "--out", str(out), *arguments])
    document = json.loads(out.read_text())
    assert document["machine"]["torch"] == torch.__version__
    assert document["model"]["num_hidden_layers"] == 6
    return code, {(record["peer"], record["part"]): record for record in document["records"]}


def test_quick_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, records = run(tmp_path)
    assert code == 0
    assert set(records) == {(peer, part) for peer in ("hybrid", "dense") for part in ("build", *end_to_end.PARTS)}
    assert {record["status"] for record in records.values()} == {"ok"}
    assert records["hybrid", "build"]["parameters"] == records["dense", "build"]["parameters"]
    assert all(records[peer, "decode"]["median_eager_ms"] > 0 for peer in ("hybrid", "dense"))
    assert records["dense", "decode"]["kv_bytes"] == 6 * 2 * 300 * 64 * 4
    assert "hybrid  prefill     300" in capsys.readouterr().out


def test_kept_attention_is_said_in_the_file(tmp_path: Path) -> None:
    code, records = run(tmp_path, "--parts", "train", "--keep-attention")
    assert code == 0
    assert {record["status"] for record in records.values()} == {"ok"}
    assert json.loads((tmp_path / "figures" / "end_to_end.json").read_text())["settings"]["keep_attention"]


def test_chunks_and_the_order_of_parts(tmp_path: Path) -> None:
    code, records = run(tmp_path, "--peers", "hybrid", "--parts", "train,prefill", "--chunk", "64K")
    assert code == 0
    assert list(records) == [("hybrid", "build"), ("hybrid", "prefill"), ("hybrid", "train")]
    assert records["hybrid", "prefill"]["chunk"] == 128


@pytest.mark.parametrize(("name", "chunk"), [("hybrid", None), ("hybrid", 64), ("dense", None)])
def test_prefill_and_steps_are_those_of_the_model(name: str, chunk: int | None) -> None:
    peer = make(name)
    ids = torch.randint(97, (1, LENGTH))
    cache = peer.new_cache(LENGTH, spare=20)
    logits = peer.read(ids, cache, chunk)
    with torch.no_grad():
        expected = peer.model(ids).logits
    torch.testing.assert_close(logits, expected[:, -1], rtol=1e-4, atol=1e-5)
    # The hybrid goes on behind the prompt; a step of the dense model takes its last token's place.
    again = ids[:, -1] if name == "dense" else torch.randint(97, (1,))
    longer = ids if name == "dense" else torch.cat([ids, again[None]], dim=1)
    with torch.no_grad():
        expected = peer.model(longer).logits[:, -1]
    for _ in range(3 if name == "dense" else 1):
        torch.testing.assert_close(peer.eager_step(cache)(again), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["hybrid", "dense"])
def test_replayed_steps_decode_the_same_tokens(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the capture replaced by direct calls; python_tests/test_model_decoding.py captures."""
    monkeypatch.setattr(whole_models, "captured", lambda call, device: call)
    peer, ids = make(name), torch.randint(97, (1, LENGTH))
    decoded = []
    for make_step in (peer.eager_step, peer.graph_step):
        bench = end_to_end.Bench(peer, LENGTH, None, 0.0, end_to_end.SPARE)
        bench.ids = ids
        bench.read()
        decoded.append([bench.tokens(make_step)().tolist() for _ in range(2)])
    assert decoded[0] == decoded[1]


@pytest.mark.parametrize("name", ["hybrid", "dense"])
def test_bytes_are_those_of_the_cache(name: str) -> None:
    peer = make(name)
    cache = peer.new_cache(LENGTH, spare=20)
    peer.read(torch.randint(97, (1, LENGTH)), cache, None)
    tensors = [x for kv in cache.kv for x in (kv.k, kv.v)] if name == "hybrid" else []
    tensors = tensors or [x for layer in cache.layers for x in (layer.keys, layer.values)]
    assert peer.cache_bytes(LENGTH, 20) == sum(x.nbytes for x in tensors)


def test_the_dense_model_builds_no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask of 128K by 128K would not fit, and would keep its attention from the fast kernels."""
    masks = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def watched(*tensors: Tensor, attn_mask: Tensor | None = None, **options: object) -> Tensor:
        masks.append(attn_mask)
        return attend(*tensors, attn_mask=attn_mask, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    peer, ids = make("dense"), torch.randint(97, (1, LENGTH))
    cache = peer.new_cache(LENGTH, 0)
    peer.read(ids, cache, None)
    peer.eager_step(cache)(ids[:, -1])
    peer.train_step(ids)
    assert len(masks) == 6 + 6 + 12  # a training step computes each layer twice
    assert all(mask is None for mask in masks)


@pytest.mark.parametrize("name", ["hybrid", "dense"])
def test_a_training_step_is_that_of_the_model(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    peer, ids, norms = make(name), torch.randint(97, (1, LENGTH)), []
    monkeypatch.setattr(
        peer.model, "zero_grad", lambda **_: norms.append([float(p.grad.norm()) for p in peer.model.parameters()])
    )
    loss = peer.train_step(ids)
    for p in peer.model.parameters():
        p.grad = None
    output = peer.model(ids, labels=ids, use_cache=False)
    output.loss.backward()
    assert float(loss) == pytest.approx(float(output.loss.detach()), rel=1e-5)
    assert norms[0] == pytest.approx([float(p.grad.norm()) for p in peer.model.parameters()], rel=1e-3, abs=1e-6)


def test_lacking_memory_is_known_before_anything_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(end_to_end, "free_bytes", lambda device: 1000)
    monkeypatch.setattr(end_to_end.Bench, "read", lambda _: pytest.fail("started"))
    code, records = run(tmp_path, "--peers", "hybrid", "--parts", "prefill,decode")
    assert code == 0
    for part in ("prefill", "decode"):
        assert records["hybrid", part]["status"] == "refused"
        assert (
            "needs 0.0 GiB beside the weights (kv cache 0.0 GiB, activations 0.0" in records["hybrid", part]["reason"]
        )


def test_what_llama_2_7b_needs() -> None:
    """On paper: 11 full layers keep 16 GiB a layer and a million tokens, the dense model 64 GiB for 128K."""
    torch.manual_seed(0)
    meta = torch.device("meta")
    available = contenders("llama-2-7b", AttentionPattern.sink_window(128, 2048))
    hybrid, dense = (kind(config, meta, torch.bfloat16) for kind, config in available.values())
    assert isinstance(hybrid, Hybrid) and isinstance(dense, Dense)
    assert sum(p.numel() for p in dense.model.parameters()) == 6_738_415_616
    gib = 1 << 30
    assert 11 * 16 < hybrid.prefill_bytes(1 << 20, 0, 1 << 16)["kv_cache"] / gib < 11 * 16 + 1
    assert dense.prefill_bytes(1 << 17, 0, None)["kv_cache"] == 64 * gib
    assert hybrid.prefill_bytes(1 << 19, 0, 1 << 16)["activations"] < 8 * gib


def failing_for(kind: type[Contender], error: Exception) -> Callable[[end_to_end.Bench], Tensor]:
    read = end_to_end.Bench.read

    def fail(bench: end_to_end.Bench) -> Tensor:
        if isinstance(bench.peer, kind):
            raise error
        return read(bench)

    return fail


@pytest.mark.parametrize(
    ("error", "status", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory", 0),
        (RuntimeError("no kernel"), "error", 1),
    ],
    ids=["out of memory", "error"],
)
def test_a_failure_is_a_record_and_stops_nothing(
    error: Exception, status: str, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(end_to_end.Bench, "read", failing_for(Hybrid, error))
    code, records = run(tmp_path)
    assert code == expected
    assert str(error) in str(records["hybrid", "prefill"]["reason"])
    assert [records["hybrid", part]["status"] for part in end_to_end.PARTS] == [status, status, "ok"]
    assert {records["dense", part]["status"] for part in end_to_end.PARTS} == {"ok"}
    assert ("median_s" in records["hybrid", "prefill"]) is False


def test_a_result_that_is_not_finite_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Hybrid, "train_step", lambda *_: torch.tensor(torch.nan))
    code, records = run(tmp_path, "--peers", "hybrid", "--parts", "train")
    assert code == 1
    assert "not finite" in str(records["hybrid", "train"]["reason"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--parts", "prefill,serve"], "--parts: serve is unknown; valid are prefill, decode, train"),
        (["--peers", "sparse"], "--peers: sparse is unknown; valid are hybrid, dense"),
        (["--chunk", "64K"], "--chunk: the dense model would need a mask for each chunk; use --peers hybrid"),
        (["--lengths", "0"], "a length must be at least 1, got 0"),
    ],
)
def test_wrong_arguments_end_in_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        end_to_end.main(["--quick", *arguments])
    assert message in capsys.readouterr().err
