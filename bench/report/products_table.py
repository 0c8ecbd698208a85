"""The tables of `python -m bench products`, from rows alone."""

from __future__ import annotations

from ..rows import Row, markdown, number, provenance, select, timed, unique
from ..workloads.formulas import KERNELS

EIGH, LIMITS, RATIO = "torch.linalg.eigh, float32", "one large product", "eigh / product"
AUTHORS = 16  # bfloat16 products a float32 eigendecomposition, arXiv 2402.03496
NOTES = (
    "Each cell is ms, and the share of the rate of one large product in the same dtype and run; a "
    "symmetric product (gram, factor momentum) counts at half price for everybody. The kernels are "
    "those of workloads/formulas.py, of one factor; a step has both. IFShampoo's gram is half the "
    "time of both and apply less that of apply; momentum and update of the factors run inside its step, "
    "where a GPU's profiler sees them. The error is the largest of a row's kernels against "
    "float64; what is WRONG has no time."
)


def table(rows: list[Row]) -> str:
    """Markdown: the limits, a table a stack, and eigendecompositions beside products."""
    parts = ["# Products of IF-Shampoo", provenance(rows), NOTES]
    limits = [row for row in select(rows, case=LIMITS) if row["value"]]
    parts.append(", ".join(f"{r['provider']}: {r['value']:.3g} {r['unit']}" for r in limits))
    absent = select(rows, metric="absent")
    parts += [f"{r['provider']} is absent ({r['case']}): {r['detail']['why']}" for r in absent]
    for case in unique(rows, "case"):
        own = [row for row in rows if row["case"] == case and row["provider"] != EIGH]
        if case != LIMITS and len(own) > len(select(own, metric="absent")):
            lines = [_line(select(own, provider=name)) for name in unique(own, "provider")]
            parts += [f"## {case}", markdown(("provider", *KERNELS, "error"), lines)]
    ratios = [_ratio(select(rows, provider=EIGH, case=row["case"])) for row in _decomposed(rows)]
    if ratios:
        header = ("matrices", "ms, eigh", f"bfloat16 products ({AUTHORS} by the authors)", "error")
        parts += ["## An eigendecomposition in float32", markdown(header, ratios)]
    return "\n\n".join(parts) + "\n"


def _decomposed(rows: list[Row]) -> list[Row]:
    return select(rows, provider=EIGH, metric="eigh error")


def _line(rows: list[Row]) -> list[str]:
    of = {row["metric"]: row for row in rows}
    errors = [row for row in rows if row["metric"].endswith(" error")]
    worst = max((_size(row) for row in errors), default=None)
    shown = "" if worst is None else "not finite" if worst == float("inf") else f"{worst:.2g}"
    return [rows[0]["provider"], *(_cell(of, kernel) for kernel in KERNELS), shown]


def _size(row: Row) -> float:
    return float("inf") if row["value"] is None else row["value"]


def _cell(of: dict[str, Row], kernel: str) -> str:
    error = of.get(f"{kernel} error")
    if error and not error["detail"]["right"]:
        return "**WRONG**"
    if f"{kernel} time" not in of:
        return ""
    time, share = of[f"{kernel} time"], of[f"{kernel} rate fraction"]
    # A difference of two times has no band.
    ms = timed(time, band=False) if "p20" in time["detail"] else number(time["value"], ".3g")
    return f"{ms}, {number(share['value'], '.0%')}"


def _ratio(rows: list[Row]) -> list[str]:
    of = {row["metric"]: row for row in rows}
    error = of["eigh error"]
    if not error["detail"]["right"]:
        return [error["case"], "**WRONG**", "", f"**{number(error['value'], '.2g')}**"]
    ratio = number(of[RATIO]["value"], ".3g") if RATIO in of else ""
    ms = timed(of["eigh time"], band=False)
    return [error["case"], ms, ratio, number(error["value"], ".2g")]
