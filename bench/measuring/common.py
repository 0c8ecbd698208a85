"""What the benchmarks measure with: shapes, timers, the byte model, the error check."""

from __future__ import annotations

import argparse
import importlib
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor

from rootfree_fused import ops

Shape = tuple[int, ...]
Tensors = dict[str, Tensor]
Call = Callable[[], object]
DRAWN = 2**26
LEAD_CYCLES = 4_000_000  # 2 ms on an H100
COPY = "copy"
PROBE_BYTES = {COPY: 16, "in-place add": 24}  # what each moves a float32 parameter of two states


def optional(module: str, extra: str = "bench") -> ModuleType:
    """Import a package that only the benchmarks need."""
    extra = "timm" if module.split(".")[0] in ("timm", "torchvision") else extra
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise SystemExit(
            f"this benchmark needs {module} ({error}); pip install rootfree-fused[{extra}]"
        ) from error


def new_folder(text: str) -> Path:
    """A folder that is there, or can be made."""
    path = Path(text)
    there = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not there.is_dir():
        raise argparse.ArgumentTypeError(f"{there} is a file; pass a folder")
    return path


def add_measurement_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of every subcommand that measures on a device."""
    parser.add_argument(
        "--out", type=new_folder, default=Path("bench/out"), help="folder for results"
    )
    parser.add_argument("--device", help="cpu or cuda; cuda where there is one")
    parser.add_argument(
        "--reference",
        action="store_true",
        help="measure the PyTorch reference where the kernels are missing, instead of stopping",
    )
    parser.add_argument(
        "--dirty",
        action="store_true",
        help="measure uncommitted code, and say so in every row, instead of stopping",
    )
    add_quick_argument(parser)


def add_short_argument(parser: argparse.ArgumentParser, cases: Sequence[str]) -> None:
    """The option of subcommands of which `make bench` takes a part."""
    help_ = f"as in a full run, but of its cases only {'; '.join(cases)}"
    parser.add_argument("--short", action="store_true", help=help_)


def add_quick_argument(parser: argparse.ArgumentParser) -> None:
    """The option of every subcommand that takes long."""
    parser.add_argument(
        "--quick", action="store_true", help="under two minutes; numbers mean little"
    )


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def pick_device(name: str | None) -> torch.device:
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def require_kernels(device: torch.device, reference: bool) -> None:
    """Stop unless the kernels are there, or it is the reference that is to be measured."""
    runs = ops.backends().get(device.type, "reference: there are no kernels for this device")
    if runs.startswith("reference") and not reference:
        raise SystemExit(
            f"on {device.type} the PyTorch reference would run ({runs.partition(': ')[2]}), several"
            " times slower than what is to be measured. Run this in the root of a clone that was "
            "installed with: pip install --no-build-isolation -e . (or pass --reference)"
        )


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Run torch's CPU operators on `count` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def available_memory(device: torch.device) -> float:
    """Bytes that may still be taken, as far as the machine says; endless where it does not."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what the allocator keeps is not free to the driver
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return math.inf
    lines = (line.split() for line in meminfo.read_text().splitlines())
    return next((1024.0 * int(kib) for key, kib, *_ in lines if key == "MemAvailable:"), math.inf)


# Shapes ---------------------------------------------------------------------------------------


def mixed_shapes(count: int, largest: int) -> Iterator[Shape]:
    """Lengths from 1 to `largest`, as many in every decade, in a fixed random order."""
    lengths = [round(largest ** (i / (count - 1))) for i in range(count)]
    for length in random.Random(0).sample(lengths, count):
        yield (length,)


