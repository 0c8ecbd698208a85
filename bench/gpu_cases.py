"""The cases of `python -m bench gpu`, each measured with its limit or its rival in the same run."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from rootfree_fused.optimizer.shards import local

from . import diag
from .matrix import checked_step, step_flops
from .measuring.common import (
    Call,
    Shape,
    device_timer,
    dtype_name,
    interleave,
    mixed_shapes,
    random_tensors,
    time_host,
)
from .measuring.rows import Rows
from .optimizers import PEERS, PROVIDERS
from .optimizers.diagonal import ALLOWED_ERROR, capturable, captured
from .optimizers.peers import EIGH, ifshampoo, in_blocks, limited, rootfree_shampoo
from .workloads.operator import GEMMS, kernel_times

Case = Callable[[Rows, torch.device, float], None]
BF16 = torch.bfloat16
OURS = "IFShampoo, bfloat16"
AVERAGED = "RootFreeShampoo, bfloat16"
# What is replayed as a graph too, and how it is built.
CAPTURED = {OURS: ifshampoo, AVERAGED: rootfree_shampoo}
WHOLE_STEPS = (OURS, AVERAGED, "IFShampoo, float32", "sirfshampoo, bfloat16", "torch Muon", EIGH)
ROUNDED_TWICE = 1e-4  # of the way of two steps: a parameter of ranks is rounded once more
CAPTURABLE = capturable("RootFreeRMSprop, momentum 0.9")


def small(device: torch.device) -> bool:
    """Without a GPU a case runs as a rehearsal, on sizes that mean nothing."""
    return device.type != "cuda"


def limits(rows: Rows, device: torch.device, seconds: float) -> None:
    """What the machine gives: a copy of 4 GB, and products of 8192 x 8192 in bfloat16."""
    elements, n = (1 << 20, 256) if small(device) else (1 << 30, 8192)
    source, target = (torch.zeros(elements, device=device) for _ in range(2))
    a, b = random_tensors([(n, n)] * 2, scale=1.0, dtype=BF16, device=device, seed=0)
    runs = {"copy": lambda: target.copy_(source), "mm": lambda: a @ b}
    times = interleave(runs, device_timer(device), seconds=seconds)
    rows.add("limits", "copy", "bandwidth", 8 * elements / times["copy"].median / 1e9, "GB/s")
    rows.add("limits", "mm", "rate", 2 * n**3 / times["mm"].median / 1e12, "TFLOP/s")


def large_diagonal(rows: Rows, device: torch.device, seconds: float) -> None:
    """One tensor far larger than the caches, beside a copy and torch's fused AdamW."""
    names = ("RootFreeRMSprop, momentum 0.9", "RootFreeAdamW", "torch AdamW, fused")
    chosen = {name: PROVIDERS[name] for name in names}
    elements = 100_000 if small(device) else 10**9
    for dtype in (torch.float32, BF16):
        case = f"one large tensor, {dtype_name(dtype)}"
        diag.measure(case, [(elements,)], dtype, rows, device, seconds / 2, chosen)


def fewer_bytes(rows: Rows, device: torch.device, seconds: float) -> None:
    """The operator on one tensor far larger than the caches, in formats, beside a copy."""
    elements, judged = (5000, 1000) if small(device) else (10**9, 10**7)
    case = "one large tensor in fewer bytes"
    diag.measure_formats(case, elements, judged, rows, device, seconds)


def micro_batches(rows: Rows, device: torch.device, seconds: float) -> None:
    """Sums of micro-batches on one tensor far larger than the caches, beside a copy and torch."""
    elements, judged = (5000, 1000) if small(device) else (10**9, 10**7)
    case = "micro-batches of one large tensor"
    diag.measure_micro_batches(case, elements, judged, rows, device, seconds)


