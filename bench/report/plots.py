"""Plots of the rows of one run: what they show, which rows they need, and how they are drawn.

A row takes part by what it has, whatever benchmark it is from:

    roofline    a rate with `flops` and `bytes` in its detail, or a bandwidth of a diagonal update;
                lines: the bandwidth of a copy and of an in-place add, the rate of `mm`
    steps       times of `bench matrix`, beside IFShampoo's in bfloat16
    loss        losses of `bench train` with their `curve`
    basin       losses of `bench sweep` at several learning rates
    worlds      work and state a rank that `bench distributed` computed
    memory      losses of `bench sweep` with weights and state in fewer bytes
    generalization   accuracies of the final runs of `bench search`
"""

from __future__ import annotations

import math
import statistics
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from ..measuring.common import COPY, PROBE_BYTES
from ..measuring.rows import Row, select, unique
from . import choice, generalization, searches
from .figures import GREY, STYLES, logarithmic, save, styles, subplots
from .losses import basin, basin_rows
from .tables import STATE, WORK
from .training import TITLES, curves, goals

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


# Roofline -------------------------------------------------------------------------------------


def roofline_rows(rows: list[Row]) -> list[Row]:
    """Points and roofs; none without a measured copy."""
    points = [row for row in rows if intensity(row) is not None]
    if not points or not select(rows, provider=COPY):
        return []
    # What moves a tenth of the most, or more, is in no cache; another process slows some of it.
    copies = select(rows, provider=COPY, metric="time")
    longest = max((row["value"] or 0.0 for row in copies), default=0.0)
    cached = {row["case"] for row in copies if (row["value"] or 0.0) < longest / 10}
    roofs = [row for row in rows if _is_roof(row) and row["case"] not in cached]
    best = {row["provider"]: row for row in sorted(roofs, key=_height)}
    return [*best.values(), *points]


def _height(roof: Row) -> float:
    """A bandwidth, or a rate in GFLOP/s."""
    return roof["value"] if roof["metric"] == "bandwidth" else achieved(roof)


def _is_roof(row: Row) -> bool:
    """A bandwidth of a probe, or the rate of a large product ("mm", or "mm, bfloat16")."""
    name, metric = row["provider"], row["metric"]
    roof = metric == "bandwidth" and name in PROBE_BYTES
    roof |= metric == "rate" and name.partition(",")[0] == MM
    return roof and row["value"] is not None


def intensity(row: Row) -> float | None:
    """FLOPs a byte; None where the row does not say."""
    name, metric, detail = row["provider"], row["metric"], row["detail"]
    if row["value"] is None or _is_roof(row):
        return None
    if metric.endswith("rate") and {"flops", "bytes"} <= detail.keys():
        return detail["flops"] / detail["bytes"]
    if metric == "bandwidth" and name in DIAGONAL_FLOPS:
        return DIAGONAL_FLOPS[name] / detail["bytes_per_parameter"]
    return None


def achieved(row: Row) -> float:
    """GFLOP/s of a row that has an intensity."""
    if row["metric"].endswith("rate"):
        return row["value"] * GIGA[row["unit"]]
    return row["value"] * intensity(row)


def roofline(rows: list[Row], path: Path) -> None:
    """Achieved GFLOP/s against FLOPs a byte, under what the same run measured of the machine."""
    figure, axis = subplots(height=4.4)
    points = [row for row in rows if intensity(row) is not None]
    clusters = clusters_of([row for row in points if row["provider"].startswith("RootFree")])
    room = 6 if clusters else 1.6  # for their names
    left, right = min(map(intensity, points)) / 1.6, max(map(intensity, points)) * room
    products = [row for row in rows if _is_roof(row) and row["metric"] == "rate"]
    top = max(map(achieved, products), default=math.inf)
    for name, dash in zip(PROBE_BYTES, ("--", "-"), strict=True):
        found = select(rows, provider=name, metric="bandwidth")
        if found:
            bandwidth = found[0]["value"]
            ends = [left, min(right, top / bandwidth)]
            label = f"{name}, {bandwidth:.0f} GB/s"
            axis.plot(ends, [bandwidth * x for x in ends], color=GREY, ls=dash, label=label)
    for row in products:
        label = f"{row['provider']}, {achieved(row):,.0f} GFLOP/s"
        axis.axhline(achieved(row), color=GREY, ls=":")
        axis.annotate(label, (left, achieved(row)), (4, 3), textcoords="offset points", fontsize=8)
    for name, look in styles(unique(points, "provider")).items():
        own = select(points, provider=name)
        axis.plot(list(map(intensity, own)), list(map(achieved, own)), **look | {"ls": ""})
    for height, names in clusters:
        text = textwrap.fill("; ".join(names), 40)
        axis.text(right / 1.05, height, text, fontsize=6.5, ha="right", va="center")
    logarithmic(axis, "x", "y")
    axis.set(xlim=(left, right), xlabel="arithmetic intensity, FLOP a byte", ylabel="GFLOP/s")
    figure.legend(frameon=False, fontsize=8, loc="outside right center")
    what = "Diagonal updates" if clusters else "Products of IFShampoo"
    save(figure, rows, path, f"{what}; lines: what the same run reached with one operator")


