"""Cases of context parallelism and the processes that run them; imported by the processes, so it holds no tests."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from longgen_kernels import AttentionPattern
from model_integration import LongGenLlamaConfig, LongGenLlamaForCausalLM, train_parallel
from model_integration.context_parallel import SequenceShard
from model_integration.training.activations import recompute_activations

SINK_WINDOW = AttentionPattern.sink_window(sink=2, window=7)
STRIDED = AttentionPattern.strided(3, 4, window=6, sink=1)  # a phase for each KV head
BLOCKS = AttentionPattern.strided(4, 2, window_blocks=3, head_phase_step=3, head_phase_offset=1)
WIDE = AttentionPattern.sink_window(sink=1, window=33)  # wider than a rank's part

VOCABULARY = 61


@dataclass(frozen=True)
class Case:
    """A tiny hybrid, a batch, and how the ranks exchange; two of its three layers have the sparse pattern."""

    name: str
    pattern: AttentionPattern
    exchange: str
    heads: tuple[int, int] = (4, 2)
    shape: tuple[int, int] = (1, 46)
    documents: list[int] = field(default_factory=list)  # lengths; none: each row is one
    by_positions: bool = False
    checkpointing: bool = False


PACKED = [5, 1, 30, 3, 7]  # 46 tokens; the third begins on the first rank of two or four
ROWS = [11, 12, 4, 19]  # two rows of 23
APART = [12, 12, 12, 12]  # no document is on two of two or four ranks

CASES = [
    Case("sink and window, heads", SINK_WINDOW, "heads"),
    Case("sink and window, keys", SINK_WINDOW, "keys"),
    Case("sink and window, as sent cheapest", SINK_WINDOW, "auto"),
    Case("strided with phases, heads", STRIDED, "heads", heads=(8, 4)),
    Case("strided with phases, keys", STRIDED, "keys", heads=(8, 4)),
    Case("strided, two rows, keys", STRIDED, "keys", shape=(2, 23)),
    Case("strided, two rows, heads", STRIDED, "heads", shape=(2, 23)),
    Case("blocks, one KV head, heads", BLOCKS, "heads", heads=(4, 1)),
    Case("blocks, one KV head, keys", BLOCKS, "keys", heads=(4, 1)),
    Case("KV heads that do not divide, heads", STRIDED, "heads", heads=(6, 3)),
    Case("KV heads that do not divide, keys", STRIDED, "keys", heads=(6, 3)),
    Case("query heads that do not divide, heads", BLOCKS, "heads", heads=(9, 3)),
    Case("a window wider than a shard, keys", WIDE, "keys"),
    Case("packed, keys", STRIDED, "keys", documents=PACKED),
    Case("packed, heads", STRIDED, "heads", documents=PACKED),
    Case("packed by position ids, keys", SINK_WINDOW, "keys", documents=PACKED, by_positions=True),
    Case("packed so that nobody needs anything, keys", STRIDED, "keys", shape=(1, 48), documents=APART),
    Case("packed in two rows, keys", STRIDED, "keys", shape=(2, 23), documents=ROWS),
    Case("packed in two rows, heads", STRIDED, "heads", shape=(2, 23), documents=ROWS),
    Case("checkpointing, keys", STRIDED, "keys", checkpointing=True),
    Case("checkpointing, as sent cheapest", STRIDED, "auto", checkpointing=True),
]


def build(case: Case) -> LongGenLlamaForCausalLM:
    torch.manual_seed(1)
    heads, kv_heads = case.heads
    config = LongGenLlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=8 * heads,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        initializer_range=0.2,  # large enough that what attention sees decides the loss
        sparse_pattern=case.pattern,
        full_layers=[1],
    )
    model = LongGenLlamaForCausalLM(config)
    if case.checkpointing:
        recompute_activations(model)
    return model


def differences(case: Case, group: dist.ProcessGroup) -> tuple[float, float]:
    """(loss, worst gradient) of the ranks together against one process: relative differences."""
    model = build(case)
    tokens = torch.randint(0, VOCABULARY, case.shape)
    labels = torch.nn.functional.pad(tokens[:, 1:], (0, 1), value=-100)
    labels[:, 3] = -100
    valid = (labels != -100).sum()
    packing: dict[str, torch.Tensor] = {}
    if case.documents:
        lengths = torch.tensor(case.documents)
        positions = torch.cat([torch.arange(n) for n in case.documents]).view(case.shape)
        bounds = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
        packing = {"position_ids": positions} if case.by_positions else {"cu_seq_lens": bounds}
        whole = {"position_ids": positions, "cu_seq_lens_q": bounds, "max_length_q": max(case.documents)}
    else:
        whole = {}

    def backward(**inputs: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
        model.zero_grad()
        loss = model(use_cache=False, num_items_in_batch=valid, **inputs).loss
        loss.backward()
        return loss.detach(), [p.grad.clone() for p in model.parameters()]

    loss, gradients = backward(input_ids=tokens, labels=labels, shift_labels=labels, **whole)
    shard = SequenceShard.of(group, *case.shape, exchange=case.exchange, **packing)
    local = shard.local(labels)
    shard_loss, shard_gradients = backward(
        input_ids=shard.local(tokens), labels=local, shift_labels=local, sequence_shard=shard
    )
    for x in (shard_loss, *shard_gradients):
        dist.all_reduce(x, group=group)
    worst = max(float((a - b).norm() / b.norm()) for a, b in zip(shard_gradients, gradients, strict=True))
    return abs(float(shard_loss / loss - 1)), worst


def compare() -> dict[str, tuple[float, float]]:
    """Every case's differences."""
    next_rendezvous()
    dist.init_process_group("gloo")
    found = {case.name: differences(case, dist.group.WORLD) for case in CASES}
    dist.destroy_process_group()
    return found


