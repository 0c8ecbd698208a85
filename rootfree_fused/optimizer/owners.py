"""Which rank does the work of which matrix: pure arithmetic, the same on every rank.

A matrix has an owner, to which gradients go and from which updates come, or its rows stay on the
ranks that have them, which sum small products instead.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

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


@dataclass(frozen=True)
class Volume:
    """Of a matrix: its elements, and those of what ranks would sum if its rows stayed.

    summed: None for a matrix that needs an owner.
    """

    elements: int
    summed: int | None


def summed_elements(layout: Layout) -> int:
    """Of what ranks sum in an update of a matrix whose rows stay: the grams of the other axes."""
    axes = list(zip(layout.structures, layout.sizes, strict=True))
    return sum(math.prod(structure.shape(size)) for structure, size in axes[1:])


def staying(volumes: Sequence[Volume], ranks: int) -> set[int]:
    """Which matrices have no owner: of those that need none the largest, as many as pays.

    An owner is sent all elements of its matrices and sends as many, and a rank on average twice
    those of all matrices over the ranks; in a sum each rank sends what is summed twice. So many
    stay that the rank which sends most sends least.
    """
    if ranks < 2:
        return set()
    free = [i for i, volume in enumerate(volumes) if volume.summed is not None]
    free.sort(key=lambda i: (-volumes[i].elements, i))
    elements = [volumes[i].elements for i in free]
    stay = [0, *accumulate(elements)]
    summed = [0, *accumulate(volumes[i].summed or 0 for i in free)]
    total = sum(volume.elements for volume in volumes)
    largest = max((v.elements for v in volumes if v.summed is None), default=0)

    def most_sent(count: int) -> float:
        by_one = max(largest, *elements[count : count + 1], 0)
        return max(by_one, 2 * (total - stay[count]) / ranks) + 2 * summed[count]

    return set(free[: min(range(len(free) + 1), key=most_sent)])


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
