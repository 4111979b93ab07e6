"""setup.py's decisions, and what it built."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from setuptools.errors import SetupError

import longgen_kernels
from longgen_kernels._version import __version__
from longgen_kernels.kernels import cuda
from longgen_kernels.kernels.cuda import extension

ROOT = Path(__file__).parent.parent
HAS_EXTENSION = importlib.util.find_spec("longgen_kernels._C") is not None


def load_setup() -> ModuleType:
    spec = importlib.util.spec_from_file_location("longgen_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


build = load_setup()


@pytest.mark.parametrize(
    ("value", "mode"), [(None, "AUTO"), ("", "AUTO"), ("on", "ON"), ("OFF", "OFF"), ("Auto", "AUTO")]
)
def test_longgen_cuda(value: str | None, mode: str) -> None:
    assert build.cuda_mode(value) == mode


def test_longgen_cuda_of_another_value() -> None:
    with pytest.raises(SetupError, match="LONGGEN_CUDA is 'yes'; valid are ON, OFF and AUTO"):
        build.cuda_mode("yes")


@pytest.mark.parametrize(
    ("value", "archs", "cmake"),
    [
        (None, ["80", "90a"], ["80-real", "90a-real", "80-virtual"]),
        ("90a", ["90a"], ["90a-real"]),
        ("120;90a, 80 86", ["80", "86", "90a", "120"], ["80-real", "86-real", "90a-real", "120-real", "80-virtual"]),
        ("100f;90;90", ["90", "100f"], ["90-real", "100f-real", "90-virtual"]),
    ],
)
def test_longgen_cuda_archs(value: str | None, archs: list[str], cmake: list[str]) -> None:
    assert build.cuda_archs(value) == archs
    assert build.cmake_architectures(archs) == cmake


@pytest.mark.parametrize("value", ["sm_90", "9.0", "75", "90b", "native", ";"])
def test_longgen_cuda_archs_of_another_value(value: str) -> None:
    with pytest.raises(SetupError, match="LONGGEN_CUDA_ARCHS"):
        build.cuda_archs(value)


def fake_nvcc(folder: Path, version: str) -> None:
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release x, V{version}'\n")
    nvcc.chmod(0o755)


def test_nvcc_of_cuda_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert build.find_nvcc() == (None, f"no nvcc in {tmp_path}/bin (CUDA_HOME)")
    fake_nvcc(tmp_path, "13.0.88")
    assert build.find_nvcc() == (tmp_path / "bin" / "nvcc", "13.0.88")


def test_nvcc_that_is_too_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_nvcc(tmp_path, "11.8.89")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    nvcc, reason = build.find_nvcc()
    assert nvcc is None
    assert reason.endswith("is version 11.8.89, and 12.3 or newer is needed")


def test_version_is_stated_once() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+\w*", __version__)
    others = [ROOT / name for name in ("pyproject.toml", "setup.py", "CMakeLists.txt", "longgen_kernels/__init__.py")]
    assert not [path.name for path in others if f'"{__version__}"' in path.read_text()]


def test_package_is_typed() -> None:
    package = Path(longgen_kernels.__file__).parent
    assert (package / "py.typed").exists()
    assert (package / "_C.pyi").exists()


def test_absence_has_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without `_C` the message says what setup.py wrote down."""
    absent = cuda.extension.BuildInfo(commit="0", cuda_archs=(), nvcc=None, cuda_absent="no nvcc on PATH")
    monkeypatch.setattr(extension.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(extension, "build_info", lambda: absent)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    extension._not_loadable.cache_clear()
    try:
        assert cuda.available() == "not built: no nvcc on PATH"
    finally:
        extension._not_loadable.cache_clear()


def test_main_reports(capfd: pytest.CaptureFixture[str]) -> None:
    subprocess.run([sys.executable, "-m", "longgen_kernels"], check=True)
    report = capfd.readouterr().out
    assert __version__ in report
    for operation in ("attention", "merge", "decode"):
        rows = [line.split()[1] for line in report.splitlines() if line.startswith(f"  {operation} ")]
        assert rows == ["cuda", "triton", "reference"]


needs_extension = pytest.mark.skipif(not HAS_EXTENSION, reason="built without CUDA kernels")


@needs_extension
def test_extension_imports_without_torch_and_driver() -> None:
    """No libtorch, no libcuda, no libcudart: nothing to match and nothing to miss."""
    from longgen_kernels import _C

    info = _C.build_info()
    assert info["cuda_archs"].split(",") == list(cuda.build_info().cuda_archs)
    assert info["cuda_runtime"] >= 12030
    linked = subprocess.run(["ldd", _C.__file__], check=True, capture_output=True, text=True).stdout
    assert not re.search(r"lib(torch|c10|cuda|cudart)\b", linked)


@needs_extension
def test_extension_refuses_an_unknown_dtype() -> None:
    from longgen_kernels import _C

    strides = {f"{name}_strides": (0, 0, 0) for name in ("out_a", "lse_a", "out_b", "lse_b")}
    addresses = dict.fromkeys(("out_a", "lse_a", "out_b", "lse_b", "out", "lse", "stream"), 0)
    with pytest.raises(ValueError, match="dtype is 'float8'; valid are float16, bfloat16 and float32"):
        _C.merge_attn_states(batch=1, seqlen=1, heads=1, head_dim=8, dtype="float8", **strides, **addresses)


def cuobjdump() -> str:
    """From the CUDA toolkit, or the one that Triton ships."""
    places = ["", "/usr/local/cuda/bin"]
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        places.append(str(Path(triton.origin).parent / "backends" / "nvidia" / "bin"))
    found = next(filter(None, (shutil.which("cuobjdump", path=place or None) for place in places)), None)
    if found is None:
        pytest.skip("no cuobjdump")
    return found


@needs_extension
def test_kernels_do_not_spill() -> None:
    """No kernel, of any architecture, keeps registers in local memory."""
    from longgen_kernels import _C

    usage = subprocess.run(
        [cuobjdump(), "--dump-resource-usage", _C.__file__], check=True, capture_output=True, text=True
    ).stdout
    kernels = re.findall(r"Function (\S+):\s+(.*)", usage)
    assert len({name for name, _ in kernels}) >= 12
    for name, resources in kernels:
        used = dict(re.findall(r"(\w+):(\d+)", resources))
        assert (used["STACK"], used["LOCAL"]) == ("0", "0"), f"{name}: {resources}"


def hopper_kernels(name: str) -> list[str]:
    """The machine code of the kernels of this name, if Hopper's were built."""
    from longgen_kernels import _C

    if "90a" not in _C.build_info()["cuda_archs"].split(","):
        pytest.skip("built without Hopper's kernels")
    sass = subprocess.run(
        [cuobjdump(), "--dump-sass", "--gpu-architecture", "sm_90a", _C.__file__],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    return [text for text in sass.split("Function : ")[1:] if name in name_of(text)]


def name_of(kernel: str) -> str:
    return kernel.split("\n", 1)[0]


@needs_extension
def test_hopper_attention_overlaps_softmax_with_matrix_products() -> None:
    """Tensor-core instructions, no local memory, and softmax before the wait for P V, which the assembler may move."""
    kernels = hopper_kernels("attn_fwd_kernel")
    assert len(kernels) == 4
    for text in kernels:
        assert text.count("HGMMA") >= 24
        assert text.count("WARPGROUP.DEPBAR") < 10  # one a matrix product, not one an instruction
        assert not re.search(r"\b(LDL|STL)\b", text)
        waits = re.split(r"WARPGROUP\.DEPBAR\.LE gsb0, (0x[01])", text)  # text, argument, text, argument, ...
        between = [
            waits[i + 1]
            for i in range(1, len(waits) - 2, 2)
            if (waits[i], waits[i + 2]) == ("0x1", "0x0")  # from "scores are there" to "output is there"
        ]
        assert len(between) == 1
        # At head_dim 64 the last weights meet the conversion of the others into an operand.
        assert between[0].count("MUFU.EX2") >= (40 if "Li64E" in name_of(text) else 64)


@needs_extension
def test_hopper_backward_overlaps_arithmetic_with_matrix_products() -> None:
    """What a thread computes while products are in flight is not moved behind a wait for them."""
    kernels = hopper_kernels("attn_bwd_kernel")
    # Of each dtype and head_dim one that adds up dQ and, for deterministic gradients, one that does not.
    assert sum("Li64E" in name_of(text) for text in kernels) == sum("Li128E" in name_of(text) for text in kernels) == 4
    assert sum("UBLKRED" in text for text in kernels) == 4
    for text in kernels:
        adds_dq, large = "UBLKRED" in text, "Li128E" in name_of(text)
        waits = re.split(r"WARPGROUP\.DEPBAR\.LE gsb0, (0x\d)", text)
        products = [part.count("HGMMA") for part in waits[::2]]
        scores = 8 if large else 4  # head_dim / 16
        if adds_dq:
            # Steps in which nobody sees the warpgroup's keys, dQ from the other's 64: before the first scores, one
            # behind them, and at the end.
            assert products[:3] == [4, scores, 4]
            assert (waits[-2], products[-2:]) == ("0x0", [4, 0])
            waits, products = [waits[2], *waits[5:-3], waits[-1]], [scores, *products[3:-2], products[-1]]
        assert sum(part.count("R2UR") for part in waits[2:-1:2]) < 20  # descriptors live in uniform registers
        # First scores; then a tile's dP; at head_dim 128 the next scores, and dV; at head_dim 64 those scores, dQ and
        # dK; nothing more is issued until dQ is there.
        dq = 8 if adds_dq else 0
        assert products[:4] == [scores, scores, 8 + 4 if large else 8, dq + (4 if large else 4 + 8)]
        assert set(products[4:]) == {0}
        if adds_dq:
            assert waits[1::2] == ["0x0", "0x1", "0x2" if large else "0x1", "0x2", "0x1", "0x0"]
        else:
            assert waits[1::2] == ["0x0", "0x1", "0x2" if large else "0x1", "0x1", "0x0"]
        _, exp2, issue, ds, beside_dq, after_dq = waits[:12:2] if adds_dq else [*waits[:10:2], waits[-1]]
        half = 16 if large else 32
        assert exp2.count("MUFU.EX2") == 2 * half  # of the first tile, before the loop, and the loop's other half
        assert beside_dq.count("MUFU.EX2") == half  # while dQ or, without it, dK is in flight
        assert ds.count("F2FP") == half  # beside dV and at head_dim 128 the next scores
        assert ds.count("STSM") == half // 4
        if large:  # delta and LSE are read before products that would keep them waiting
            assert issue.count("LDS.128") == ds.count("LDS.128") == 4
        if adds_dq:
            assert after_dq.count("STS.128") == 8  # then the copy engine adds it up


@needs_extension
def test_hopper_deterministic_dq_overlaps_arithmetic_with_matrix_products() -> None:
    kernels = hopper_kernels("bwd_dq_rows_kernel")
    assert len(kernels) == 4
    for text in kernels:
        transposed = 8 if "Li128E" in name_of(text) else 4  # scores or dP: head_dim / 16
        waits = re.split(r"WARPGROUP\.DEPBAR\.LE gsb0, (0x[01])", text)
        assert waits[1::2] == ["0x0", "0x1", "0x1", "0x1", "0x0"]
        assert [part.count("HGMMA") for part in waits[::2]] == [transposed, transposed, transposed, 4, 0, 0]
        assert waits[4].count("MUFU.EX2") == 32  # beside dP
        assert waits[6].count("F2FP") == 16  # dS, beside the next scores


@needs_extension
def test_hopper_decode_copies_in_bulk_and_merges_in_clusters() -> None:
    """Chunks come as boxes, no local memory; parts go to other blocks without a fence of the whole GPU before them."""
    kernels = [text for text in hopper_kernels("decode_kernel") if "CacheMaps" in name_of(text)]
    # Two types, four head_dims, 8 or 16 rows up to head_dim 128; of fp8 caches two head_dims; persistent blocks of all
    # these, small ones (plain, in a row, and by halves) of the three head_dims up to 128, not of fp8 caches.
    kinds = [[text for text in kernels if f"BlocksE{i}E" in name_of(text)] for i in range(5)]
    assert [len(kind) for kind in kinds] == [14 + 8, 12, 12, 12, 14 + 8]
    assert len(kernels) == 80
    big = kinds[0]
    for text in kernels:
        assert not re.search(r"\b(LDL|STL)", text), name_of(text)
        assert not re.search(r"\bLD\.", text), (
            "parameters are constants: read as memory, copies begin microseconds later"
        )
        assert "UTMALDG" in text
        assert ("STAS" in text) == (text in big)  # others are no clusters
        # Nothing that other kernels wrote is read through the level-1 cache before they have ended.
        assert "LDG.E.CONSTANT" not in text