def clusters_of(rows: list[Row]) -> list[tuple[float, list[str]]]:
    """Cases that are within 60 % of the next: their middle in GFLOP/s, and their names."""
    heights = {
        case: statistics.median(map(achieved, select(rows, case=case)))
        for case in unique(rows, "case")
    }
    clusters: list[list[str]] = []
    for case in sorted(heights, key=heights.__getitem__):
        if clusters and heights[case] < 1.6 * heights[clusters[-1][-1]]:
            clusters[-1].append(case)
        else:
            clusters.append([case])
    middles = [math.sqrt(heights[cases[0]] * heights[cases[-1]]) for cases in clusters]
    return [
        (middle, [case.removesuffix(", float32") for case in cases])
        for middle, cases in zip(middles, clusters, strict=True)
    ]


# Whole steps beside IFShampoo -----------------------------------------------------------------


def steps_rows(rows: list[Row]) -> list[Row]:
    """Times of the methods for matrices, where ours is among them."""
    times = [row for row in select(rows, benchmark="matrix", metric="time") if row["value"]]
    times = [row for row in times if row["provider"] not in DIAGONAL_FLOPS]
    return times if select(times, provider=OURS) else []


def steps(rows: list[Row], path: Path) -> None:
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
    axis.set_xlabel("times as long as a step of IFShampoo in bfloat16")
    axis.set_yticks(range(len(cases)), labels=cases)
    axis.set_ylim(len(cases) - 0.5, -0.5)
    for words, side in (("IFShampoo is faster \u2192", "left"), ("\u2190 slower", "right")):
        corner, shift = (1, 1), (4 if side == "left" else -4, 3)
        axis.annotate(
            words, corner, shift, ("data", "axes fraction"), "offset points", ha=side, fontsize=8
        )
    figure.legend(frameon=False, fontsize=8, loc="outside right center")
    save(
        figure, rows, path, "Time of a step that updates its factors, beside IFShampoo in bfloat16"
    )


# Curves ---------------------------------------------------------------------------------------

# The two panels of a plot: metric, what it is drawn against, and the label of either axis.
ON_IMAGES = "squared error of an image"
_TEXT = (
    ("test loss", "steps", "step", "test loss, nat a character"),
    ("test loss", "seconds", "seconds of training", "test loss, nat a character"),
)
PANELS = {
    "autoencoder": (
        ("loss on all images", "steps", "step", ON_IMAGES),
        ("loss on all images", "seconds", "seconds of training", ON_IMAGES),
    ),
    "digits": (
        ("training loss", "steps", "step", "training loss, nat"),
        ("test accuracy", "steps", "step", "test error, %"),
    ),
    **dict.fromkeys(("text", "long text", "wide text", "large text"), _TEXT),
}
LEAST_ERROR = 0.1  # %, because a logarithmic axis has no 0; one of the digits' test images is 0.19


def loss_rows(rows: list[Row]) -> list[Row]:
    """All of a comparison's; a search has no curves of that name."""
    has_curves = any("curve" in row["detail"] and row["case"] in PANELS for row in rows)
    return rows if has_curves else []


