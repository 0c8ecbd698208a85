"""Time optimizer.step() of the diagonal updates against torch.

Beside every time stands the error: the largest over parameters and state after two steps, against
float64, in units of the error of the same update made one PyTorch operation at a time in the same
dtypes. A provider above 2 is WRONG and gets no time.
"""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.optim import Optimizer

from .measuring.common import (
    COPY,
    PROBE_BYTES,
    Call,
    Shape,
    Tensors,
    Timing,
    add_measurement_arguments,
    add_short_argument,
    available_memory,
    device_timer,
    error_ratio,
    interleave,
    mixed_shapes,
    pick_device,
    random_tensors,
    step_bytes,
    tensor_state,
    threads,
    time_host,
)
from .measuring.rows import Rows, wrong_of_ours
from .optimizers import PROVIDERS
from .optimizers.diagonal import ALLOWED_ERROR, CHECK_STEPS, Provider, replayed
from .report import tables
from .workloads import lowbit, micro_batches, networks

# Elements: on the CPU the comparison stays in the cache, on a GPU it is not a host's work.
CHECK_ELEMENTS = {"cpu": 3 * 10**7, "cuda": 10**9}
SHORT = ("ResNet-50, float32", "tensors of 1,000, float32")  # how their names end
# On a GPU cases of `bench gpu`.
FEWER_BYTES = "30M in one tensor, fewer bytes"
MICRO_BATCHES = "30M in one tensor, sums of micro-batches"
ADAMW = "RootFreeAdamW"
CHECK_CHUNK = {"cpu": 2**15, "cuda": 2**24}


# Cases ----------------------------------------------------------------------------------------


