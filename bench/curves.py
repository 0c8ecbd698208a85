"""Table and plot of the rows of `python -m bench train`."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .common import optional
from .rows import Row, markdown, provenance, select, unique

COLOURS = ("#0072b2", "#56b4e9", "#d55e00", "#555555")  # distinct to the colour-blind
DASHES = ("-", "--", "-.", ":")


def table(rows: list[Row]) -> str:
    """Markdown: mean and standard deviation over the seeds."""
    header = (
        "optimizer",
        "settings",
        "test accuracy, %",
        "test loss",
        "final training loss",
        "optimizer step, ms",
        "training step, ms",
    )
    example = select(rows, metric="test accuracy")[0]["detail"]
    seeds = {row["detail"]["seed"] for row in rows}
    epochs, images = len(example["curve"]), example["images"]
    notes = (
        f"Mean and standard deviation over {len(seeds)} seeds after {epochs} epochs; a time is the "
        f"median over seeds of the median step. One of the {images} test images is "
        f"{100 / images:.2f} %."
    )
    lines = [_line(select(rows, provider=name)) for name in unique(rows, "provider")]
    parts = ["# Training on digits", provenance(rows), markdown(header, lines), notes]
    return "\n\n".join(parts) + "\n"


def _line(rows: list[Row]) -> list[str]:
    settings = select(rows, metric="test accuracy")[0]["detail"]["settings"]
    times = [statistics.median(_values(rows, f"{what} step")) for what in ("optimizer", "training")]
    return [
        rows[0]["provider"],
        ", ".join(f"{key} {_text(value)}" for key, value in settings.items()),
        _mean_and_deviation([100 * v for v in _values(rows, "test accuracy")], ".2f"),
        _mean_and_deviation(_values(rows, "test loss"), ".3f"),
        _mean_and_deviation(_values(rows, "training loss"), ".1e"),
        f"{times[0]:.3f}",
        f"{times[1]:.2f}",
    ]


def _text(value: Any) -> str:
    return f"({', '.join(map(_text, value))})" if isinstance(value, list) else f"{value}"


def _values(rows: list[Row], metric: str) -> list[float]:
    return [_number(row["value"]) for row in select(rows, metric=metric)]


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _mean_and_deviation(values: list[float], spec: str) -> str:
    mean = f"{statistics.mean(values):{spec}}"
    return f"{mean} ± {statistics.stdev(values):{spec}}" if len(values) > 1 else mean


def plot(rows: list[Row], path: Path) -> None:
    """Training loss and test error against epochs: mean over seeds, band from lowest to highest."""
    optional("matplotlib").use("Agg")
    pyplot = optional("matplotlib.pyplot")
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    for name, colour, dash in zip(unique(rows, "provider"), COLOURS, DASHES, strict=True):
        own = select(rows, provider=name)
        images = select(own, metric="test accuracy")[0]["detail"]["images"]
        error = 100 * (1 - _curves(own, "test accuracy")).clamp_min(0.5 / images)
        for axis, curves in ((left, _curves(own, "training loss")), (right, error)):
            epochs = range(1, curves.shape[1] + 1)
            axis.plot(epochs, curves.mean(0), color=colour, ls=dash, lw=1.8, label=name)
            axis.fill_between(
                epochs, curves.amin(0), curves.amax(0), color=colour, alpha=0.15, lw=0
            )
    for axis, label in ((left, "training loss, nat"), (right, "test error, %")):
        axis.set(yscale="log", xlabel="epoch", ylabel=label)
        axis.grid(alpha=0.3)
    ticks = [0.5, 1, 2, 5, 10, 20, 50, 100]
    right.set_yticks(ticks, labels=map(str, ticks), minor=False)
    right.set_yticks([], minor=True)
    left.legend(frameon=False)
    seeds = len({row["detail"]["seed"] for row in rows})
    figure.suptitle(f"Small CNN on scikit-learn's digits: mean and range of {seeds} seeds")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _curves(rows: list[Row], metric: str) -> Tensor:
    """One line a seed."""
    curves = [row["detail"]["curve"] for row in select(rows, metric=metric)]
    return torch.tensor([[_number(v) for v in curve] for curve in curves], dtype=torch.float64)
