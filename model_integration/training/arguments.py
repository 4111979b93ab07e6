"""The command line of finetune: its options, their defaults, and every check that needs no work first."""

from __future__ import annotations

import argparse
import importlib.util
import math
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig
from transformers.training_args import OptimizerNames

from model_integration.attention import IMPLEMENTATIONS
from model_integration.command_line import (
    OneLineParser,
    UsageError,
    add_hybrid_options,
    convertible_config,
    given_pattern,
    hybrid_config,
    seed,
    with_recipe,
)
from model_integration.configuration import LongGenConfig
from model_integration.data import DataError, find_files

#: Defaults of a small model trained from nothing, and of a pretrained checkpoint that becomes a hybrid.
FROM_SCRATCH: dict[str, Any] = {
    "seq_length": 256,
    "batch_size": 4,
    "max_steps": 700,
    "learning_rate": 2.5e-3,
    "warmup_steps": 50,
    "sink": 16,
    "window": 64,
}
PRETRAINED: dict[str, Any] = {
    "seq_length": 4096,
    "batch_size": 1,
    "max_steps": 1000,
    "learning_rate": 2e-5,
    "warmup_steps": 50,
    "sink": 128,
    "window": 2048,
}

#: The small model: about 1.2 million parameters.
SMALL_MODEL: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
    "initializer_range": 128**-0.5,  # Llama's 0.02 suits a width of 2500; here it costs half a bit per byte
}

#: Options that may differ between a run and its continuation: they say where and how fast, not what.
FREE_ON_RESUME = (
    "recipe", "output_dir", "resume", "overwrite", "attn_implementation", "backend", "compile", "device",
    "sequence_parallel", "exchange",
)  # fmt: skip


def token_count(text: str) -> int:
    """A number of tokens: 5e9 or 5000000000."""
    try:
        count = int(float(text))
    except (ValueError, OverflowError):
        count = 0
    if count < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of tokens such as 5e9")
    return count


