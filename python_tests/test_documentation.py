"""README.md and docs/: the Python blocks run, the commands exist and take the options shown, links lead to files."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import os
import re
import sys
import tomllib
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from markdown_blocks import PAGES, ROOT, Block, blocks, commands

import longgen_kernels

# How many Python blocks of a page say in their first line what they need. Without it they are compiled only.
NEEDING = {"docs/how-to/kv-caches.md": 1}

LLAMA = "path/to/Llama-2-7b-hf"  # what the pages call a dense checkpoint
OTHER_PROGRAMS = ("python3", ".", "git", "clang-format", "CUDA_HOME")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
INSTALLED_PROGRAMS = [re.split(r"[=<>\[]", need)[0] for extra in EXTRAS.values() for need in extra]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty current folder, one thread, and what `torchrun --nproc-per-node 1` sets, with a free port."""
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small models are slower with more
    launched = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    yield tmp_path
    torch.set_num_threads(threads)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")])
def test_python_blocks_run(page: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order and in one module, as a reader who follows the page runs them."""
    found = blocks(page, "python")
    if any("model_integration" in block.text or "transformers" in block.text for block in found):
        pytest.importorskip("transformers")
        from model_cases import save_byte_llama

        save_byte_llama(folder / LLAMA, num_hidden_layers=6, num_attention_heads=4, max_position_embeddings=512)
    module = types.ModuleType("documentation_page")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # where torch.compile looks for a block's functions
    for block in found:
        # Empty lines in front: a traceback then names the page's own lines.
        code = compile("\n" * (block.line - 1) + block.text, str(ROOT / page), "exec")
        if block.needs is None or (block.needs == "a GPU" and torch.cuda.is_available()):
            exec(code, module.__dict__)
    assert sum(block.needs is not None for block in found) == NEEDING.get(page, 0)


def test_pages_with_such_blocks_exist() -> None:
    assert set(NEEDING) <= set(PAGES)


BASH_BLOCKS = [block for page in PAGES for block in blocks(page, "bash")]


@pytest.mark.parametrize("block", BASH_BLOCKS, ids=lambda block: f"{block.page}:{block.line}")
def test_commands_exist(block: Block, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in commands(block):
        program, *arguments = words
        if "-m" in arguments and arguments[(at := arguments.index("-m")) + 1] != "venv":
            assert program in ("python", "torchrun"), words
            check_module(arguments[at + 1], arguments[at + 2 :], capsys)
        elif program == "pip":
            check_pip(arguments)
        elif program == ".ci/run":
            assert os.access(ROOT / program, os.X_OK)
        else:
            assert program in (*OTHER_PROGRAMS, *INSTALLED_PROGRAMS), f"unknown command {words}"
        if program == "pytest":
            missing = [word for word in arguments if re.match(r"\w+[./]", word) and not (ROOT / word).exists()]
            assert not missing, words


def check_module(module: str, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """The module is there, and its --help names every option; files of the repository that it is given are there."""
    options = {word.split("=")[0] for word in arguments if word.startswith("--")}
    for word in arguments:
        assert (ROOT / word).exists() or not word.startswith(("recipes/", "python_tests/")), f"no {word}"
    if module.startswith(("model_integration", "bench.end_to_end", "bench.several_gpus")):
        pytest.importorskip("transformers")
    found = importlib.util.find_spec(module)
    assert found is not None and Path(found.origin or "").is_relative_to(ROOT), f"no module {module}"
    if found.submodule_search_locations:
        module = f"{module}.__main__"
    if not arguments:
        return
    # What stands in front of the options may name a subcommand, which has a help of its own.
    before = list(itertools.takewhile(lambda word: not word.startswith("-"), arguments))
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(module).main([*before, "--help"])
    assert stopped.value.code == 0
    missing = options - set(re.findall(r"--[a-z][\w-]*", capsys.readouterr().out))
    assert not missing, f"{module} --help does not name {missing}"


def check_pip(arguments: list[str]) -> None:
    """The extras that are asked for are pyproject's."""
    for word in arguments:
        if match := re.fullmatch(r"\.\[(.*)\]", word):
            assert set(match[1].split(",")) <= set(EXTRAS), word


def test_the_rehearsal_of_the_tutorial_runs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The commands that speak of rehearsal/, one after the other, and what the page says that they leave."""
    pytest.importorskip("transformers")
    page = "docs/tutorial.md"
    exec(blocks(page, "python")[0].text, {})
    shown = [words for block in blocks(page, "bash") for words in commands(block) if "rehearsal/" in " ".join(words)]
    assert [words[2] for words in shown] == [
        f"model_integration.{name}" for name in ("convert", "finetune", "generate", "evaluate")
    ]
    for _, _, module, *arguments in shown:
        importlib.import_module(module).main(arguments)
    share = re.search(r"KV cache: [\d.]+ MiB, (\d+)% of a dense model's", capsys.readouterr().err)
    assert share and int(share[1]) < 80
    results = (folder / "rehearsal" / "evaluate" / "results.jsonl").read_text()
    assert len(results.splitlines()) == 6
    assert (folder / "rehearsal" / "run" / "loss.png").stat().st_size


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files(page: str) -> None:
    """Of the pages that GitHub shows. What the site's pages link to, headings too, `mkdocs build --strict` checks."""
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", (ROOT / page).read_text())
    local = [target for target in targets if not target.startswith(("https://", "http://"))]
    missing = [target for target in local if not (ROOT / page).parent.joinpath(target).exists()]
    assert not missing


def test_the_reference_has_every_public_name() -> None:
    pages = "".join((ROOT / page).read_text() for page in PAGES if page.startswith("docs/reference/"))
    missing = {name for name in longgen_kernels.__all__ if f"::: longgen_kernels.{name}\n" not in pages}
    assert missing == {"__version__"}
