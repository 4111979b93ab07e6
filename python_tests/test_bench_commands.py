"""The benchmarks' files and commands: run, compare, revisions, decode, and the pytest-benchmark suites."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from test_bench import Stub, small_case

# `bench` is run from the repository's root and is not installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
pytest.importorskip("bench", reason="the sources have no bench/")

from bench import compare, decode, revisions, run
from longgen_kernels import AttentionPattern
from longgen_kernels.benchmark import report
from longgen_kernels.benchmark.results import Document, Record, load
from longgen_kernels.benchmark.timing import Effort

ROOT = Path(__file__).resolve().parents[1]


# -- files and command lines -------------------------------------------------------------------------------------------


def make_document(scale: float = 1.0, **machine: object) -> Document:
    case = small_case()
    good = Record(
        case.key, case.to_dict(), "triton", "fwd", "ok", None, median_ms=scale, q1_ms=0.99 * scale, q3_ms=1.02 * scale,
        min_ms=0.9 * scale, repeats=7, tflops=case.flops("fwd") / scale / 1e9, flops=case.flops("fwd"),
    )  # fmt: skip
    bad = Record(case.key, case.to_dict(), "flex", "bwd", "error", "RuntimeError: no")
    return Document({"gpu": "G", "commit": "a", **machine}, {}, {"triton": None}, records=[good, bad])


def test_result_files_come_back_as_they_were(tmp_path: Path) -> None:
    document = make_document()
    path = tmp_path / "new" / "result.json"
    document.save(path)
    assert load(path) == document
    assert [p.name for p in path.parent.iterdir()] == ["result.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(schema=99), "schema 1"),
        (lambda d: d.pop("machine"), "machine"),
        (lambda d: d["records"][0].update(colour="red"), "colour"),
        (lambda d: d["records"][0].update(median_ms=None), "a figure is missing"),
        (lambda d: d["records"][0].update(status="fine"), "unknown status 'fine'"),
        (lambda d: d["records"][1].update(tflops=1.0), "has figures"),
        (lambda d: d["records"][1].update(reason=None), "without a reason"),
    ],
)
def test_a_file_that_contradicts_itself_is_not_read(tmp_path: Path, change: object, message: str) -> None:
    path = tmp_path / "result.json"
    make_document().save(path)
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=message):
        load(path)


def test_compare_prints_ratios_with_spread(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, after = make_document(1.0), make_document(0.5, commit="b")
    change = compare.changes(before, after)[0]
    assert change.speedup == pytest.approx(2.0)
    assert (change.low, change.high) == (pytest.approx(0.99 / 0.51), pytest.approx(1.02 / 0.495))
    assert change.verdict == "faster"
    assert compare.changes(after, before)[0].verdict == "slower"
    assert compare.changes(before, make_document(1.01))[0].verdict == "same within spread"
    paths = tmp_path / "a.json", tmp_path / "b.json"
    for path, document in zip(paths, (before, after), strict=True):
        document.save(path)
    assert compare.main([str(path) for path in paths]) == 0
    printed = capsys.readouterr().out
    assert "commit: a -> b" in printed
    assert "2.000" in printed


def test_compare_ends_in_one_line_on_a_bad_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(SystemExit):
        compare.main([str(tmp_path / "a.json"), str(tmp_path / "missing.json")])
    assert "is not JSON" in capsys.readouterr().err


def test_table_shows_ratios_to_the_baseline_and_to_its_dense_figure() -> None:
    def record(name: str, peer: str, tflops: float) -> Record:
        case = replace(small_case(), name=name)
        return Record(case.key, case.to_dict(), peer, "fwd", "ok", None, 1.0, 1.0, 1.0, 1.0, 5, tflops, 1.0)

    records = [record("strided", "triton", 300.0), record("strided", "flex", 200.0), record("causal", "cudnn", 600.0)]
    assert "1.500" in report.table(records, "flex")
    against_dense = report.table(records, "cudnn")
    assert "0.500*" in against_dense
    assert "dense causal" in against_dense
    assert "of matmul" not in against_dense
    against_matmul = report.table(records, "flex", 750.0)
    assert "40%" in against_matmul
    assert "of the 750 TFLOP/s" in against_matmul


def test_quick_run_on_the_reference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "quick.json"
    arguments = ["--quick", "--device", "cpu", "--cases", "strided", "--lengths", "1280", "--commit", "c0ffee"]
    arguments += ["--warmups", "2", "--warmup-seconds", "0.01", "--min-repeats", "4", "--budget", "0.001"]
    assert run.main([*arguments, "--out", str(path)]) == 0
    document = load(path)
    assert [(r.key, r.peer, r.which, r.status) for r in document.records] == [
        ("strided/1280/tiny", "reference", "fwd", "ok"),
        ("strided/1280/tiny", "reference", "bwd", "ok"),
    ]
    record = document.records[0]
    assert record.tflops == pytest.approx(record.flops / record.median_ms / 1e9)
    assert record.q1_ms <= record.median_ms <= record.q3_ms
    assert {"date", "commit", "dirty", "gpu", "driver", "torch", "cuda", "triton", "package"} <= document.machine.keys()
    assert document.machine["commit"]
    assert document.peers == {"reference": None}
    effort = Effort(budget_s=0.001, warmups=2, warmup_s=0.01, min_repeats=4)
    assert document.settings["effort"] == asdict(effort)
    printed = capsys.readouterr()
    assert "strided/1280/tiny" in printed.out
    assert "[1/1]" in printed.err


def test_run_fails_when_a_kernel_was_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "wrong.json"
    wrong = {"wrong": Stub("wrong", lambda q, k, v: q + k + v)}
    arguments = ["--quick", "--device", "cpu", "--cases", "causal", "--lengths", "64", "--peers", "wrong"]
    assert run.main([*arguments, "--out", str(path)], peers=wrong) == 1
    assert [r.status for r in load(path).records] == ["refused", "refused"]
    assert "refused: out: largest error" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cases", "nothing"], "'nothing' is unknown; valid are sink_window"),
        (["--lengths", "8Q"], "--lengths"),
        (["--peers", "nobody"], "'nobody' is unknown"),
        (["--passes", "sideways"], "valid are fwd, bwd"),
        (["--device", "tpu"], "valid are cpu, cuda"),
        (["--device", "cpu", "--cuda-graph"], "--cuda-graph needs a GPU"),
        (["--min-repeats", "1"], "at least 2"),
        (["--out", "."], "is a directory"),
    ],
)
def test_wrong_arguments_end_in_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run.main(arguments)
    assert message in capsys.readouterr().err


# -- decoding ---------------------------------------------------------------------------------------------------------


def test_decoding_runs_and_writes_its_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "decode.json"
    assert decode.main(["--quick", "--out", str(out)]) == 0
    document = json.loads(out.read_text())
    (record,) = document["records"]
    assert (record["case"], record["peer"], record["status"], record["kept"]) == ("quick", "reference", "ok", 64)
    assert record["bytes"] == 2 * 64 * 16 * 4
    assert record["q1_us"] <= record["median_us"] <= record["q3_us"]
    assert "quick: 64 keys" in capsys.readouterr().out


def test_a_wrong_kernel_is_not_timed_while_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    right = decode.longgen_attn_with_kvcache
    monkeypatch.setattr(
        decode,
        "longgen_attn_with_kvcache",
        lambda *tensors, backend: right(*tensors, backend="reference") * (1.0 if backend == "reference" else 1.01),
    )
    (record,) = decode.time_case(decode.QUICK, ["triton"], torch.device("cpu"), Effort(budget_s=0.0, min_repeats=2))
    assert record["status"] == "error"
    assert "wrong, so not timed: off by" in record["reason"]


def test_sequences_of_different_lengths() -> None:
    case = replace(decode.QUICK, name="ragged", pattern=AttentionPattern.causal(), batch=4, seen=200, ragged=True)
    assert case.lengths == [50, 100, 150, 200]
    assert case.nbytes == 2 * 500 * 16 * 4
    assert case.flops == 4 * 2 * 500 * 16
    ours, cudnn = decode.time_case(case, ["reference", "cudnn"], torch.device("cpu"), Effort(budget_s=0.0))
    assert (ours["status"], ours["bytes"]) == ("ok", case.nbytes)
    assert (cudnn["status"], cudnn["reason"].split(":")[0]) == ("unsupported", "NotImplementedError")


# -- pytest-benchmark -------------------------------------------------------------------------------------------------


def test_the_pytest_suites_run_without_a_gpu(tmp_path: Path) -> None:
    pytest.importorskip("pytest_benchmark")
    out = tmp_path / "suites.json"
    command = [sys.executable, "-m", "pytest", "bench", "-q", "-p", "no:cacheprovider", f"--benchmark-json={out}"]
    # Without what pytest-xdist says here, by which the suites would take themselves for one of its workers.
    here = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment = here | {"CUDA_VISIBLE_DEVICES": ""}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, timeout=300)
    measured = {entry["group"] for entry in json.loads(out.read_text())["benchmarks"]}
    assert measured == {
        "forward", "backward", "decode", "append to a cache", "merge", "eager call overhead",
        "plan of a block mask", "plan of an arithmetic pattern",
    }  # fmt: skip


# -- two revisions ----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs a clone")
def test_two_revisions_are_built_measured_and_compared(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("setuptools")
    monkeypatch.setenv("LONGGEN_CUDA", "OFF")
    options = ["--quick", "--device", "cpu", "--cases", "strided", "--lengths", "64", "--passes", "fwd"]
    assert revisions.main(["HEAD", "HEAD", *options]) == 0
    assert "strided/64/tiny  reference" in capfd.readouterr().out
    listed = subprocess.run(["git", "worktree", "list"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert "/before" not in listed


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs a clone")
def test_an_unknown_revision_is_no_traceback(capfd: pytest.CaptureFixture[str]) -> None:
    assert revisions.main(["no-such-revision", "HEAD"]) == 1
    assert "no-such-revision" in capfd.readouterr().err


def test_the_files_of_revisions_are_not_kept(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        revisions.main(["HEAD", "HEAD", "--quick", "--out", "kept.json"])
    assert "--out: the two result files are compared and not kept" in capsys.readouterr().err
