"""How evenly ranks share the work of matrices, and what they send: from shapes, and by CPU time.

Worlds of up to 1,024 ranks are computed from a model's shapes by the code that plans a step: no
process group, and parameters on the meta device. Then each rank of a world is timed by itself: a
plain optimizer of the matrices that this rank would own, in CPU time of one thread, all ranks of
all worlds in turn. What a step sends, and what it waits for, is not in these times.
"""

from __future__ import annotations

import argparse
import math
import operator
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from rootfree_fused.optimizer import exchange
from rootfree_fused.optimizer.joint import unit_of
from rootfree_fused.optimizer.layouts import Layout
from rootfree_fused.optimizer.matrix import MatrixOptimizer
from rootfree_fused.optimizer.owners import (
    Cost,
    Volume,
    owners_of,
    staying,
    summed_elements,
    update_flops,
)
from rootfree_fused.optimizer.ranks import rows_of
from rootfree_fused.optimizer.state import MOMENTUM, is_of_rows

from .layouts import GIVEN, Stack, on_meta
from .matrix import owned as fresh
from .measuring.common import (
    Call,
    Shape,
    add_measurement_arguments,
    interleave,
    random_tensors,
    threads,
)
from .measuring.rows import Rows
from .report import tables
from .report.plots import PLOTS
from .workloads.networks import (
    Layer,
    llama_1b,
    llama_8b,
    llama_70b,
    qwen3_30b_a3b_experts,
    split,
)

RANKS = (1, 2, 4, 8, 64, 256, 1024)
LONGEST = 100_000  # an axis of words is longer
WIRES = (torch.float32, torch.bfloat16)  # of updates; gradients are float32


@dataclass(frozen=True)
class World:
    """What each rank does and holds; the bytes that one sends a step at most.

    halved: with bfloat16 updates. waves: in which gradients and updates travel.
    """

    loads: list[Cost]
    sent: int
    halved: int
    waves: int

    @property
    def messages(self) -> int:
        """That a rank sends to each other one in a step: gradients, and updates."""
        return 2 * self.waves if len(self.loads) > 1 else 0


# Of a model, an optimizer and a number of ranks.
Simulation = Callable[[type[MatrixOptimizer], int], World]


def cost_of(cls: type[MatrixOptimizer], stack: Stack) -> Cost:
    """As the optimizer itself has it."""
    return costs(on_meta(cls, stack))[0]


def costs(optimizer: MatrixOptimizer) -> list[Cost]:
    """Of each parameter, in order."""
    return [optimizer._cost(p, group) for group in optimizer.param_groups for p in group["params"]]


def loads_of(each: Sequence[Cost], owners: Sequence[int], ranks: int) -> list[Cost]:
    """What each rank has, from who owns what."""
    loads = [Cost(0, 0)] * ranks
    for cost, owner in zip(each, owners, strict=True):
        loads[owner] += cost
    return loads


# From shapes ----------------------------------------------------------------------------------


def by_rows(shapes: Sequence[Shape]) -> Simulation:
    """Matrices cut by rows, as `fully_shard` leaves them: of most one rank owns the factors, of
    others, which have a diagonal factor of the rows, these stay where they are.
    """

    def world(cls: type[MatrixOptimizer], ranks: int) -> World:
        optimizers = {shape: on_meta(cls, Stack(shape)) for shape in set(shapes)}
        layouts = {shape: whole_layout(optimizer) for shape, optimizer in optimizers.items()}
        stay = staying([volume(layouts[shape]) for shape in shapes], ranks)
        owned = [shape for i, shape in enumerate(shapes) if i not in stay]
        each = [costs(optimizers[shape])[0] for shape in owned]
        owners = owners_of(each, [Cost(0, 0)] * ranks)
        (sent, waves), (halved, _) = (
            traffic(owned, owners, ranks, wire, len(stay)) for wire in WIRES
        )
        loads = loads_of(each, owners, ranks)
        for i in stay:
            layout, optimizer = layouts[shapes[i]], optimizers[shapes[i]]
            parts = (rows_cost(optimizer, layout, rows) for rows in rows_of(shapes[i][0], ranks))
            loads = list(map(operator.add, loads, parts))
        summed = sum(summed_bytes(layouts[shapes[i]], ranks) for i in stay)
        return World(loads, sent + summed, halved + summed, waves)

    return world


def whole_layout(optimizer: MatrixOptimizer) -> Layout:
    """Of the only parameter."""
    (group,) = optimizer.param_groups
    layout = unit_of(group["params"][0], group).layout
    assert layout is not None
    return layout


