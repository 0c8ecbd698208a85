"""Time what the host does in a step of many small tensors, with the launches stubbed out.

A step of the diagonal optimizers is one launch, one on matrices eight or thirteen, and one more for
vectors. The rest is the host's work: which tensors there are, whether they moved, their tables, the
settings, and Triton's own way to the launch. All of it runs here without a GPU, on CPU tensors, up
to the call of the driver. A first step, which builds the tables of its tensors, is timed apart.
"""

from __future__ import annotations

import argparse
import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as distributed
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from rootfree_fused import IFShampoo, RootFreeAdamW, RootFreeRMSprop, RootFreeShampoo
from rootfree_fused.ops import by_reference, dispatch, extensions
from rootfree_fused.ops.methods import ADAMW, RMSPROP, SIGN, VECTOR_ADAM
from rootfree_fused.optimizer import matrix_calls

from .measuring.common import (
    Timing,
    add_measurement_arguments,
    interleave,
    optional,
    random_tensors,
    summarize,
    time_host,
)
from .measuring.rows import Rows
from .report import tables
from .report.tables import FIRST, HOST_GOALS, KNOWN, LOOP, MOVED

DTENSORS = "RootFreeAdamW, DTensors"
OPTIMIZERS: dict[str, Callable[[list[Parameter]], Optimizer]] = {
    "RootFreeRMSprop": functools.partial(RootFreeRMSprop, momentum=0.9, batch_size=1),
    "RootFreeAdamW": functools.partial(RootFreeAdamW, batch_size=1),
    DTENSORS: functools.partial(RootFreeAdamW, batch_size=1),
    "IFShampoo": functools.partial(IFShampoo, batch_size=1, factor_dtype=torch.bfloat16),
    "RootFreeShampoo": functools.partial(RootFreeShampoo, factor_dtype=torch.bfloat16),
}
FIRST_STEPS = 9  # that are timed, each on tensors of its own


@contextmanager
def as_on_cuda() -> Iterator[None]:
    """CPU tensors go where CUDA tensors go: through the dispatcher to the launchers in Triton."""
    bodies = {
        "ifshampoo_": dispatch._ifshampoo_on_cuda(by_reference.ifshampoo_),
        "rootfree_shampoo_": dispatch._rootfree_shampoo_on_cuda(by_reference.rootfree_shampoo_),
        "unpack_": dispatch._lists_on_cuda("unpack_", "packing", by_reference.unpack_),
        "pack_": dispatch._lists_on_cuda("pack_", "packing", by_reference.pack_),
        "accumulate_": dispatch._lists_on_cuda(
            "accumulate_", "accumulate", by_reference.accumulate_
        ),
    }
    for method in (RMSPROP, ADAMW, SIGN, VECTOR_ADAM):
        for name, (_, on_cuda) in dispatch.diagonal_bodies(method).items():
            bodies[name] = on_cuda
    library = torch.library.Library("rootfree_fused", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that there is a body already
        for name, body in bodies.items():
            library.impl(name, body, "CPU", allow_override=True)
    try:
        with (
            patch.object(dispatch, "triton_serves", lambda param: True),
            patch.object(matrix_calls, "matrix_kernel", lambda *args: None),
        ):
            yield
    finally:
        library._destroy()


@contextmanager
def stubbed() -> Iterator[None]:
    """As on CUDA, with kernels that are compiled for sm_90, and a driver that does nothing."""
    target = optional("triton.backends.compiler").GPUTarget("cuda", 90, 32)
    driver = optional("triton").runtime.driver
    kept = driver._active
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
    try:
        with as_on_cuda():
            yield
    finally:
        driver._active = kept


def built(name: str, count: int) -> tuple[Optimizer, list[Parameter]]:
    """An optimizer of vectors, or of as many matrices as vectors, with gradients."""
    shapes = [(8 + i % 5,) for i in range(count)]
    if "Shampoo" in name:
        shapes = [(8, 8) if i % 2 else shape for i, shape in enumerate(shapes)]
    cpu = torch.device("cpu")
    values = random_tensors(shapes, scale=1.0, dtype=torch.float32, device=cpu, seed=0)
    if name == DTENSORS:
        return OPTIMIZERS[name](params := _sharded(values)), params
    params = [Parameter(value) for value in values]
    for p in params:
        p.grad = torch.ones_like(p)
    return OPTIMIZERS[name](params), params


def _sharded(values: list[Tensor]) -> list[Parameter]:
    """As fully_shard leaves them: a gradient has the specification of its parameter itself."""
    mesh = init_device_mesh("cpu", (1,))
    params = [Parameter(distribute_tensor(value, mesh, [Shard(0)])) for value in values]
    for p in params:
        ones: Any = torch.ones_like(p.to_local())
        p.grad = DTensor(ones, p._spec, requires_grad=False)
    return params


@contextmanager
def one_rank() -> Iterator[None]:
    """A process group of this process alone."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        distributed.destroy_process_group()


def first_steps(name: str, count: int, rounds: int) -> Timing:
    """Of as many fresh optimizers, which live on meanwhile: no address comes twice."""
    fresh = [built(name, count)[0] for _ in range(rounds)]
    return summarize([time_host(optimizer.step) for optimizer in fresh])


def steps(count: int) -> dict[tuple[str, str], Callable[[], Any]]:
    """A step of each optimizer on `count` tensors, which it knows or whose gradients moved."""
    found: dict[tuple[str, str], Callable[[], Any]] = {}
    for name in OPTIMIZERS:
        for case in (KNOWN, MOVED):
            optimizer, params = built(name, count)
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
    with one_rank(), stubbed():
        cases = {f"{count} tensors": count for count in HOST_GOALS}
        for case in rows.remaining(cases):
            seconds = 0.1 if args.quick else 4.0
            runs = steps(cases[case])
            timings = interleave(runs, time_host, seconds=seconds)
            for name in OPTIMIZERS:
                alone = {(name, LOOP): runs[name, KNOWN]}
                timings |= interleave(alone, time_host, seconds=seconds)
                rounds = 3 if args.quick else FIRST_STEPS
                timings[name, FIRST] = first_steps(name, cases[case], rounds)
            for (name, metric), timing in timings.items():
                rows.add_time(case, name, metric, timing, compared_by=compared)
    rows.finish(tables.host)
    return 0
