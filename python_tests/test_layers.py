"""The order of the layers in docs/design.md, proven from the import statements; and files short enough to read."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAX_LINES = 400
REASON = "Longer than 400 lines because"

# Each layer imports only from those before it; the entries of one layer do not import each other.
LAYERS = [
    ["longgen_kernels._version", "longgen_kernels._C", "longgen_kernels._build_info", "longgen_kernels.patterns"],
    ["longgen_kernels.cache_layout", "longgen_kernels.kernels.problem"],
    ["longgen_kernels.cache_scales", "longgen_kernels.kernels.cache_problem"],
    ["longgen_kernels.kernels.reference", "longgen_kernels.kernels.triton", "longgen_kernels.kernels.cuda"],
    ["longgen_kernels.dispatch"],
    ["longgen_kernels.ops"],
    ["longgen_kernels.attention", "longgen_kernels.merge", "longgen_kernels.kv_cache"],
    ["longgen_kernels.decode", "longgen_kernels.paged_kv_cache"],
    ["longgen_kernels"],
    ["longgen_kernels.benchmark"],
    ["longgen_kernels.__main__"],
    [f"model_integration.{name}" for name in ("cache_name", "configuration", "data", "layout", "loss")],
    [f"model_integration.{name}" for name in ("cache", "context_parallel")],
    ["model_integration.attention"],
    [f"model_integration.{name}" for name in ("command_line", "decoding")],
    ["model_integration.modeling"],
    [f"model_integration.{name}" for name in ("evaluation", "training")],
    ["model_integration"],
    [f"model_integration.{name}" for name in ("convert", "evaluate", "finetune", "generate")],
    ["model_integration.train_parallel"],
]
PLACES = {entry: rank for rank, layer in enumerate(LAYERS) for entry in layer}
PACKAGES = ("longgen_kernels", "model_integration")


def modules() -> dict[str, Path]:
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def entry_of(module: str) -> str | None:
    """The entry of LAYERS that a module belongs to. None: longgen_kernels.kernels itself, which holds nothing."""
    if module == "longgen_kernels.kernels":
        return None
    parts = module.split(".")
    prefixes = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
    return next(prefix for prefix in prefixes if prefix in PLACES)


def imports(module: str, path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module if path.name == "__init__.py" else module.rpartition(".")[0]
                for _ in range(node.level - 1):
                    package = package.rpartition(".")[0]
                base = f"{package}.{base}".rstrip(".")
            # `from package import name` imports a module if there is one of that name.
            names = [
                full if (full := f"{base}.{alias.name}") in MODULES or full in PLACES else base for alias in node.names
            ]
        else:
            continue
        yield from (name for name in names if name.split(".")[0] in PACKAGES)


@pytest.mark.parametrize("module", MODULES)
def test_imports_only_lower_layers(module: str) -> None:
    own = entry_of(module)
    for imported in imports(module, MODULES[module]):
        entry = entry_of(imported)
        if own is None or entry is None or entry == own:
            assert own is not None, f"{module} imports {imported}; it is a folder and imports nothing"
            continue
        assert PLACES[entry] < PLACES[own], f"{module} imports {imported}, which is not in a layer below it"


def test_every_module_has_a_layer_of_its_own() -> None:
    """A new file does not slip into the catch-all entry of its package."""
    strays = [m for m in MODULES if m not in PACKAGES and entry_of(m) in PACKAGES]
    assert not strays, f"add to LAYERS in test_layers.py: {strays}"


def test_the_check_sees_every_form_of_import(tmp_path: Path) -> None:
    source = tmp_path / "module.py"
    source.write_text(
        "import longgen_kernels.ops\n"
        "from longgen_kernels import dispatch, _C, longgen_attn_func\n"
        "from . import problem\n"
        "from ..patterns import BlockMask\n"
        "def later():\n"
        "    from longgen_kernels.kernels.cuda import available\n"
        "import torch\n"
    )
    assert list(imports("longgen_kernels.kernels.module", source)) == [
        "longgen_kernels.ops",
        "longgen_kernels.dispatch",
        "longgen_kernels._C",
        "longgen_kernels",
        "longgen_kernels.kernels.problem",
        "longgen_kernels.patterns",
        "longgen_kernels.kernels.cuda",
    ]


SOURCES = sorted(
    path.relative_to(ROOT)
    for folder, suffixes in {"longgen_kernels": (".py", ".pyi"), "csrc": (".cu", ".cuh", ".cpp", ".h")}.items()
    for path in (ROOT / folder).rglob("*")
    if path.suffix in suffixes
)


@pytest.mark.parametrize("source", SOURCES, ids=str)
def test_files_are_short_or_say_why(source: Path) -> None:
    text = (ROOT / source).read_text()
    lines = text.count("\n")
    assert lines <= MAX_LINES or REASON in text, f"{source} has {lines} lines; split it, or say `{REASON} ...`"
