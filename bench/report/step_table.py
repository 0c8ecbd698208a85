"""The tables of `python -m bench step`, from rows alone."""

from __future__ import annotations

from ..matrix import error_cell
from ..rows import Row, markdown, number, provenance, select, timed, unique

INTERVALS = (1, 2, 10)
FORWARD = "forward-backward"
HEADER = (
    "provider",
    "ms, update step (20 to 80 %)",
    "ms, step between",
    *(f"of forward-backward at interval {k}" for k in INTERVALS),
    "bytes of state a parameter",
    "error",
)
NOTES = (
    "Optimizers of matrices take the matrices, and torch's fused AdamW the vectors, embeddings and "
    "heads beside them, in the same time. An update step renews the preconditioner; the mean at an "
    "interval of k is one of them and k - 1 steps between. IFShampoo has diagonal factors on axes "
    "above 2048. forward-backward is a stand-in: the products with the weights, 6 FLOP a parameter "
    "and place, in bfloat16 where the device multiplies it natively, without attention scores, "
    "norms and activations. The error is that of the first steps on one tensor of every shape "
    "against float64, as optimizers/peers.py says; what is WRONG has "
    "no time. State is all that an optimizer holds between steps, caches too."
)


def table(rows: list[Row]) -> str:
    """Markdown: a table a network, then one of growth."""
    parts = ["# Whole steps: optimizer.step()", provenance(rows), NOTES]
    growing = [row for row in rows if row["case"].startswith("against ")]
    networks = [row for row in rows if not row["case"].startswith("against ")]
    for case in unique(networks, "case"):
        own = select(networks, case=case)
        parts += [f"## {case}", markdown(HEADER, _lines(own))]
    for case in unique(select(growing, metric="growth"), "case"):
        parts += [f"## Growth {case}", _growth(select(growing, case=case))]
    wrong = [row for row in growing if row["detail"].get("right") is False]
    parts += [f"**WRONG**: {row['provider']} {row['case']}" for row in wrong]
    return "\n\n".join(parts) + "\n"


def _lines(rows: list[Row]) -> list[list[str]]:
    return [_line(select(rows, provider=name)) for name in unique(rows, "provider")]


def _line(rows: list[Row]) -> list[str]:
    name, of = rows[0]["provider"], {row["metric"]: row for row in rows}
    empty = [""] * (len(HEADER) - 3)
    if "absent" in of:
        return [name, f"absent: {of['absent']['detail']['why']}", *empty, ""]
    if name == FORWARD:
        return [name, timed(of["time"]), *empty, ""]
    error = max((r for r in rows if r["metric"].startswith("error")), key=_badness)
    if not error["detail"]["right"]:
        return [name, "**WRONG**", *empty, f"**{error_cell(error)}**"]
    return [
        name,
        timed(of["update step"]),
        timed(of["step between"], band=False) if "step between" in of else "",
        *(number(of[f"share at interval {k}"]["value"], ".3g") for k in INTERVALS),
        number(of["state"]["value"], ".3g"),
        error_cell(error),
    ]


def _badness(row: Row) -> tuple[bool, float]:
    return not row["detail"]["right"], row["value"] if row["value"] is not None else float("inf")


def _growth(rows: list[Row]) -> str:
    times = [row for row in rows if "size" in row["detail"]]
    sizes = list(dict.fromkeys(row["detail"]["size"] for row in times))
    lines = []
    for name in unique(times, "provider"):
        own = select(times, provider=name)
        found = select(rows, provider=name, metric="growth")
        cells = {row["detail"]["size"]: timed(row, band=False) for row in own}
        slope = number(found[0]["value"], ".2f") if found else ""
        lines.append([name, *(cells.get(size, "") for size in sizes), slope])
    return markdown(("provider", *(f"ms at {size}" for size in sizes), "exponent"), lines)
