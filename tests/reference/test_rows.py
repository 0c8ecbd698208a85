"""The specification on parts of the rows, each beside the others, against the whole."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from helpers.truth import times_identity

from rootfree_fused import reference
from rootfree_fused.reference.rows import Rows, scale_of
from rootfree_fused.reference.structures import DENSE, DIAGONAL, Blocks

F64 = torch.float64
CUTS = [(7,), (3, 4), (1, 0, 4, 2)]


class Part(Rows):
    """Of several threads each has some rows; `table` is what all put down."""

    def __init__(self, index, rows, table, barrier):
        self.index, self.rows, self.table, self.barrier = index, rows, table, barrier
        self.asked = []

    def count(self, x):
        return self.rows

    def everyones(self, value):
        self.table[self.index] = value
        self.barrier.wait(10)
        found = list(self.table)
        self.barrier.wait(10)
        return found

    def total(self, *sums):
        self.asked.append("total")
        return [sum(each) for each in zip(*self.everyones(sums), strict=True)]

    def scale(self, x):
        self.asked.append("scale")
        return scale_of(torch.cat(self.everyones(x)))

    def learns(self, grad):
        return self.scale(grad)[0] != 0


def in_parts(cut, step):
    """What `step` returns of each part, given its rows and where they lie."""
    table, barrier = [None] * len(cut), Barrier(len(cut))
    ends = [sum(cut[: i + 1]) for i in range(len(cut))]
    parts = [Part(i, sum(cut), table, barrier) for i in range(len(cut))]
    slices = [slice(end - size, end) for end, size in zip(ends, cut, strict=True)]
    with ThreadPoolExecutor(len(cut)) as threads:
        found = list(threads.map(step, parts, slices))
    assert len({tuple(part.asked) for part in parts}) == 1, "all ask alike"
    return found, parts[0].asked


def near(actual, expected):
    scale = expected.abs().max().clamp_min(1e-300)
    return (actual - expected).abs().max() <= 1e-14 * scale


@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize("row_beta", [0.9, None])
@pytest.mark.parametrize("columns", [DENSE, DIAGONAL, Blocks(2)], ids=lambda s: s.name)
def test_rootfree_shampoo(columns, row_beta, cut):
    torch.manual_seed(0)
    param, grads = torch.randn(7, 5, dtype=F64), torch.randn(4, 7, 5, dtype=F64)
    grads[2] = 0
    settings = {"lr": 0.1, "beta1": 0.9, "beta2": 0.9, "damping": 0.1, "weight_decay": 0.1}
    settings |= {"update_rms": 0.3, "row_beta": row_beta}

    def steps(rows, **over):
        p = param[rows].clone()
        momentum = torch.zeros_like(p)
        grams = [torch.ones(len(p), dtype=F64), times_identity(1.0, columns, 5, F64)]
        roots = [torch.ones(len(p), dtype=F64), times_identity(1.0, columns, 5, F64)]
        balance = torch.zeros(len(p), dtype=F64)
        for t, grad in enumerate(grads):
            given = p, grad[rows], momentum, grams, roots, balance, t + 1
            updates = {"update_factors": t != 1}
            reference.rootfree_shampoo_(*given, **settings, **updates, **over)
        return [p, momentum, grams[0], roots[0], balance], [grams[1], roots[1]]

    whole, other = steps(slice(None))
    found, asked = in_parts(cut, lambda part, rows: steps(rows, over=part))
    for values, expected in zip(zip(*(own for own, _ in found), strict=True), whole, strict=True):
        assert near(torch.cat(values), expected)
    for _, values in found:
        assert all(map(near, values, other))
    # Of 4 steps 3 update, of which one has a gradient of zero; scales, and whether it is.
    assert asked.count("total") == 2
    assert asked.count("scale") == 4 * (2 if row_beta is None else 3) + 3


@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize(
    "others",
    [(DENSE,), (DIAGONAL,), (Blocks(2, joint_norm=True),), (DENSE, DENSE)],
    ids=lambda structures: ",".join(s.name for s in structures),
)
def test_ifshampoo(others, cut):
    torch.manual_seed(0)
    sizes = 7, *(5, 3)[: len(others)]
    grads = torch.randn(3, *sizes, dtype=F64)
    grads[1] = 0
    structures = DIAGONAL, *others
    settings = {"factor_lr": 0.5, "factor_momentum": 0.5, "damping": 1e-3, "batch_size": 4.0}

    def steps(rows, **over):
        shape = len(grads[0, rows]), *sizes[1:]
        axes = list(zip(structures, shape, strict=True))
        factors = [times_identity(1.0, *axis, F64) for axis in axes]
        momenta = [torch.zeros_like(factor) for factor in factors]
        for grad in grads:
            own = grad[rows]
            reference.update_factors_(
                own, factors, momenta, structures=structures, **settings, **over
            )
        update = reference.precondition(grads[0, rows], factors, structures)
        return [update, factors[0], momenta[0]], [*factors[1:], *momenta[1:]]

    whole, other = steps(slice(None))
    found, asked = in_parts(cut, lambda part, rows: steps(rows, over=part))
    for values, expected in zip(zip(*(own for own, _ in found), strict=True), whole, strict=True):
        assert near(torch.cat(values), expected)
    for _, values in found:
        assert all(map(near, values, other))
    assert asked == ["scale", "total"] * 3
