"""The cases of `python -m bench gpu`, each measured with its limit or its rival in the same run."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from rootfree_fused import RootFreeRMSprop

from . import diag, step
from . import products as bench_products
from .matrix import owned, step_flops
from .measuring.common import device_timer, interleave, mixed_shapes, random_tensors, time_host
from .measuring.rows import Rows
from .optimizers.diagonal import ALLOWED_ERROR, PROVIDERS, RELEASED, RMSPROP, Provider
from .optimizers.peers import DIAGONAL_PEERS, EIGH, PEERS, Peer, ifshampoo, judge, specified
from .workloads import networks as models
from .workloads.operator import kernel_times

Case = Callable[[Rows, torch.device, float], None]
BF16 = torch.bfloat16
OURS = "IFShampoo, bfloat16"
GRAPH = f"{OURS}, graph"
WHOLE_STEPS = (OURS, "IFShampoo, float32", "sirfshampoo, bfloat16", "torch Muon", EIGH)
CAPTURABLE = Provider(
    functools.partial(RootFreeRMSprop, momentum=0.9, capturable=True, **RMSPROP, **RELEASED),
    PROVIDERS["RootFreeRMSprop, momentum 0.9"].eager,
)


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
        case = f"one large tensor, {str(dtype).split('.')[1]}"
        diag.measure(case, [(elements,)], dtype, rows, device, seconds / 2, chosen)


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


def captured(step: Callable[[], object]) -> Callable[[], object]:
    """A graph of a step, to replay."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


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
        step = checked_step(rows, case, OURS, dense_up_to(n), values, grads)
        if step is None:
            continue
        times = kernel_times(step)
        stack = torch.stack(grads)
        runs = {"torch.bmm": lambda stack=stack: torch.bmm(stack, stack.mT)}
        bmm = interleave(runs, device_timer(device), seconds=seconds / 8)["torch.bmm"]
        rows.add_time(case, "torch.bmm", "time", bmm, gemms=count)
        # GEMMs of n x n in each launch, for both factors, at full price.
        gemms = {"products": 2, "factor_momenta": 4, "factors": 2, "product": 3, "params": 1}
        for name, each in times.items():
            rows.add(case, name, "time", 1e3 * each, "ms")
            if name in gemms:
                ratio = gemms[name] * bmm.median / each
                rows.add(case, name, "speed", ratio, "x torch.bmm", gemms=gemms[name] * count)


def dense_up_to(n: int) -> Peer:
    """IFShampoo in bfloat16 with dense factors for axes of up to n."""

    def build(params: list[Parameter], interval: int) -> Optimizer:
        return ifshampoo([{"params": params, "max_dense_dim": n}], interval, dtype=BF16)

    way = functools.partial(specified, limit=n)
    return dataclasses.replace(PEERS[OURS], build=build, way=way)


def whole_steps(rows: Rows, device: torch.device, seconds: float) -> None:
    """114 matrices of 1024 x 1024, factors updated every step; an eighth of a 953M model."""
    count, n = (3, 64) if small(device) else (114, 1024)
    shapes = [(n, n)] * count
    values = random_tensors(shapes, scale=0.02, dtype=torch.float32, device=device, seed=0)
    grads = random_tensors(shapes, scale=0.1, dtype=torch.float32, device=device, seed=1)
    runs = {}
    for name in WHOLE_STEPS:
        if why := PEERS[name].why_absent():
            rows.add("114 of 1024", name, "absent", None, "", why=why)
            continue
        # Of the others two: eigendecompositions in float64 take seconds.
        judged = count if name == OURS else 2
        step = checked_step(rows, "114 of 1024", name, PEERS[name], values, grads, judged)
        if step:
            runs[name] = step
    if not small(device):
        capturable = functools.partial(ifshampoo, dtype=BF16, capturable=True)
        peer = dataclasses.replace(PEERS[OURS], build=capturable)
        step = checked_step(rows, "114 of 1024", GRAPH, peer, values, grads, 2)
        runs |= {GRAPH: captured(step)} if step else {}
    side = 256 if small(device) else 8192
    a, b = random_tensors([(side, side)] * 2, scale=1.0, dtype=BF16, device=device, seed=0)
    runs["mm"] = lambda: a @ b
    times = interleave(runs, device_timer(device), seconds=seconds, min_rounds=3)
    for name, timing in times.items():
        rows.add_time("114 of 1024", name, "time", timing)
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


def checked_step(
    rows: Rows,
    case: str,
    name: str,
    peer: Peer,
    values: list[Tensor],
    grads: list[Tensor],
    judged: int | None = None,
) -> Callable[[], object] | None:
    """The step of a fresh optimizer, or None where the result on the first `judged` is wrong."""
    params = owned(values, grads)
    optimizer = peer.build(params, 1)
    for _ in range(peer.steps):
        optimizer.step()
    verdict = judge(peer, values[:judged], grads[:judged], params[:judged], interval=1)
    rows.add(case, name, "error", verdict.value, verdict.unit, right=verdict.right)
    return optimizer.step if verdict.right else None


def kernels(rows: Rows, device: torch.device, seconds: float) -> None:
    """The products of the targets by torch.bmm and torch.compile too, and eigh beside them."""
    bench_products.limits(rows, device, seconds / 8, 128 if small(device) else 8192)
    rates = bench_products.measured_rates(rows)
    compiled, why = bench_products.compiled_formulas(quick=small(device))
    if why:
        rows.add(bench_products.LIMITS, bench_products.COMPILED, "absent", None, "", why=why)
    stacks = [(2, 32)] if small(device) else PRODUCTS.values()
    for count, n in stacks:
        bench_products.measure(count, n, rows, device, seconds / 5, rates, compiled)


NETWORKS = ("GPT-2 small, 16 x 1024 tokens", "ResNet-50, 128 images")
NETWORKS += ("Llama 1B, 8 x 2048 tokens",)
NETWORK_PEERS = ("IFShampoo, bfloat16", "sirfshampoo, bfloat16", "SOAP, float32", EIGH)
NETWORK_PEERS += ("torch Muon", *DIAGONAL_PEERS)


def networks(rows: Rows, device: torch.device, seconds: float) -> None:
    """Whole steps on networks, with what they cost of a forward and backward."""
    names = (*DIAGONAL_PEERS, NETWORK_PEERS[0]) if small(device) else NETWORK_PEERS
    chosen = {name: PEERS[name] for name in names}
    found = models.QUICK if small(device) else {n: models.FULL[n] for n in NETWORKS}
    for case, build in found.items():
        step.measure(case, build(), rows, device, seconds / len(found), 2.0, chosen)


CASES: dict[str, Case] = {
    "limits": limits,
    "large diagonal": large_diagonal,
    "whole steps": whole_steps,
    "products": products,
    "many tensors": many_tensors,
    "kernels": kernels,
    "networks": networks,
}
