"""Plots of the rows of one run: what they show, which rows they need, and how they are drawn.

A row takes part by what it has, whatever benchmark it is from:

    roofline    a rate with `flops` and `bytes` in its detail, or a bandwidth of a diagonal update;
                roofs: the bandwidth of a copy and of an in-place add, the rate of `mm`
    speed-up    a `speed` with `n` in its detail (and `count`, for matrices at once)
    step cost   a `time` with `parameters` in its detail
    peers       times of `bench matrix`, beside IFShampoo's in bfloat16
    curves      losses of `bench train` with their `curve`
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from . import curves
from .diag import COPY, PROBE_BYTES
from .figures import GREY, STYLES, logarithmic, save, styles, subplots
from .rows import Row, select, unique

# FLOPs a parameter of the plain PyTorch loop of an update; a root or a division counts as one.
DIAGONAL_FLOPS = {
    "RootFreeRMSprop, momentum 0.9": 13,
    "RootFreeRMSprop, momentum 0": 11,
    "RootFreeAdamW": 15,
    "torch AdamW, fused": 14,
    "torch RMSprop, momentum 0.9": 11,
    "torch SGD, momentum 0.9, fused": 4,
}
GIGA = {"GFLOP/s": 1.0, "TFLOP/s": 1e3}
OURS = "IFShampoo, bfloat16"
MM = "mm"


class Plot(NamedTuple):
    """A kind of plot; `rows` chooses what it draws, and none of them means no plot."""

    title: str
    about: str
    rows: Callable[[list[Row]], list[Row]]
    draw: Callable[[list[Row], Path], None]
    made_by: str


# Roofline -------------------------------------------------------------------------------------


def roofline_rows(rows: list[Row]) -> list[Row]:
    """Points and roofs; none without a measured copy."""
    points = [row for row in rows if intensity(row) is not None]
    roofs = [row for row in rows if _is_roof(row)]
    return [*roofs, *points] if points and select(roofs, provider=COPY) else []


def _is_roof(row: Row) -> bool:
    roofs = {(name, "bandwidth") for name in PROBE_BYTES} | {(MM, "rate")}
    return (row["provider"], row["metric"]) in roofs and row["value"] is not None


def intensity(row: Row) -> float | None:
    """FLOPs a byte; None where the row does not say."""
    name, metric, detail = row["provider"], row["metric"], row["detail"]
    if row["value"] is None or _is_roof(row):
        return None
    if metric == "rate" and {"flops", "bytes"} <= detail.keys():
        return detail["flops"] / detail["bytes"]
    if metric == "bandwidth" and name in DIAGONAL_FLOPS:
        return DIAGONAL_FLOPS[name] / detail["bytes_per_parameter"]
    return None


def achieved(row: Row) -> float:
    """GFLOP/s of a row that has an intensity."""
    if row["metric"] == "rate":
        return row["value"] * GIGA[row["unit"]]
    return row["value"] * intensity(row)


def roofline(rows: list[Row], path: Path) -> None:
    """Achieved GFLOP/s against FLOPs a byte, under what the same run measured of the machine.

    The bandwidths are those of the case that moves the most, which is in no cache.
    """
    figure, axis = subplots(height=4.4)
    points = [row for row in rows if intensity(row) is not None]
    left, right = min(map(intensity, points)) / 1.6, max(map(intensity, points)) * 1.6
    rates = [achieved(row) for row in select(rows, provider=MM, metric="rate")]
    top = max(rates, default=math.inf)
    for name, dash in zip(PROBE_BYTES, ("--", "-"), strict=True):
        found = select(rows, provider=name, metric="bandwidth")
        if found:
            bandwidth = found[0]["value"]
            ends = [left, min(right, top / bandwidth)]
            label = f"{name}, {bandwidth:.0f} GB/s"
            axis.plot(ends, [bandwidth * x for x in ends], color=GREY, ls=dash, label=label)
    if rates:
        axis.axhline(top, color=GREY, ls=":", label=f"large product, {top:,.0f} GFLOP/s")
    for name, look in styles(unique(points, "provider")).items():
        own = select(points, provider=name)
        axis.plot(list(map(intensity, own)), list(map(achieved, own)), **look | {"ls": ""})
    logarithmic(axis, "x", "y")
    axis.set(xlim=(left, right), xlabel="arithmetic intensity, FLOP a byte", ylabel="GFLOP/s")
    figure.legend(frameon=False, fontsize=8, loc="outside right center")
    save(figure, rows, path)


# Against size ---------------------------------------------------------------------------------


def _with(metric: str, key: str) -> Callable[[list[Row]], list[Row]]:
    """Chooses rows that have a number of this metric, and in their detail the size it is for."""

    def choose(rows: list[Row]) -> list[Row]:
        return [r for r in select(rows, metric=metric) if key in r["detail"] and r["value"]]

    return choose


def _against(
    key: str, xlabel: str, ylabel: str, scale: float = 1.0
) -> Callable[[list[Row], Path], None]:
    """Draws a line a provider, and a count of matrices at once, against a size in the detail."""

    def draw(rows: list[Row], path: Path) -> None:
        figure, axis = subplots(height=4.4)
        lines: dict[str, list[Row]] = {}
        for row in rows:
            count = row["detail"].get("count")
            name = row["provider"] + (f", {count} at once" if count else "")
            lines.setdefault(name, []).append(row)
        for name, look in styles(list(lines)).items():
            own = sorted(lines[name], key=lambda row: row["detail"][key])
            x = [scale * row["detail"][key] for row in own]
            axis.plot(x, [row["value"] for row in own], **look, ms=5)
        logarithmic(axis, "x", "y")
        axis.set(xlabel=xlabel, ylabel=ylabel)
        figure.legend(frameon=False, fontsize=8, loc="outside right center")
        save(figure, rows, path)

    return draw


# Whole steps beside IFShampoo -----------------------------------------------------------------


def peers_rows(rows: list[Row]) -> list[Row]:
    """Times of the methods for matrices, where ours is among them."""
    times = [row for row in select(rows, kernel="matrix", metric="time") if row["value"]]
    times = [row for row in times if row["provider"] not in DIAGONAL_FLOPS]
    return times if select(times, provider=OURS) else []


def peers(rows: list[Row], path: Path) -> None:
    """How many times as long as IFShampoo's the step of each peer takes, a line a set of shapes."""
    base = {row["case"]: row["value"] for row in select(rows, provider=OURS)}
    cases = list(base)
    figure, axis = subplots(height=0.42 * len(cases) + 1.4)
    axis.axvline(1, color=STYLES["IFShampoo"][0], lw=2, label=OURS)
    names = [name for name in unique(rows, "provider") if not name.startswith("IFShampoo")]
    for name, look in styles(names).items():
        own = [row for row in select(rows, provider=name) if row["case"] in base]
        x = [row["value"] / base[row["case"]] for row in own]
        y = [cases.index(row["case"]) for row in own]
        axis.plot(x, y, **look | {"ls": "", "ms": 8})
    logarithmic(axis, "x")
    axis.set_xlabel("time of a step that updates the factors, in units of IFShampoo's in bfloat16")
    axis.set_yticks(range(len(cases)), labels=cases)
    axis.set_ylim(len(cases) - 0.5, -0.5)
    figure.legend(frameon=False, fontsize=9, loc="outside upper center", ncols=5)
    save(figure, rows, path)