def many_tensors(rows: Rows, device: torch.device, seconds: float) -> None:
    """2,000 mixed tensors beside one of as many elements; host time, eager and replayed."""
    largest = 1000 if small(device) else 2_000_000  # 276M elements in all
    mixed = list(mixed_shapes(2000, largest))
    optimizers = {}
    for name, shapes in {
        "2,000 tensors": mixed,
        "300 tensors": list(mixed_shapes(300, largest)),
        "one tensor": [(sum(shape[0] for shape in mixed),)],
    }.items():
        params, grads = (
            random_tensors(shapes, scale=0.1, dtype=torch.float32, device=device, seed=seed)
            for seed in (0, 1)
        )
        optimizer = diag.built(CAPTURABLE, params, grads)
        error = diag.check(CAPTURABLE, optimizer, params, grads)
        right = error <= ALLOWED_ERROR
        rows.add("many tensors", name, "error", error, "x eager error", right=right)
        if right:
            optimizers[name] = optimizer
    runs = {name: optimizer.step for name, optimizer in optimizers.items()}
    times = interleave(runs, device_timer(device), seconds=seconds / 2)
    for name, timing in times.items():
        rows.add_time("many tensors", name, "time", timing)
        if "one tensor" in times:
            ratio = timing.median / times["one tensor"].median
            rows.add("many tensors", name, "time ratio", ratio, "x one tensor")
    if device.type == "cuda":
        runs |= {f"{name}, graph": captured(runs[name]) for name in list(runs)}
    for name, timing in interleave(runs, time_host, seconds=seconds / 2).items():
        rows.add_time("many tensors", name, "host time", timing)


PRODUCTS = {"1 of 4096": (1, 4096), "16 of 2048": (16, 2048), "32 of 1024": (32, 1024)}
PRODUCTS |= {"64 of 512": (64, 512)}


def products(rows: Rows, device: torch.device, seconds: float) -> None:
    """Each launch of an update step, by the profiler, beside torch.bmm on the same stacks."""
    if small(device):
        rows.add("products", "profiler", "skipped", None, "", why="the kernels need a GPU")
        return
    for case, (count, n) in PRODUCTS.items():
        values = [torch.zeros(n, n, device=device, dtype=BF16)] * count
        grads = random_tensors([(n, n)] * count, scale=0.1, dtype=BF16, device=device, seed=0)
        step = checked_step(rows, case, OURS, limited(OURS, n), values, grads)
        if step is None:
            continue
        times = kernel_times(step)
        stack = torch.stack(grads)
        runs = {"torch.bmm": lambda stack=stack: torch.bmm(stack, stack.mT)}
        bmm = interleave(runs, device_timer(device), seconds=seconds / 8)["torch.bmm"]
        rows.add_time(case, "torch.bmm", "time", bmm, gemms=count)
        for name, each in times.items():
            rows.add(case, name, "time", 1e3 * each, "ms")
            if name in GEMMS:
                ratio = GEMMS[name] * bmm.median / each
                rows.add(case, name, "speed", ratio, "x torch.bmm", gemms=GEMMS[name] * count)


def blocks(rows: Rows, device: torch.device, seconds: float) -> None:
    """An MLP weight of Llama-8B, 4096 x 14336, in blocks of 2048 beside Distributed Shampoo's."""
    shape, limit = ((64, 224), 32) if small(device) else ((4096, 14336), 2048)
    values = random_tensors([shape], scale=0.02, dtype=torch.float32, device=device, seed=0)
    grads = random_tensors([shape], scale=0.1, dtype=torch.float32, device=device, seed=1)
    case, runs = "4096 x 14336 in blocks of 2048", {}
    for name, peer in in_blocks(limit).items():
        if not name.endswith("dense"):  # whose factors would take 1.2 GB
            step = checked_step(rows, case, name, peer, values, grads, 0 if EIGH in name else None)
            runs |= {name: step} if step else {}
    times = interleave(runs, device_timer(device), seconds=seconds / 2, min_rounds=3)
    for name, timing in times.items():
        rows.add_time(case, name, "time", timing)


def whole_steps(rows: Rows, device: torch.device, seconds: float) -> None:
    """114 matrices of 1024 x 1024, factors updated every step; an eighth of a 953M model."""
    count, n = (3, 64) if small(device) else (114, 1024)
    shapes = [(n, n)] * count
    values = random_tensors(shapes, scale=0.02, dtype=torch.float32, device=device, seed=0)
    grads = random_tensors(shapes, scale=0.1, dtype=torch.float32, device=device, seed=1)
    runs = {}
    for name in WHOLE_STEPS:
        # Of the others two: eigendecompositions in float64 take seconds.
        judged = count if name in CAPTURED else 2
        step = checked_step(rows, "114 of 1024", name, PEERS[name], values, grads, judged)
        if step:
            runs[name] = step
    if not small(device):
        for name, build in CAPTURED.items():
            build = functools.partial(build, dtype=BF16, capturable=True)
            peer, graph = dataclasses.replace(PEERS[name], build=build), f"{name}, graph"
            step = checked_step(rows, "114 of 1024", graph, peer, values, grads, 2)
            runs |= {graph: captured(step)} if step else {}
    side = 256 if small(device) else 8192
    a, b = random_tensors([(side, side)] * 2, scale=1.0, dtype=BF16, device=device, seed=0)
    runs["mm"] = lambda: a @ b
    times = interleave(runs, device_timer(device), seconds=seconds, min_rounds=3)
    for name, timing in times.items():
        rows.add_time("114 of 1024", name, "time", timing)
    add_launches(rows, {name: runs[name] for name in CAPTURED if name in runs}, device)
    if OURS not in times:
        return
    ours = times[OURS].median
    for name, timing in times.items():
        if name != "mm":
            rows.add("114 of 1024", name, "slowdown", timing.median / ours, "x IFShampoo, bfloat16")
    rate = step_flops(shapes) / ours
    limit = 2 * side**3 / times["mm"].median
    rows.add("114 of 1024", OURS, "rate", rate / 1e12, "TFLOP/s")
    rows.add("114 of 1024", OURS, "rate fraction", rate / limit, "x mm")


