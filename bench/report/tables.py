"""The tables of steps and products, a function a benchmark, from rows alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from ..measuring.common import dtype_name
from ..measuring.rows import Row, select, unique
from ..optimizers.diagonal import ALLOWED_ERROR
from ..optimizers.peers import BASE, CHECK_STEPS, ROUNDINGS
from ..workloads.formulas import KERNELS
from .cells import by_metric, lines_of, markdown, number, page, provenance, timed


def error_cell(row: Row) -> str:
    """What a result was checked by, as text."""
    shown = number(row["value"], ".2g")
    return f"cos {shown}" if row["unit"].startswith("cosine") else shown


# bench diag -----------------------------------------------------------------------------------


def diag(rows: list[Row]) -> str:
    """A table a case."""
    header = (
        "provider",
        "ms a step (20 to 80 %)",
        "bytes a parameter",
        "GB/s",
        "of copy",
        "host ms",
        "error / eager error",
    )
    notes = (
        "GB/s counts what an update must move: parameter and state read and written, gradient "
        "read. Copy and in-place add have the footprint of float32 parameter, gradient and two "
        "states; a CPU copy also fetches the lines that it overwrites, which is not counted. "
        "Host time: until step() returns, on the CPU with as many empty tensors. The error against "
        f"float64 is in units of the plain loop's; above {ALLOWED_ERROR:g} it is WRONG."
    )
    parts = ["# Diagonal update: optimizer.step()", provenance(rows), notes]
    for case in unique(rows, "case"):
        lines = lines_of(select(rows, case=case), _diag_line)
        parts += [f"## {case}", markdown(header, lines)]
    return page(*parts)


def _diag_line(rows: list[Row]) -> list[str]:
    name, of = rows[0]["provider"], by_metric(rows)
    if "absent" in of:
        return [name, f"absent: {of['absent']['detail']['why']}", "", "", "", "", ""]
    error = "" if "error" not in of else number(of["error"]["value"], ".2f")
    if "error" in of and not of["error"]["detail"]["right"]:
        return [name, "**WRONG**", "", "", "", "", f"**{error}**"]
    bandwidth = of["bandwidth"]
    return [
        name,
        timed(of["time"]),
        number(bandwidth["detail"]["bytes_per_parameter"], ".3g"),
        number(bandwidth["value"], ".1f"),
        number(of["bandwidth fraction"]["value"], ".0%"),
        timed(of["host time"], ".3f", band=False) if "host time" in of else "",
        error,
    ]


# bench matrix ---------------------------------------------------------------------------------


def matrix(rows: list[Row]) -> str:
    """A table a case."""
    limits = ", ".join(f"{limit:.2g} in {dtype_name(dtype)}" for dtype, limit in ROUNDINGS.items())
    notes = (
        "Rates count 18 n^3 FLOPs for a square, symmetric products at half price, for IFShampoo "
        "and sirfshampoo alike. SOAP, Shampoo and ScalableShampoo are those of pytorch-optimizer; "
        "HeavyBall runs compiled on a GPU alone. The error of IFShampoo and sirfshampoo is that "
        f"of {CHECK_STEPS} steps against float64, relative to their displacement; above "
        f"{limits} it is WRONG. Other methods are held to themselves in float64 in the same way, "
        "and where rounding or chance decides (cos), to a descent."
    )
    parts = ["# IF-Shampoo: optimizer.step(), factors updated every step", provenance(rows), notes]
    header = ("provider", "ms a step (20 to 80 %)", "GFLOP/s", "x sirfshampoo, bfloat16", "error")
    for case in unique(rows, "case"):
        own = select(rows, case=case)
        base = select(own, provider=BASE, metric="time")
        lines = lines_of(own, lambda of, base=base: _matrix_line(of, base))
        parts += [f"## {case}", markdown(header, lines)]
    return page(*parts)


def _matrix_line(rows: list[Row], base: list[Row]) -> list[str]:
    name, of = rows[0]["provider"], by_metric(rows)
    if "absent" in of:
        return [name, "absent", "", "", ""]
    error = error_cell(of["error"]) if "error" in of else ""
    if "time" not in of:
        return [name, "**WRONG**", "", "", f"**{error}**"]
    faster = f"{base[0]['value'] / of['time']['value']:.3g}" if base else ""
    rate = number(of["rate"]["value"], ".0f") if "rate" in of else ""
    return [name, timed(of["time"]), rate, faster, error]


# bench products -------------------------------------------------------------------------------

EIGH, LIMITS, RATIO = "torch.linalg.eigh, float32", "one large product", "eigh / product"
AUTHORS = 16  # bfloat16 products a float32 eigendecomposition, arXiv 2402.03496


def products(rows: list[Row]) -> str:
    """The limits, a table a stack, and eigendecompositions beside products."""
    notes = (
        "Each cell is ms, and the share of the rate of one large product in the same dtype and "
        "run; a symmetric product (gram, factor momentum) counts at half price for everybody. The "
        "kernels are those of workloads/formulas.py, of one factor; a step has both. IFShampoo's "
        "gram is half the time of both and apply less that of apply; momentum and update of the "
        "factors run inside its step, where a GPU's profiler sees them. The error is the largest "
        "of a row's kernels against float64; what is WRONG has no time."
    )
    parts = ["# Products of IF-Shampoo", provenance(rows), notes]
    limits = [row for row in select(rows, case=LIMITS) if row["value"]]
    parts.append(", ".join(f"{r['provider']}: {r['value']:.3g} {r['unit']}" for r in limits))
    absent = select(rows, metric="absent")
    parts += [f"{r['provider']} is absent ({r['case']}): {r['detail']['why']}" for r in absent]
    for case in unique(rows, "case"):
        own = [row for row in rows if row["case"] == case and row["provider"] != EIGH]
        if case != LIMITS and len(own) > len(select(own, metric="absent")):
            lines = lines_of(own, _products_line)
            parts += [f"## {case}", markdown(("provider", *KERNELS, "error"), lines)]
    decomposed = select(rows, provider=EIGH, metric="eigh error")
    if decomposed:
        header = ("matrices", "ms, eigh", f"bfloat16 products ({AUTHORS} by the authors)", "error")
        lines = [_ratio(select(rows, provider=EIGH, case=row["case"])) for row in decomposed]
        parts += ["## An eigendecomposition in float32", markdown(header, lines)]
    return page(*parts)


def _products_line(rows: list[Row]) -> list[str]:
    of = by_metric(rows)
    errors = [_size(row) for row in rows if row["metric"].endswith(" error")]
    worst = max(errors, default=None)
    shown = "" if worst is None else "not finite" if worst == math.inf else f"{worst:.2g}"
    return [rows[0]["provider"], *(_products_cell(of, kernel) for kernel in KERNELS), shown]


def _size(row: Row) -> float:
    return math.inf if row["value"] is None else row["value"]


def _products_cell(of: dict[str, Row], kernel: str) -> str:
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
    of = by_metric(rows)
    error = of["eigh error"]
    if not error["detail"]["right"]:
        return [error["case"], "**WRONG**", "", f"**{number(error['value'], '.2g')}**"]
    ratio = number(of[RATIO]["value"], ".3g") if RATIO in of else ""
    ms = timed(of["eigh time"], band=False)
    return [error["case"], ms, ratio, number(error["value"], ".2g")]


# bench step -----------------------------------------------------------------------------------

INTERVALS = (1, 2, 10)
FORWARD = "forward-backward"
STEP_HEADER = (
    "provider",
    "ms, update step (20 to 80 %)",
    "ms, step between",
    *(f"of forward-backward at interval {k}" for k in INTERVALS),
    "bytes of state a parameter",
    "error",
)


def step(rows: list[Row]) -> str:
    """A table a network, then one of growth."""
    notes = (
        "Optimizers of matrices take the matrices, and torch's fused AdamW the vectors, embeddings "
        "and heads beside them, in the same time. An update step renews the preconditioner; the "
        "mean at an interval of k is one of them and k - 1 steps between. IFShampoo has diagonal "
        "factors on axes above 2048. forward-backward is a stand-in: the products with the "
        "weights, 6 FLOP a parameter and position, in bfloat16 where the device multiplies it "
        "natively, without attention scores, norms and activations. The error is that of the first "
        "steps on one tensor of every shape against float64, as optimizers/peers.py says; what is "
        "WRONG has no time. State is all that an optimizer holds between steps, caches too."
    )
    parts = ["# Whole steps: optimizer.step()", provenance(rows), notes]
    growing = [row for row in rows if row["case"].startswith("against ")]
    networks = [row for row in rows if not row["case"].startswith("against ")]
    for case in unique(networks, "case"):
        lines = lines_of(select(networks, case=case), _step_line)
        parts += [f"## {case}", markdown(STEP_HEADER, lines)]
    for case in unique(select(growing, metric="growth"), "case"):
        parts += [f"## Growth {case}", _growth(select(growing, case=case))]
    wrong = [row for row in growing if row["detail"].get("right") is False]
    parts += [f"**WRONG**: {row['provider']} {row['case']}" for row in wrong]
    return page(*parts)


def _step_line(rows: list[Row]) -> list[str]:
    name, of = rows[0]["provider"], by_metric(rows)
    empty = [""] * (len(STEP_HEADER) - 3)
    if "absent" in of:
        return [name, f"absent: {of['absent']['detail']['why']}", *empty, ""]
    if name == FORWARD:
        return [name, timed(of["time"]), *empty, ""]
    errors = [row for row in rows if row["metric"].startswith("error")]
    error = max(errors, key=lambda row: (not row["detail"]["right"], _size(row)))
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


def _growth(rows: list[Row]) -> str:
    times = [row for row in rows if "size" in row["detail"]]
    sizes = list(dict.fromkeys(row["detail"]["size"] for row in times))

    def line(own: list[Row]) -> list[str]:
        name = own[0]["provider"]
        found = select(rows, provider=name, metric="growth")
        cells = {row["detail"]["size"]: timed(row, band=False) for row in own}
        slope = number(found[0]["value"], ".2f") if found else ""
        return [name, *(cells.get(size, "") for size in sizes), slope]

    header = ("provider", *(f"ms at {size}" for size in sizes), "exponent")
    return markdown(header, lines_of(times, line))


# bench host -----------------------------------------------------------------------------------

# Microseconds a step, by the number of tensors.
HOST_GOALS = {300: 100.0, 2000: 500.0}
KNOWN, MOVED = "known tensors", "gradients moved"
# The same as KNOWN, step after step: nothing else has used the caches in between.
LOOP = "in a loop"
FIRST = "first step"


def host(rows: list[Row]) -> str:
    """Microseconds a step, and the goal."""
    lines = []
    for case in unique(rows, "case"):
        for name in unique(rows, "provider"):
            of = by_metric(select(rows, case=case, provider=name))
            cells = [
                timed(of[metric], ".0f", scale=1e3) if metric in of else ""
                for metric in (LOOP, KNOWN, MOVED, FIRST)
            ]
            goal = HOST_GOALS[int(case.removesuffix(" tensors"))]
            lines.append([case, name, *cells, f"{goal:.0f}"])
    header = ("tensors", "optimizer", LOOP, f"in turn, {KNOWN}", f"in turn, {MOVED}", FIRST, "goal")
    notes = (
        "Microseconds of host time of step() up to the call of the driver, which is stubbed out: "
        "kernels compiled for sm_90, tensors on the CPU. Median (20 to 80 %). In a loop: nothing "
        "but this optimizer's steps. In turn: the optimizers and cases one after the other, so "
        "that caches are cold. Where gradients moved, one of them has another address than in the "
        "step before, and the table of addresses is found again in a cache. The first step "
        "allocates state and builds plans and tables, with kernels that are compiled. Half of the "
        "Shampoos' tensors are matrices of 8 x 8. DTensors are of one rank."
    )
    return page("# Host time of a step", provenance(rows), notes, markdown(header, lines))


# bench distributed ----------------------------------------------------------------------------

WORK, STATE, SENT = "work", "state", "sent"
SLOWEST, SPEEDUP = "slowest rank", "speed-up"
WORLDS = (
    "model",
    "optimizer",
    "ranks",
    "TFLOP an update, most",
    "most / mean",
    "GB sent a rank and step, most",
    "with bfloat16 updates",
    "GB of state a rank, most",
    "most / mean",
    "messages a pair and step",
    "waves",
)


def distributed(rows: list[Row]) -> str:
    """A table of all worlds that were computed, then one of those that were timed."""
    about = (
        "From shapes alone, at the defaults with bfloat16 factors: the matrices of layers, without "
        "embedding and head, cut by rows, float32. One rank owns the factors of a matrix; it is "
        "sent the gradient and sends the update. Of experts each rank has, and steps, whole ones, "
        "as stacks that are cut between members, and sends nothing. Bytes count headers and "
        "padding, and a pair's messages those of one direction."
    )
    timed_about = (
        "Every rank by itself: a plain optimizer of the matrices that it would own, CPU time of "
        "one thread (20 to 80 %), factors updated every step, all ranks of all worlds in turn. The "
        "speed-up is that of the slowest rank over one rank with all; the predicted one is all "
        "FLOPs over those of the rank that has most. Efficiency is speed-up over ranks. All ranks "
        "together: the sum of their times over that of one rank with all. No messages are in it."
    )
    parts = ["# Matrices that ranks share", provenance(rows), about]
    measured = [row for row in rows if row["metric"] in (SLOWEST, SPEEDUP)]
    computed = [row for row in rows if row["metric"] in (WORK, STATE, SENT)]
    parts += [markdown(WORLDS, _each_world(computed, _world_line))]
    if measured:
        header = ("of", "optimizer", "ranks", "ms, slowest rank", "speed-up", "predicted")
        header += ("efficiency", "predicted", "measured / predicted", "all ranks together")
        parts += ["## Timed", timed_about, markdown(header, _each_world(measured, _timed_line))]
    return page(*parts)


def _each_world(
    rows: list[Row], line: Callable[[dict[str, Row], int], list[str]]
) -> Iterator[list[str]]:
    """A line of each case, optimizer and number of ranks."""
    found: dict[tuple[str, str, int], dict[str, Row]] = {}
    for row in rows:
        key = row["case"], row["provider"], row["detail"]["ranks"]
        found.setdefault(key, {})[row["metric"]] = row
    for (case, name, ranks), of in found.items():
        yield [case, name, f"{ranks:,}", *line(of, ranks)]


def _world_line(of: dict[str, Row], ranks: int) -> list[str]:
    work, state, sent = of[WORK], of[STATE], of[SENT]
    return [
        number(work["value"], ".3g"),
        number(work["value"] / work["detail"]["mean"], ".2f"),
        number(sent["value"], ".3g"),
        number(sent["detail"]["bfloat16"], ".3g"),
        number(state["value"], ".3g"),
        number(state["value"] / state["detail"]["mean"], ".2f"),
        f"{sent['detail']['messages']}",
        f"{sent['detail']['waves']}",
    ]


def _timed_line(of: dict[str, Row], ranks: int) -> list[str]:
    speedup = of[SPEEDUP]
    value, predicted = speedup["value"], speedup["detail"]["predicted"]
    return [
        timed(of[SLOWEST]),
        number(value, ".2f"),
        number(predicted, ".2f"),
        number(value / ranks, ".1%"),
        number(predicted / ranks, ".1%"),
        number(value / predicted, ".3f"),
        number(speedup["detail"]["together"], ".3f"),
    ]