def cases(device: torch.device, quick: bool) -> dict[str, tuple[list[Shape], torch.dtype]]:
    """Shapes and parameter dtype of every case; gradients have the parameter's dtype."""
    large = 250_000_000 if device.type == "cuda" else 30_000_000
    largest = 1_000_000_000 if device.type == "cuda" else 100_000_000
    many = 100 if quick else 1000
    resnet50 = [layer.shape for layer in networks.resnet50()]
    if quick:
        large, largest = 100_000, 10_000
        resnet50 = [shape for shape in resnet50 if shape[0] <= 64]
    float32, bfloat16 = torch.float32, torch.bfloat16
    name = f"{large / 1e6:g}M in one tensor"
    return {
        f"{name}, float32": ([(large,)], float32),
        f"{name}, bfloat16": ([(large,)], bfloat16),
        f"{name}, float16": ([(large,)], torch.float16),
        "ResNet-50, float32": (resnet50, float32),
        f"{many:,} tensors of 1,000, float32": ([(1000,)] * many, float32),
        f"{many:,} tensors of 100, float32": ([(100,)] * many, float32),
        "4 large tensors, float32": ([(large // 4,)] * 4, float32),
        **{
            f"{count:,} mixed tensors, float32": (list(mixed_shapes(count, large // 250)), float32)
            for count in (many * 3 // 10, many * 2)
        },
        **cases_of_sizes(largest),
    }


def cases_of_sizes(largest: int) -> dict[str, tuple[list[Shape], torch.dtype]]:
    """One tensor of 1,000 elements, of ten times as many, and so on up to `largest`."""
    sizes = [10**i for i in range(3, 10) if 10**i <= largest]
    return {f"{size:,} in one tensor, float32": ([(size,)], torch.float32) for size in sizes}


def providers(device: torch.device) -> dict[str, Provider]:
    """What is timed on the device."""
    return {**PROVIDERS, **(replayed() if device.type == "cuda" else {})}


def built(provider: Provider, params: list[Tensor], grads: list[Tensor]) -> Optimizer:
    """An optimizer on copies of `params`; the gradients are shared, because nobody writes them."""
    copies = [p.clone() for p in params]
    for copy, grad in zip(copies, grads, strict=True):
        copy.grad = grad
    return provider.build(copies)


def check(
    provider: Provider, optimizer: Optimizer, params: list[Tensor], grads: list[Tensor]
) -> float:
    """Step a fresh optimizer on copies of `params` and compare them; see error_ratio.

    Every element up to CHECK_ELEMENTS, and of more as many.
    """
    for _ in range(CHECK_STEPS):
        optimizer.step()
    owned = optimizer.param_groups[0]["params"]
    per_tensor = [{"param": p, **tensor_state(optimizer.state[p])} for p in owned]
    actual = {key: _chunks([tensors[key] for tensors in per_tensor]) for key in per_tensor[0]}

    def chunks() -> Iterator[tuple[Tensors, Tensors, Tensors]]:
        for *entries, p, g in zip(*actual.values(), _chunks(params), _chunks(grads), strict=True):
            eager = provider.eager(p.clone(), g)
            truth = provider.eager(p.double(), g.double())
            yield dict(zip(actual, entries, strict=True)), eager, truth

    with threads(1):
        return error_ratio(chunks())


def _chunks(tensors: list[Tensor]) -> list[Tensor]:
    """All elements in pieces; of very many, evenly spaced pieces and the last."""
    flat = [t.reshape(-1) for t in tensors]
    one = flat[0] if len(flat) == 1 else torch.cat(flat)
    pieces = one.split(CHECK_CHUNK[one.device.type])
    spacing = max(1, -(-one.numel() // CHECK_ELEMENTS[one.device.type]))
    return list(pieces[-1::-spacing])


def fitting(
    chosen: dict[str, Provider], elements: int, dtype: torch.dtype, device: torch.device
) -> dict[str, Provider]:
    """As many of the first providers as memory has room for.

    What all share is counted at 32 bytes an element with float32 (parameters and gradients, copies
    to check by, the probes), and a provider at 12: its parameters and two states.
    """
    width = dtype.itemsize
    left = 0.9 * available_memory(device) - elements * (16 + 4 * width)
    return dict(list(chosen.items())[: max(0, int(left / (elements * (8 + width))))])


def _probes(elements: int, device: torch.device) -> dict[str, Call]:
    """What the memory gives, on the footprint of float32 p, g and two states."""
    source, target = (torch.zeros(2 * elements, device=device) for _ in range(2))
    run = (functools.partial(target.copy_, source), functools.partial(target.add_, source))
    return dict(zip(PROBE_BYTES, run, strict=True))


def measure(
    case: str,
    shapes: list[Shape],
    dtype: torch.dtype,
    rows: Rows,
    device: torch.device,
    seconds: float,
    chosen: dict[str, Provider] | None = None,
) -> None:
    """Check and time every provider on one case, or those that were chosen, where they fit."""
    elements = sum(math.prod(shape) for shape in shapes)
    chosen = providers(device) if chosen is None else chosen
    room = fitting(chosen, elements, dtype, device)
    for name in list(chosen)[len(room) :]:
        rows.add(case, name, "absent", None, "", why="no memory")
    if not room:
        return
    params = random_tensors(shapes, scale=0.1, dtype=dtype, device=device, seed=0)
    grads = random_tensors(shapes, scale=0.1, dtype=dtype, device=device, seed=1)
    optimizers = {}
    for name, provider in room.items():
        optimizer = built(provider, params, grads)
        ratio = check(provider, optimizer, params, grads)
        right = ratio <= provider.allowed
        rows.add(case, name, "error", ratio, "x eager error", right=right)
        if right:
            optimizers[name] = optimizer

    runs = _probes(elements, device)
    runs |= {name: optimizer.step for name, optimizer in optimizers.items()}
    times = interleave(runs, device_timer(device), seconds=0.8 * seconds)
    host = _host_times(room, optimizers, params, device, seconds=0.2 * seconds)

    bytes_ = {name: step_bytes(optimizer) / elements for name, optimizer in optimizers.items()}
    bytes_ |= PROBE_BYTES
    bandwidth = {name: bytes_[name] * elements / t.median / 1e9 for name, t in times.items()}
    for name, timing in times.items():
        rows.add_time(case, name, "time", timing)
        rows.add(case, name, "bandwidth", bandwidth[name], "GB/s", bytes_per_parameter=bytes_[name])
        fraction = bandwidth[name] / bandwidth[COPY]
        rows.add(case, name, "bandwidth fraction", fraction, "x copy")
    for name, timing in host.items():
        rows.add_time(case, name, "host time", timing)


OTHERS = 0.01  # of what is stored, where an update rounds otherwise than the specification


def measure_formats(
    case: str, elements: int, judged: int, rows: Rows, device: torch.device, seconds: float
) -> None:
    """Check and time the operators on one tensor in fewer bytes, beside a copy; on the CPU beside
    the step in float32 too.

    judged: how many elements are compared with the specification.
    """
    source, target = (torch.ones(elements, device=device) for _ in range(2))
    runs: dict[str, Call] = {COPY: functools.partial(target.copy_, source)}
    moved = {COPY: 8.0}
    if device.type == "cpu":
        params, grads = (
            random_tensors([(elements,)], scale=0.1, dtype=torch.float32, device=device, seed=seed)
            for seed in (0, 1)
        )
        optimizer = built(PROVIDERS[ADAMW], params, grads)
        runs[f"{ADAMW}, float32"] = optimizer.step
        moved[f"{ADAMW}, float32"] = step_bytes(optimizer) / elements
    for formats in lowbit.TIMED:
        kept, name = lowbit.CASES[formats], f"{ADAMW}, {formats}"
        share = lowbit.others_than_specified(kept, judged, device)
        right = share <= OTHERS
        rows.add(case, name, "error", share, "of what is stored", right=right)
        if right:
            runs[name] = lowbit.Step(kept, elements, device).run
            moved[name] = kept.bytes_with_scales
    for formats in lowbit.TIMED_PACKED:
        packed = lowbit.Packed(lowbit.PACKED[formats], target)
        share = lowbit.packed_otherwise(lowbit.PACKED[formats], judged, device)
        for name, run in (("pack_", packed.pack), ("unpack_", packed.unpack)):
            name = f"{name}, {formats}"
            rows.add(case, name, "error", share, "of what is stored", right=share == 0)
            if share == 0:
                runs[name] = run
                moved[name] = lowbit.PACKED[formats].bytes_with_scales
    _add_bandwidths(case, runs, moved, elements, rows, device, seconds)


def measure_micro_batches(
    case: str, elements: int, judged: int, rows: Rows, device: torch.device, seconds: float
) -> None:
    """Check and time sums of micro-batches and a step on them, beside a copy and torch.

    judged: how many elements are compared with the specification.
    """
    source, target = (torch.ones(elements, device=device) for _ in range(2))
    runs: dict[str, Call] = {COPY: functools.partial(target.copy_, source)}
    moved = {COPY: 8.0}
    for name, bytes_, run in micro_batches.MicroBatches(elements, device).runs():
        if name.startswith(micro_batches.OURS):
            error = micro_batches.error_of(name, judged, device)
            right = error <= ALLOWED_ERROR
            rows.add(case, name, "error", error, "x eager error", right=right)
            if not right:
                continue
        runs[name], moved[name] = run, bytes_
    _add_bandwidths(case, runs, moved, elements, rows, device, seconds)


def _add_bandwidths(
    case: str,
    runs: dict[str, Call],
    moved: dict[str, float],
    elements: int,
    rows: Rows,
    device: torch.device,
    seconds: float,
) -> None:
    """Time calls that move so many bytes an element."""
    times = interleave(runs, device_timer(device), seconds=seconds)
    rates = {name: moved[name] * elements / timing.median for name, timing in times.items()}
    for name, timing in times.items():
        rows.add_time(case, name, "time", timing)
        rate, model = rates[name], {"bytes_per_parameter": moved[name]}
        rows.add(case, name, "bandwidth", rate / 1e9, "GB/s", **model)
        rows.add(case, name, "bandwidth fraction", rate / rates[COPY], "x copy")


def _host_times(
    providers: dict[str, Provider],
    optimizers: dict[str, Optimizer],
    params: list[Tensor],
    device: torch.device,
    seconds: float,
) -> dict[str, Timing]:
    """What a step costs the host: on a GPU until step() returns, on the CPU with empty tensors."""
    if device.type == "cpu":
        empty = [p.new_empty(0) for p in params]
        optimizers = {name: built(providers[name], empty, empty) for name in optimizers}
    return interleave({n: o.step for n, o in optimizers.items()}, time_host, seconds=seconds)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `python -m bench diag`."""
    add_measurement_arguments(parser)
    add_short_argument(parser, SHORT)
    parser.add_argument(
        "--seconds", type=float, default=4.0, help="timing budget of each of the 17 cases"
    )


def run(args: argparse.Namespace) -> int:
    """Measure every case; 1 if an update of ours was WRONG."""
    device = pick_device(args.device)
    rows = Rows(args.out / "diag.jsonl", "diag", device, arguments=args)
    seconds = 0.1 if args.quick else args.seconds
    chosen = cases(device, args.quick)
    if args.short:
        chosen = {name: case for name, case in chosen.items() if name.endswith(SHORT)}
    by_operator = {FEWER_BYTES: measure_formats, MICRO_BATCHES: measure_micro_batches}
    if device.type != "cpu" or args.short:
        by_operator = {}
    for case in rows.remaining([*chosen, *by_operator]):
        if case in by_operator:
            elements, judged = (5000, 1000) if args.quick else (30_000_000, 1_000_000)
            by_operator[case](case, elements, judged, rows, device, seconds)
        else:
            measure(case, *chosen[case], rows, device, seconds)
    return int(bool(wrong_of_ours(rows.finish(tables.diag))))
