"""Which matrices share launches: small ones have their own where that saves more than it costs."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from helpers import kernels_rootfree_shampoo as shampoo
from helpers.kernels_matrix import (
    BF16,
    DENSE,
    F32,
    KERNELS,
    NEITHER,
    Model,
    _interpreter,
    _poisoned_scratch,
)

from bench.machine_code.offline import Recorder
from rootfree_fused.kernels import matrix

__all__ = ["_interpreter", "_poisoned_scratch"]  # fixtures

CPU = torch.device("cpu")


def bucket(count, sizes, dense=DENSE):
    return matrix.MatrixBucket(sizes, dense, sizes, (False, False), (0,) * count, (), (), *[[]] * 4)


LARGE, SMALL = bucket(3, (1024, 1024)), bucket(1100, (64, 64))
FEW, NARROW = bucket(1, (64, 147)), bucket(140, (192, 192))


@pytest.mark.parametrize(
    ("buckets", "parts"),
    [
        ([LARGE, SMALL], [([LARGE], matrix.LARGE), ([SMALL], matrix.SMALL)]),
        # ResNet-50's first convolution: eight launches cost more than its empty tiles.
        ([FEW, LARGE], [([FEW, LARGE], matrix.LARGE)]),
        ([SMALL, bucket(2, (1024, 1024))], [([SMALL, bucket(2, (1024, 1024))], matrix.SMALL)]),
        # 140 large tiles, but nearly half of what they compute is empty.
        ([NARROW], [([NARROW], matrix.SMALL)]),
        ([LARGE, bucket(9, (64, 64), NEITHER)], None),
    ],
    ids=["many small", "one small", "few large", "narrow", "diagonal"],
)
def test_small_matrices_have_small_tiles_where_that_pays(buckets, parts):
    if parts is None:  # as one
        parts = [(buckets, matrix.LARGE)]
    found = matrix.parted(CPU, BF16, buckets)
    assert [(part, matrix.tiling_of(CPU, BF16, part)) for part in found] == parts
    assert matrix.parted(CPU, F32, buckets) == [buckets]


def test_flops_are_those_of_the_tiles():
    """24 n^3 without symmetry; 12 of them are of the tiles on and below the diagonal alone."""
    assert matrix.flops_of(bucket(2, (128, 128)), 128) == 2 * 24 * 128**3
    assert matrix.flops_of(bucket(1, (256, 256)), 128) == (12 + 12 * 3 // 4) * 256**3
    assert matrix.flops_of(bucket(1, (64, 64)), 128) == 4 * 24 * 64**3
    in_blocks = bucket(1, (256, 256))._replace(blocks=(128, 128))
    # Four products of four tiles, two blocks of M M^T an axis 256 deep, and three of each block.
    assert matrix.flops_of(in_blocks, 128) == 2 * (4 * 4 + 4 * 2 + 4 * 3) * 128**3


@pytest.fixture
def two_parts(monkeypatch):
    monkeypatch.setattr(matrix, "WORTH_LAUNCHES", 0)
    monkeypatch.setattr(matrix, "ENOUGH_LARGE_TILES", 1)


BUCKETS = [((128, 128), DENSE, 1), ((9, 16), DENSE, 2)]


def test_parts_follow_the_specification(two_parts, device):
    model = Model(device, "momentum", BF16, BUCKETS)
    for update in (True, False):
        model.step(update=update)
    model.check()


def test_parts_of_root_free_shampoo_follow_the_specification(two_parts, device):
    model = shampoo.Model(device, BF16, BUCKETS)
    for update in (True, False):
        model.step(update=update)
    model.check()


def test_each_part_has_its_own_launches(two_parts, device, monkeypatch):
    recorder = Recorder()
    for name in KERNELS:
        monkeypatch.setattr(matrix, name, recorder)
    model = Model(device, "momentum", BF16, BUCKETS)
    model.launch(model.fresh_grads(), torch.tensor(0.1), update=True)
    blocks = [options["BLOCK"] for *_, options in recorder.calls if "BLOCK" in options]
    assert (len(recorder.calls), blocks) == (16, [128] * 7 + [64] * 7)
