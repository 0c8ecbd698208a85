"""Which rank does the work of which matrix: pure arithmetic, the same on every rank."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .layouts import Layout

# No rank takes a matrix that brings it above this times the mean memory, where another can.
LARGEST_SHARE = 1.3


@dataclass(frozen=True)
class Cost:
    """Of a matrix: the FLOPs of an update of its factors, and the bytes of its state."""

    flops: float
    bytes: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes)


def update_flops(layout: Layout, of_blocks: int) -> float:
    """FLOPs of an update of all factors, symmetric products at half price, and of the gradient.

    of_blocks: the FLOPs of an update of a factor b x b, in b^3 (`MatrixMethod.flops_of_blocks`).
    Five products of the size of the gradient, 2 b an element each, are halved or shared by two
    axes: 5 b an element and axis. A diagonal factor takes none of it.
    """
    elements, flops = math.prod(layout.sizes), 0.0
    for size, structure in zip(layout.sizes, layout.structures, strict=True):
        if structure.is_dense:
            block = structure.shape(size)[-1]
            flops += 5 * elements * block + of_blocks * -(-size // block) * block**3
    return flops


def owners_of(costs: Sequence[Cost], loads: Sequence[Cost]) -> list[int]:
    """The rank that owns each matrix: the largest first, each to the rank of the least work.

    A rank whose memory it would bring above LARGEST_SHARE of the mean of all is passed over, unless
    every rank's would be. Of equal ones the first, so that all ranks find the same.

    loads: what each rank has already.
    """
    ranks = len(loads)
    flops, held = [load.flops for load in loads], [load.bytes for load in loads]
    most = LARGEST_SHARE * (sum(held) + sum(cost.bytes for cost in costs)) / ranks
    owners = [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i].flops, -costs[i].bytes, i)):
        cost = costs[i]
        fit = [rank for rank in range(ranks) if held[rank] + cost.bytes <= most]
        owner = min(fit or range(ranks), key=lambda rank: (flops[rank], held[rank], rank))
        owners[i] = owner
        flops[owner] += cost.flops
        held[owner] += cost.bytes
    return owners
