"""Time whole optimizer steps on the parameters of well-known networks.

Every optimizer sees the same parameters and gradients. Those of matrices take the matrices; what
they are not meant for (vectors, lookups, axes above 10,000) goes to torch's fused AdamW beside
them, which is in their time. A step that renews the preconditioner and one between are timed
apart; the mean at an interval of k is (update + (k - 1) between) / k. On a CPU the networks are
smaller than their models, as their names say.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import AdamW, Optimizer

from rootfree_fused.optimizer.factor_state import default_dtype

from .matrix import transformer
from .measuring.common import (
    Call,
    Shape,
    add_measurement_arguments,
    available_memory,
    device_timer,
    held_bytes,
    interleave,
    pick_device,
    random_tensors,
)
from .measuring.rows import Rows, wrong_of_ours
from .optimizers import PEERS
from .optimizers.peers import EIGH, LR, MATRIX_PEERS, NEVER, Peer, judge
from .report import tables
from .report.tables import FORWARD, INTERVALS
from .train import add_choice
from .workloads.networks import FULL, QUICK, SCALED, Model, forward_backward, split

LONGEST = 10_000
LIMIT = 10.0  # seconds that a step may take
# At least so many, also where they take longer than their time; one when nobody reads it.
ROUNDS = (3, 1)
UPDATE, BETWEEN = "update step", "step between"
GROWTH = "growth"
GROWING = ("IFShampoo, bfloat16", "RootFreeRMSprop, momentum 0.9", "RootFreeAdamW")
GROWING += ("torch AdamW, fused", EIGH)


@dataclass
class Parameters:
    """The parameters that all optimizers step in turn, and what they were."""

    matrices: list[Parameter]
    others: list[Parameter]
    values: list[Tensor]

    @classmethod
    def of(cls, matrices: list[Shape], others: list[Shape], device: torch.device) -> Parameters:
        """Random values and gradients."""
        shapes = [*matrices, *others]
        float32 = {"dtype": torch.float32, "device": device}
        values = random_tensors(shapes, scale=0.05, seed=0, **float32)
        params = [Parameter(value.clone()) for value in values]
        for p, grad in zip(
            params, random_tensors(shapes, scale=0.1, seed=1, **float32), strict=True
        ):
            p.grad = grad
        return cls(params[: len(matrices)], params[len(matrices) :], values)

    def optimizers(self, name: str, peer: Peer, interval: int) -> list[Optimizer]:
        """The optimizer of all, or one of matrices with AdamW beside it."""
        if name not in MATRIX_PEERS:
            return [peer.build([*self.matrices, *self.others], interval)]
        beside = [AdamW(self.others, lr=LR, fused=True)] if self.others else []
        return [peer.build(self.matrices, interval), *beside]

    def restore(self) -> None:
        """Make all what they were."""
        with torch.no_grad():
            torch._foreach_copy_([*self.matrices, *self.others], self.values)

    def need(self, peer: Peer) -> float:
        """Bytes that it may take at both intervals: 4 float32 matrices an axis, and its states."""
        axes = [d for p in self.matrices for d in p.shape if d <= peer.dense]
        squares = sum(d * d for d in axes) if peer.renews else 0
        return 4 * (4 * sum(value.numel() for value in self.values) + 8 * squares)


def checked(
    case: str, name: str, peer: Peer, parameters: Parameters, rows: Rows
) -> dict[str, Call]:
    """The steps of an optimizer that is here, fits, is right and takes at most LIMIT seconds.

    None of them where it is not. The last tensor of every shape is compared, and all must be
    finite.
    """
    why, device = peer.why_absent(), parameters.values[0].device
    timer = device_timer(device)
    if not why and parameters.need(peer) > 0.8 * available_memory(device):
        why = f"its state may need {parameters.need(peer) / 1e9:.0f} GB"
    intervals = {UPDATE: 1, BETWEEN: NEVER} if peer.renews else {UPDATE: 1}
    found = {}
    for metric, interval in intervals.items():
        if not why:
            try:
                optimizers = parameters.optimizers(name, peer, interval)
                step = in_turn(optimizers)
                step()  # imports and compiles, with some
                seconds = timer(step)
            except Exception as error:
                if peer.package == "rootfree_fused":
                    raise
                why = f"{type(error).__name__}: {error}"[:200]
        if why or seconds > LIMIT:
            why = why or f"a step took {seconds:.1f} s, more than the limit of {LIMIT:g} s"
            rows.add(case, name, "absent", None, "", why=why)
            parameters.restore()
            return {}
        if not is_right(case, name, metric, peer, parameters, step, interval, rows):
            return {}
        found[metric] = step
    size = held_bytes(optimizers, [*parameters.matrices, *parameters.others])
    elements = sum(value.numel() for value in parameters.values)
    rows.add(case, name, "state", size / elements, "bytes a parameter", bytes=size)
    return found


def is_right(
    case: str,
    name: str,
    metric: str,
    peer: Peer,
    parameters: Parameters,
    step: Call,
    interval: int,
    rows: Rows,
) -> bool:
    """After two steps take the others of the check, compare, and put all back."""
    for _ in range(peer.steps - 2):
        step()
    params = parameters.matrices
    indices = {p.shape: i for i, p in enumerate(params)}.values()
    before, after, grads = (
        [tensors[i] for i in indices]
        for tensors in (parameters.values, params, [p.grad for p in params])
    )
    verdict = judge(peer, before, grads, after, interval)
    finite = all(bool(p.isfinite().all()) for p in [*params, *parameters.others])
    right = verdict.right and finite
    rows.add(case, name, f"error, {metric}", verdict.value, verdict.unit, right=right)
    parameters.restore()
    return right


def in_turn(optimizers: Sequence[Optimizer]) -> Call:
    """One step of each."""

    def step() -> None:
        for optimizer in optimizers:
            optimizer.step()

    return step


def measure(
    case: str,
    model: Model,
    rows: Rows,
    device: torch.device,
    seconds: float,
    names: Sequence[str],
) -> None:
    """Time these optimizers, and the products of a forward and backward."""
    parameters = Parameters.of(*split(model.layers, LONGEST), device)
    steps = {name: checked(case, name, PEERS[name], parameters, rows) for name in names}
    runs = {(name, metric): step for name, of in steps.items() for metric, step in of.items()}
    dtype = default_dtype(parameters.values[0])
    runs[FORWARD, "time"] = forward_backward(model, dtype, device)
    times = interleave(runs, device_timer(device), seconds=seconds, min_rounds=ROUNDS[seconds < 1])
    base = times[FORWARD, "time"]
    elements = sum(value.numel() for value in parameters.values)
    rows.add_time(case, FORWARD, "time", base, flops=model.flops(), dtype=str(dtype))
    for name, of in steps.items():
        for metric in of:
            rows.add_time(case, name, metric, times[name, metric], parameters=elements)
        if not of:
            continue
        update = times[name, UPDATE].median
        between = times[name, BETWEEN].median if BETWEEN in of else update
        for interval in INTERVALS:
            mean = (update + (interval - 1) * between) / interval
            rows.add(case, name, f"mean at interval {interval}", 1e3 * mean, "ms")
            share = mean / base.median
            rows.add(case, name, f"share at interval {interval}", share, "x forward-backward")
        if device.type == "cuda":
            rows.add(case, name, "workspace", workspace(of[UPDATE], device), "GB")


def workspace(step: Call, device: torch.device) -> float:
    """GB that a step takes and gives back."""
    torch.cuda.reset_peak_memory_stats(device)
    held = torch.cuda.memory_allocated(device)
    step()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - held) / 1e9


# Growth ---------------------------------------------------------------------------------------


def sweeps(device: torch.device, quick: bool) -> dict[str, dict[int, list[Shape]]]:
    """Matrices by what grows: width, depth, or how many a fixed number of elements makes."""
    times = 8 if device.type == "cuda" and not quick else 1
    widths = [16, 32] if quick else [times * width for width in (64, 128, 256)]
    side = 64 if quick else times * 512
    return {
        "width": {width: transformer(width, 2) for width in widths},
        "depth": {
            depth: transformer(widths[1], depth) for depth in ((1, 2) if quick else (1, 4, 16))
        },
        "number of tensors": {
            count: [(side // math.isqrt(count),) * 2] * count for count in (4, 16, 64)
        },
    }


def exponent(sizes: Sequence[float], times: Sequence[float]) -> float:
    """The slope of log time against log size, by least squares: time grows as size^slope."""
    x, y = (torch.tensor(values, dtype=torch.float64).log() for values in (sizes, times))
    x = x - x.mean()
    return float((x * y).sum() / x.square().sum())


def grow(rows: Rows, device: torch.device, seconds: float, quick: bool) -> None:
    """Time update steps as a network grows; a case a sweep."""
    for what, sweep in sweeps(device, quick).items():
        case = f"against {what}"
        runs: dict[tuple[str, int], Call] = {}
        for size, shapes in sweep.items():
            for name in GROWING:
                parameters = Parameters.of(shapes, [], device)
                found = checked(f"{case} {size}", name, PEERS[name], parameters, rows)
                if found:
                    runs[name, size] = found[UPDATE]
        timings = interleave(
            runs, device_timer(device), seconds=seconds, min_rounds=ROUNDS[seconds < 1]
        )
        for name in GROWING:
            own = {size: timings[name, size] for size in sweep if (name, size) in timings}
            for size, timing in own.items():
                rows.add_time(case, name, f"time at {size}", timing, size=size)
            if len(own) == len(sweep):
                slope = exponent(list(own), [timing.median for timing in own.values()])
                rows.add(case, name, "growth", slope, f"exponent of {what}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `python -m bench step`."""
    add_measurement_arguments(parser)
    parser.add_argument(
        "--seconds",
        type=float,
        default=20.0,
        help=f"timing budget of each of the {len(SCALED) + 1} cases",
    )
    parser.add_argument(
        "--networks",
        nargs="+",
        metavar="NAME",
        help=f"those whose names begin so, as 'GPT-2 small', or {GROWTH}; all if it is left out",
    )
    add_choice(parser, "--optimizers", PEERS)


def networks(device: torch.device, quick: bool) -> dict[str, Callable[[], Model]]:
    if quick:
        return QUICK
    return FULL if device.type == "cuda" else SCALED


def begun_so(names: Sequence[str], beginnings: Sequence[str] | None) -> list[str]:
    """The names that begin so; all where nothing is asked."""
    found = [name for name in names if beginnings is None or name.startswith(tuple(beginnings))]
    if not found:
        raise SystemExit(f"no network begins so; there are {'; '.join(names)}")
    return found


def run(args: argparse.Namespace) -> int:
    """Measure every network, then growth; 1 if a step of ours was WRONG."""
    device = pick_device(args.device)
    rows = Rows(args.out / "step.jsonl", "step", device, arguments=args)
    seconds = 0.1 if args.quick else args.seconds
    builders = networks(device, args.quick)
    for case in rows.remaining(begun_so((*builders, GROWTH), args.networks)):
        if case == GROWTH:
            grow(rows, device, seconds, args.quick)
        else:
            measure(case, builders[case](), rows, device, seconds, args.optimizers)
    return int(bool(wrong_of_ours(rows.finish(tables.step))))
