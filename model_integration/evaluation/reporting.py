"""What an evaluation shows: heat maps, curves and a table."""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib
from rich.table import Table

matplotlib.use("Agg")  # a picture in a file: no display is needed
from matplotlib import pyplot as plt


def plot_depths(records: list[dict[str, Any]], title: str, path: Path) -> None:
    """Draw length x depth into a PNG: the share of right answers, and the mean loss of the answer's tokens."""
    lengths = sorted({record["length"] for record in records})
    depths = sorted({record["depth"] for record in records})
    cells: dict[tuple[float, int], list[dict[str, Any]]] = defaultdict(list)
    for record in records:
        cells[record["depth"], record["length"]].append(record)
    size = (2 * (2.2 + 0.6 * len(lengths)), 1.6 + 0.45 * len(depths))
    figure, panels = plt.subplots(1, 2, figsize=size, layout="constrained")
    for axes, label, value, colours, limits in (
        (panels[0], "right answers", _share_correct, "RdYlGn", (0.0, 1.0)),
        (panels[1], "nats per answer token", _nats_per_token, "viridis_r", (0.0, None)),
    ):
        grid = [
            [value(cells[depth, length]) if cells[depth, length] else math.nan for length in lengths]
            for depth in depths
        ]
        image = axes.imshow(grid, cmap=colours, vmin=limits[0], vmax=limits[1], aspect="auto")
        axes.set_xticks(range(len(lengths)), [short_length(n) for n in lengths], rotation=45)
        axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
        axes.set(xlabel="length in tokens", ylabel="depth", title=label)
        figure.colorbar(image, ax=axes)
    figure.suptitle(title)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_perplexity(records: list[dict[str, Any]], path: Path) -> None:
    """Draw perplexity over the position in the text into a PNG, a curve for each length."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for length in sorted({record["length"] for record in records}):
        samples = [record for record in records if record["length"] == length]
        losses = zip(*(record["losses"] for record in samples), strict=True)
        perplexities = [math.exp(sum(loss) / len(samples)) for loss in losses]
        axes.plot(samples[0]["positions"], perplexities, "o-", label=f"{short_length(length)} tokens", markersize=4)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda position, _: short_length(round(position)))
    axes.set(xlabel="position in the text; each point: all tokens since the one before", ylabel="perplexity per token")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def results_table(runs: dict[str, list[dict[str, Any]]]) -> Table:
    """A row for each task, length and run: its samples, its right answers and its perplexity."""
    table = Table()
    for heading in ("task", "length", "run", "samples", "right", "perplexity"):
        if heading != "run" or len(runs) > 1:
            table.add_column(heading, justify="left" if heading in ("task", "run") else "right", overflow="fold")
    everything = [record for records in runs.values() for record in records]
    for task in dict.fromkeys(record["task"] for record in everything):
        for length in sorted({record["length"] for record in everything if record["task"] == task}):
            for name, records in runs.items():
                cell = [record for record in records if (record["task"], record["length"]) == (task, length)]
                named = [name] if len(runs) > 1 else []
                table.add_row(task, short_length(length), *named, *_table_cell(cell))
    return table


def short_length(tokens: int) -> str:
    """A length as the command line takes it.

    >>> short_length(131072), short_length(1000)
    ('128k', '1000')
    """
    return f"{tokens // 1024}k" if tokens % 1024 == 0 else str(tokens)


def _table_cell(records: list[dict[str, Any]]) -> list[str]:
    if not records:
        return ["-", "-", "-"]
    right = "-" if records[0]["correct"] is None else f"{_share_correct(records):.0%}"
    return [str(len(records)), right, f"{math.exp(_nats_per_token(records)):.4g}"]


def _share_correct(records: list[dict[str, Any]]) -> float:
    return sum(record["correct"] for record in records) / len(records)


def _nats_per_token(records: list[dict[str, Any]]) -> float:
    return -sum(record["logprob"] for record in records) / sum(record["answer_tokens"] for record in records)
