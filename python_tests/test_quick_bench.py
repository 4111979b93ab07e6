"""`python -m longgen_kernels bench`: what it prints, and when it fails."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from longgen_kernels import __main__ as command
from longgen_kernels import longgen_attn_func
from longgen_kernels.benchmark import quick
from longgen_kernels.benchmark.cases import Case, Inputs
from longgen_kernels.benchmark.prepared import Prepared
from longgen_kernels.benchmark.results import Record

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="what is measured without a GPU")


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quick, "CPU_LENGTH", 64)


class Stub:
    """A kernel of this package under the reference's name, its output scaled."""

    name = "reference"

    def __init__(self, scale: float | None, absent: str | None = None) -> None:
        self.scale, self.absent = scale, absent

    def available(self, device: torch.device) -> str | None:
        return self.absent

    def unsupported(self, case: Case, device: torch.device) -> str | None:
        return None

    def prepare(self, case: Case, inputs: Inputs) -> Prepared:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if self.scale is None:
                raise RuntimeError("no such instruction")
            return longgen_attn_func(q, k, v, case.pattern) * self.scale

        return Prepared(attend, inputs)


def test_the_command_says_right_and_that_there_is_no_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["bench"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("No GPU")
    assert "nothing about the speed" in printed
    rows = [line for line in printed.splitlines() if "  reference  " in line]
    assert len(rows) == 6
    assert all("  right  " in row for row in rows)


def test_without_a_word_it_reports(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([]) == 0
    assert "Backends for bf16 tensors" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("stub", "code", "said"),
    [
        (Stub(1.0), 0, "right"),
        (Stub(1.01), 1, "sink 128, window 2048, fwd, reference: out: largest error"),
        (Stub(None), 1, "dense causal, fwd, reference: RuntimeError: no such instruction"),
        (Stub(1.0, absent="not built"), 1, "not measured: reference: not built"),
    ],
    ids=["right", "wrong", "raises", "absent"],
)
def test_a_wrong_kernel_is_not_timed(stub: Stub, code: int, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert quick.run(64, ["fwd"], 60.0, {"reference": stub}) == code
    printed = capsys.readouterr().out
    assert said in printed
    assert ("WRONG" in printed) == (stub.scale == 1.01)


def test_no_kernel_is_begun_after_the_time(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["bench", "--seconds", "0"]) == 0
    printed = capsys.readouterr().out
    assert "not complete: the 0 seconds were over" in printed
    assert len([line for line in printed.splitlines() if "  reference  " in line]) == 2  # both passes of the first


def test_ratios_are_to_the_fastest_dense_attention_of_others() -> None:
    def record(name: str, peer: str, ms: float | None) -> Record:
        status, reason = ("ok", None) if ms else ("error", "out of memory")
        return Record(name, {"name": name}, peer, "fwd", status, reason, median_ms=ms, tflops=ms)

    timings: list[tuple[str, str, float | None]] = [
        ("sink_window", "cuda", 2.0),
        ("sink_window", "flex", 4.0),
        ("causal", "cuda", 5.0),
        ("causal", "cudnn", 6.0),
        ("causal", "fa2_sdpa", 7.0),
        ("causal", "flex", None),
    ]
    lines = quick.table([record(*timing) for timing in timings]).splitlines()
    assert [line.split()[-1] for line in lines[2:7]] == ["3.00", "1.50", "1.20", "1.00", "0.86"]
    assert lines[7].split()[-1] == "failed"
    assert lines[8] == "dense causal, fwd, flex: out of memory"
