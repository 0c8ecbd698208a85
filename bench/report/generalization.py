"""Training beside test, of the final runs of `bench search`, from rows alone."""

from __future__ import annotations

import statistics
from pathlib import Path

from ..measuring.rows import Row, select, unique
from .cells import markdown
from .figures import save, styles, subplots
from .training import mean_and_deviation

TRAINING, TEST = "training accuracy", "test accuracy"


def rows_of(rows: list[Row]) -> list[Row]:
    """Accuracies of methods whose training accuracy is known; none where there is none."""
    known = {row["provider"] for row in select(rows, metric=TRAINING)}
    return [r for r in rows if r["metric"] in (TRAINING, TEST) and r["provider"] in known]


def table(rows: list[Row]) -> str:
    """A line an optimizer, best test accuracy first: mean and standard deviation over seeds."""
    lines = []
    for name in unique(rows_of(rows), "provider"):
        own = select(rows, provider=name)
        test = _percent(own, TEST)
        cells = [
            mean_and_deviation(_percent(own, TRAINING), ".2f"),
            mean_and_deviation(test, ".2f"),
            mean_and_deviation([r["value"] for r in select(own, metric="test loss")], ".4f"),
        ]
        lines.append((-statistics.fmean(test), [name, *cells]))
    header = ["optimizer", "training accuracy, %", "test accuracy, %", "test loss"]
    return markdown(header, [line for _, line in sorted(lines)])


def _percent(rows: list[Row], metric: str) -> list[float]:
    return [100 * row["value"] for row in select(rows, metric=metric)]


def plot(rows: list[Row], path: Path) -> None:
    """A line an optimizer, the best on top: training hollow, test filled, small dots the seeds."""
    figure, axis = subplots(height=3.6)
    names = sorted(unique(rows, "provider"), key=lambda name: _mean(rows, name))
    looks = styles(names)
    for line, name in enumerate(names):
        own, look = select(rows, provider=name), looks[name] | {"ls": "none", "label": None}
        for metric, fill, height in ((TRAINING, "none", line + 0.14), (TEST, "full", line - 0.14)):
            values = _percent(own, metric)
            look |= {"fillstyle": fill}
            error = _deviation(values)
            axis.errorbar(statistics.fmean(values), height, xerr=error, **look, elinewidth=1, ms=7)
            axis.plot(values, [height] * len(values), ".", color=look["color"], alpha=0.5, ms=4)
    axis.set_yticks(range(len(names)), names)
    axis.set_xlabel("accuracy, %: hollow on training data, filled on test data")
    save(figure, rows, path, f"{rows[0]['case']}: what was learnt, and what it is worth")


def _mean(rows: list[Row], name: str) -> float:
    return statistics.fmean(_percent(select(rows, provider=name), TEST))


def _deviation(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0
