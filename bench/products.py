"""Time each product of IF-Shampoo on stacks of n x n matrices against torch.bmm and torch.compile.

workloads/formulas.py has what every kernel computes. Rates count a symmetric product at half price
for everybody, and are compared with one large product of the same run. Each result is compared with
its formula in float64. One eigendecomposition is timed beside them, and what it costs in bfloat16
products of its size: 16 by the method's authors (arXiv 2402.03496).
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from .measuring.common import (
    COPY,
    Call,
    Tensors,
    Timing,
    add_measurement_arguments,
    available_memory,
    device_timer,
    interleave,
    pick_device,
    random_tensors,
)
from .measuring.rows import Rows, read_rows, select, wrong_of_ours
from .optimizers.peers import ROUNDINGS
from .report import tables
from .report.tables import EIGH, LIMITS, RATIO
from .workloads.formulas import KERNELS, error_of, moved, stacks
from .workloads.operator import LAUNCHES, PARTS, Operator, kernel_times

OURS, BMM, COMPILED = "IFShampoo", "torch.bmm", "torch.compile"
# Matrices of a stack, by size: a stack of one and a larger one.
SIZES = (128, 256, 512, 1024, 2048, 4096, 8192)
MANY = {
    "cpu": {128: 64, 256: 32, 512: 16, 1024: 4},
    "cuda": {128: 256, 256: 128, 512: 64, 1024: 32, 2048: 16},
}
# That a case takes an element, in both dtypes, temporaries counted.
BYTES = 240
EIGH_ERROR = 2.0**-14
Runs = dict[tuple[str, str], Call]


# Measurement ----------------------------------------------------------------------------------


def limits(rows: Rows, device: torch.device, seconds: float, n: int) -> None:
    """Add the rates of one large product a dtype, and of a copy that is in no cache."""
    source, target = (torch.zeros(16 * n * n, device=device) for _ in range(2))
    runs: dict[str, Call] = {COPY: functools.partial(target.copy_, source)}
    for dtype in ROUNDINGS:
        a, b = random_tensors([(n, n)] * 2, scale=1.0, dtype=dtype, device=device, seed=0)
        runs[_name(dtype)] = functools.partial(torch.mm, a, b)
    times = interleave(runs, device_timer(device), seconds=seconds)
    bandwidth = 2 * source.nbytes / times.pop(COPY).median
    rows.add(LIMITS, COPY, "bandwidth", bandwidth / 1e9, "GB/s", bytes=source.nbytes)
    for name, timing in times.items():
        rate = 2 * n**3 / timing.median
        rows.add(LIMITS, f"mm, {name}", "rate", rate / 1e12, "TFLOP/s", n=n)


def measured_rates(rows: Rows) -> dict[str, float]:
    """FLOP/s of one large product, by the name of its dtype."""
    found = select(read_rows(rows.path), case=LIMITS, metric="rate")
    return {row["provider"].partition(", ")[2]: 1e12 * row["value"] for row in found}


def compiled_formulas(quick: bool) -> tuple[dict[str, Callable[..., Tensors]], str]:
    """Every formula by torch.compile, or none and why."""
    if quick:
        return {}, "compiling takes longer than --quick may"
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(2))
    except Exception as error:
        return {}, f"{type(error).__name__}: {str(error).splitlines()[0]}"[:200]
    return {name: torch.compile(kernel.formula) for name, kernel in KERNELS.items()}, ""


def measure(
    count: int,
    n: int,
    rows: Rows,
    device: torch.device,
    seconds: float,
    rates: dict[str, float],
    compiled: dict[str, Callable[..., Tensors]],
) -> None:
    """Check and time every kernel on one stack, in both dtypes, and eigh."""
    case = f"{count} of {n}"
    need = BYTES * count * n * n
    if need > 0.8 * available_memory(device):
        rows.add(case, OURS, "absent", None, "", why=f"takes {need / 1e9:.0f} GB")
        return
    runs: Runs = {}
    for dtype in ROUNDINGS:
        tensors = stacks(count, n, dtype, device)
        for provider, formulas in {BMM: _formulas(), COMPILED: compiled}.items():
            for name, formula in formulas.items():
                run = functools.partial(formula, *(tensors[key] for key in KERNELS[name].takes))
                after = run()
                _keep(case, provider, name, dtype, tensors, after, run, rows, runs)
        for name, flags in PARTS.items():
            operator = Operator(tensors)
            run = functools.partial(operator, **flags)
            run()
            _keep(case, OURS, name, dtype, tensors, operator.results(), run, rows, runs)
    symmetric = stacks(count, n, torch.float32, device)["pc"]
    if _eigh_is_right(case, symmetric, rows):
        runs[EIGH, "eigh"] = functools.partial(torch.linalg.eigh, symmetric)
    times = interleave(runs, device_timer(device), seconds=seconds, min_rounds=3)
    _report(case, count, n, times, rates, rows)
    if device.type == "cuda":
        _report_launches(case, count, n, times, rates, runs, rows)


def _formulas() -> dict[str, Callable[..., Tensors]]:
    return {name: kernel.formula for name, kernel in KERNELS.items()}


def _keep(
    case: str,
    provider: str,
    kernel: str,
    dtype: torch.dtype,
    before: Tensors,
    after: Tensors,
    run: Call,
    rows: Rows,
    runs: Runs,
) -> None:
    """Keep what is right to be timed."""
    error = error_of(kernel, before, after)
    right, name = error <= ROUNDINGS[dtype], f"{provider}, {_name(dtype)}"
    rows.add(case, name, f"{kernel} error", error, "of float64", right=right)
    if right:
        runs[name, kernel] = run


def _eigh_is_right(case: str, symmetric: Tensor, rows: Rows) -> bool:
    values, vectors = (part.double() for part in torch.linalg.eigh(symmetric[-1:]))
    truth = symmetric[-1:].double()
    error = ((vectors * values.unsqueeze(1) @ vectors.mT - truth).norm() / truth.norm()).item()
    rows.add(case, EIGH, "eigh error", error, "of float64", right=error <= EIGH_ERROR)
    return error <= EIGH_ERROR


def _report(
    case: str,
    count: int,
    n: int,
    times: dict[tuple[str, str], Timing],
    rates: dict[str, float],
    rows: Rows,
) -> None:
    """Rows of times, rates and speeds."""
    for (provider, kernel), timing in times.items():
        if provider.startswith(OURS) and kernel == "gram":
            apply = times.get((provider, "apply"))
            rest = (timing.median - apply.median) / 2 if apply else 0.0
            if rest > 0:
                how = "half of gram and apply, less apply"
                rows.add(case, provider, "gram time", 1e3 * rest, "ms", how=how)
                _add_rates(case, provider, kernel, count, n, rest, times, rates, rows)
            continue
        rows.add_time(case, provider, f"{kernel} time", timing)
        if kernel in KERNELS:
            _add_rates(case, provider, kernel, count, n, timing.median, times, rates, rows)
    product = times.get((f"{BMM}, bfloat16", "gram"))
    if (EIGH, "eigh") in times and product:
        ratio = times[EIGH, "eigh"].median / product.median
        rows.add(case, EIGH, RATIO, ratio, "bfloat16 products")


def _add_rates(
    case: str,
    provider: str,
    kernel: str,
    count: int,
    n: int,
    seconds: float,
    times: dict[tuple[str, str], Timing],
    rates: dict[str, float],
    rows: Rows,
) -> None:
    dtype = provider.split(", ")[1]
    flops = KERNELS[kernel].needed * count * n**3
    bytes_ = moved(kernel, getattr(torch, dtype)) * count * n * n
    rate = flops / seconds
    rows.add(case, provider, f"{kernel} rate", rate / 1e12, "TFLOP/s", flops=flops, bytes=bytes_)
    rows.add(case, provider, f"{kernel} rate fraction", rate / rates[dtype], "x mm")
    if plain := times.get((f"{BMM}, {dtype}", kernel)):
        rows.add(case, provider, f"{kernel} speed", plain.median / seconds, f"x {BMM}")


def _report_launches(
    case: str,
    count: int,
    n: int,
    times: dict[tuple[str, str], Timing],
    rates: dict[str, float],
    runs: Runs,
    rows: Rows,
) -> None:
    """On a GPU, the kernels inside a step, by the profiler."""
    for dtype in map(_name, ROUNDINGS):
        provider = f"{OURS}, {dtype}"
        found = kernel_times(runs[provider, "step"]) if (provider, "step") in runs else {}
        for kernel, launch in LAUNCHES.items():
            if launch in found:
                seconds = found[launch] / 2
                inside = f"{provider}, in a step"
                rows.add(case, inside, f"{kernel} time", 1e3 * seconds, "ms", how="profiler")
                _add_rates(case, inside, kernel, count, n, seconds, times, rates, rows)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).split(".")[1]


# Subcommand -----------------------------------------------------------------------------------


def cases(device: torch.device, largest: int) -> list[tuple[int, int]]:
    """Stacks (count, n) up to n = `largest`: one of every size, and several."""
    single = [(1, n) for n in SIZES if n <= largest]
    return single + [(count, n) for n, count in MANY[device.type].items() if n <= largest]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `python -m bench products`."""
    add_measurement_arguments(parser)
    parser.add_argument(
        "--seconds", type=float, default=8.0, help="timing budget of each of the 9 to 12 cases"
    )
    parser.add_argument("--largest", type=int, help="n; 8192, and 2048 on a CPU, if left out")


def run(args: argparse.Namespace) -> int:
    """Measure every stack; 1 if a kernel of ours was WRONG."""
    device = pick_device(args.device)
    rows = Rows(args.out / "products.jsonl", "products", device, arguments=args)
    on_gpu = device.type == "cuda"
    seconds = 0.1 if args.quick else args.seconds
    largest = args.largest or (128 if args.quick else 8192 if on_gpu else 2048)
    compiled, why = compiled_formulas(args.quick)
    stacks_ = {f"{count} of {n}": (count, n) for count, n in cases(device, largest)}
    for case in rows.remaining((LIMITS, *stacks_)):
        if case == LIMITS:
            limits(rows, device, seconds, 512 if args.quick else 8192 if on_gpu else 2048)
            if why:
                rows.add(LIMITS, COMPILED, "absent", None, "", why=why)
        else:
            measure(*stacks_[case], rows, device, seconds, measured_rates(rows), compiled)
    return int(bool(wrong_of_ours(rows.finish(tables.products))))
