"""What the plots share: styles, the line that says where the numbers come from, and the file."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from ..measuring.common import optional
from ..measuring.rows import Row
from .cells import provenance

# By the name before the comma: a colour of its own, a dash and a marker; ours have full lines, and
# what stands beside them most often is distinct to the colour-blind.
STYLES = {
    "RootFreeShampoo": ("#332288", "-", "*"),
    "IFShampoo": ("#0072b2", "-", "o"),
    "RootFreeRMSprop": ("#009e73", "-", "s"),
    "RootFreeAdamW": ("#56b4e9", "-", "D"),
    "torch AdamW": ("#d55e00", "-.", "^"),
    "torch RMSprop": ("#000000", ":", "P"),
    "torch SGD": ("#777777", ":", "v"),
    "torch Muon": ("#8c564b", ":", "X"),
    "SOAP": ("#cc79a7", "--", "<"),
    "Muon": ("#5f3a31", "--", "X"),
    "KL-Shampoo": ("#999933", "--", "v"),
    "KL-SOAP": ("#44aa99", "--", ">"),
    "HeavyBall SOAP": ("#7b3294", ":", ">"),
    "HeavyBall PSGD": ("#66a61e", ":", "p"),
    "sirfshampoo": ("#e69f00", "--", "s"),
    "Shampoo": ("#8c1a11", "-.", "v"),
    "ScalableShampoo": ("#a6a600", "-.", "^"),
    "Shampoo by batched eigh": ("#f781bf", "--", "D"),
    "torch.bmm": ("#e6550d", "--", "^"),
    "torch.compile": ("#31a354", "-.", "D"),
}
OF_TORCH = ("AdamW", "SGD")  # as a search calls them
OTHERS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#555555")
WIDTH = 9.0  # inches; at 120 dots an inch the width of a README
GREY = "#666666"


def styles(names: list[str]) -> dict[str, dict[str, Any]]:
    """Keywords of a line for each provider; of two variants of one the second is hollow."""
    found: dict[str, dict[str, Any]] = {}
    bases: list[str] = []
    taken = {STYLES[base][0] for name in names if (base := _base(name)) in STYLES}
    free = [colour for colour in OTHERS if colour not in taken] or list(OTHERS)
    for name in names:
        base = _base(name)
        fill = "none" if base in bases else "full"
        bases += [] if base in bases else [base]
        number = bases.index(base)
        other = (free[number % len(free)], "--", "oDs^v<>P"[number % 8])
        colour, dash, marker = STYLES.get(base, other)
        found[name] = {"color": colour, "ls": dash, "marker": marker, "fillstyle": fill}
        found[name]["label"] = name
    return found


def _base(name: str) -> str:
    base = name.partition(",")[0]
    return f"torch {base}" if base in OF_TORCH else base


def subplots(columns: int = 1, height: float = 3.9) -> tuple[Any, Any]:
    """A figure of README width and its axes, one beside the other."""
    optional("matplotlib").use("Agg")
    pyplot = optional("matplotlib.pyplot")
    figure, axes = pyplot.subplots(1, columns, figsize=(WIDTH, height), layout="constrained")
    for axis in figure.axes:
        axis.grid(alpha=0.3)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def logarithmic(axis: Any, *sides: str, at: tuple[int, ...] = (1, 2, 5)) -> None:
    """Make the sides, "x" and "y", logarithmic, with plain numbers at these of each decade."""
    ticker = optional("matplotlib.ticker")
    for side in sides:
        getattr(axis, f"set_{side}scale")("log")
        of_side = getattr(axis, f"{side}axis")
        of_side.set_major_locator(ticker.LogLocator(subs=at, numticks=20))
        of_side.set_major_formatter("{x:g}")
        of_side.set_minor_formatter("")


def save(figure: Any, rows: list[Row], path: Path, title: str) -> None:
    """Write a plot of `rows`, of one run, with that run's name below and their digest inside."""
    figure.suptitle(title)
    figure.supxlabel(provenance(rows), fontsize=7, color=GREY)
    figure.savefig(path, dpi=120, metadata={"Software": None, "rows": digest(rows)})
    optional("matplotlib.pyplot").close(figure)


def shows(path: Path, rows: list[Row]) -> bool:
    """Whether the plot in the file was drawn of these rows."""
    return b"rows\0" + digest(rows).encode() in path.read_bytes()


def digest(rows: list[Row]) -> str:
    """A name for the content of rows."""
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:32]