# -- training ---------------------------------------------------------------------------------------------------------

#: Options of `train_parallel` for a tiny run with a checkpoint in its middle.
TRAINING = (
    "--device cpu --seq-length 30 --batch-size 4 --accumulate 2 --eval-blocks 5 --held-out 0.3 --max-steps 6 "
    "--log-steps 1 --save-steps 3 --eval-steps 3 --stride 2 --block-size 4 --window 8 --sink 2 --gradient-checkpointing"
)

#: (processes, further options) of the run that is cut, and of those that continue it.
FIRST_RUN = (2, ["--exchange", "keys"])
CONTINUED = {4: ["--sequence-parallel", "2"], 1: []}


def run_directory(directory: Path, ranks: int) -> Path:
    return directory / f"run-{ranks}"


def training_options(directory: Path, out: Path, further: list[str]) -> list[str]:
    return ["--data", str(directory / "texts"), "--output-dir", str(out), *TRAINING.split(), *further]


def train(directory: Path, further: list[str], out: Path | None = None) -> int:
    """Train on `directory / "texts"` with as many processes as there are; returns the exit status."""
    out = run_directory(directory, int(os.environ["WORLD_SIZE"])) if out is None else out
    next_rendezvous()
    try:
        train_parallel.main(training_options(directory, out, further))
    except SystemExit as error:
        return int(error.code or 0)
    return 0


def first_run(directory: Path) -> tuple[dict[str, tuple[float, float]], int]:
    """(differences of the cases, exit status of the whole training and of two short ones)."""
    bf16 = [*FIRST_RUN[1], "--precision", "bf16", "--max-steps", "3"]
    apart = [*FIRST_RUN[1], "--separate-documents", "--data", str(directory / "short texts"), "--max-steps", "2"]
    differences, status = compare(), train(directory, FIRST_RUN[1])
    return differences, status or train(directory, bf16, directory / "bf16") or train(
        directory, apart, directory / "apart"
    )


def continued_run(directory: Path) -> tuple[dict[str, tuple[float, float]], int]:
    """(differences of the cases, exit status of the resumed training)."""
    return compare(), train(directory, ["--resume", *CONTINUED[int(os.environ["WORLD_SIZE"])]])


def refused_run(directory: Path) -> int:
    """Exit status of a training that is to be resumed with other settings."""
    return train(directory, ["--resume", "--weight-decay", "0.5"])


def bench_run(directory: Path) -> int:
    """bench.several_gpus on the CPU; one file for all numbers of processes."""
    next_rendezvous()
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `bench` is not installed
    from bench import several_gpus

    return several_gpus.main(["--quick", "--repeats", "1", "--out", str(directory.parent / "several.json")])


# -- processes --------------------------------------------------------------------------------------------------------


def spawn(ranks: int, work: Callable[[Path], Any], directory: Path) -> list[Any]:
    """What `work(directory)` returns in each of `ranks` processes, whose environment is as torchrun makes it."""
    mp.set_forkserver_preload(["model_integration.train_parallel"])  # imported once, for all processes
    mp.start_processes(_run, (ranks, free_ports(4), work, directory), ranks, start_method="forkserver")
    return [torch.load(directory / f"result-{rank}.pt", weights_only=False) for rank in range(ranks)]


def free_ports(count: int) -> list[str]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [str(one.getsockname()[1]) for one in sockets]
    for one in sockets:
        one.close()
    return ports


#: Of a spawned process: ports at which its process groups meet.
PORTS: list[str] = []


def next_rendezvous() -> None:
    """A new port for each process group: at the last one's, a process may still find what it left behind."""
    os.environ["MASTER_PORT"] = PORTS.pop(0)


def _run(rank: int, ranks: int, ports: list[str], work: Callable[[Path], Any], directory: Path) -> None:
    torch.set_num_threads(1)
    os.environ.pop("LONGGEN_BACKEND", None)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks))
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    PORTS.extend(ports)
    torch.save(work(directory), directory / f"result-{rank}.pt")