def volume(layout: Layout) -> Volume:
    """Of what is cut by rows."""
    summed = summed_elements(layout) if layout.has_diagonal_rows else None
    return Volume(math.prod(layout.sizes), summed)


def rows_cost(optimizer: MatrixOptimizer, layout: Layout, rows: int) -> Cost:
    """Of so many rows of its only parameter, with the factors of the other axes."""
    part = Layout((rows, *layout.sizes[1:]), layout.structures)
    (state,) = optimizer.state.values()
    size = 0.0
    for key, value in state.items():
        share = rows / layout.sizes[0] if is_of_rows(key) or key == MOMENTUM else 1
        size += share * value.numel() * value.itemsize
    return Cost(update_flops(part, optimizer._flops_of_blocks), size)


def summed_bytes(layout: Layout, ranks: int) -> int:
    """That a rank sends in an update of a matrix whose rows stay: sums of float32, in a ring."""
    return 2 * (ranks - 1) * 4 * summed_elements(layout) // ranks


def traffic(
    shapes: Sequence[Shape], owners: Sequence[int], ranks: int, wire: torch.dtype, stay: int = 0
) -> tuple[int, int]:
    """The bytes that a rank sends a step at most, and the waves.

    stay: how many more there are whose rows stay, without what is summed of them.
    """
    cuts = {shape: boxes(shape, ranks) for shape in dict.fromkeys(shapes)}
    params = {shape: torch.empty(shape, device="meta") for shape in cuts}
    dtypes, senders = (torch.float32, wire), list(range(ranks))
    planned = [
        exchange.Matrix(params[shape], *dtypes, owner, cuts[shape], senders)
        for shape, owner in zip(shapes, owners, strict=True)
    ]
    rows: Any = [None] * stay  # of which messages have as many headers more
    most = count = 0
    for rank in unlike(shapes, owners, cuts, ranks):
        ends: Any = SimpleNamespace(rank=rank, size=ranks)
        waves = exchange.waves_of(planned, ends, rows)
        most, count = max(most, sum(wave.bytes_sent for wave in waves)), len(waves)
    return most, count


def boxes(shape: Shape, ranks: int) -> list[exchange.Box]:
    """What each rank has of a parameter that is cut by rows."""
    found, first = [], 0
    for rows in rows_of(shape[0], ranks):
        found.append(exchange.Box((first, *[0] * len(shape[1:])), (rows, *shape[1:])))
        first += rows
    return found


def unlike(
    shapes: Sequence[Shape],
    owners: Sequence[int],
    cuts: dict[Shape, list[exchange.Box]],
    ranks: int,
) -> Iterator[int]:
    """Ranks, one of those that own equal shapes and have as many rows of all: these send alike."""
    held: list[list[Shape]] = [[] for _ in range(ranks)]
    for shape, owner in zip(shapes, owners, strict=True):
        held[owner].append(shape)
    rows = [tuple(parts[rank].sizes[0] for parts in cuts.values()) for rank in range(ranks)]
    kinds = ((tuple(sorted(own)), of) for own, of in zip(held, rows, strict=True))
    yield from {kind: rank for rank, kind in enumerate(kinds)}.values()


def by_members(stacks: Sequence[Shape]) -> Simulation:
    """Stacks of which each rank has, and steps, whole members of its own: nothing is sent."""

    def world(cls: type[MatrixOptimizer], ranks: int) -> World:
        of_shape = {s: cost_of(cls, Stack((1, *s[1:]), batch_axes=1)) for s in set(stacks)}
        each, owners = [], []
        for shape in stacks:
            each += [of_shape[shape]] * shape[0]
            for rank, members in enumerate(rows_of(shape[0], ranks)):
                owners += [rank] * members
        return World(loads_of(each, owners, ranks), 0, 0, 0)

    return world


def matrices(layers: Iterator[Layer]) -> list[Shape]:
    """Those of a language model's layers, without its embedding and head."""
    return split(layers, LONGEST)[0]


MODELS: dict[str, Callable[[], Simulation]] = {
    "Llama-1B": lambda: by_rows(matrices(llama_1b())),
    "Llama-8B": lambda: by_rows(matrices(llama_8b())),
    "Llama-70B": lambda: by_rows(matrices(llama_70b())),
    "experts of Qwen3-30B-A3B": lambda: by_members(list(qwen3_30b_a3b_experts())),
    "Llama-8B with its lookup and head": lambda: by_rows(
        [layer.shape for layer in llama_8b() if len(layer.shape) > 1]
    ),
}


