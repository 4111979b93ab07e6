"""Turn a checkpoint into a LongGen hybrid: `python -m model_integration.convert SRC DST --full-ratio 1/3`.

A hybrid has the dense model's parameters under the same names, so the weight files are copied and never loaded.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from model_integration.command_line import (
    OneLineParser,
    UsageError,
    add_hybrid_options,
    convertible_config,
    given_pattern,
    hybrid_config,
    one_line_errors,
)
from model_integration.configuration import DEFAULT_SPARSE_PATTERN, LongGenConfig
from model_integration.modeling import HYBRID_MODELS

#: The file or the index that transformers reads, in its order of preference.
WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)

#: Other forms of the weights, which the hybrid does not need.
WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".msgpack", ".h5", ".gguf", ".onnx"}


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The checked options, with `config` (the hybrid's) and `files` (what is copied) added."""
    parser = OneLineParser(
        prog="python -m model_integration.convert",
        description="Turn a checkpoint into a LongGen hybrid without loading it: the weights stay as they are, "
        "the config gets a pattern for each layer. Options left out keep a hybrid's own.",
    )
    parser.add_argument("source", type=Path, metavar="SRC", help="checkpoint directory of a dense or LongGen model")
    parser.add_argument("destination", type=Path, metavar="DST", help="directory to write; it must be new or empty")
    default = DEFAULT_SPARSE_PATTERN
    add_hybrid_options(parser, sink=str(default.sink), window=str(default.window))
    parser.add_argument("--max-positions", type=int, help="tokens that the hybrid is made for (as many as the source)")
    parser.add_argument(
        "--link",
        action="store_true",
        help="hard links instead of copies: no room is taken, and who writes into one checkpoint changes both",
    )
    args = parser.parse_args(argv)
    try:
        _check(args)
    except UsageError as error:
        parser.error(str(error))
    return args


def _check(args: argparse.Namespace) -> None:
    source = convertible_config(args.source, "SRC")
    changes = {}
    if args.max_positions is not None:
        if args.max_positions < 1:
            raise UsageError(f"--max-positions must be at least 1, got {args.max_positions}")
        changes["max_position_embeddings"] = args.max_positions
    default = DEFAULT_SPARSE_PATTERN
    assert default.window is not None
    args.config = hybrid_config(args, source, given_pattern(args, default.sink, default.window), **changes)
    args.config.architectures = [HYBRID_MODELS[type(args.config)].__name__]
    weights = weight_files(args.source)
    _check_weights(args.source, weights, args.config)
    others = [
        path
        for path in sorted(args.source.iterdir())
        if path.is_file() and path.name != "config.json" and path.name not in WEIGHTS
        and path.suffix not in WEIGHT_SUFFIXES and not path.name.endswith(".index.json")
    ]  # fmt: skip
    args.files = [*weights, *others]
    if args.destination.exists() and (not args.destination.is_dir() or any(args.destination.iterdir())):
        raise UsageError(f"DST {args.destination} exists already, and is no empty directory")


def weight_files(path: Path) -> list[Path]:
    """The files with the weights that transformers would load from `path`, an index among them.

    Raises UsageError where one is missing.
    """
    first = next((path / name for name in WEIGHTS if (path / name).is_file()), None)
    if first is None:
        raise UsageError(f"SRC {path}: none of {', '.join(WEIGHTS)}")
    if first.suffix != ".json":
        return [first]
    try:
        names = sorted(set(json.loads(first.read_text())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UsageError(f"SRC {path}: {first.name} is no index of weights") from error
    missing = [name for name in names if not (path / name).is_file()]
    if missing:
        raise UsageError(f"SRC {path}: {first.name} names {', '.join(missing)}, which are not there")
    return [*(path / name for name in names), first]


def _check_weights(source: Path, weights: list[Path], config: LongGenConfig) -> None:
    """Raise UsageError for a safetensors file that is cut off, and for parameters that no file holds.

    transformers would fill those with random numbers. Only headers are read.
    """
    shards = [path for path in weights if path.suffix == ".safetensors"]
    if not shards:
        return  # pytorch_model.bin has no header: it would have to be loaded
    found: set[str] = set()
    for shard in shards:
        try:
            with safe_open(shard, framework="pt") as tensors:
                found.update(tensors.keys())
        except (SafetensorError, OSError) as error:
            raise UsageError(f"SRC {source}: {shard.name} cannot be read: {error}") from error
    with torch.device("meta"):
        model = HYBRID_MODELS[type(config)](config)
    expected = set(model.state_dict()) - (set(model.all_tied_weights_keys) if config.tie_word_embeddings else set())
    missing = sorted(expected - found)
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UsageError(f"SRC {source}: the weights lack {missing[0]}{more}")


def convert(config: LongGenConfig, files: list[Path], destination: Path, link: bool = False) -> None:
    """Make a checkpoint of `config` and copies of `files` in `destination`; with `link`, hard links to them.

    config.json comes last: until then nothing takes the directory for a checkpoint.
    """
    destination.mkdir(parents=True, exist_ok=True)
    total = sum(path.stat().st_size for path in files)
    with tqdm(total=total, unit="B", unit_scale=True, unit_divisor=1024) as bar:
        for path in files:
            bar.set_description(path.name)
            copy = destination / path.name
            if link:
                os.link(path.resolve(), copy)  # resolved: a download's cache holds symbolic links
            else:
                shutil.copyfile(path, copy)
            bar.update(path.stat().st_size)
    config.save_pretrained(destination)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    with one_line_errors("python -m model_integration.convert", OSError):
        convert(args.config, args.files, args.destination, args.link)
    full = ", ".join(map(str, args.config.full_layer_indices)) or "none"
    print(
        f"{args.destination}: layers {full} of {args.config.num_hidden_layers} full, "
        f"the others {args.config.sparse_pattern}; RoPE base {args.config.rope_theta:g}"
    )


if __name__ == "__main__":
    main()
