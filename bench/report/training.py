"""The tables of training runs, from rows alone, and what else is read of their curves."""

from __future__ import annotations

import math
import statistics
from typing import Any

import torch
from torch import Tensor

from ..measuring.rows import Row, select, unique
from .cells import NOISY, lines_of, markdown, noisy, number, page, provenance

TITLES = {
    "autoencoder": "Deep autoencoder on scikit-learn's digits",
    "digits": "Small CNN on scikit-learn's digits",
    "text": "Character transformer on Python's standard library",
    "long text": "The same for 1,500 steps",
    "wide text": "The same at width 256 with 4 layers",
    "large text": "The same at width 512 with 8 layers, 8,192 characters a batch, autocast",
}
GOALS = ("test loss", "loss on all images")  # what the loss of a comparison is called


def train(rows: list[Row]) -> str:
    """Mean and standard deviation over the seeds."""
    losses = goals(rows)
    seeds = {row["detail"]["seed"] for row in losses}
    accuracy = ["test accuracy, %"] if select(rows, metric="test accuracy") else []
    header = (
        "optimizer",
        "settings",
        *accuracy,
        losses[0]["metric"],
        "final training loss",
        "optimizer step, ms",
        "training step, ms",
        "state, bytes a parameter",
    )
    notes = (
        f"Mean and standard deviation over {len(seeds)} seeds after "
        f"{losses[0]['detail']['steps'][-1]} steps; a time is the median over seeds of the median "
        f"step; losses in {losses[0]['unit']}."
    )
    lines = lines_of(rows, lambda own: _line(own, len(header)))
    title = f"# {TITLES.get(rows[0]['case'], rows[0]['case'])}"
    return page(title, provenance(rows), markdown(header, lines), notes)


def _line(rows: list[Row], columns: int) -> list[str]:
    if not goals(rows):
        error = f"**WRONG**, error {number(rows[0]['value'], '.2g')}"
        return [rows[0]["provider"], error, *[""] * (columns - 2)]
    settings = goals(rows)[0]["detail"]["settings"]
    if any("diverged" in row["detail"] for row in rows):
        return [rows[0]["provider"], settings_text(settings), "diverged", *[""] * (columns - 3)]
    accuracy = [100 * v for v in _values(rows, "test accuracy")]
    return [
        rows[0]["provider"],
        settings_text(settings),
        *([mean_and_deviation(accuracy, ".2f")] if accuracy else []),
        loss(rows),
        mean_and_deviation(_values(rows, "training loss"), ".2g"),
        step_time(rows, "optimizer step"),
        step_time(rows, "training step"),
        f"{_values(rows, 'state')[0]:.3g}",
    ]


def goals(rows: list[Row]) -> list[Row]:
    """The losses of a comparison, on data that no search has seen."""
    return [row for row in rows if row["metric"] in GOALS]


def settings_text(settings: dict[str, Any]) -> str:
    return ", ".join(f"{key} {_text(value)}" for key, value in settings.items())


def step_time(rows: list[Row], metric: str) -> str:
    """Median over the seeds, in ms, marked where the time of any seed is noisy."""
    time = f"{statistics.median(_values(rows, metric)):.3g}"
    return time + NOISY * any(map(noisy, select(rows, metric=metric)))


def loss(rows: list[Row]) -> str:
    """The last loss of a comparison, mean and standard deviation over the seeds."""
    return mean_and_deviation([_number(row["value"]) for row in goals(rows)], ".3f")


def reached(rows: list[Row], other: list[Row]) -> tuple[float, float] | None:
    """Steps and seconds of training to the last test loss of `other`, means of the seeds."""
    goal = curves(goals(other), "curve").mean(0)[-1]
    own = goals(rows)
    below = (curves(own, "curve").mean(0) <= goal).nonzero()
    if not len(below):
        return None
    first = below[0].item()
    steps, seconds = (curves(own, key).median(0).values[first] for key in ("steps", "seconds"))
    return steps.item(), seconds.item()


def curves(rows: list[Row], key: str) -> Tensor:
    """The list of a detail, one line a seed."""
    lines = [row["detail"][key] for row in rows]
    return torch.tensor([[_number(v) for v in line] for line in lines], dtype=torch.float64)


def mean_and_deviation(values: list[float], spec: str) -> str:
    """Of the seeds; the mean alone of one."""
    mean = f"{statistics.mean(values):{spec}}"
    return f"{mean} ± {statistics.stdev(values):{spec}}" if len(values) > 1 else mean


def _text(value: Any) -> str:
    return f"({', '.join(map(_text, value))})" if isinstance(value, list) else f"{value}"


def _values(rows: list[Row], metric: str) -> list[float]:
    return [_number(row["value"]) for row in select(rows, metric=metric)]


def _number(value: float | None) -> float:
    return math.nan if value is None else value


# bench defaults -------------------------------------------------------------------------------


def defaults(rows: list[Row]) -> str:
    """Held-out loss and accuracy, mean and standard deviation over the seeds."""
    cases = unique(rows, "case")
    seeds = len({row["detail"]["seed"] for row in rows})
    steps = {case: select(rows, case=case)[0]["detail"]["steps"] for case in cases}

    def line(own: list[Row]) -> list[str]:
        return [own[0]["provider"], *(_defaults_cell(select(own, case=case)) for case in cases)]

    header = ["optimizer", *(f"{case}: {count} steps" for case, count in steps.items())]
    notes = (
        "Every optimizer as its constructor builds it, at a constant lr. Held-out loss in nat, "
        f"mean and standard deviation over {seeds} seeds, and the mean accuracy."
    )
    table = markdown(header, lines_of(rows, line))
    return page("# Training at the defaults", provenance(rows), table, notes)


def _defaults_cell(rows: list[Row]) -> str:
    shown = mean_and_deviation(_values(rows, "loss"), ".3f")
    accuracies = _values(rows, "accuracy")
    return f"{shown}, {statistics.fmean(accuracies):.1%}" if accuracies else shown
