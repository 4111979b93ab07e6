"""The training loop over several processes: FSDP2 shards the model, and groups of processes share each sequence.

What a step computes does not depend on how many processes there are, or on how many share a sequence: batches are those
of the whole job, in an order that the seed gives, and the loss is divided by all labels that count, wherever they are.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from transformers import TrainerState, default_data_collator, get_scheduler

from model_integration.context_parallel import SequenceShard
from model_integration.data import TokenBlocks
from model_integration.modeling import LongGenForCausalLM
from model_integration.training.reporting import BITS_PER_BYTE, ProgressBar
from model_integration.training.sharded_checkpoint import TrainingState, load_checkpoint, save_checkpoint

IGNORED = -100
MAX_GRAD_NORM = 1.0


def shard_model(model: LongGenForCausalLM, mesh: DeviceMesh, *, compute_in_bf16: bool) -> None:
    """Shard parameters, gradients and so the optimizer over a mesh, layer by layer, in place.

    Gradients are averaged over the processes, in fp32.
    """
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if compute_in_bf16 else None, reduce_dtype=torch.float32)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def sharded_loss(
    model: LongGenForCausalLM,
    group: dist.ProcessGroup,
    ids: Tensor,
    targets: Tensor,
    divisor: Tensor | int,
    exchange: str = "auto",
    position_ids: Tensor | None = None,
) -> Tensor:
    """The summed loss of this process's tokens over `divisor`, collectively over the processes that share sequences.

    Args:
        group: the processes that share the sequences.
        ids: int64 (rows, tokens), whole sequences, the same on each of them.
        targets: int64 (rows, tokens), shifted: each token's next; IGNORED where it does not count.
        exchange: what attention exchanges, of `context_parallel.EXCHANGES`.
        position_ids: int64 (rows, tokens); where they begin anew, so does a packed document. None: each row is one.
    """
    shard = SequenceShard.of(group, *ids.shape, position_ids=position_ids, exchange=exchange)
    layout = {"sequence_shard": shard} if shard.sharding.ranks > 1 else {"position_ids": position_ids}
    local = shard.local(targets)
    output = model(
        input_ids=shard.local(ids),
        labels=local,
        shift_labels=local,
        num_items_in_batch=divisor,
        use_cache=False,
        **layout,
    )
    loss: Tensor = output.loss
    return loss


@lru_cache(maxsize=2)
def _epoch_order(sequences: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(sequences)


def sequences_of_step(step: int, per_step: int, sequences: int, seed: int) -> list[int]:
    """Which of `sequences` training sequences an optimizer step reads: a new order in every epoch, none left out.

    >>> sorted(sequences_of_step(0, 2, 4, seed=0) + sequences_of_step(1, 2, 4, seed=0))
    [0, 1, 2, 3]
    """
    places = range(step * per_step, (step + 1) * per_step)
    return [int(_epoch_order(sequences, seed, place // sequences)[place % sequences]) for place in places]


class ParallelTrainer:
    """Trains a model that `shard_model` has sharded, evaluates it, and keeps the history that Trainer keeps.

    Args:
        args: the checked options of `train_parallel`.
        mesh: (data, sequence) processes; those of one row of it share their sequences.

    Attributes:
        progress: steps done and `log_history`, the same on every process.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        model: LongGenForCausalLM,
        train: TokenBlocks,
        held_out: TokenBlocks,
        mesh: DeviceMesh,
        device: torch.device,
    ) -> None:
        self.args, self.model, self.train_blocks, self.held_out, self.device = args, model, train, held_out, device
        self.data_group, self.sequence_group = mesh.get_group("data"), mesh.get_group("sequence")
        self.rows = args.batch_size // self.data_group.size()
        matrices = [p for p in model.parameters() if p.ndim > 1]
        others = [p for p in model.parameters() if p.ndim <= 1]
        optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": args.weight_decay}, {"params": others, "weight_decay": 0.0}],
            lr=args.learning_rate,
            betas=(0.9, 0.95),
            fused=args.optimizer == "adamw_torch_fused",
        )
        scheduler = get_scheduler(
            "cosine_with_min_lr", optimizer, args.warmup_steps, args.max_steps, {"min_lr_rate": 0.1}
        )
        self.state = TrainingState(model, optimizer, scheduler)
        self.progress = TrainerState(max_steps=args.max_steps, is_world_process_zero=dist.get_rank() == 0)

    def resume(self, checkpoint: Path) -> None:
        """Continue from a checkpoint, which any number of processes may have written."""
        self.progress = load_checkpoint(checkpoint, self.state)
        self.progress.is_world_process_zero = dist.get_rank() == 0

    def train(self) -> None:
        """Run the steps that are left, with the logs, evaluations and checkpoints that the options ask for."""
        args, progress, bar = self.args, self.progress, ProgressBar()
        bar.on_train_begin(None, progress, None)
        losses = torch.zeros((), device=self.device)
        while progress.global_step < args.max_steps:
            loss, norm = self._step(progress.global_step)
            losses += loss
            progress.global_step += 1
            bar.on_step_end(None, progress, None)
            last = progress.global_step == args.max_steps
            if progress.global_step % args.log_steps == 0:
                dist.all_reduce(losses)
                rate = float(self.state.scheduler.get_last_lr()[0])
                loss_per_step = float(losses) / args.log_steps
                self._log(bar, {"loss": loss_per_step, "grad_norm": float(norm), "learning_rate": rate})
                losses.zero_()
            if progress.global_step % args.eval_steps == 0 or last:
                self._log(bar, self.evaluate())
            if progress.global_step % args.save_steps == 0 or last:
                save_checkpoint(args.output_dir / f"checkpoint-{progress.global_step}", self.state, progress)
        bar.on_train_end(None, progress, None)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """The loss of the held-out sequences and their bits per byte."""
        self.model.eval()
        totals = torch.zeros(2, dtype=torch.float64, device=self.device)  # loss in nats, tokens
        for first in range(0, len(self.held_out), self.args.batch_size):
            batch = range(first, first + self.args.batch_size)
            ids, targets, places = self._rows_of(self.held_out, [i if i < len(self.held_out) else None for i in batch])
            totals[0] += self._loss(ids, targets, places, divisor=1)
            if self.sequence_group.rank() == 0:
                totals[1] += (targets != IGNORED).sum()
        dist.all_reduce(totals)
        self.model.train()
        loss = float(totals[0] / totals[1])
        return {"eval_loss": loss, BITS_PER_BYTE: loss / math.log(2) / self.held_out.bytes_per_token}

    def _step(self, step: int) -> tuple[Tensor, Tensor]:
        """One optimizer step; returns this process's part of the loss, and the whole gradient's norm."""
        args = self.args
        per_step = args.batch_size * args.accumulate
        indices = sequences_of_step(step, per_step, len(self.train_blocks), args.seed)
        batches = [
            self._rows_of(self.train_blocks, indices[first : first + args.batch_size])
            for first in range(0, per_step, args.batch_size)
        ]
        valid = sum(((targets != IGNORED).sum() for _, targets, _ in batches), torch.zeros((), device=self.device))
        dist.all_reduce(valid, group=self.data_group)
        total = torch.zeros((), device=self.device)
        for batch in batches:
            loss = self._loss(*batch, divisor=valid)
            (loss * dist.get_world_size()).backward()  # FSDP averages what are parts of a sum
            total += loss.detach()
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = get_total_norm(gradients)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        clip_grads_with_norm_(self.model.parameters(), MAX_GRAD_NORM, norm)
        self.state.optimizer.step()
        self.state.scheduler.step()
        self.state.optimizer.zero_grad()
        return total, norm

    def _rows_of(self, blocks: TokenBlocks, indices: Sequence[int | None]) -> tuple[Tensor, Tensor, Tensor | None]:
        """This process's rows of a batch: ids, targets and, with documents apart, position ids, (rows, seq_length).

        An index of None is a row that does not count. Targets are shifted here, where a sequence is still whole: the
        last one of a shard is in the next shard.
        """
        own = indices[self.data_group.rank() * self.rows : (self.data_group.rank() + 1) * self.rows]
        batch = default_data_collator([blocks[i or 0] for i in own])
        rows = {name: value.to(self.device) for name, value in batch.items()}
        ids = rows["input_ids"]
        targets = F.pad(ids[:, 1:], (0, 1), value=IGNORED)
        targets[[i is None for i in own]] = IGNORED
        return ids, targets, rows.get("position_ids")

    def _loss(self, ids: Tensor, targets: Tensor, places: Tensor | None, divisor: Tensor | int) -> Tensor:
        return sharded_loss(self.model, self.sequence_group, ids, targets, divisor, self.args.exchange, places)

    def _log(self, bar: ProgressBar, logs: dict[str, float]) -> None:
        self.progress.log_history.append({**logs, "step": self.progress.global_step})
        bar.on_log(None, self.progress, None, logs=logs)
