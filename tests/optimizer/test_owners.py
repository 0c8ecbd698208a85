"""Who owns which matrix, and how it is cut: arithmetic that every rank does alike."""

from __future__ import annotations

import random

import pytest
import torch
from torch.distributed.tensor import Shard

from rootfree_fused.optimizer.exchange import Box, are_parts_of, senders_of
from rootfree_fused.optimizer.layouts import Layout
from rootfree_fused.optimizer.matrix_calls import IFSHAMPOO, ROOTFREE_SHAMPOO
from rootfree_fused.optimizer.owners import (
    Cost,
    Volume,
    owners_of,
    staying,
    summed_elements,
    update_flops,
)
from rootfree_fused.optimizer.ranks import rows_of
from rootfree_fused.reference.structures import DENSE, DIAGONAL, Blocks

NONE = Cost(0, 0)


def loads_of(costs, owners, ranks):
    return [
        sum(cost.flops for cost, owner in zip(costs, owners, strict=True) if owner == rank)
        for rank in range(ranks)
    ]


def test_the_largest_matrix_goes_first_to_the_rank_of_the_least_work():
    costs = [Cost(flops, 1) for flops in (1, 7, 3, 3, 5)]
    assert owners_of(costs, [NONE] * 2) == [1, 0, 1, 0, 1]  # 7 and 3, 5 and 3 and 1
    # The last ones go to the rank of more work, since three of five are a share of memory.
    assert owners_of(costs, [Cost(100, 0), NONE]) == [0, 1, 1, 0, 1]
    assert owners_of([Cost(1, 1)] * 4, [NONE] * 4) == [0, 1, 2, 3]
    assert owners_of([], [NONE] * 3) == []


def test_no_rank_takes_more_memory_than_its_share_where_another_can():
    heavy, light = Cost(1, 100), Cost(10, 1)
    owners = owners_of([heavy] * 2 + [light] * 8, [NONE] * 2)
    assert owners[0] != owners[1]
    # By FLOPs alone both would go to the second rank, which has 10 less to do.
    assert owners_of([heavy] * 2, [Cost(10, 0), NONE])[:2] == [1, 0]
    assert owners_of([heavy], [NONE] * 2) == [0], "above every share, and yet it has an owner"


@pytest.mark.parametrize("ranks", [2, 8, 64])
def test_eight_matrices_a_rank_are_balanced_within_a_tenth(ranks):
    draw = random.Random(0)
    sides = [(draw.choice((1024, 2048)), draw.choice((1024, 2048))) for _ in range(8 * ranks)]
    costs = [Cost(9 * m * n * (m + n), m * m + n * n) for m, n in sides]
    loads = loads_of(costs, owners_of(costs, [NONE] * ranks), ranks)
    assert max(loads) <= 1.1 * sum(loads) / ranks


def test_flops_are_those_of_the_products():
    square = Layout((64, 64), (DENSE, DENSE))
    assert update_flops(square, IFSHAMPOO.flops_of_blocks) == 18 * 64**3
    assert update_flops(square, ROOTFREE_SHAMPOO.flops_of_blocks) == 24 * 64**3
    half = Layout((64, 1000), (DENSE, DIAGONAL))
    assert update_flops(half, 4) == 5 * 64 * 1000 * 64 + 4 * 64**3
    blocks = Layout((64, 96), (DENSE, Blocks(32)))
    assert update_flops(blocks, 7) == 5 * 64 * 96 * (64 + 32) + 7 * (64**3 + 3 * 32**3)


def test_what_ranks_sum_is_the_grams_of_the_other_axes():
    assert summed_elements(Layout((128256, 4096), (DIAGONAL, Blocks(2048)))) == 2 * 2048**2
    assert summed_elements(Layout((61, 4), (DIAGONAL, DENSE))) == 16
    assert summed_elements(Layout((61, 4, 3), (DIAGONAL, DENSE, DIAGONAL))) == 16 + 3


def test_rows_stay_where_the_rank_that_sends_most_then_sends_less():
    head, layer = Volume(1000, 10), Volume(60, None)
    assert staying([layer, head, layer], 4) == {1}
    assert staying([head, layer, head], 4) == {0, 2}, "one alone would help no rank"
    assert staying([head] * 3, 1) == set(), "nothing is sent"
    assert staying([Volume(1000, None)] * 2, 4) == set()
    # Summed, 1200 by each rank; by owners 1000 by one of them.
    assert staying([Volume(1000, 600)], 64) == set()
    # Two of the size of the bound that a matrix with an owner sets.
    assert staying([Volume(1000, None), head], 64) == set()
    # Many alike are well shared by owners: 2 * 224 / 64 of each, or 224 sums.
    assert staying([Volume(1000, 100)] * 224, 64) == set()
    assert staying([Volume(1000, 2)] * 224, 64) == set(range(224))


def test_the_head_of_a_large_model_stays():
    layers = [Volume(4096 * 14336, None)] * 96 + [Volume(4096 * 4096, None)] * 128
    words = Volume(128256 * 4096, 2 * 2048**2)
    for ranks in (2, 8, 64, 1024):
        assert staying([words, *layers, words], ranks) == {0, 225}


def boxes(*rows):
    """Of a matrix of 5 columns."""
    return [Box((first, 0), (last - first, 5)) for first, last in rows]


def test_of_replicas_one_sends_the_nearest_of_the_mesh():
    hsdp = [(0, 0), (0, 1), (1, 0), (1, 1)]
    halves = boxes((0, 3), (3, 6)) * 2
    assert senders_of(halves, 0, hsdp, [0]) == [0, 1]
    assert senders_of(halves, 3, hsdp, [0]) == [2, 3]
    everywhere = boxes((0, 6)) * 4
    assert senders_of(everywhere, 2, hsdp, [0, 1]) == [2]
    assert senders_of(boxes((0, 2), (2, 4), (4, 6), (6, 6)), 1, [(r,) for r in range(4)], []) == [
        0,
        1,
        2,
        3,
    ]


def test_parts_are_the_whole_or_are_refused():
    assert are_parts_of(boxes((0, 3), (3, 6), (6, 6)), (6, 5))
    assert are_parts_of(boxes((0, 3), (3, 6)) * 2, (6, 5))
    assert not are_parts_of(boxes((0, 3), (4, 6)), (6, 5))
    assert not are_parts_of(boxes((0, 3), (3, 7)), (6, 5))
    assert not are_parts_of(boxes((0, 2), (0, 4)), (6, 5))
    whole = torch.arange(30).view(6, 5)
    assert torch.equal(boxes((3, 6))[0].of(whole), whole[3:])


@pytest.mark.parametrize("length", [0, 1, 3, 8, 9, 17])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_rows_are_cut_as_torch_cuts_them(length, ranks):
    cut = [Shard.local_shard_size_and_offset(length, ranks, rank)[0] for rank in range(ranks)]
    assert rows_of(length, ranks) == cut