def loss(rows: list[Row], path: Path) -> None:
    """Two panels: mean over the seeds, band from lowest to highest."""
    case = rows[0]["case"]
    figure, axes = subplots(2, height=4.2)
    for axis, (metric, along, *labels) in zip(axes, PANELS[case], strict=True):
        for name, look in styles(unique(select(rows, metric=metric), "provider")).items():
            own = select(rows, provider=name, metric=metric)
            y = curves(own, "curve")
            if metric == "test accuracy":
                y = (100 * (1 - y)).clamp_min(LEAST_ERROR)
            x = curves(own, along).median(0).values
            axis.plot(x, y.mean(0), **look | {"marker": None}, lw=1.8)
            axis.fill_between(x, y.amin(0), y.amax(0), color=look["color"], alpha=0.15, lw=0)
        axis.set(xlabel=labels[0], ylabel=labels[1])
        if case == "digits":
            axis.set_yscale("log")
    if case == "digits":
        ticks = [0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100]
        axes[1].set_yticks(ticks, labels=map(str, ticks), minor=False)
        axes[1].set_yticks([], minor=True)
    axes[0].legend(frameon=False)
    seeds = len({row["detail"]["seed"] for row in goals(rows)})
    save(figure, rows, path, f"{TITLES[case]}: mean and range of {seeds} seeds")


# Matrices that ranks share --------------------------------------------------------------------


def worlds_rows(rows: list[Row]) -> list[Row]:
    """Work and state of every world."""
    own = select(rows, benchmark="distributed")
    return [*select(own, metric=WORK), *select(own, metric=STATE)]


def worlds(rows: list[Row], path: Path) -> None:
    """How evenly work is shared, and the state that a rank holds at most, against the ranks."""
    figure, (even, state) = subplots(2, height=4.4)
    lines = list(dict.fromkeys((row["case"], row["provider"]) for row in rows))
    looks = styles([f"{case}, {name}" for case, name in lines])
    for (case, name), look in zip(lines, looks.values(), strict=True):
        of_line = select(rows, case=case, provider=name)
        for axis, metric in ((even, WORK), (state, STATE)):
            own = select(of_line, metric=metric)
            y = [row["value"] for row in own]
            if metric == WORK:
                y = [100 * row["detail"]["mean"] / row["value"] for row in own]
            axis.plot([row["detail"]["ranks"] for row in own], y, **look)
    ranks = sorted({row["detail"]["ranks"] for row in rows})
    for axis in (even, state):
        axis.set_xscale("log", base=2)
        axis.set_xticks(ranks, labels=map(str, ranks), minor=False)
        axis.set_xlabel("ranks")
    even.set(ylim=(0, 105), ylabel="mean work of a rank / most, %")
    even.legend(frameon=False, fontsize=8, loc="lower left")
    logarithmic(state, "y")
    state.set_ylabel("state of the rank that has most, GB")
    save(figure, rows, path, "Matrices that ranks share, computed from the shapes of models")


PLOTS = {
    "roofline": Plot(
        "Rates beside what the machine reached",
        "Achieved rates, and as lines what the same run measured of the machine: no hard limits, a "
        "point may lie a little above. FLOPs of a diagonal update are those of its plain loop, and "
        "points far below the lines are many small tensors. A CPU copy also fetches the lines that "
        "it overwrites, which is not counted, so that an in-place add passes it.",
        roofline_rows,
        roofline,
    ),
    "steps": Plot(
        "A step of IFShampoo beside its peers",
        "Every optimizer updates its factors in the step, from the same matrices.",
        steps_rows,
        steps,
    ),
    "loss": Plot(
        "Loss against steps and time",
        "Networks that start from the same weights and see the same batches.",
        loss_rows,
        loss,
    ),
    "basin": Plot(
        "Loss against the learning rate",
        "Two decades of lr for every optimizer, all else at its defaults (Muon's second lr keeps "
        "its ratio to the first), on the tuning data.",
        basin_rows,
        basin,
    ),
    "memory": Plot(
        "Loss against memory",
        "Weights in float32 and in bfloat16, averages in float32, bfloat16 and 8 bits, without a "
        "search; the factors of this small network weigh more than those of a large one.",
        choice.memory_rows,
        choice.memory,
    ),
    "worlds": Plot(
        "Matrices that ranks share",
        "Each matrix has its factors on one rank, chosen by work and memory; of experts each rank "
        "has whole ones. Computed from shapes.",
        worlds_rows,
        worlds,
    ),
    "generalization": Plot(
        "Accuracy on training and on test data",
        "Each optimizer at the best settings of its search, trained with three other seeds.",
        generalization.rows_of,
        generalization.plot,
    ),
    "search": Plot(
        "What a trial of a search is worth",
        "The expected lowest validation loss of n trials, exact over all orders of them; each "
        "method draws from a space of its own.",
        searches.rows_of,
        searches.plot,
    ),
}