def build_parser() -> OneLineParser:
    parser = OneLineParser(
        prog="python -m model_integration.finetune",
        description="Train a LongGen hybrid. Without arguments: a small byte-level one, from nothing, on the "
        "source code of Python's standard library; it needs neither network nor GPU. With --model: turn a "
        "checkpoint into a hybrid and fine-tune it.",
    )

    def both(name: str) -> str:
        return f"from scratch: {FROM_SCRATCH[name]}, with --model: {PRETRAINED[name]}"

    parser.add_argument(
        "--recipe", metavar="FILE", help="YAML file of these options, without their dashes; those given here win"
    )
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model", type=Path, metavar="DIR", help="checkpoint directory of a dense or LongGen model to start from"
    )
    group.add_argument("--tokenizer", metavar="DIR", help="tokenizer directory (the model's own, or raw bytes)")
    add_hybrid_options(parser, sink=both("sink"), window=both("window"))

    group = parser.add_argument_group("data")
    group.add_argument(
        "--data", type=Path, nargs="+", metavar="PATH", help=".txt, .md, .py, .jsonl, or directories of them"
    )
    group.add_argument("--dataset", metavar="PATH", help="a datasets directory or name, instead of --data")
    group.add_argument("--dataset-split", default="train", help="which split of it")
    group.add_argument(
        "--text-field", default="text", help="field of .jsonl lines and column of datasets with the text"
    )
    group.add_argument("--held-out", type=float, default=0.05, help="share of the documents kept for evaluation")
    group.add_argument("--seq-length", type=int, help=f"tokens in a training sequence ({both('seq_length')})")
    group.add_argument(
        "--separate-documents", action="store_true", help="attention stays inside each document of a training sequence"
    )

    group = parser.add_argument_group("training")
    group.add_argument("--max-steps", type=int, help=f"optimizer steps ({both('max_steps')})")
    group.add_argument(
        "--max-tokens",
        type=token_count,
        help="tokens for each device to train on, such as 5e9; with --max-steps, whichever is less",
    )
    group.add_argument("--batch-size", type=int, help=f"sequences per device and step ({both('batch_size')})")
    group.add_argument("--accumulate", type=int, default=1, help="forward passes summed into one optimizer step")
    group.add_argument(
        "--learning-rate", type=float, help=f"peak, then a cosine down to a tenth ({both('learning_rate')})"
    )
    group.add_argument("--warmup-steps", type=int, help=f"linear warm-up ({both('warmup_steps')})")
    group.add_argument("--weight-decay", type=float, default=0.1, help="on matrices")
    optimizers = [str(o.value) for o in OptimizerNames]
    group.add_argument(
        "--optimizer", default="adamw_torch", choices=optimizers, metavar="NAME", help="a Trainer optimizer"
    )
    group.add_argument(
        "--precision",
        default="fp32",
        choices=("fp32", "bf16", "bf16-weights"),
        help="bf16: fp32 weights, 16-bit arithmetic; bf16-weights: all in bf16",
    )
    group.add_argument(
        "--gradient-checkpointing", action="store_true", help="recompute activations in the backward pass"
    )
    group.add_argument(
        "--keep-attention", action="store_true", help="but for the attention of full layers, which takes longest"
    )
    group.add_argument(
        "--lora-rank", type=int, help="train adapters of this rank beside all linear layers, by PEFT (every weight)"
    )
    group.add_argument("--lora-alpha", type=float, help="scale of the adapters, divided by their rank (twice the rank)")
    group.add_argument("--seed", type=seed, default=0, help="of weights and data order")

    group = parser.add_argument_group("what runs it")
    group.add_argument(
        "--attn-implementation", default="longgen", choices=IMPLEMENTATIONS, help="same result, other speed"
    )
    group.add_argument(
        "--backend", choices=("cuda", "triton", "reference"), help="of longgen (for each pass the fastest)"
    )
    group.add_argument("--compile", action="store_true", help="torch.compile: slow to begin with")
    group.add_argument("--device", default="auto", choices=("auto", "cpu"), help="auto: the GPU if there is one")

    group = parser.add_argument_group("run")
    group.add_argument(
        "--output-dir", type=Path, help="checkpoints, final/, loss.png (runs/stdlib, runs/NAME of --model)"
    )
    group.add_argument("--log-steps", type=int, default=10, help="steps between points of the training loss")
    group.add_argument("--eval-steps", type=int, default=100, help="steps between evaluations")
    group.add_argument("--eval-blocks", type=int, default=128, help="held-out sequences in an evaluation")
    group.add_argument("--save-steps", type=int, default=200, help="steps between checkpoints")
    group.add_argument("--resume", action="store_true", help="continue from the last checkpoint in --output-dir")
    group.add_argument("--overwrite", action="store_true", help="start again where a run has already been")
    return parser


def parse_arguments(argv: list[str] | None = None, parser: OneLineParser | None = None) -> argparse.Namespace:
    """The checked options, defaults filled in and `config` (the hybrid's) added.

    `parser` is `build_parser()`'s, with further options of the caller's. Bad paths and impossible combinations end the
    process with status 2 and one line.
    """
    parser = build_parser() if parser is None else parser
    try:
        args = parser.parse_args(with_recipe(sys.argv[1:] if argv is None else argv))
    except UsageError as error:
        parser.error(str(error))
    defaults = PRETRAINED if args.model else FROM_SCRATCH
    args.pattern = _pattern(args, defaults)
    _fill_in(args, defaults)
    if args.output_dir is None:
        args.output_dir = Path("runs", args.model.resolve().name if args.model else "stdlib")
    try:
        _check(args)
        args.config = _config(args)
    except (UsageError, DataError) as error:
        parser.error(str(error))
    return args


