"""Time steps of IFShampoo against peers, factors updated every step.

The models are matrices alone, so that sirfshampoo does the same mathematics on equal settings and
the float64 specification says how far each is from it. The others are other methods, each checked
as optimizers/peers.py says. `pip install rootfree-fused[peers]` brings those on PyPI; the table
says which of them is absent.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from .common import (
    Shape,
    add_measurement_arguments,
    device_timer,
    interleave,
    pick_device,
    random_tensors,
)
from .optimizers.peers import BASE, CHECK_STEPS, PEERS, ROUNDINGS, judge
from .rows import Row, Rows, markdown, number, provenance, read_rows, select, timed, unique

# The optimizers whose products are counted.
COUNTED = ("IFShampoo", "sirfshampoo")


def transformer(width: int, layers: int) -> list[Shape]:
    """The matrices of transformer layers: query-key-value, projection, and an MLP of 4 widths."""
    layer = [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)]
    return layer * layers


CASES: dict[str, list[Shape]] = {
    "4 layers of width 256": transformer(256, 4),
    "1 layer of width 512": transformer(512, 1),
    "12 of 384 x 384": [(384, 384)] * 12,
    "300 x 130": [(300, 130)],
    "65 x 777": [(65, 777)],
    "513 x 257": [(513, 257)],
    "200 of 64 x 64": [(64, 64)] * 200,
}


def step_flops(shapes: list[Shape]) -> float:
    """FLOPs of an update step, symmetric products at half price: 18 n^3 a square."""
    return sum(5 * m * n * (m + n) + 4 * (m**3 + n**3) for m, n in shapes)


def owned(values: list[Tensor], grads: list[Tensor]) -> list[Parameter]:
    """Parameters that nobody else steps, with gradients that nobody else overwrites."""
    params = [Parameter(value.clone()) for value in values]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad.clone()
    return params


def measure(
    case: str, shapes: list[Shape], rows: Rows, device: torch.device, seconds: float
) -> None:
    """Check and time every optimizer on one case."""
    values = random_tensors(shapes, scale=0.05, dtype=torch.float32, device=device, seed=0)
    grads = random_tensors(shapes, scale=0.1, dtype=torch.float32, device=device, seed=1)
    steps = {}
    for name, peer in PEERS.items():
        if why := peer.why_absent():
            rows.add(case, name, "absent", None, "", why=why)
            continue
        params = owned(values, grads)
        optimizer = peer.build(params, 1)
        for _ in range(peer.steps):
            optimizer.step()
        verdict = judge(peer, values, grads, params, interval=1)
        rows.add(case, name, "error", verdict.value, verdict.unit, right=verdict.right)
        if verdict.right:
            steps[name] = optimizer.step
    for name, timing in interleave(steps, device_timer(device), seconds=seconds).items():
        rows.add_time(case, name, "time", timing)
        if name.startswith(COUNTED):
            rate = step_flops(shapes) / timing.median / 1e9
            rows.add(case, name, "rate", rate, "GFLOP/s", flops=step_flops(shapes))


def table(rows: list[Row]) -> str:
    """Markdown, a table a case."""
    limits = ", ".join(
        f"{limit:.2g} in {str(dtype).split('.')[1]}" for dtype, limit in ROUNDINGS.items()
    )
    notes = (
        "Rates count 18 n^3 FLOPs for a square, symmetric products at half price, for IFShampoo "
        "and sirfshampoo alike. SOAP, Shampoo and ScalableShampoo are those of pytorch-optimizer; "
        "HeavyBall runs compiled on a GPU alone. The error of IFShampoo and sirfshampoo is that "
        f"of {CHECK_STEPS} steps against float64, relative to the way that they went; above "
        f"{limits} it is WRONG. Other methods are held to themselves in float64 in the same way, "
        "and where rounding or chance decides (cos), to a descent."
    )
    parts = ["# IF-Shampoo: optimizer.step(), factors updated every step", provenance(rows), notes]
    header = ("provider", "ms a step (20 to 80 %)", "GFLOP/s", "x sirfshampoo, bfloat16", "error")
    for case in unique(rows, "case"):
        of_case = select(rows, case=case)
        base = select(of_case, provider=BASE, metric="time")
        lines = [_line(select(of_case, provider=p), base) for p in unique(of_case, "provider")]
        parts += [f"## {case}", markdown(header, lines)]
    return "\n\n".join(parts) + "\n"


def _line(rows: list[Row], base: list[Row]) -> list[str]:
    name, of = rows[0]["provider"], {row["metric"]: row for row in rows}
    if "absent" in of:
        return [name, "absent", "", "", ""]
    error = error_cell(of["error"]) if "error" in of else ""
    if "time" not in of:
        return [name, "**WRONG**", "", "", f"**{error}**"]
    faster = f"{base[0]['value'] / of['time']['value']:.3g}" if base else ""
    rate = number(of["rate"]["value"], ".0f") if "rate" in of else ""
    return [name, timed(of["time"]), rate, faster, error]


def error_cell(row: Row) -> str:
    """What a result was checked by, as text."""
    shown = number(row["value"], ".2g")
    return f"cos {shown}" if row["unit"].startswith("cosine") else shown


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `python -m bench matrix`."""
    add_measurement_arguments(parser)
    parser.add_argument(
        "--seconds",
        type=float,
        default=8.0,
        help=f"timing budget of each of the {len(CASES)} cases",
    )


def run(args: argparse.Namespace) -> int:
    """Measure every case; 1 if a step of ours was WRONG."""
    device = pick_device(args.device)
    rows = Rows(args.out / "matrix.jsonl", "matrix", device, arguments=args)
    seconds = 0.1 if args.quick else args.seconds
    cases: dict[str, Any] = dict(list(CASES.items())[3:4]) if args.quick else CASES
    for case in rows.remaining(cases):
        measure(case, cases[case], rows, device, seconds)
    rows.finish()
    written = read_rows(rows.path)
    report = args.out / "matrix.md"
    report.write_text(table(written))
    print(report.read_text())
    print(f"rows   {rows.path}\ntables {report}")
    wrong = [row for row in written if row["metric"] == "error" and not row["detail"]["right"]]
    return int(any(row["provider"].startswith("IFShampoo") for row in wrong))
