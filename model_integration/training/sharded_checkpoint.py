"""Checkpoints of sharded training: every process writes its part, and any number of processes reads them again."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.stateful import Stateful
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import TrainerState

from model_integration.data import DataError

#: Beside the sharded weights, and the last file that a checkpoint gets, as in those of transformers' Trainer.
STATE_FILE = "trainer_state.json"
SHARDS = "shards"

#: Checkpoints that stay; older ones are deleted.
KEPT = 2


@dataclass
class TrainingState(Stateful):
    """What training changes: weights, the optimizer's moments and the schedule.

    The data's position needs no entry: with the seed and the batch size it follows from the step in STATE_FILE.
    """

    model: nn.Module
    optimizer: Optimizer
    scheduler: LRScheduler

    def state_dict(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer, "scheduler": self.scheduler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])


def save_checkpoint(path: Path, training: TrainingState, progress: TrainerState) -> None:
    """Write a checkpoint, collectively, and delete those before the last `KEPT` beside it."""
    state_dict_saver.save({"training": training}, checkpoint_id=path / SHARDS)
    if dist.get_rank() == 0:
        progress.save_to_json(str(path / STATE_FILE))
        steps = sorted(int(p.parent.name.split("-")[1]) for p in path.parent.glob(f"checkpoint-*/{STATE_FILE}"))
        for step in steps[:-KEPT]:
            shutil.rmtree(path.parent / f"checkpoint-{step}")


def load_checkpoint(path: Path, training: TrainingState) -> TrainerState:
    """Read a checkpoint into `training`, collectively; returns its progress.

    Raises DataError for one that this module has not written.
    """
    if not (path / SHARDS).is_dir():
        raise DataError(f"{path} is no sharded checkpoint: a run is resumed by the command that began it")
    state_dict_loader.load({"training": training}, checkpoint_id=path / SHARDS)
    return TrainerState.load_from_json(str(path / STATE_FILE))
