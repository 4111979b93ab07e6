"""bench.several_gpus: as many processes as there are take the same step."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `bench` is run from the root and is not installed
pytest.importorskip("bench", reason="the sources have no bench/")

from parallel_cases import bench_run, spawn

from bench import several_gpus


def test_the_step_does_not_depend_on_the_number_of_processes(tmp_path: Path) -> None:
    for ranks in (1, 2):
        directory = tmp_path / str(ranks)
        directory.mkdir()
        assert spawn(ranks, bench_run, directory) == [0] * ranks
    one, two = json.loads((tmp_path / "several.json").read_text())["records"]
    assert (one["processes"], two["processes"]) == (1, 2)
    assert one["tokens"] == two["tokens"] == 300
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
    assert two["gradient_norm"] == pytest.approx(one["gradient_norm"], rel=1e-4)


def test_it_wants_torchrun(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(SystemExit):
        several_gpus.main(["--quick"])
    assert "start it with torchrun" in capsys.readouterr().err