def random_tensors(
    shapes: Iterable[Shape], *, scale: float, dtype: torch.dtype, device: torch.device, seed: int
) -> list[Tensor]:
    """Normal tensors; the same numbers for a seed on every device.

    In a tensor of more than DRAWN elements they repeat, since the host draws them one by one.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = []
    for shape in shapes:
        count = math.prod(shape)
        drawn = scale * torch.randn(min(count, DRAWN), generator=generator).to(device, dtype)
        if count > DRAWN:
            drawn = drawn.repeat(-(-count // DRAWN))[:count].clone()
        tensors.append(drawn.view(shape))
    return tensors


# Timers ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timing:
    """Median, 20th and 80th percentile in seconds."""

    median: float
    p20: float
    p80: float
    samples: int


def summarize(samples: Sequence[float]) -> Timing:
    """Percentiles by linear interpolation between the sorted samples."""
    points = torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64)
    median, p20, p80 = torch.tensor(samples, dtype=torch.float64).quantile(points).tolist()
    return Timing(median, p20, p80, len(samples))


def time_host(run: Call) -> float:
    """Seconds until `run` returns, whatever it leaves running on a GPU."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def device_timer(device: torch.device) -> Callable[[Call], float]:
    """A timer of what `run` costs on `device`: wall clock on the CPU, events on a GPU, L2 cold.

    The GPU first has LEAD_CYCLES to wait, so that it finds launches in its queue as it does behind
    a backward pass: what the host takes longer than that is counted, the rest is `time_host`'s.
    """
    if device.type != "cuda":
        return time_host
    l2_flush = torch.empty(256 * 2**20, dtype=torch.int8, device=device)

    def time_cuda(run: Call) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        l2_flush.zero_()
        torch.cuda._sleep(LEAD_CYCLES)
        start.record()
        run()
        end.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(end) / 1e3

    return time_cuda


def interleave(
    runs: dict[str, Call],
    timer: Callable[[Call], float],
    *,
    seconds: float,
    min_rounds: int = 5,
    max_rounds: int = 200,
) -> dict[str, Timing]:
    """Time every entry once a round, in a random order, after one warm-up round.

    Noise that lasts longer than a round falls on all entries alike, and so does what the entry
    before leaves in the caches.
    """
    names = list(runs)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for name in names:
        timer(runs[name])
    deadline = time.perf_counter() + seconds
    order = random.Random(0)
    for i in range(max_rounds):
        if i >= min_rounds and time.perf_counter() > deadline:
            break
        for name in order.sample(names, len(names)):
            samples[name].append(timer(runs[name]))
    return {name: summarize(values) for name, values in samples.items()}


# Byte model -----------------------------------------------------------------------------------


def tensor_state(state: dict[str, Any]) -> dict[str, Tensor]:
    """The entries that have the parameter's shape: all but the step count."""
    return {k: v for k, v in state.items() if isinstance(v, Tensor) and k != "step"}


def step_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes that a step must move: p and state read and written, g read; caches, `step` left out.

    float32: 28 a parameter with two states (momentum, AdamW), 20 with one. To be called after a
    step, because torch builds its state in the first.
    """
    total = 0
    for group in optimizer.param_groups:
        for p in group["params"]:
            state = tensor_state(optimizer.state[p]).values()
            total += 2 * p.nbytes + p.grad.nbytes + 2 * sum(s.nbytes for s in state)
    return total


def held_bytes(optimizers: Sequence[torch.optim.Optimizer], params: Sequence[Tensor]) -> int:
    """Bytes of all tensors that optimizers hold, caches included, but for parameters and gradients.

    Found in their attributes, however deep: not every optimizer keeps its state in `state`. Views
    count once.
    """
    sizes: dict[int, int] = {}
    seen: set[int] = set()
    left: list[Any] = list(optimizers)
    while left:
        entry = left.pop()
        if id(entry) in seen:
            continue
        seen.add(id(entry))
        if isinstance(entry, Tensor):
            storage = entry.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
        elif isinstance(entry, Mapping):
            left += [*entry.keys(), *entry.values()]
        elif isinstance(entry, (list, tuple, set)):
            left += entry
        elif not isinstance(entry, (type, ModuleType, FunctionType)):
            left += getattr(entry, "__dict__", {}).values()
    for p in params:
        for tensor in (p, p.grad):
            sizes.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(sizes.values())


# Error ----------------------------------------------------------------------------------------


def error_ratio(chunks: Iterable[tuple[Tensors, Tensors, Tensors]]) -> float:
    """Largest error of `actual`, in units of the error of `eager`; at most 2 is right.

    Both against the float64 `truth`, entry by entry (param, square_avg, ...) over all chunks of
    (actual, eager, truth). An eager error counts as at least one rounding of its dtype, as in
    tests/_comparison.py. NaN anywhere gives NaN.
    """
    worst: Tensors = {}
    for actual, eager, truth in chunks:
        for key, exact in truth.items():
            rounding = torch.finfo(eager[key].dtype).eps * exact.abs().max()
            error, allowed = ((x[key].double() - exact).abs().max() for x in (actual, eager))
            errors = torch.stack([error, allowed.maximum(rounding)])
            worst[key] = errors.maximum(worst.get(key, errors))
    return torch.stack([error / allowed for error, allowed in worst.values()]).max().item()