# Curves ---------------------------------------------------------------------------------------


def curve_rows(rows: list[Row]) -> list[Row]:
    """All of a comparison's; the rows of a search have no curves."""
    return rows if any("curve" in row["detail"] for row in rows) else []


PLOTS = {
    "roofline": Plot(
        "Roofline",
        "Achieved rates under what the same run measured of the machine. FLOPs of a diagonal "
        "update are those of its plain loop, and points far below the roof are many small tensors. "
        "A CPU copy also fetches the lines that it overwrites, which is not counted, so that an "
        "in-place add passes it.",
        roofline_rows,
        roofline,
        "`bench diag`",
    ),
    "speedup": Plot(
        "Speed-up against n",
        "Products and kernels on matrices of n x n, in times as fast as what their rows name.",
        _with("speed", "n"),
        _against("n", "n, of matrices of n x n", "times as fast"),
        "a benchmark of products, whose rows have a `speed` and its `n`",
    ),
    "cost": Plot(
        "Step cost against model size",
        "Whole optimizer steps on the shapes of models.",
        _with("time", "parameters"),
        _against("parameters", "million parameters of the model", "ms a step", 1e-6),
        "a benchmark of steps, whose rows have a `time` and the model's `parameters`",
    ),
    "steps": Plot(
        "A step of IFShampoo beside its peers",
        "Every optimizer updates its factors in the step, from the same matrices.",
        peers_rows,
        peers,
        "`bench matrix`",
    ),
    "loss": Plot(
        "Loss against steps and time",
        "Networks that start from the same weights and see the same batches.",
        curve_rows,
        curves.plot,
        "`bench train`",
    ),
}