def _fill_in(args: argparse.Namespace, defaults: dict[str, Any]) -> None:
    """Set the options left out; a run that is given its length gets a warm-up that suits it."""
    max_steps, its_own_length = args.max_steps, args.max_steps is not None or args.max_tokens is not None
    short_warmup = args.warmup_steps is None and its_own_length
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.max_tokens is not None:
        tokens = max(1, args.seq_length * args.batch_size * args.accumulate)  # what is below 1 is refused later
        steps = math.ceil(args.max_tokens / tokens)
        args.max_steps = steps if max_steps is None else min(max_steps, steps)
    if short_warmup:
        args.warmup_steps = min(args.warmup_steps, args.max_steps // 5)


def _check(args: argparse.Namespace) -> None:
    for name in ("max_steps", "batch_size", "accumulate", "log_steps", "eval_steps", "eval_blocks", "save_steps"):
        if getattr(args, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    if args.seq_length < 2:
        raise UsageError(f"--seq-length must be at least 2, got {args.seq_length}")
    if not 0.0 < args.held_out < 1.0:
        raise UsageError(f"--held-out must lie between 0 and 1, got {args.held_out}")
    if not 0.0 < args.learning_rate < math.inf:
        raise UsageError(f"--learning-rate must be positive and finite, got {args.learning_rate}")
    if not 0.0 <= args.weight_decay < math.inf:
        raise UsageError(f"--weight-decay must be at least 0 and finite, got {args.weight_decay}")
    if not 0 <= args.warmup_steps <= args.max_steps:
        raise UsageError(f"--warmup-steps must lie in [0, --max-steps={args.max_steps}], got {args.warmup_steps}")
    if args.save_steps % args.log_steps:
        raise UsageError(
            f"--save-steps ({args.save_steps}) must be a multiple of --log-steps ({args.log_steps}), "
            "or a resumed loss curve would have other points"
        )
    if args.data and args.dataset:
        raise UsageError("--data and --dataset exclude each other")
    if args.data:
        find_files(args.data)
    _check_lora(args)
    if args.keep_attention and not args.gradient_checkpointing:
        raise UsageError("--keep-attention says what --gradient-checkpointing leaves out: give both")
    cpu = args.device == "cpu" or not torch.cuda.is_available()
    if args.backend and args.attn_implementation != "longgen":
        raise UsageError(
            f"--backend {args.backend} needs --attn-implementation longgen, not {args.attn_implementation}"
        )
    if args.backend in ("cuda", "triton") and cpu:
        raise UsageError(
            f"--backend {args.backend} needs a CUDA GPU" + (", not --device cpu" if args.device == "cpu" else "")
        )
    if args.attn_implementation == "flex_attention" and cpu:
        raise UsageError("--attn-implementation flex_attention cannot train on a CPU: it has no backward pass there")
    if args.tokenizer and not Path(args.tokenizer).is_dir():
        raise UsageError(f"--tokenizer {args.tokenizer}: no such directory")
    _check_output(args)


def _check_lora(args: argparse.Namespace) -> None:
    if args.lora_rank is None:
        if args.lora_alpha is not None:
            raise UsageError("--lora-alpha needs --lora-rank")
        return
    if args.lora_rank < 1:
        raise UsageError(f"--lora-rank must be at least 1, got {args.lora_rank}")
    if args.lora_alpha is None:
        args.lora_alpha = 2.0 * args.lora_rank
    if not args.lora_alpha > 0.0:
        raise UsageError(f"--lora-alpha must be positive, got {args.lora_alpha}")
    if args.model is None:
        raise UsageError("--lora-rank needs --model: adapters beside random weights would learn little")
    if importlib.util.find_spec("peft") is None:
        raise UsageError("--lora-rank needs the peft package: pip install peft")


def _check_output(args: argparse.Namespace) -> None:
    out: Path = args.output_dir
    if args.resume and args.overwrite:
        raise UsageError("--resume and --overwrite exclude each other")
    if out.exists() and not out.is_dir():
        raise UsageError(f"--output-dir {out} is not a directory")
    if args.resume and not list(out.glob("checkpoint-*/trainer_state.json")):
        raise UsageError(f"--resume: no checkpoint in {out}")
    if not args.resume and not args.overwrite and (any(out.glob("checkpoint-*")) or (out / "final").exists()):
        raise UsageError(f"{out} already holds a run: --resume continues it, --overwrite starts again")


def _pattern(args: argparse.Namespace, defaults: dict[str, Any]) -> dict[str, Any] | None:
    """What the options say of the pattern; None leaves a checkpoint's pattern, or the config's default, as it is."""
    given = given_pattern(args, defaults["sink"], defaults["window"])
    if given is None and not args.model:
        return {"sink": defaults["sink"], "window": defaults["window"]}
    return given


def _config(args: argparse.Namespace) -> LongGenConfig:
    """The config of the model to train; UsageError where a checkpoint or a combination is no good."""
    source = convertible_config(args.model, "--model") if args.model else LlamaConfig(**SMALL_MODEL)
    changes: dict[str, Any] = {}
    if args.model is None or args.seq_length > source.max_position_embeddings:
        changes["max_position_embeddings"] = args.seq_length
    return hybrid_config(args, source, args.pattern, **changes)
