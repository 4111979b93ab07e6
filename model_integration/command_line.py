"""What the commands share: errors in one line, a checkpoint's config, and the options that make a model a hybrid."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from transformers import AutoConfig, PreTrainedConfig

from longgen_kernels import AttentionPattern
from model_integration import attention
from model_integration.configuration import FULL_PLACEMENTS, HYBRID_CONFIGS, LongGenConfig

PATTERN_OPTIONS = ("sink", "window", "window_blocks", "stride", "block_size", "head_phase_step")


class _Defaults(argparse.ArgumentDefaultsHelpFormatter):
    """Names the defaults, but of flags and of options whose help says itself what is done without them."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False or action.default == []:
            return action.help
        return super()._get_help_string(action)


class OneLineParser(argparse.ArgumentParser):
    """argparse with one line for an error, instead of the usage of forty options; its help names defaults."""

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(prog=prog, description=description, formatter_class=_Defaults)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


@contextmanager
def one_line_errors(prog: str, *kinds: type[Exception], say: bool = True) -> Iterator[None]:
    """Ends the process with status 2 for an error of these kinds, and with its message in one line if `say`."""
    try:
        yield
    except kinds as error:
        if say:
            print(f"{prog}: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


class UsageError(ValueError):
    """An option, or a combination, that cannot work; the message is one line."""


def with_recipe(argv: list[str]) -> list[str]:
    """`argv` after the options of the YAML file that its `--recipe` names, so that what it says itself wins.

    Raises UsageError for a file that is no mapping of options to values.
    """
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    parser.add_argument("--recipe", type=Path)
    try:
        recipe = parser.parse_known_args(argv)[0].recipe
    except argparse.ArgumentError:
        return argv  # without a value: the command's own parser says so
    if recipe is None:
        return argv
    try:
        options = yaml.safe_load(recipe.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"--recipe {recipe}: {error}") from error
    if not isinstance(options, dict) or "recipe" in options:
        raise UsageError(f"--recipe {recipe}: not a mapping of options (other than recipe) to values")
    given: list[str] = []
    for name, value in options.items():
        if isinstance(value, list):
            given += [f"--{name}", *map(str, value)]
        elif value is True:
            given.append(f"--{name}")
        elif value is not None and value is not False:
            given.append(f"--{name}={value}")
    return [*given, *argv]


def checkpoint_config(path: Path, option: str) -> Any:
    """The config in a checkpoint directory; UsageError, naming the option, where there is none or no weights."""
    if not path.is_dir():
        raise UsageError(f"{option} {path}: no such directory")
    if not (path / "config.json").is_file():
        raise UsageError(f"{option} {path}: no config.json, so no checkpoint")
    if not any(path.glob("*.safetensors")) and not any(path.glob("pytorch_model*.bin")):
        raise UsageError(f"{option} {path}: no weights (*.safetensors or pytorch_model*.bin)")
    try:
        return AutoConfig.from_pretrained(path)
    except Exception as error:  # malformed files raise whatever their parser raises
        raise UsageError(f"{option} {path}: config.json cannot be read: {str(error).splitlines()[0]}") from error


def convertible_config(path: Path, option: str) -> PreTrainedConfig:
    """The config of a checkpoint that can become a hybrid, or is one; UsageError for others."""
    config = checkpoint_config(path, option)
    if config.model_type not in HYBRID_CONFIGS:
        raise UsageError(
            f"{option} {path}: a {config.model_type} model; what can become a hybrid is {', '.join(HYBRID_CONFIGS)}"
        )
    return config


def share(text: str) -> float:
    """A number, or a fraction of whole ones: 0.25 and 1/3."""
    try:
        return float(Fraction(text))
    except (ValueError, ZeroDivisionError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no number and no fraction such as 1/3") from error


def seed(text: str) -> int:
    """A number that every generator of random numbers takes."""
    number = int(text) if text.isdecimal() else -1
    if not 0 <= number < 1 << 32:
        raise argparse.ArgumentTypeError(f"{text!r} is no seed; valid are whole numbers from 0 to 2^32 - 1")
    return number


def check_device(name: str) -> torch.device:
    """The device that `--device` names; UsageError for one that is not there."""
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {name}: no such device; valid are cpu, cuda and cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"--device {name}: this machine has {torch.cuda.device_count()} usable CUDA GPUs")
    return device


def implementation_for(config: PreTrainedConfig, checkpoint: Path, asked: str | None) -> str:
    """What `--attn-implementation` says, or longgen for a hybrid and sdpa for others; UsageError where it cannot be."""
    hybrid = isinstance(config, LongGenConfig)
    if asked is None:
        return attention.NAME if hybrid else "sdpa"
    if asked == attention.NAME and not hybrid:
        others = ", ".join(name for name in attention.IMPLEMENTATIONS if name != attention.NAME)
        raise UsageError(
            f"--attn-implementation {attention.NAME} needs a LongGen checkpoint, {checkpoint} is "
            f"{config.model_type}; valid for it are {others}"
        )
    return asked


def add_hybrid_options(parser: argparse.ArgumentParser, sink: str, window: str) -> None:
    """Add the options that `hybrid_config` reads; `sink` and `window` are the help's words for their defaults."""
    group = parser.add_argument_group("full layers and positions")
    group.add_argument("--full-ratio", type=share, help="share of layers with full attention (1/3)")
    group.add_argument("--full-placement", choices=FULL_PLACEMENTS, help="where they are (middle)")
    group.add_argument(
        "--full-layers", type=int, nargs="+", metavar="I", help="their indices, instead of the two above"
    )
    group.add_argument("--rope-base", type=float, help="RoPE base, such as 5e6 for 128K tokens (as it is)")

    group = parser.add_argument_group("pattern of the sparse layers")
    group.add_argument("--sink", type=int, help=f"first tokens that stay visible ({sink})")
    group.add_argument("--window", type=int, help=f"last tokens that stay visible ({window})")
    group.add_argument("--window-blocks", type=int, help="window in blocks of --block-size, instead of --window")
    group.add_argument("--stride", type=int, help="of every STRIDE blocks one stays visible")
    group.add_argument("--block-size", type=int, help="tokens in a block, a power of two")
    group.add_argument("--head-phase-step", type=int, help="shift of the strided blocks from KV head to KV head (1)")


def given_pattern(args: argparse.Namespace, sink: int, window: int) -> dict[str, Any] | None:
    """AttentionPattern's arguments as the options describe them; None when no option speaks of a pattern.

    `sink` and `window` stand in where only others are given.
    """
    given = {name: getattr(args, name) for name in PATTERN_OPTIONS if getattr(args, name) is not None}
    if not given:
        return None
    if "window_blocks" not in given:
        given.setdefault("window", window)
    given.setdefault("sink", sink)
    if "stride" in given:
        given.setdefault("head_phase_step", 1)
    return given


def hybrid_config(
    args: argparse.Namespace, source: PreTrainedConfig, pattern: dict[str, Any] | None, **changes: Any
) -> LongGenConfig:
    """The hybrid of `source` that the options describe, with further `changes` of its fields.

    Args:
        pattern: AttentionPattern's arguments; None leaves a hybrid its own and gives others the default.

    Raises UsageError where the options contradict each other or the model.
    """
    if pattern is not None and pattern.keys() & {"stride", "window_blocks"} and "block_size" not in pattern:
        raise UsageError("--stride and --window-blocks count blocks: give their --block-size")
    if args.full_layers is not None and (args.full_ratio is not None or args.full_placement is not None):
        raise UsageError("--full-layers excludes --full-ratio and --full-placement")
    for option, field in (
        ("full_ratio", "full_ratio"),
        ("full_placement", "full_placement"),
        ("rope_base", "rope_theta"),
    ):
        if getattr(args, option) is not None:
            changes[field] = getattr(args, option)
    if args.full_layers is not None or args.full_ratio is not None or args.full_placement is not None:
        changes["full_layers"] = args.full_layers
    try:
        if pattern is not None:
            changes["sparse_pattern"] = AttentionPattern(**pattern)
        return HYBRID_CONFIGS[source.model_type].from_dense(source, **changes)
    except (TypeError, ValueError) as error:
        raise UsageError(str(error)) from error
