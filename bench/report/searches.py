"""The table and the plot of `bench search`, from rows alone."""

from __future__ import annotations

import math
from pathlib import Path

from ..measuring.rows import Row, select, unique
from .cells import markdown, page, provenance
from .figures import logarithmic, save, styles, subplots
from .training import settings_text

SEARCHED, VALIDATION = "settings searched", "validation loss"
OF = (1, 3, 10, 30, 100)  # trials whose expected best is shown
NEAR = 0.02


def expected_best(values: list[float]) -> list[float]:
    """The expected lowest of 1, 2, ... all of the values, exact over all orders of them.

    Of n out of N the i-th lowest, from 0 on, is the best in C(N - 1 - i, n - 1) of C(N, n) choices.
    """
    ordered = sorted(values)
    size = len(ordered)
    return [
        math.fsum(
            value * (math.comb(size - 1 - i, n - 1) / math.comb(size, n))
            for i, value in enumerate(ordered)
        )
        for n in range(1, size + 1)
    ]


def rows_of(rows: list[Row]) -> list[Row]:
    """Those of a search."""
    return [row for row in rows if row["benchmark"] == "search"]


def table(rows: list[Row]) -> str:
    """Per method and stage what so many trials are worth, and the best settings."""
    stages = {stage: _stage(rows, stage) for stage in (1, 2)}
    longest = 1 + max(row["detail"]["run"] for row in _trials(rows))
    shown = [n for n in OF if n <= longest]
    bests = [f"best of {n}" for n in shown]
    header = ["method", "settings searched", "runs", "diverged", *bests, "best", "within 2 %"]
    parts = [f"# Search on {rows[0]['case']}", provenance(rows)]
    for stage, own in stages.items():
        if own:
            lines = [_line(select(own, provider=p), shown) for p in unique(own, "provider")]
            parts += [f"**Stage {stage}**", markdown(header, lines)]
    lines = []
    for name in unique(rows, "provider"):
        finite = [r for r in _trials(select(rows, provider=name)) if r["value"] is not None]
        if finite:
            best = min(finite, key=lambda row: row["value"])
            settings = settings_text(best["detail"]["settings"])
            lines.append([name, settings, f"{best['detail']['stage']}", f"{best['value']:.4g}"])
    parts += ["**Best settings**", markdown(["method", "settings", "stage", VALIDATION], lines)]
    before = select(rows, metric=SEARCHED)[0]["detail"]["untrained"]
    parts.append(
        f"Validation loss at the end, in {select(rows, metric=VALIDATION)[0]['unit']}. Best of n: "
        "the expected lowest of n trials, over all orders. A run that diverged, or ended higher, "
        f"counts there as the network before training, {before:.4g}. Within 2 %: the share of "
        "trials that end at most that far above the best of their stage."
    )
    noted = [row for row in rows if "note" in row["detail"]]
    parts += [f"{row['provider']}: {row['detail']['note']}." for row in noted]
    return page(*parts)


def _stage(rows: list[Row], stage: int) -> list[Row]:
    return [row for row in rows if row["detail"]["stage"] == stage]


def _trials(rows: list[Row]) -> list[Row]:
    return select(rows, metric=VALIDATION)


def curve(rows: list[Row]) -> list[float]:
    """The expected best of so many trials, of the rows of one method and stage."""
    (searched,) = select(rows, metric=SEARCHED)
    most = searched["detail"]["untrained"]
    values = [row["value"] for row in _trials(rows)]
    return expected_best([most if value is None else min(value, most) for value in values])


def _line(rows: list[Row], shown: list[int]) -> list[str]:
    values = [row["value"] for row in _trials(rows)]
    finite = [value for value in values if value is not None]
    best, expected = min(finite, default=math.nan), curve(rows)
    near = sum(value <= best * (1 + NEAR) for value in finite) / len(values)
    return [
        rows[0]["provider"],
        f"{select(rows, metric=SEARCHED)[0]['value']:.0f}",
        f"{len(values)}",
        f"{len(values) - len(finite)}",
        *(f"{expected[n - 1]:.4g}" if n <= len(expected) else "" for n in shown),
        f"{best:.4g}",
        f"{near:.0%}",
    ]


def plot(rows: list[Row], path: Path) -> None:
    """A panel a stage."""
    stages = [stage for stage in (1, 2) if _trials(_stage(rows, stage))]
    figure, _ = subplots(len(stages), height=4.2)
    for axis, stage in zip(figure.axes, stages, strict=True):
        own = _stage(rows, stage)
        for name, look in styles(unique(rows, "provider")).items():
            if of := select(own, provider=name):
                y = curve(of)
                axis.plot(range(1, len(y) + 1), y, **look | {"marker": None}, lw=1.8)
        logarithmic(axis, "x")
        logarithmic(axis, "y")
        unit = _trials(own)[0]["unit"]
        axis.set(xlabel="trials", ylabel=f"expected best {VALIDATION}, {unit}")
        axis.set_title(f"stage {stage}")
    figure.axes[0].legend(frameon=False, fontsize=8)
    save(figure, rows, path, f"Search on {rows[0]['case']}: the best of n trials")