def add_launches(rows: Rows, runs: dict[str, Call], device: torch.device) -> None:
    """Each launch of these steps, by the profiler."""
    for name, step in runs.items():
        for launch, seconds in ({} if small(device) else kernel_times(step)).items():
            rows.add("114 of 1024", f"{name}: {launch}", "time", 1e3 * seconds, "ms")


def one_rank(rows: Rows, device: torch.device, seconds: float) -> None:
    """DTensors of a world of one, whose messages go to itself, beside the same steps without."""
    count, n = (3, 32) if small(device) else (16, 1024)
    values, grads = (
        random_tensors([(n, n)] * count, scale=0.1, dtype=torch.float32, device=device, seed=seed)
        for seed in (0, 1)
    )
    backend = "gloo" if small(device) else "nccl"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh(device.type, (1,))

    def spread(value: torch.Tensor) -> torch.Tensor:
        return distribute_tensor(value, mesh, [Shard(0)])

    for name, build in CAPTURED.items():
        runs, ends = {}, []
        for of, laid in {name: torch.Tensor.clone, f"{name}, DTensors": spread}.items():
            own = [Parameter(laid(value)) for value in values]
            for parameter, grad in zip(own, grads, strict=True):
                parameter.grad = laid(grad)
            optimizer = build(own, 1, dtype=BF16)
            for _ in range(2):
                optimizer.step()
            ends.append([local(parameter.detach()).clone() for parameter in own])
            runs[of] = optimizer.step
        pairs = zip(*ends, values, strict=True)
        apart, way = zip(*((a - b, a - start) for a, b, start in pairs), strict=True)
        error = (torch.stack(apart).norm() / torch.stack(way).norm()).item()
        right = error <= ROUNDED_TWICE
        rows.add("one rank", f"{name}, DTensors", "error", error, "of the way", right=right)
        if right:
            timings = interleave(runs, device_timer(device), seconds=seconds / 2, min_rounds=3)
            for of, timing in timings.items():
                rows.add_time("one rank", of, "time", timing)
    dist.destroy_process_group()


def watched_steps(rows: Rows, device: torch.device, seconds: float) -> None:
    """Two steps of a stack that is computed as one, for a profiler that looks at the second."""
    count, n = (2, 32) if small(device) else (32, 1024)
    step_twice(ifshampoo, [(n, n)] * count, device)


def small_matrices(rows: Rows, device: torch.device, seconds: float) -> None:
    """Steps of either method on rows that are aligned and that are not, for a sanitizer."""
    for build in CAPTURED.values():
        step_twice(build, [(24, 16)] * 2 + [(7, 9)] * 2 + [(136, 72)], device)


def step_twice(
    build: Callable[..., Optimizer], shapes: Sequence[Shape], device: torch.device
) -> None:
    params, grads = (
        random_tensors(shapes, scale=0.1, dtype=torch.float32, device=device, seed=seed)
        for seed in (0, 1)
    )
    own = [Parameter(param) for param in params]
    optimizer = build(own, 1, dtype=BF16)
    for parameter, gradient in zip(own, grads, strict=True):
        parameter.grad = gradient
    for _ in range(2):
        optimizer.step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)


CASES: dict[str, Case] = {
    "limits": limits,
    "large diagonal": large_diagonal,
    "fewer bytes": fewer_bytes,
    "micro-batches": micro_batches,
    "whole steps": whole_steps,
    "blocks": blocks,
    "products": products,
    "ncu": watched_steps,
    "many tensors": many_tensors,
    "one rank": one_rank,
    "memcheck": small_matrices,
    "racecheck": small_matrices,
}
