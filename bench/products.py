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
from dataclasses import dataclass, field

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
    dtype_name,
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
        runs[dtype_name(dtype)] = functools.partial(torch.mm, a, b)
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
    compiled: dict[str, Callable[..., Tensors]],
) -> None:
    """Check and time every kernel on one stack, in both dtypes, and eigh."""
    stack = Stack(count, n, rows, measured_rates(rows))
    need = BYTES * count * n * n
    if need > 0.8 * available_memory(device):
        rows.add(stack.case, OURS, "absent", None, "", why=f"takes {need / 1e9:.0f} GB")
        return
    runs: Runs = {}

    def keep(provider: str, kernel: str, before: Tensors, after: Tensors, run: Call) -> None:
        """Keep what is right to be timed."""
        dtype = before["c"].dtype
        error, name = error_of(kernel, before, after), f"{provider}, {dtype_name(dtype)}"
        right = error <= ROUNDINGS[dtype]
        rows.add(stack.case, name, f"{kernel} error", error, "of float64", right=right)
        if right:
            runs[name, kernel] = run

    plain = {name: kernel.formula for name, kernel in KERNELS.items()}
    for dtype in ROUNDINGS:
        tensors = stacks(count, n, dtype, device)
        for provider, formulas in {BMM: plain, COMPILED: compiled}.items():
            for name, formula in formulas.items():
                run = functools.partial(formula, *(tensors[key] for key in KERNELS[name].takes))
                keep(provider, name, tensors, run(), run)
        for name, flags in PARTS.items():
            operator = Operator(tensors)
            run = functools.partial(operator, **flags)
            run()
            keep(OURS, name, tensors, operator.results(), run)
    symmetric = stacks(count, n, torch.float32, device)["pc"]
    if eigh_is_right(stack.case, symmetric, rows):
        runs[EIGH, "eigh"] = functools.partial(torch.linalg.eigh, symmetric)
    stack.times = interleave(runs, device_timer(device), seconds=seconds, min_rounds=3)
    stack.add_times()
    if device.type == "cuda":
        stack.add_launches(runs)


def eigh_is_right(case: str, symmetric: Tensor, rows: Rows) -> bool:
    values, vectors = (part.double() for part in torch.linalg.eigh(symmetric[-1:]))
    truth = symmetric[-1:].double()
    error = ((vectors * values.unsqueeze(1) @ vectors.mT - truth).norm() / truth.norm()).item()
    rows.add(case, EIGH, "eigh error", error, "of float64", right=error <= EIGH_ERROR)
    return error <= EIGH_ERROR


@dataclass
class Stack:
    """Rows of what was timed on `count` matrices of n x n, beside the rate of a large product."""

    count: int
    n: int
    rows: Rows
    rates: dict[str, float]  # FLOP/s by dtype
    times: dict[tuple[str, str], Timing] = field(default_factory=dict)  # by provider and kernel

    @property
    def case(self) -> str:
        return f"{self.count} of {self.n}"

    def add_times(self) -> None:
        """Times, rates and speeds."""
        for (provider, kernel), timing in self.times.items():
            if provider.startswith(OURS) and kernel == "gram":
                self._add_gram(provider, timing)
                continue
            self.rows.add_time(self.case, provider, f"{kernel} time", timing)
            if kernel in KERNELS:
                self._add_rates(provider, kernel, timing.median)
        product = self.times.get((f"{BMM}, bfloat16", "gram"))
        if (EIGH, "eigh") in self.times and product:
            ratio = self.times[EIGH, "eigh"].median / product.median
            self.rows.add(self.case, EIGH, RATIO, ratio, "bfloat16 products")

    def _add_gram(self, provider: str, both: Timing) -> None:
        apply = self.times.get((provider, "apply"))
        rest = (both.median - apply.median) / 2 if apply else 0.0
        if rest > 0:
            self._add(provider, "gram", rest, "half of gram and apply, less apply")

    def add_launches(self, runs: Runs) -> None:
        """On a GPU, the kernels inside a step, by the profiler."""
        for provider in (f"{OURS}, {dtype_name(dtype)}" for dtype in ROUNDINGS):
            found = kernel_times(runs[provider, "step"]) if (provider, "step") in runs else {}
            for kernel, launch in LAUNCHES.items():
                if launch in found:
                    self._add(f"{provider}, in a step", kernel, found[launch] / 2, "profiler")

    def _add(self, provider: str, kernel: str, seconds: float, how: str) -> None:
        self.rows.add(self.case, provider, f"{kernel} time", 1e3 * seconds, "ms", how=how)
        self._add_rates(provider, kernel, seconds)

    def _add_rates(self, provider: str, kernel: str, seconds: float) -> None:
        dtype = provider.split(", ")[1]
        flops = KERNELS[kernel].needed * self.count * self.n**3
        bytes_ = moved(kernel, getattr(torch, dtype)) * self.count * self.n**2
        rate = flops / seconds
        sizes = {"flops": flops, "bytes": bytes_}
        self.rows.add(self.case, provider, f"{kernel} rate", rate / 1e12, "TFLOP/s", **sizes)
        share = rate / self.rates[dtype]
        self.rows.add(self.case, provider, f"{kernel} rate fraction", share, "x mm")
        if plain := self.times.get((f"{BMM}, {dtype}", kernel)):
            speed = plain.median / seconds
            self.rows.add(self.case, provider, f"{kernel} speed", speed, f"x {BMM}")


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


def run(args: argparse.Namespace) -> int:
    """Measure every stack; 1 if a kernel of ours was WRONG."""
    device = pick_device(args.device)
    rows = Rows(args.out / "products.jsonl", "products", device, arguments=args)
    on_gpu = device.type == "cuda"
    seconds = 0.1 if args.quick else args.seconds
    largest = 128 if args.quick else 8192 if on_gpu else 2048
    compiled, why = compiled_formulas(args.quick)
    stacks_ = {f"{count} of {n}": (count, n) for count, n in cases(device, largest)}
    for case in rows.remaining((LIMITS, *stacks_)):
        if case == LIMITS:
            limits(rows, device, seconds, 512 if args.quick else 8192 if on_gpu else 2048)
            if why:
                rows.add(LIMITS, COMPILED, "absent", None, "", why=why)
        else:
            measure(*stacks_[case], rows, device, seconds, compiled)
    return int(bool(wrong_of_ours(rows.finish(tables.products))))