def simulate(case: str, simulation: Simulation, rows: Rows, worlds: Sequence[int]) -> None:
    """The rows of a model."""
    for cls in GIVEN:
        for ranks in worlds:
            world = simulation(cls, ranks)
            for metric, unit, each in (
                (tables.WORK, "TFLOP", [load.flops / 1e12 for load in world.loads]),
                (tables.STATE, "GB", [load.bytes / 1e9 for load in world.loads]),
            ):
                mean = sum(each) / ranks
                rows.add(case, cls.__name__, metric, max(each), unit, ranks=ranks, mean=mean)
            of = {"bfloat16": world.halved / 1e9, "waves": world.waves, "messages": world.messages}
            rows.add(case, cls.__name__, tables.SENT, world.sent / 1e9, "GB", ranks=ranks, **of)


# By time --------------------------------------------------------------------------------------

MEASURED: dict[str, Callable[[], list[Shape]]] = {
    "28 matrices of a Llama-1B of 1/8 the width and 4 layers": lambda: matrices(llama_1b(256, 4))
}
QUICK: dict[str, Callable[[], list[Shape]]] = {
    "7 matrices of a Llama-1B of width 32 and 1 layer": lambda: matrices(llama_1b(32, 1))
}


def cpu_seconds(run: Call) -> float:
    """CPU time of this process: another that takes the core is not in it."""
    start = time.process_time()
    run()
    return time.process_time() - start


def measure(
    case: str, shapes: Sequence[Shape], rows: Rows, worlds: Sequence[int], seconds: float
) -> None:
    """Time the slowest rank of each world, factors updated every step."""
    float32: Any = {"dtype": torch.float32, "device": torch.device("cpu")}
    values = random_tensors(shapes, scale=0.05, seed=0, **float32)
    grads = random_tensors(shapes, scale=0.1, seed=1, **float32)
    for cls, given in GIVEN.items():
        each = costs(cls(fresh(values, grads), **given))
        loads, runs = {}, {}
        for ranks in sorted({1, *worlds}):
            owners = owners_of(each, [Cost(0, 0)] * ranks)
            loads[ranks] = [load.flops for load in loads_of(each, owners, ranks)]
            for rank in sorted(set(owners)):
                own = [i for i, owner in enumerate(owners) if owner == rank]
                params = fresh([values[i] for i in own], [grads[i] for i in own])
                runs[ranks, rank] = cls(params, **given).step
        for step in runs.values():
            step()  # which starts the state and builds the plan
        found = interleave(runs, cpu_seconds, seconds=seconds)
        one = found[1, 0].median
        for ranks in loads:
            times = {rank: timing for (of, rank), timing in found.items() if of == ranks}
            slowest = max(times, key=lambda rank: times[rank].median)
            timing, most = times[slowest], max(loads[ranks])
            rows.add_time(case, cls.__name__, tables.SLOWEST, timing, ranks=ranks, rank=slowest)
            rows.add(
                case,
                cls.__name__,
                tables.SPEEDUP,
                one / timing.median,
                "x",
                ranks=ranks,
                predicted=sum(loads[ranks]) / most,
                together=sum(t.median for t in times.values()) / one,
            )


def at_least_one(text: str) -> int:
    """A number of ranks."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} ranks; pass 1 or more")
    return int(text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `python -m bench distributed`."""
    add_measurement_arguments(parser)
    parser.add_argument(
        "--simulate",
        type=at_least_one,
        nargs="+",
        default=[1, 2, 4, 8, 64],
        metavar="RANKS",
        help="the worlds of which every rank is timed",
    )
    parser.add_argument(
        "--seconds", type=float, default=30.0, help="timing budget of each optimizer"
    )


def run(args: argparse.Namespace) -> int:
    """Compute the worlds of every model, then time those that are asked for, on the CPU."""
    with threads(1):
        rows = Rows(
            args.out / "distributed.jsonl", "distributed", torch.device("cpu"), arguments=args
        )
        timed = QUICK if args.quick else MEASURED
        models = list(MODELS)[::3] if args.quick else list(MODELS)
        for case in rows.remaining([*models, *timed]):
            if case in timed:
                seconds = 0.1 if args.quick else args.seconds
                measure(case, timed[case](), rows, args.simulate, seconds)
            else:
                simulate(case, MODELS[case](), rows, RANKS[:4] if args.quick else RANKS)
        written = rows.finish(tables.distributed)
    plot = PLOTS["worlds"]
    picture = args.out / "distributed_worlds.png"
    plot.draw(plot.rows(written), picture)
    print(f"plot   {picture}")
    return 0
