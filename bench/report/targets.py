"""The targets of `python -m bench gpu`, and the table of what was measured against them."""

from __future__ import annotations

from typing import NamedTuple

from ..measuring.rows import OURS, Row, select, wrong, wrong_of_ours
from .cells import markdown, number, page, provenance, timed

SHOWN_TROUBLES = 20
# How the providers that are ours are called.
GPU_OURS = (*OURS, "pack_", "unpack_", "2,000 tensors", "300 tensors", "one tensor")


class Target(NamedTuple):
    """A row and the value that it has to reach."""

    what: str
    case: str
    provider: str
    metric: str
    goal: float
    at_most: bool = False
    unit: str = ""


def _targets() -> list[Target]:
    large = [
        Target(f"{name}, {dtype}, of a copy", f"one large tensor, {dtype}", name, *rest)
        for name in ("RootFreeRMSprop, momentum 0.9", "RootFreeAdamW")
        for dtype in ("float32", "bfloat16")
        for rest in (("bandwidth fraction", 0.92),)
    ]
    fewer = [
        Target(f"{formats}, of a copy", "one large tensor in fewer bytes", provider, *rest)
        for formats in ("bfloat16 + 8, bfloat16", "bfloat16 + 8, 8bit", "bfloat16 stochastic, 8bit")
        for provider in (f"RootFreeAdamW, {formats}",)
        for rest in (("bandwidth fraction", 0.9),)
    ]
    sums = [
        Target(f"{name}, of a copy", "micro-batches of one large tensor", name, *rest)
        for name in (
            "accumulate_, float32 gradients",
            "accumulate_ with squares, float32 gradients",
            "accumulate_ with squares, bfloat16 gradients",
            "rmsprop_, momentum 0.9, on squares",
        )
        for rest in (("bandwidth fraction", 0.92),)
    ]
    goals = {"1 of 4096": 1.7, "16 of 2048": 1.5, "32 of 1024": 1.4, "64 of 512": 1.1}
    ours = "IFShampoo, bfloat16"
    return [
        *large,
        *fewer,
        *sums,
        Target("114 of 1024: a step", "114 of 1024", ours, "time", 6.0, True, "ms"),
        Target("the same, graph", "114 of 1024", f"{ours}, graph", "time", 6.0, True, "ms"),
        *(
            Target(f"RootFreeShampoo: {what}", "114 of 1024", f"{averaged}{kind}", *rest)
            for averaged in ("RootFreeShampoo, bfloat16",)
            for what, kind in (("a step", ""), ("graph", ", graph"))
            for rest in (("time", 7.2, True, "ms"),)
        ),
        Target("of the mm rate", "114 of 1024", ours, "rate fraction", 0.6),
        Target("eigh Shampoo", "114 of 1024", "Shampoo by batched eigh", "slowdown", 50.0),
        Target("sirfshampoo", "114 of 1024", "sirfshampoo, bfloat16", "slowdown", 5.0),
        *(
            Target(f"K K^T, {case}, x bmm", case, "products", "speed", goal)
            for case, goal in goals.items()
        ),
        *(
            Target(f"K m, {case}, x bmm", case, "factors", "speed", 0.95)
            for case in ("16 of 2048", "32 of 1024")
        ),
        Target("2,000 tensors, x one", "many tensors", "2,000 tensors", "time ratio", 1.05, True),
        Target("300 tensors, host", "many tensors", "300 tensors", "host time", 0.1, True, "ms"),
        Target("2,000, host", "many tensors", "2,000 tensors", "host time", 0.5, True, "ms"),
        Target(
            "300, graph, host", "many tensors", "300 tensors, graph", "host time", 0.01, True, "ms"
        ),
    ]


TARGETS = _targets()


def table(rows: list[Row]) -> str:
    """Markdown: whatever failed or was left out, then the targets with what was measured."""
    limits = select(rows, case="limits")
    tests = [row for row in select(rows, case="tests") if row["unit"] == "tests"]
    parts = ["# GPU: measured against the targets", provenance(rows)]
    if not on_gpu(rows):
        parts.append("**A rehearsal on the CPU with small sizes: none of these is a result.**")
    troubles = [*_told(rows, "why"), *_wrong(rows), *_told(rows, "test")]
    if more := len(troubles) - SHOWN_TROUBLES:
        troubles[SHOWN_TROUBLES:] = [f"- and {more} more: see the rows"] if more > 0 else []
    if troubles:
        parts.append("\n".join(troubles))
    for name, found in (("Tests", tests), ("Limits", limits)):
        numbers = [f"{row['metric']} {row['value']:.4g} {row['unit']}" for row in found]
        parts.append(f"{name}: {', '.join(numbers) or 'none'}")
    parts.append(markdown(("what", "measured", "target", ""), [_line(t, rows) for t in TARGETS]))
    return page(*parts)


def _told(rows: list[Row], key: str) -> list[str]:
    """Of parts and providers that are missing ("why"), or of tests ("test"), which may be many."""
    found = [row for row in rows if key in row["detail"]]
    return [f"- {row['case']}, {row['metric']}: {row['detail'][key]}" for row in found]


def _wrong(rows: list[Row]) -> list[str]:
    return [
        f"- {row['case']}, {row['provider']}: **WRONG**, error {number(row['value'], '.3g')} "
        f"{row['unit']}"
        for row in wrong(rows)
    ]


def _line(target: Target, rows: list[Row]) -> list[str]:
    found = select(rows, case=target.case, provider=target.provider, metric=target.metric)
    goal = f"{'<=' if target.at_most else '>='} {target.goal:g} {target.unit}".strip()
    if wrong_of_ours(select(rows, case=target.case), GPU_OURS):
        return [target.what, "**WRONG**", goal, ""]
    if not found or found[0]["value"] is None:
        return [target.what, "not measured", goal, ""]
    value = found[0]["value"]
    shown = timed(found[0], band=False) if "p20" in found[0]["detail"] else f"{value:.3g}"
    reached = value <= target.goal if target.at_most else value >= target.goal
    verdict = "reached" if reached else "missed"
    return [target.what, shown, goal, verdict if on_gpu(found) else "rehearsal"]


def on_gpu(rows: list[Row]) -> bool:
    return "sm_" in rows[0]["device"]
