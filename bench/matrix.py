"""Time steps of IFShampoo against peers, factors updated every step.

The models are matrices alone, so that sirfshampoo does the same mathematics on equal settings and
the float64 specification says how far each is from it. The others are other methods, each checked
as optimizers/peers.py says. `pip install rootfree-fused[peers]` brings those on PyPI; the table
says which of them is absent.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import Parameter

from .measuring.common import (
    Call,
    Shape,
    add_measurement_arguments,
    add_short_argument,
    device_timer,
    interleave,
    pick_device,
    random_tensors,
)
from .measuring.rows import Rows, wrong_of_ours
from .optimizers import PEERS
from .optimizers.peers import Peer, in_blocks, judge
from .report import tables

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


# An eighth of an MLP weight of Llama-8B, in blocks of an eighth.
IN_BLOCKS = {"512 x 1792 in blocks of 256": ([(512, 1792)], in_blocks(256))}


SHORT = ("300 x 130", "513 x 257")


def step_flops(shapes: list[Shape]) -> float:
    """FLOPs of an update step, symmetric products at half price: 18 n^3 a square."""
    return sum(5 * m * n * (m + n) + 4 * (m**3 + n**3) for m, n in shapes)


def owned(values: list[Tensor], grads: list[Tensor]) -> list[Parameter]:
    """Parameters that nobody else steps, with gradients that nobody else overwrites."""
    params = [Parameter(value.clone()) for value in values]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad.clone()
    return params


def checked_step(
    rows: Rows,
    case: str,
    name: str,
    peer: Peer,
    values: list[Tensor],
    grads: list[Tensor],
    judged: int | None = None,
) -> Call | None:
    """The step of a fresh optimizer, or None where it is absent or wrong on the first `judged`."""
    if why := peer.why_absent():
        rows.add(case, name, "absent", None, "", why=why)
        return None
    params = owned(values, grads)
    optimizer = peer.build(params, 1)
    for _ in range(peer.steps):
        optimizer.step()
    verdict = judge(peer, values[:judged], grads[:judged], params[:judged], interval=1)
    rows.add(case, name, "error", verdict.value, verdict.unit, right=verdict.right)
    return optimizer.step if verdict.right else None


def measure(
    case: str,
    shapes: list[Shape],
    rows: Rows,
    device: torch.device,
    seconds: float,
    peers: Mapping[str, Peer],
) -> None:
    """Check and time these optimizers on one case."""
    values = random_tensors(shapes, scale=0.05, dtype=torch.float32, device=device, seed=0)
    grads = random_tensors(shapes, scale=0.1, dtype=torch.float32, device=device, seed=1)
    steps = {n: checked_step(rows, case, n, peer, values, grads) for n, peer in peers.items()}
    runs = {name: step for name, step in steps.items() if step}
    for name, timing in interleave(runs, device_timer(device), seconds=seconds).items():
        rows.add_time(case, name, "time", timing)
        if name.startswith(COUNTED) and case in CASES:
            rate = step_flops(shapes) / timing.median / 1e9
            rows.add(case, name, "rate", rate, "GFLOP/s", flops=step_flops(shapes))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `python -m bench matrix`."""
    add_measurement_arguments(parser)
    add_short_argument(parser, SHORT)
    parser.add_argument(
        "--seconds",
        type=float,
        default=8.0,
        help=f"timing budget of each of the {len(CASES)} cases",
    )
    parser.add_argument(
        "--optimizers",
        nargs="+",
        choices=PEERS,
        default=list(PEERS),
        metavar="NAME",
        help="some of them, as the table names them (default: all)",
    )


def run(args: argparse.Namespace) -> int:
    """Measure every case; 1 if a step of ours was WRONG."""
    device = pick_device(args.device)
    rows = Rows(args.out / "matrix.jsonl", "matrix", device, arguments=args)
    seconds = 0.1 if args.quick else args.seconds
    peers = {name: PEERS[name] for name in args.optimizers}
    cases = {case: (shapes, peers) for case, shapes in CASES.items()} | IN_BLOCKS
    chosen = list(CASES)[3:4] if args.quick else SHORT if args.short else cases
    for case in rows.remaining(chosen):
        measure(case, cases[case][0], rows, device, seconds, cases[case][1])
    return int(bool(wrong_of_ours(rows.finish(tables.matrix))))
