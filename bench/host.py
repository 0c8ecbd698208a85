"""Time what the host does in a step of many small tensors, with the launch itself stubbed out.

A step of the diagonal optimizers is one launch; the rest is the host's work: which tensors there
are, whether they moved, their table, the settings, and Triton's own way to the launch. All of it
runs here without a GPU, on CPU tensors, up to the call of the driver.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn import Parameter
from torch.optim import Optimizer

from rootfree_fused import RootFreeAdamW, RootFreeRMSprop
from rootfree_fused.ops import dispatch, extensions

from .common import add_measurement_arguments, interleave, optional, random_tensors, time_host
from .rows import Row, Rows, markdown, provenance, read_rows, select, timed, unique

# Microseconds a step, by the number of tensors.
GOALS = {300: 100.0, 2000: 500.0}
OPTIMIZERS: dict[str, Callable[[list[Parameter]], Optimizer]] = {
    "RootFreeRMSprop": functools.partial(RootFreeRMSprop, momentum=0.9, batch_size=1),
    "RootFreeAdamW": functools.partial(RootFreeAdamW, batch_size=1),
}
KNOWN, MOVED = "known tensors", "gradients moved"
# The same as KNOWN, step after step: nothing else has used the caches in between.
LOOP = "in a loop"


@contextmanager
def stubbed() -> Iterator[None]:
    """CPU tensors go the way of CUDA tensors, compiled for sm_90, and the driver does nothing."""
    target = optional("triton.backends.compiler").GPUTarget("cuda", 90, 32)
    driver = optional("triton").runtime.driver
    kept, served = driver._active, dispatch._served
    nothing = SimpleNamespace(
        load_binary=lambda *args: (0, 0, 32, 0, 1024),
        get_device_properties=lambda device: {"max_shared_mem": 227 << 10},
    )
    driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: target,
            get_current_device=lambda: 0,
            get_current_stream=lambda device: 0,
            launcher_cls=lambda source, metadata: lambda *args: None,
            utils=nothing,
        )
    )
    dispatch._served = lambda param: True
    try:
        yield
    finally:
        driver._active, dispatch._served = kept, served


def steps(count: int) -> dict[tuple[str, str], Callable[[], Any]]:
    """A step of each optimizer on `count` tensors, which it knows or whose gradients moved."""
    found: dict[tuple[str, str], Callable[[], Any]] = {}
    for name, build in OPTIMIZERS.items():
        for case in (KNOWN, MOVED):
            shapes = [(8 + i % 5,) for i in range(count)]
            values = random_tensors(
                shapes, scale=1.0, dtype=torch.float32, device=torch.device("cpu"), seed=0
            )
            params = [Parameter(value) for value in values]
            optimizer = build(params)
            for p in params:
                p.grad = torch.ones_like(p)
            found[name, case] = _moving(optimizer, params) if case == MOVED else optimizer.step
    return found


def _moving(optimizer: Optimizer, params: list[Parameter]) -> Callable[[], Any]:
    spare = [torch.ones_like(p) for p in params]

    def step() -> None:
        """Of the first gradient alone: an allocator gives most of them the same place again."""
        params[0].grad, spare[0] = spare[0], params[0].grad
        optimizer.step()

    return step


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `python -m bench host`."""
    add_measurement_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Time the steps; always on CPU tensors."""
    rows = Rows(args.out / "host.jsonl", "host", torch.device("cpu"), arguments=args)
    compared = "C++" if extensions.known_tensors() else "Python"
    with stubbed():
        cases = {f"{count} tensors": count for count in GOALS}
        for case in rows.remaining(cases):
            seconds = 0.1 if args.quick else 4.0
            runs = steps(cases[case])
            timings = interleave(runs, time_host, seconds=seconds)
            for name in OPTIMIZERS:
                alone = {(name, LOOP): runs[name, KNOWN]}
                timings |= interleave(alone, time_host, seconds=seconds)
            for (name, metric), timing in timings.items():
                rows.add_time(case, name, metric, timing, compared_by=compared)
    rows.finish()
    written = read_rows(rows.path)
    report = rows.path.with_suffix(".md")
    report.write_text(table(written))
    print(report.read_text())
    print(f"rows   {rows.path}\ntable  {report}")
    return 0


def table(rows: list[Row]) -> str:
    """Markdown: microseconds a step, and the goal."""
    lines = []
    for case in unique(rows, "case"):
        for name in unique(rows, "provider"):
            found = [
                select(rows, case=case, provider=name, metric=metric)
                for metric in (LOOP, KNOWN, MOVED)
            ]
            cells = [timed(row, ".0f", scale=1e3) for (row,) in found]
            goal = next(goal for count, goal in GOALS.items() if case == f"{count} tensors")
            lines.append([case, name, *cells, f"{goal:.0f}"])
    header = ("tensors", "optimizer", LOOP, f"in turn, {KNOWN}", f"in turn, {MOVED}", "goal")
    notes = (
        "Microseconds of host time of step() up to the call of the driver, which is stubbed out: "
        "kernels compiled for sm_90, tensors on the CPU. Median (20 to 80 %). In a loop: nothing "
        "but this optimizer's steps. In turn: the optimizers and cases one after the other, so "
        "that caches are cold. Where gradients moved, one of them has another address than in the "
        "step before, and the table of addresses is found again in a cache."
    )
    return (
        "\n\n".join(["# Host time of a step", provenance(rows), notes, markdown(header, lines)])
        + "\n"
    )
