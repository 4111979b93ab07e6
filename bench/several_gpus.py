"""Measure training over several GPUs: `torchrun --nproc-per-node 2 -m bench.several_gpus --out FILE.json`.

A step of the LongGen hybrid with random weights: forward and backward pass with gradient checkpointing, the model
sharded by FSDP2, one sequence shared by all processes. The same command with one process is what it is compared to.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.nn.utils import get_total_norm
from transformers import AutoModelForCausalLM

from bench import machine
from bench.whole_models import SHAPES, contenders
from longgen_kernels import AttentionPattern
from longgen_kernels.benchmark.cases import PATTERNS, length_name, parse_length
from longgen_kernels.benchmark.timing import synchronize
from model_integration.attention import NAME
from model_integration.context_parallel import EXCHANGES
from model_integration.training.activations import recompute_activations
from model_integration.training.parallel_trainer import IGNORED, shard_model, sharded_loss

GIB = 1 << 30


class Step:
    """One training step of one sequence, whose loss and gradient norm do not depend on how many processes take it."""

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        pattern = AttentionPattern.sink_window(4, 60) if args.quick else PATTERNS["sink_window"]
        config = contenders(args.model, pattern)["hybrid"][1]
        torch.manual_seed(0)  # the same weights and tokens everywhere
        with device:
            dtype = torch.float32 if args.quick else torch.bfloat16
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=NAME)
            self.ids = torch.randint(config.vocab_size, (1, args.length))
        self.targets = F.pad(self.ids[:, 1:], (0, 1), value=IGNORED)
        model.train()
        recompute_activations(model)
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        shard_model(model, mesh, compute_in_bf16=False)
        self.model, self.group, self.exchange = model, mesh.get_group(), args.exchange

    def __call__(self) -> tuple[Tensor, Tensor]:
        """The mean loss and the norm of the gradient."""
        loss = sharded_loss(self.model, self.group, self.ids, self.targets, self.ids.shape[1] - 1, self.exchange)
        (loss * dist.get_world_size()).backward()  # FSDP averages what are parts of a sum
        norm = get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        self.model.zero_grad(set_to_none=True)
        loss = loss.detach()
        dist.all_reduce(loss)
        return loss, norm


def measure(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """The record of one step, the same on every process but for the peak of its memory."""
    step = Step(args, device)
    step()  # compiles, and sets up what processes communicate through
    times = []
    for _ in range(args.repeats):
        synchronize(device)
        dist.barrier()
        start = time.perf_counter()
        loss, norm = step()
        synchronize(device)
        times.append(time.perf_counter() - start)
    seconds = statistics.median(times)
    return {
        "processes": dist.get_world_size(),
        "tokens": args.length,
        "exchange": args.exchange,
        "median_s": seconds,
        "all_s": times,
        "tokens_per_s": args.length / seconds,
        "loss": float(loss),
        "gradient_norm": float(norm),
        "peak_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line in each process that torchrun started."""
    args = _parse(argv)
    if args.quick or not torch.cuda.is_available():
        device = torch.device("cpu")
        dist.init_process_group("gloo")
    else:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
    try:
        record = measure(args, device)
        if dist.get_rank() == 0:
            peak = "" if record["peak_bytes"] is None else f", peak {record['peak_bytes'] / GIB:.1f} GiB a process"
            print(
                f"{record['processes']} processes, {length_name(args.length)}: {record['median_s']:.3f} s a step, "
                f"{record['tokens_per_s']:.0f} tokens/s, loss {record['loss']:.5f}, "
                f"gradient norm {record['gradient_norm']:.5f}{peak}",
                flush=True,
            )
            if args.out is not None:
                save(args, device, record)
    finally:
        dist.destroy_process_group()
    return 0


def save(args: argparse.Namespace, device: torch.device, record: dict[str, Any]) -> None:
    """Adds the record to the file, which runs with other numbers of processes may have begun."""
    document: dict[str, Any] = {"model": dict(SHAPES[args.model]), "records": []}
    if args.out.exists():
        document = json.loads(args.out.read_text())
    document["machine"] = machine.describe(device, args.commit)
    document["records"].append(record)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(document, indent=1) + "\n")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="torchrun --nproc-per-node N -m bench.several_gpus", description=(__doc__ or "").split("\n\n")[0]
    )
    add = parser.add_argument
    add("--model", choices=[name for name in SHAPES if name != "tiny"], default="llama-2-7b", help="the shape")
    add("--length", default="128K", help="tokens of the sequence, such as 32K")
    add("--exchange", choices=EXCHANGES, default="auto", help="what attention exchanges")
    add("--repeats", type=int, default=3, help="timed steps")
    add("--quick", action="store_true", help="a tiny run on the CPU that tests the script")
    add("--commit", help="recorded where the sources have no .git")
    add("--out", type=Path, help="JSON result file; a file that is there gets another record")
    args = parser.parse_args(argv)
    if "WORLD_SIZE" not in os.environ:
        parser.error("start it with torchrun, which says how many processes there are")
    try:
        args.length = 300 if args.quick else parse_length(args.length)
    except ValueError as error:
        parser.error(str(error))
    if args.repeats < 1:
        parser.error(f"--repeats is {args.repeats}; at least 1")
    if args.quick:
        args.model = "tiny"
    elif not torch.cuda.is_available():
        parser.error("PyTorch finds no GPU that it can use; --quick tests the script without one")
    return args


if __name__ == "__main__":
    sys.exit(main())
