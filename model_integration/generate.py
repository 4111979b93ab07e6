"""Continue a prompt: `python -m model_integration.generate --checkpoint DIR --prompt "def "`."""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BatchEncoding,
    Cache,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TextStreamer,
    set_seed,
)
from transformers.utils import logging

from longgen_kernels.patterns import MAX_POSITION
from model_integration.attention import IMPLEMENTATIONS
from model_integration.cache import LongGenCache
from model_integration.cache_name import CACHE_NAME
from model_integration.command_line import (
    OneLineParser,
    UsageError,
    check_device,
    checkpoint_config,
    implementation_for,
    one_line_errors,
    seed,
)


class TimedStreamer(TextStreamer):
    """Prints the text as it comes, and notes when each token did."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.times: list[float] = []
        """Of the prompt, before it is read, and of each new token."""

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())
        super().put(value)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = OneLineParser(
        prog="python -m model_integration.generate",
        description="Continue a prompt with a LongGen hybrid, or with a dense model, printing the text as it comes; on "
        "stderr, how fast it came and how much memory the KV cache took.",
    )
    parser.add_argument(
        "--checkpoint", type=Path, required=True, metavar="DIR", help="model and tokenizer, such as finetune's final/"
    )
    parser.add_argument("--prompt", required=True, help="the text to continue")
    parser.add_argument("--max-new-tokens", type=int, default=240, help="tokens at most; fewer if the text ends")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the most likely token always")
    parser.add_argument("--top-k", type=int, default=0, help="sample from the K most likely tokens only (0: from all)")
    parser.add_argument(
        "--top-p", type=float, default=1.0, help="sample from the most likely tokens of this total probability"
    )
    parser.add_argument("--seed", type=seed, default=0, help="of the sampling")
    parser.add_argument(
        "--attn-implementation",
        choices=IMPLEMENTATIONS,
        help="same result, other speed and memory (longgen for a hybrid, otherwise sdpa)",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda or cuda:N")
    parser.add_argument(
        "--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"), help="auto: the checkpoint's"
    )
    args = parser.parse_args(argv)
    try:
        _check(args)
    except UsageError as error:
        parser.error(str(error))
    return args


def _check(args: argparse.Namespace) -> None:
    config = checkpoint_config(args.checkpoint, "--checkpoint")
    args.attn_implementation = implementation_for(config, args.checkpoint, args.attn_implementation)
    check_device(args.device)
    if not args.prompt:
        raise UsageError("--prompt must not be empty")
    sampling = 0.0 <= args.temperature < math.inf and args.top_k >= 0 and 0.0 < args.top_p <= 1.0
    if args.max_new_tokens < 1 or not sampling:
        raise UsageError("need --max-new-tokens >= 1, --temperature >= 0, --top-k >= 0 and 0 < --top-p <= 1")


def load(args: argparse.Namespace) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """Tokenizer and model of checked arguments; UsageError where their files are no good."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(args.checkpoint)
    except (OSError, ValueError) as error:
        raise UsageError(f"--checkpoint {args.checkpoint}: no tokenizer: {str(error).splitlines()[0]}") from error
    try:
        model = AutoModelForCausalLM.from_pretrained(
            args.checkpoint, attn_implementation=args.attn_implementation, dtype=args.dtype
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise UsageError(f"--checkpoint {args.checkpoint}: {str(error).splitlines()[0]}") from error
    return tokenizer, model.to(args.device)


def speed(times: list[float]) -> str:
    """One line about a TimedStreamer's times."""
    tokens = len(times) - 1
    line = f"{tokens} new tokens; the prompt took {times[1] - times[0]:.2f} s"
    return line if tokens == 1 else f"{line}, then {(tokens - 1) / (times[-1] - times[1]):.1f} tokens a second"


def memory(cache: Cache) -> str:
    """One line about a cache: its bytes, beside those of one that keeps every token in every layer."""
    if not isinstance(cache, LongGenCache):
        size = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        return f"KV cache: {size / 2**20:.2f} MiB, every token in every layer"
    layers = cache.tokens_kept().amax((1, 2)).tolist()
    counts = {tokens: layers.count(tokens) for tokens in sorted(set(layers))}
    kept = ", ".join(f"{tokens} in {n} layer{'s' if n > 1 else ''}" for tokens, n in counts.items())
    share = f"{cache.nbytes / cache.full_nbytes:.0%} of"
    if cache.nbytes > cache.full_nbytes:
        share = "room for sink and window, which this short text does not fill;"
    return (
        f"KV cache: {cache.nbytes / 2**20:.2f} MiB, {share} a dense model's {cache.full_nbytes / 2**20:.2f} MiB; "
        f"of {cache.get_seq_length()} tokens it keeps {kept}"
    )


def continue_prompt(
    args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, inputs: BatchEncoding
) -> tuple[Any, list[float]]:
    """What `generate` returns, and the TimedStreamer's times; UsageError where there is no room for the tokens."""
    prompt = inputs["input_ids"].shape[1]
    tokens = f"--max-new-tokens {args.max_new_tokens} behind {prompt} of the prompt"
    if prompt + args.max_new_tokens > MAX_POSITION:
        raise UsageError(f"{tokens}: a sequence has {MAX_POSITION} tokens at most")
    sampling = {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p} if args.temperature else {}
    streamer = TimedStreamer(tokenizer, skip_special_tokens=True)
    try:
        output = model.generate(
            **inputs,
            max_new_tokens=args.max_new_tokens,
            do_sample=args.temperature > 0.0,
            use_cache=True,  # a checkpoint from the middle of a training run says False
            pad_token_id=tokenizer.eos_token_id,
            streamer=streamer,
            return_dict_in_generate=True,
            **sampling,
        )
    except RuntimeError as error:  # the CPU's allocator has no exception of its own
        if "tried to allocate" not in str(error).lower():
            raise
        raise UsageError(f"{tokens}: {args.device} has not the memory for them") from error
    return output, streamer.times


def main(argv: list[str] | None = None) -> None:
    logging.disable_progress_bar()
    args = parse_arguments(argv)
    set_seed(args.seed)
    with one_line_errors("python -m model_integration.generate", UsageError):
        tokenizer, model = load(args)
        inputs = tokenizer(args.prompt, return_tensors="pt", return_token_type_ids=False).to(args.device)
        output, times = continue_prompt(args, tokenizer, model, inputs)
    print(speed(times), memory(output[CACHE_NAME]), sep="\n", file=sys.stderr)


if __name__ == "__main__":
    main()
