"""Train a LongGen hybrid Llama on several GPUs: `torchrun --nproc-per-node 8 -m model_integration.train_parallel ...`.

It takes finetune's options and does what finetune does. The model is sharded over all processes, and as many as
`--sequence-parallel` says share each sequence, so that it may be longer than one GPU has room for.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from model_integration.attention import NAME
from model_integration.command_line import OneLineParser, one_line_errors
from model_integration.context_parallel import EXCHANGES, Sharding
from model_integration.context_parallel.traffic import bytes_by_heads, bytes_by_keys
from model_integration.data import DataError, TokenBlocks
from model_integration.finetune import build_model, load_documents, load_tokenizer, prepare_output
from model_integration.training.arguments import build_parser, parse_arguments
from model_integration.training.parallel_trainer import ParallelTrainer, shard_model
from model_integration.training.reporting import BITS_PER_BYTE, plot_losses

OPTIMIZERS = ("adamw_torch", "adamw_torch_fused")


def parallel_parser() -> OneLineParser:
    parser = build_parser()
    parser.prog = "torchrun -m model_integration.train_parallel"
    parser.description = (
        "Train a LongGen hybrid Llama with several processes, which torchrun starts. --batch-size counts the sequences "
        "of all of them together, so that the same options are the same run on any number of GPUs."
    )
    group = parser.add_argument_group("several GPUs")
    group.add_argument(
        "--sequence-parallel", type=int, metavar="N", help="processes that share each sequence (all of them)"
    )
    group.add_argument(
        "--exchange",
        default="auto",
        choices=EXCHANGES,
        help="what attention exchanges: all tokens of some heads, or the keys that the pattern shows; auto: heads in "
        "full layers, whatever sends less in sparse ones",
    )
    return parser


def parse_parallel_arguments(argv: list[str] | None, processes: int) -> argparse.Namespace:
    """finetune's checked options and those of several processes; errors end the process with status 2 and one line."""
    parser = parallel_parser()
    args = parse_arguments(argv, parser)
    if args.sequence_parallel is None:
        args.sequence_parallel = processes
    shared, heads = args.sequence_parallel, args.config.num_attention_heads
    if shared < 1 or processes % shared:
        parser.error(f"--sequence-parallel must divide the {processes} processes, got {shared}")
    if args.batch_size % (processes // shared):
        parser.error(
            f"--batch-size must be a multiple of {processes // shared}, since of {processes} processes "
            f"--sequence-parallel={shared} share each sequence; got {args.batch_size}"
        )
    if args.seq_length < shared:
        parser.error(f"--seq-length must be at least --sequence-parallel={shared}, got {args.seq_length}")
    if shared > 1 and args.attn_implementation != NAME:
        parser.error(f"--sequence-parallel={shared} needs --attn-implementation {NAME}, not {args.attn_implementation}")
    if args.exchange == "heads" and heads < shared:
        parser.error(f"--exchange heads needs --sequence-parallel of at most {heads}, the query heads; got {shared}")
    if args.lora_rank is not None or args.compile:
        parser.error(
            "--lora-rank and --compile are for finetune: neither adapters nor compiled layers are sharded here"
        )
    if args.optimizer not in OPTIMIZERS:
        parser.error(f"--optimizer must be one of {', '.join(OPTIMIZERS)} here, got {args.optimizer}")
    return args


def on_first_process(action: Callable[[], Any]) -> Any:
    """What `action` returns on process 0, where alone it runs, on every process; a DataError is raised on every one."""
    outcome: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            outcome = [action()]
        except DataError as error:
            outcome = [error]
    dist.broadcast_object_list(outcome)
    if isinstance(outcome[0], DataError):
        raise outcome[0]
    return outcome[0]


def describe(args: argparse.Namespace, train: TokenBlocks, processes: int) -> str:
    """What is about to run, and what attention sends for it."""
    config, shared = args.config, args.sequence_parallel
    full = ", ".join(map(str, config.full_layer_indices)) or "none"
    text = (
        f"layers {full} of {config.num_hidden_layers} full, the others {config.sparse_pattern}\n"
        f"{train.tokens.size:,} training tokens; {processes} processes, {shared} to a sequence"
    )
    if shared == 1:
        return text
    sharding = Sharding.of(args.batch_size * shared // processes, args.seq_length, shared)
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    vector_bytes = config.head_dim * (4 if args.precision == "fp32" else 2)
    sent = [f"{bytes_by_heads(sharding, heads, kv_heads, vector_bytes):,} by heads"] if heads >= shared else []
    for pattern in set(config.layer_patterns):
        if not pattern.is_dense:
            sent.append(f"{bytes_by_keys(sharding, pattern, kv_heads, vector_bytes):,} by keys in sparse layers")
    return f"{text}\nbytes that a process sends or receives in a layer's forward pass: at most {', '.join(sent)}"


def save_model(trainer: ParallelTrainer, tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """Write the whole model as transformers does, from process 0."""
    weights = get_model_state_dict(trainer.model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() == 0:
        trainer.model.save_pretrained(path, state_dict=weights)
        tokenizer.save_pretrained(path)
        trainer.progress.save_to_json(str(path / "trainer_state.json"))


def train_parallel(args: argparse.Namespace, device: torch.device) -> dict[str, float]:
    """Run the training that checked arguments describe, collectively; returns the metrics of the final evaluation."""
    if args.backend:
        os.environ["LONGGEN_BACKEND"] = args.backend
    processes, first = dist.get_world_size(), dist.get_rank() == 0
    tokenizer = load_tokenizer(args)
    train_documents, held_out_documents = load_documents(args)
    train = TokenBlocks(train_documents, tokenizer, args.seq_length)
    held_out = TokenBlocks(held_out_documents, tokenizer, args.seq_length).thinned(args.eval_blocks)
    for name, blocks in (("training", train), ("held-out", held_out)):
        if not len(blocks):
            raise DataError(f"the {name} text is shorter than one sequence of {args.seq_length} tokens")
    if args.separate_documents:
        train, held_out = (blocks.apart(tokenizer.eos_token_id) for blocks in (train, held_out))
    checkpoint = on_first_process(lambda: prepare_output(args))
    model = build_model(args)
    shard_model(model, init_device_mesh(device.type, (processes,)), compute_in_bf16=args.precision == "bf16")
    mesh = init_device_mesh(
        device.type,
        (processes // args.sequence_parallel, args.sequence_parallel),
        mesh_dim_names=("data", "sequence"),
    )
    trainer = ParallelTrainer(args, model, train, held_out, mesh, device)
    if checkpoint is not None:
        trainer.resume(Path(checkpoint))
    if first:
        print(f"{model.num_parameters():,} parameters; {describe(args, train, processes)}", flush=True)
    trainer.train()
    metrics = next(entry for entry in reversed(trainer.progress.log_history) if BITS_PER_BYTE in entry)

    out: Path = args.output_dir
    save_model(trainer, tokenizer, out / "final")
    if first:
        plot_losses(trainer.progress.log_history, held_out.bytes_per_token, out / "loss.png")
        print(f"{metrics[BITS_PER_BYTE]:.3f} bits per byte on held-out text; {out}/loss.png, checkpoint in {out}/final")
    return metrics


def main(argv: list[str] | None = None) -> None:
    logging.disable_progress_bar()  # of loading and saving: the run's own bar is enough
    if "WORLD_SIZE" not in os.environ:
        parser = parallel_parser()
        parser.parse_known_args(argv)  # --help, and what no number of processes would make right
        parser.error("start it with torchrun, which says how many processes there are")
    args = parse_parallel_arguments(argv, int(os.environ["WORLD_SIZE"]))
    if args.device != "cpu" and torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
    else:
        device = torch.device("cpu")
        dist.init_process_group("gloo")
    try:
        with one_line_errors("torchrun -m model_integration.train_parallel", DataError, say=dist.get_rank() == 0):
            train_parallel(args, device)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
