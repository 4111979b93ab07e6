"""What a training shows: its progress and its loss curve."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import matplotlib
from transformers import ProgressCallback

matplotlib.use("Agg")  # a picture in a file: no display is needed
from matplotlib import pyplot as plt

BITS_PER_BYTE = "eval_bits_per_byte"


class ProgressBar(ProgressCallback):
    """One bar for the run, the training loss beside it, and a line for each evaluation."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        if state.is_world_process_zero:
            self.training_bar.update(state.global_step)  # a resumed run starts where it was
            self.current_step = state.global_step

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """No second bar: an evaluation takes seconds."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.training_bar is None or not logs:
            return
        if "loss" in logs:
            self.training_bar.set_postfix_str(f"loss {logs['loss']:.3f} nats/token")
        if BITS_PER_BYTE in logs:
            self.training_bar.write(f"step {state.global_step:>6}: {logs[BITS_PER_BYTE]:.3f} bits per byte, held out")


def plot_losses(history: list[dict[str, Any]], bytes_per_token: float, path: Path) -> None:
    """Draw the training and the held-out curve of a Trainer's `log_history`, both in bits per byte, into a PNG."""
    train = [(entry["step"], entry["loss"] / math.log(2) / bytes_per_token) for entry in history if "loss" in entry]
    held_out = [(entry["step"], entry[BITS_PER_BYTE]) for entry in history if BITS_PER_BYTE in entry]
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for points, style, label in ((train, "-", "training"), (held_out, "o-", "held out")):
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, markersize=4)
    axes.set(xlabel="step", ylabel="bits per byte")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)
