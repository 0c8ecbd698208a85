"""Tables and plots of the rows of `python -m bench train`."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..rows import NOISY, Row, markdown, noisy, number, provenance, select, unique
from .figures import save, styles, subplots

TITLES = {
    "digits": "Small CNN on scikit-learn's digits",
    "text": "Character transformer on Python's standard library",
}
# The two panels of a plot: metric, what it is drawn against, and the label of either axis.
PANELS = {
    "digits": (
        ("training loss", "steps", "step", "training loss, nat"),
        ("test accuracy", "steps", "step", "test error, %"),
    ),
    "text": (
        ("test loss", "steps", "step", "test loss, nat a character"),
        ("test loss", "seconds", "seconds of training", "test loss, nat a character"),
    ),
}
LEAST_ERROR = 0.1  # %, because a logarithmic axis has no 0; one of the digits' test images is 0.19


# Table ----------------------------------------------------------------------------------------


def table(rows: list[Row]) -> str:
    """Markdown: mean and standard deviation over the seeds."""
    last = select(rows, metric="test loss")[0]["detail"]
    seeds = {row["detail"]["seed"] for row in select(rows, metric="test loss")}
    accuracy = ["test accuracy, %"] if select(rows, metric="test accuracy") else []
    header = (
        "optimizer",
        "settings",
        *accuracy,
        "test loss",
        "final training loss",
        "optimizer step, ms",
        "training step, ms",
        "state, bytes a parameter",
    )
    notes = (
        f"Mean and standard deviation over {len(seeds)} seeds after {last['steps'][-1]} steps; a "
        "time is the median over seeds of the median step; losses in nat."
    )
    lines = [_line(select(rows, provider=name), len(header)) for name in unique(rows, "provider")]
    parts = [f"# {TITLES[rows[0]['case']]}", provenance(rows), markdown(header, lines), notes]
    return "\n\n".join(parts) + "\n"


def _line(rows: list[Row], columns: int) -> list[str]:
    if not select(rows, metric="test loss"):
        error = f"**WRONG**, error {number(rows[0]['value'], '.2g')}"
        return [rows[0]["provider"], error, *[""] * (columns - 2)]
    settings = select(rows, metric="test loss")[0]["detail"]["settings"]
    accuracy = [100 * v for v in _values(rows, "test accuracy")]
    return [
        rows[0]["provider"],
        ", ".join(f"{key} {_text(value)}" for key, value in settings.items()),
        *([mean_and_deviation(accuracy, ".2f")] if accuracy else []),
        loss(rows),
        mean_and_deviation(_values(rows, "training loss"), ".2g"),
        step_time(rows, "optimizer step"),
        step_time(rows, "training step"),
        f"{_values(rows, 'state')[0]:.3g}",
    ]


def step_time(rows: list[Row], metric: str) -> str:
    """Median over the seeds, in ms, marked where the time of any seed is noisy."""
    time = f"{statistics.median(_values(rows, metric)):.3g}"
    return f"{time} {NOISY}" if any(map(noisy, select(rows, metric=metric))) else time


def loss(rows: list[Row]) -> str:
    """The last test loss, mean and standard deviation over the seeds."""
    return mean_and_deviation(_values(rows, "test loss"), ".3f")


def reached(rows: list[Row], other: list[Row]) -> tuple[float, float] | None:
    """Steps and seconds of training to the last test loss of `other`, means of the seeds."""
    goal = _lines(select(other, metric="test loss"), "curve").mean(0)[-1]
    own = select(rows, metric="test loss")
    below = (_lines(own, "curve").mean(0) <= goal).nonzero()
    if not len(below):
        return None
    first = below[0].item()
    steps, seconds = (_lines(own, key).median(0).values[first] for key in ("steps", "seconds"))
    return steps.item(), seconds.item()


def _text(value: Any) -> str:
    return f"({', '.join(map(_text, value))})" if isinstance(value, list) else f"{value}"


def _values(rows: list[Row], metric: str) -> list[float]:
    return [_number(row["value"]) for row in select(rows, metric=metric)]


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def mean_and_deviation(values: list[float], spec: str) -> str:
    """Of the seeds; the mean alone of one."""
    mean = f"{statistics.mean(values):{spec}}"
    return f"{mean} ± {statistics.stdev(values):{spec}}" if len(values) > 1 else mean


# Plot -----------------------------------------------------------------------------------------


def plot(rows: list[Row], path: Path) -> None:
    """Two panels: mean over the seeds, band from lowest to highest."""
    case = rows[0]["case"]
    figure, axes = subplots(2, height=4.2)
    for axis, (metric, along, *labels) in zip(axes, PANELS[case], strict=True):
        for name, look in styles(unique(select(rows, metric=metric), "provider")).items():
            own = select(rows, provider=name, metric=metric)
            curves = _lines(own, "curve")
            if metric == "test accuracy":
                curves = (100 * (1 - curves)).clamp_min(LEAST_ERROR)
            x = _lines(own, along).median(0).values
            axis.plot(x, curves.mean(0), **look | {"marker": None}, lw=1.8)
            band = {"color": look["color"], "alpha": 0.15, "lw": 0}
            axis.fill_between(x, curves.amin(0), curves.amax(0), **band)
        axis.set(xlabel=labels[0], ylabel=labels[1])
        if case == "digits":
            axis.set_yscale("log")
    if case == "digits":
        ticks = [0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100]
        axes[1].set_yticks(ticks, labels=map(str, ticks), minor=False)
        axes[1].set_yticks([], minor=True)
    axes[0].legend(frameon=False)
    seeds = len({row["detail"]["seed"] for row in select(rows, metric="test loss")})
    save(figure, rows, path, f"{TITLES[case]}: mean and range of {seeds} seeds")


def _lines(rows: list[Row], key: str) -> Tensor:
    """The list of a detail, one line a seed."""
    lines = [row["detail"][key] for row in rows]
    return torch.tensor([[_number(v) for v in line] for line in lines], dtype=torch.float64)
