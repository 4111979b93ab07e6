"""Which backend runs, and what is said when none can."""

from __future__ import annotations

import pytest

from longgen_kernels.dispatch import BACKENDS, choose, explain


def can(problem: object) -> None:
    return None


def cannot(problem: object) -> str:
    return "no luck"


def never_asked(problem: object) -> str:
    raise AssertionError("this backend does not come into question")


@pytest.fixture(autouse=True)
def _no_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.mark.parametrize(
    ("device", "cuda", "triton", "chosen"),
    [("cuda", can, never_asked, "cuda"), ("cuda", cannot, can, "triton"), ("xpu", never_asked, can, "triton")],
)
def test_auto_takes_the_first_kernel_that_can(device, cuda, triton, chosen) -> None:
    candidates = {"cuda": cuda, "triton": triton, "reference": never_asked}
    assert choose("auto", candidates, "problem", "merge", device) == chosen


@pytest.mark.parametrize(("triton", "chosen"), [(can, "triton"), (cannot, "cuda")])
def test_auto_asks_those_last_that_are_slower_here(triton, chosen) -> None:
    candidates = {"cuda": can, "triton": triton, "reference": never_asked}
    assert choose("auto", candidates, "problem", "x", "cuda", last=("cuda",)) == chosen
    assert choose("cuda", candidates, "problem", "x", "cuda", last=("cuda",)) == "cuda"


def test_auto_on_the_cpu_is_the_reference() -> None:
    candidates = {"cuda": never_asked, "triton": never_asked, "reference": can}
    assert choose("auto", candidates, "problem", "x", "cpu") == "reference"


def test_auto_never_falls_to_the_reference_on_a_gpu() -> None:
    with pytest.raises(NotImplementedError) as raised:
        choose("auto", {"cuda": cannot, "reference": never_asked}, "problem", "merge", "cuda")
    message = str(raised.value)
    assert "merge on cuda tensors" in message
    assert "cuda: no luck" in message
    assert "triton: has no implementation of merge" in message
    assert 'backend="reference"' in message


@pytest.mark.parametrize("name", BACKENDS)
def test_an_explicit_backend_runs_or_raises(name: str) -> None:
    others = dict.fromkeys(BACKENDS, never_asked)
    assert choose(name, {**others, name: can}, "problem", "x", "cuda") == name
    with pytest.raises(NotImplementedError, match=f"{name}: no luck"):
        choose(name, {**others, name: cannot}, "problem", "x", "cuda")


def test_triton_takes_cpu_tensors_in_its_interpreter_only(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NotImplementedError, match="TRITON_INTERPRET=1"):
        choose("triton", {"triton": can}, "problem", "x", "cpu")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose("triton", {"triton": can}, "problem", "x", "cpu") == "triton"
    assert choose("auto", {"triton": can, "reference": can}, "problem", "x", "cpu") == "reference"


def test_cuda_takes_cuda_tensors_only() -> None:
    with pytest.raises(NotImplementedError, match="cuda: takes CUDA tensors, got cpu tensors"):
        choose("cuda", {"cuda": never_asked}, "problem", "x", "cpu")


def test_environment_replaces_auto_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    everything = dict.fromkeys(BACKENDS, can)
    monkeypatch.setenv("LONGGEN_BACKEND", "reference")
    assert choose("auto", everything, "problem", "x", "cuda") == "reference"
    assert choose("triton", everything, "problem", "x", "cuda") == "triton"
    monkeypatch.setenv("LONGGEN_BACKEND", "auto")
    assert choose("auto", everything, "problem", "x", "cuda") == "cuda"
    monkeypatch.setenv("LONGGEN_BACKEND", "cuda")
    with pytest.raises(NotImplementedError, match="LONGGEN_BACKEND=cuda"):
        choose("auto", {"cuda": cannot}, "problem", "x", "cuda")
    monkeypatch.setenv("LONGGEN_BACKEND", "fast")
    with pytest.raises(ValueError, match="LONGGEN_BACKEND is 'fast'; valid are auto, cuda, triton, reference"):
        choose("auto", everything, "problem", "x", "cuda")


def test_unknown_name() -> None:
    with pytest.raises(ValueError, match="backend is 'gpu'; valid are"):
        choose("gpu", {}, "problem", "x", "cuda")


def test_explain_asks_everyone() -> None:
    assert explain({"cuda": can, "reference": cannot}, "problem", "x", "cuda") == {
        "cuda": None,
        "triton": "has no implementation of x",
        "reference": "no luck",
    }
