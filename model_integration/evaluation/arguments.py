"""The command line of evaluate: its options, their defaults, and every check that needs no work first."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from model_integration import attention
from model_integration.command_line import (
    OneLineParser,
    UsageError,
    check_device,
    checkpoint_config,
    implementation_for,
    seed,
)
from model_integration.data import DataError, find_files
from model_integration.evaluation.tasks import TASKS

RESULTS_FILE = "results.jsonl"
SETTINGS_FILE = "evaluate.json"

#: Options that decide what a result is; a run is not continued with others.
FIXED_ON_RESUME = (
    "checkpoint",
    "tokenizer",
    "data",
    "text_field",
    "held_out",
    "seed",
    "dtype",
    "attn_implementation",
    "backend",
)


def comma_list(parse: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """An argparse type: what stands between commas, parsed, without what comes twice."""
    return lambda text: list(dict.fromkeys(parse(part.strip()) for part in text.split(",")))


def task_name(text: str) -> str:
    if text not in TASKS:
        raise argparse.ArgumentTypeError(f"{text!r} is no task; valid are {', '.join(TASKS)}")
    return text


def token_count(text: str) -> int:
    """A number of tokens: 4096, or 4k for as many, or 1m for 1024k."""
    unit = {"k": 1 << 10, "m": 1 << 20}.get(text[-1:].lower(), 1)
    digits = text if unit == 1 else text[:-1]
    if not digits.isdecimal() or int(digits) * unit < 2:
        raise argparse.ArgumentTypeError(f"{text!r} is no length; valid are numbers from 2 on such as 4096, 4k or 1m")
    return int(digits) * unit


def percentage(text: str) -> float:
    """A depth as a share in [0, 1], given in per cent."""
    try:
        share = float(text) / 100.0
    except ValueError:
        share = -1.0
    if not 0.0 <= share <= 1.0:
        raise argparse.ArgumentTypeError(f"{text!r} is no depth; valid are percentages from 0 to 100")
    return share


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The checked options, with `config`, the checkpoint's, added; what cannot work ends the process in one line."""
    parser = OneLineParser(
        prog="python -m model_integration.evaluate",
        description="Measure a checkpoint, dense or LongGen, on long texts: retrieval of needles (niah), of one among "
        "several (multikey), where a thing was carried (whereabouts), the most common of many words (aggregation), and "
        "perplexity on held-out text (ppl). The "
        "tasks are in the style of known benchmarks, and are none of them.",
    )
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="directory of a causal language model")
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help="tokenizer directory (the checkpoint's own)")

    group = parser.add_argument_group("tasks")
    group.add_argument(
        "--task", type=comma_list(task_name), default="niah", metavar="TASK,...", help=f"of {', '.join(TASKS)}"
    )
    group.add_argument(
        "--lengths", type=comma_list(token_count), default="4k", metavar="N,...", help="tokens, such as 4k,32k,128k"
    )
    group.add_argument(
        "--depths",
        type=comma_list(percentage),
        default="0,25,50,75,100",
        metavar="P,...",
        help="where needles stand, in per cent of the text",
    )
    group.add_argument("--samples", type=int, default=4, help="texts for each task, length and depth")
    group.add_argument("--seed", type=seed, default=0, help="of everything that is drawn")
    group.add_argument(
        "--data", type=Path, nargs="+", metavar="PATH", help="text, as finetune takes it (Python's standard library)"
    )
    group.add_argument("--text-field", default="text", help="field of .jsonl lines with the text")
    group.add_argument("--held-out", type=float, default=0.05, help="share of the documents that finetune held out")

    group = parser.add_argument_group("what runs it")
    group.add_argument(
        "--attn-implementation",
        choices=attention.IMPLEMENTATIONS,
        help="same result, other speed (longgen for a hybrid, otherwise sdpa)",
    )
    group.add_argument(
        "--backend", choices=("cuda", "triton", "reference"), help="of longgen (for each pass the fastest)"
    )
    group.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda or cuda:N")
    group.add_argument(
        "--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"), help="auto: the checkpoint's"
    )

    group = parser.add_argument_group("run")
    group.add_argument("--out", type=Path, metavar="DIR", help="results.jsonl and pictures (runs/evaluate/NAME of it)")
    group.add_argument("--resume", action="store_true", help="keep the results in --out and add what is missing")
    group.add_argument("--overwrite", action="store_true", help="start again where a run has already been")
    group.add_argument(
        "--compare", type=Path, nargs="+", default=[], metavar="RUN", help="earlier --out directories to show beside"
    )
    args = parser.parse_args(argv)
    if args.out is None:
        path = args.checkpoint.resolve()
        args.out = Path("runs", "evaluate", path.parent.name if path.name == "final" else path.name)
    try:
        _check(args)
    except (UsageError, DataError) as error:
        parser.error(str(error))
    return args


def _check(args: argparse.Namespace) -> None:
    args.config = checkpoint_config(args.checkpoint, "CHECKPOINT")
    limit = getattr(args.config, "max_position_embeddings", None)
    if limit is not None and max(args.lengths) > limit:
        raise UsageError(
            f"--lengths {max(args.lengths)}: {args.checkpoint} is made for at most {limit} tokens "
            "(max_position_embeddings in its config.json)"
        )
    if args.tokenizer and not args.tokenizer.is_dir():
        raise UsageError(f"--tokenizer {args.tokenizer}: no such directory")
    if args.samples < 1:
        raise UsageError(f"--samples must be at least 1, got {args.samples}")
    if not 0.0 < args.held_out < 1.0:
        raise UsageError(f"--held-out must lie between 0 and 1, got {args.held_out}")
    if args.data:
        find_files(args.data)
    _check_engine(args)
    if args.resume and args.overwrite:
        raise UsageError("--resume and --overwrite exclude each other")
    if args.out.exists() and not args.out.is_dir():
        raise UsageError(f"--out {args.out} is not a directory")
    results = args.out / RESULTS_FILE
    used = results.exists() and results.stat().st_size > 0  # a run that failed at once leaves nothing to lose
    if args.resume and not used:
        raise UsageError(f"--resume: no results in {args.out}")
    if used and not args.resume and not args.overwrite:
        raise UsageError(f"--out {args.out} already holds a run: --resume continues it, --overwrite starts again")
    for run in args.compare:
        if not (run / RESULTS_FILE).is_file():
            raise UsageError(f"--compare {run}: no {RESULTS_FILE} in it")


def _check_engine(args: argparse.Namespace) -> None:
    """Settle the attention implementation, and refuse what this machine or this checkpoint cannot run."""
    device = check_device(args.device)
    args.attn_implementation = implementation_for(args.config, args.checkpoint, args.attn_implementation)
    if args.backend and args.attn_implementation != attention.NAME:
        raise UsageError(
            f"--backend {args.backend} needs --attn-implementation {attention.NAME}, not {args.attn_implementation}"
        )
    if args.backend in ("cuda", "triton") and device.type == "cpu":
        raise UsageError(f"--backend {args.backend} needs a CUDA GPU, not --device cpu")
