"""Measure two git revisions on this machine and compare them: `python -m bench.revisions BEFORE AFTER --cases causal`.

Each revision is checked out and built in a folder of its own; what is installed stays as it is. Then `python -m
bench.run` runs in each, with all options that follow.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from bench import compare, machine
from longgen_kernels.benchmark.results import load


def build(revision: str, folder: Path) -> None:
    """Checks a revision out into a new folder and compiles its extension there. Raises CalledProcessError."""
    _run("git", "-C", machine.ROOT, "worktree", "add", "--quiet", "--detach", folder, revision)
    _run(sys.executable, "setup.py", "--quiet", "build_ext", "--inplace", cwd=folder)


def remove(folder: Path) -> None:
    """Forgets a checkout, if there is one."""
    subprocess.run(["git", "-C", machine.ROOT, "worktree", "remove", "--force", folder], capture_output=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns 1 if a revision cannot be built or measured, or a kernel was refused as wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.revisions", description=(__doc__ or "").split("\n\n")[0],
        epilog="All other options are those of `python -m bench.run`, which both revisions must know.",
    )  # fmt: skip
    parser.add_argument("before", help="a branch, tag or commit")
    parser.add_argument("after", help="another one")
    args, options = parser.parse_known_args(argv)
    if "--out" in options:
        parser.error("--out: the two result files are compared and not kept; bench.run writes one that is")
    if not (machine.ROOT / ".git").exists():
        parser.error(f"{machine.ROOT} has no .git: revisions are checked out of a clone")
    with tempfile.TemporaryDirectory() as place:
        folders = {name: Path(place, name) for name in ("before", "after")}
        try:
            for name, folder in folders.items():
                print(f"{name}: building {vars(args)[name]}", file=sys.stderr, flush=True)
                build(vars(args)[name], folder)
            files = [_measured(folder, options) for folder in folders.values()]
        except subprocess.CalledProcessError as error:
            print(f"{' '.join(map(str, error.cmd))} ended with {error.returncode}", file=sys.stderr)
            return 1
        finally:
            for folder in folders.values():
                remove(folder)
        print(compare.render(*map(load, files)))
    return 0


def _measured(folder: Path, options: Sequence[str]) -> Path:
    out = folder.with_suffix(".json")
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    _run(sys.executable, "-m", "bench.run", *options, "--out", out, cwd=folder, env=environment)
    return out


def _run(*command: str | Path, cwd: Path | None = None, env: dict[str, str] | None = None) -> None:
    subprocess.run(command, cwd=cwd, env=env, check=True, stdout=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
