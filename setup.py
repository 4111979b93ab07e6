"""Builds the CUDA extension `longgen_kernels._C` with CMake and ninja where there is an nvcc.

Environment:
    LONGGEN_CUDA        AUTO (default): build the CUDA kernels if there is an nvcc. ON: fail without one. OFF: do not.
    LONGGEN_CUDA_ARCHS  compute capabilities, default "80;90a". The lowest plain one is also embedded as PTX, which the
                        driver compiles on GPUs newer than all of them.
    CUDA_HOME           the CUDA toolkit to use; otherwise nvcc comes from PATH or /usr/local/cuda.
    MAX_JOBS            parallel compilations; default: one per core.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext
from setuptools.command.sdist import sdist
from setuptools.errors import CompileError, SetupError

ROOT = Path(__file__).resolve().parent
DEFAULT_ARCHS = "80;90a"
MIN_NVCC = (12, 3)  # the first whose sm_90a support the kernels were written for


def cuda_mode(value: str | None) -> str:
    """LONGGEN_CUDA as "ON", "OFF" or "AUTO"."""
    mode = (value or "AUTO").upper()
    if mode not in ("ON", "OFF", "AUTO"):
        raise SetupError(f"LONGGEN_CUDA is {value!r}; valid are ON, OFF and AUTO")
    return mode


def cuda_archs(value: str | None) -> list[str]:
    """LONGGEN_CUDA_ARCHS as a sorted list of compute capabilities without their dot, such as ["80", "90a"]."""
    archs = {arch for arch in re.split(r"[;,\s]+", value or DEFAULT_ARCHS) if arch}
    for arch in archs:
        if not re.fullmatch(r"\d{2,3}[af]?", arch) or int(arch.rstrip("af")) < 80:
            raise SetupError(
                f"LONGGEN_CUDA_ARCHS has {arch!r}; valid are compute capabilities of 80 and up without a dot, "
                f'separated by semicolons, such as "{DEFAULT_ARCHS}"'
            )
    if not archs:
        raise SetupError(f'LONGGEN_CUDA_ARCHS is {value!r}; an example of what is valid is "{DEFAULT_ARCHS}"')
    return sorted(archs, key=lambda arch: (int(arch.rstrip("af")), arch))


def cmake_architectures(archs: list[str]) -> list[str]:
    """Machine code for every architecture, and PTX of the lowest that later GPUs run too ("90a" runs on 9.0 alone)."""
    portable = [arch for arch in archs if arch.isdigit()]
    return [f"{arch}-real" for arch in archs] + [f"{arch}-virtual" for arch in portable[:1]]


def find_nvcc() -> tuple[Path | None, str]:
    """nvcc's path and version, or None and the reason why there is none to build with."""
    home = os.environ.get("CUDA_HOME")
    if home:  # says where to look: another toolkit elsewhere is not what was asked for
        places = [str(Path(home) / "bin")]
    else:
        places = [os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    found = next(filter(None, (shutil.which("nvcc", path=place) for place in places)), None)
    if found is None:
        return None, f"no nvcc in {home}/bin (CUDA_HOME)" if home else "no nvcc on PATH or in /usr/local/cuda/bin"
    try:
        text = subprocess.run([found, "--version"], check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        return None, f"{found} does not run: {error}"
    match = re.search(r"V(\d+)\.(\d+)\.\d+", text)
    if match is None:
        return None, f"{found} --version names no version"
    if (int(match[1]), int(match[2])) < MIN_NVCC:
        return None, f"{found} is version {match[0][1:]}, and {MIN_NVCC[0]}.{MIN_NVCC[1]} or newer is needed"
    return Path(found), match[0][1:]


def build_tool(name: str) -> str:
    """cmake or ninja of the Python package, a build requirement: what PATH holds may be older."""
    try:
        files = importlib.metadata.distribution(name).files or []
    except importlib.metadata.PackageNotFoundError:
        return name
    return next((str(file.locate().resolve()) for file in files if file.name == name), name)


def git_commit() -> str:
    """The commit of this checkout, "+" added if files differ from it, or the one that the sdist was made from."""

    def git(*args: str) -> str:
        return subprocess.run(["git", *args], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() == ROOT:  # not unpacked inside another repository
            changed = git("status", "--porcelain", "--untracked-files=no")
            return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        pass  # no git, or no repository
    stated = ROOT / "COMMIT"
    return stated.read_text().strip() if stated.exists() else "unknown"


def say(message: str) -> None:
    """Says something to whoever installs. pip swallows the output of a build that succeeds, the terminal does not."""
    print(message, file=sys.stderr, flush=True)
    if not sys.stderr.isatty():
        try:
            with open("/dev/tty", "w") as terminal:
                terminal.write(f"\n{message}\n")
        except OSError:
            pass  # nobody is watching: the log has it, and so has `python -m longgen_kernels`


class FreshBuild(build):
    """Starts from an empty folder: a module that an earlier build left there would go into the wheel."""

    def run(self) -> None:
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class SourceDistribution(sdist):
    """States the commit in a file, which a build from the sdist reads."""

    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        super().make_release_tree(base_dir, files)
        Path(base_dir, "COMMIT").write_text(git_commit() + "\n")


class BuildExtension(build_ext):
    """Puts `_C` and `_build_info.py`, which says how it was built or why not, into longgen_kernels."""

    def run(self) -> None:
        mode = cuda_mode(os.environ.get("LONGGEN_CUDA"))
        archs = cuda_archs(os.environ.get("LONGGEN_CUDA_ARCHS"))
        nvcc, detail = (None, "LONGGEN_CUDA=OFF") if mode == "OFF" else find_nvcc()
        if nvcc is None and mode == "ON":
            raise SetupError(f"LONGGEN_CUDA=ON, but the CUDA kernels cannot be built: {detail}")

        library = self._compile(nvcc, archs) if nvcc else None
        info = [
            '"""Written by setup.py: how this copy of longgen_kernels was built."""',
            "",
            f"commit = {git_commit()!r}",
            f"cuda_archs = {tuple(archs) if nvcc else ()!r}",
            f"nvcc = {detail if nvcc else None!r}",
            f"cuda_absent = {None if nvcc else detail!r}",
        ]
        for package in self._package_folders():
            package.mkdir(parents=True, exist_ok=True)
            (package / "_build_info.py").write_text("\n".join(info) + "\n")
            target = package / self._library_name()
            target.unlink(missing_ok=True)  # of an earlier build; a process that has it mapped keeps its copy
            if library:
                shutil.copy2(library, target)
        if nvcc is None:
            say(f"longgen_kernels: installing without CUDA kernels ({detail}). Triton and PyTorch still run.")

    def _compile(self, nvcc: Path, archs: list[str]) -> Path:
        import pybind11  # a build requirement; not needed to read this file

        # Not setuptools' temporary folder: this one survives, so that a second build compiles only what changed.
        folder = ROOT / "build" / f"cmake-{sysconfig.get_config_var('SOABI')}"
        cache = folder / "CMakeCache.txt"
        if cache.exists() and f"CMAKE_HOME_DIRECTORY:INTERNAL={ROOT}\n" not in cache.read_text():
            shutil.rmtree(folder)  # came along when the checkout was copied
        jobs = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
        configure = [
            build_tool("cmake"),
            *("-S", str(ROOT), "-B", str(folder), "-G", "Ninja"),
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_MAKE_PROGRAM={build_tool('ninja')}",
            f"-DCMAKE_CUDA_COMPILER={nvcc}",
            f"-DCMAKE_CUDA_ARCHITECTURES={';'.join(cmake_architectures(archs))}",
            f"-DLONGGEN_CUDA_ARCHS={','.join(archs)}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ]
        try:
            subprocess.run(configure, check=True)
            subprocess.run([configure[0], "--build", str(folder), "--parallel", jobs], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise CompileError(
                f"the CUDA kernels did not compile with {nvcc}: {error}. The compiler's messages are above; "
                "LONGGEN_CUDA=OFF installs without CUDA kernels."
            ) from error
        return folder / self._library_name()

    def _package_folders(self) -> list[Path]:
        # Also beside the sources, as an editable install does: Python started in the checkout imports longgen_kernels
        # from there, not the installed copy, and would otherwise find no `_C`.
        return list({Path(self.build_lib).resolve() / "longgen_kernels", ROOT / "longgen_kernels"})

    def _library_name(self) -> str:
        return Path(self.get_ext_filename("_C")).name

    def get_outputs(self) -> list[str]:
        folder = Path(self.build_lib) / "longgen_kernels"
        return [str(f) for f in (folder / "_build_info.py", folder / self._library_name()) if f.exists()]

    def get_output_mapping(self) -> dict[str, str]:
        return {file: str(ROOT / "longgen_kernels" / Path(file).name) for file in self.get_outputs()}


if __name__ == "__main__":
    setup(
        ext_modules=[Extension("longgen_kernels._C", sources=[])],
        cmdclass={"build": FreshBuild, "build_ext": BuildExtension, "sdist": SourceDistribution},
    )
