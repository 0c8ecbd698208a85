"""Which factors a shape owns, when K K^T is kept, and how state is stacked."""

from __future__ import annotations

import re

import pytest
import torch

from rootfree_fused.optimizer.buckets import Stacks
from rootfree_fused.optimizer.factor_state import caches_product, factor_state
from rootfree_fused.optimizer.layouts import Layout, automatic, layout_of
from rootfree_fused.optimizer.stacks import allocate
from rootfree_fused.reference import join
from rootfree_fused.reference.compact_structures import Hierarchical, Toeplitz
from rootfree_fused.reference.structures import DENSE, DIAGONAL, Blocks

GROUP = {
    "structures": "auto",
    "max_dense_dim": 100,
    "block_size": 48,
    "hierarchical_sizes": (2, 1),
    "merge_axes": True,
    "vector_method": "rmsprop",
}
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("shape", "settings", "sizes", "structures"),
    [
        ((8, 4), {}, (8, 4), (DENSE, DENSE)),
        ((8, 400), {}, (8, 400), (DENSE, Blocks(80))),
        ((8, 1601), {}, (8, 1601), (DENSE, DIAGONAL)),
        ((8, 101), {}, (8, 101), (DENSE, Blocks(64))),
        ((8, 400), {"structures": "block"}, (8, 400), (DENSE, Blocks(48, joint_norm=True))),
        ((8, 61), {"structures": "block30diagonal"}, (8, 61), (DENSE, Blocks(30, True))),
        (
            (8, 61),
            {"structures": "hierarchical"},
            (8, 61),
            (Hierarchical(8, 2, 1), Hierarchical(61, 2, 1)),
        ),
        (
            (8, 61),
            {"structures": ("hierarchical3_4", "dense")},
            (8, 61),
            (Hierarchical(8, 3, 4), DENSE),
        ),
        (
            (8, 61),
            {"structures": ("triltoeplitz", "upper_toeplitz")},
            (8, 61),
            (Toeplitz(True), Toeplitz(False)),
        ),
        ((8, 100), {}, (8, 100), (DENSE, DENSE)),
        ((6, 1, 5), {}, (6, 5), (DENSE, DENSE)),
        ((4, 3, 3, 2), {}, (4, 18), (DENSE, DENSE)),
        ((4, 3, 3, 2), {"merge_axes": False}, (4, 3, 3, 2), (DENSE,) * 4),
        ((4, 3, 3, 2), {"merge_axes": ((0, 1), (2, 3))}, (12, 6), (DENSE, DENSE)),
        ((4, 1, 3, 2), {"merge_axes": ((0,), (1,), (2, 3))}, (4, 6), (DENSE, DENSE)),
        ((5, 8, 4), {"batch_axes": 1}, (8, 4), (DENSE, DENSE)),
        ((1, 8, 1, 4), {"batch_axes": 1}, (8, 4), (DENSE, DENSE)),
        ((5, 6, 8, 2, 2), {"batch_axes": 2}, (8, 4), (DENSE, DENSE)),
        ((5, 2, 3, 4), {"batch_axes": 1, "merge_axes": ((0, 1), (2,))}, (6, 4), (DENSE, DENSE)),
        ((8, 4), {"structures": "diagonal"}, (8, 4), (DIAGONAL, DIAGONAL)),
        ((8, 1700), {"structures": ("dense", "auto")}, (8, 1700), (DENSE, DIAGONAL)),
        ((8, 4), {"structures": ("diagonal", "dense")}, (8, 4), (DIAGONAL, DENSE)),
        ((7,), {"vector_method": "factor"}, (7,), (DENSE,)),
        ((1, 7), {"vector_method": "factor"}, (7,), (DENSE,)),
        ((), {"vector_method": "factor"}, (1,), (DENSE,)),
    ],
)
def test_layout(shape, settings, sizes, structures):
    assert layout_of(shape, {**GROUP, **settings}) == Layout(sizes, structures)


@pytest.mark.parametrize("shape", [(), (1,), (7,), (1, 7), (0, 3)])
def test_vectors_scalars_and_empty_parameters_are_rmsprops(shape):
    assert layout_of(shape, GROUP) is None


@pytest.mark.parametrize(
    ("shape", "settings"),
    [
        ((8, 4), {"merge_axes": ((0, 1),)}),
        ((1, 7), {"merge_axes": ((0,), (1,))}),
        ((5, 7), {"batch_axes": 1}),
        ((0, 8, 4), {"batch_axes": 1}),
    ],
)
def test_what_is_merged_into_a_vector_or_has_vectors_as_members(shape, settings):
    assert layout_of(shape, {**GROUP, **settings}) is None


@pytest.mark.parametrize(
    "sets", [((0,),), ((0, 1), (1, 2)), ((1, 0), (2,)), ((0, 1), (3,)), ((0, 1), (2, 3))]
)
def test_axes_are_merged_in_order_each_once(sets):
    settings = {**GROUP, "merge_axes": sets}
    message = f"merge_axes is {sets} but a parameter of shape (4, 3, 2) has 3 axes; name them from"
    with pytest.raises(ValueError, match=re.escape(message)):
        layout_of((4, 3, 2), settings)
    behind = "of shape (9, 4, 3, 2) has 3 axes behind its batch axes; name them from 0 on"
    with pytest.raises(ValueError, match=re.escape(behind)):
        layout_of((9, 4, 3, 2), {**settings, "batch_axes": 1})


@pytest.mark.parametrize(
    ("size", "limit", "count", "block"),
    [
        (2049, 2048, 2, 1056),
        (4096, 2048, 2, 2048),
        (11008, 2048, 6, 1856),
        (14336, 2048, 7, 2048),
        (3000, 2048, 2, 1504),
        (32000, 2048, 16, 2016),
        (2049, 1024, 3, 704),
        (11008, 1024, 11, 1024),
        (384, 48, 8, 48),
        (256, 100, 3, 96),
        (7, 5, 2, 4),
    ],
)
def test_blocks_of_a_large_axis(size, limit, count, block):
    assert automatic(size, limit) == Blocks(block)
    assert Blocks(block).shape(size) == (count, block, block)


def test_every_axis_up_to_sixteen_limits_has_full_blocks():
    """Multiples of 32, or of 16 where the limit is none of 32, and none of them empty."""
    for limit in (16, 40, 96, 100, 1024):
        for size in range(limit + 1, 16 * limit + 1, 1 if limit < 100 else 97):
            structure = automatic(size, limit)
            count, block, _ = structure.shape(size)
            assert block <= limit
            assert block % (16 if limit % 32 else 32) == 0
            assert (count - 1) * block < size
            assert limit < 1024 or count * block - size < 0.1 * size
        assert automatic(16 * limit + 1, limit) is DIAGONAL


def test_an_axis_too_large_for_a_dense_factor_is_refused():
    with pytest.raises(
        ValueError, match=r"axis of 400, .*above max_dense_dim=100: .* GiB; pass 'block', 'auto'"
    ):
        layout_of((8, 400), {**GROUP, "structures": "dense"})


def test_structures_must_be_one_an_axis():
    with pytest.raises(ValueError, match=r"of length 3, but a parameter of shape \(8, 4\)"):
        layout_of((8, 4), {**GROUP, "structures": ("dense", "dense", "auto")})


def test_products_are_kept_where_that_costs_fewer_flops():
    square, wide = Layout((64, 64), (DENSE, DENSE)), Layout((64, 512), (DENSE, DENSE))
    assert caches_product(wide, 0, 1, CPU)
    assert not caches_product(wide, 1, 1, CPU)
    assert caches_product(wide, 1, 10, CPU)
    assert caches_product(square, 0, 1, CPU)
    assert caches_product(Layout((140, 100), (DENSE, DENSE)), 0, 1, CPU)
    assert not caches_product(Layout((160, 100), (DENSE, DENSE)), 0, 1, CPU)
    assert caches_product(wide, 1, 1, CUDA)
    assert not caches_product(Layout((64, 512), (DENSE, DIAGONAL)), 1, 10, CUDA)


def test_factor_state_by_dtype():
    layout = Layout((4, 3), (DENSE, DIAGONAL))
    spec = factor_state(layout, torch.bfloat16, 1.0)
    state = {key: initial(CPU) for key, initial in spec.items()}
    assert {key: (tuple(v.shape), v.dtype) for key, v in state.items()} == {
        "factor_0": ((4, 4), torch.bfloat16),
        "factor_momentum_0": ((4, 4), torch.bfloat16),
        "factor_0_residual": ((4, 4), torch.int16),
        "factor_1": ((3,), torch.float32),
        "factor_momentum_1": ((3,), torch.float32),
    }
    assert torch.equal(state["factor_0"].float(), torch.eye(4))
    assert not state["factor_0_residual"].any()
    parts = factor_state(layout, torch.bfloat16, 0.3)
    whole = join(*(parts[key](CPU) for key in ("factor_0", "factor_0_residual")))
    assert torch.equal(whole, torch.eye(4) * 0.3**-0.25)
    assert "factor_0_residual" not in factor_state(layout, torch.float32, 1.0)
    assert factor_state(layout, torch.float64, 1.0)["factor_1"](CPU).dtype == torch.float64


# Buckets of the stacks


DENSE_4_3 = Layout((4, 3), (DENSE, DENSE))


def stacked_states(count=5, dtype=torch.float32, interval=1):
    spec = factor_state(DENSE_4_3, dtype, 1.0)
    states = allocate([spec] * count, [dict.fromkeys(spec, CPU)] * count)
    for i, state in enumerate(states):
        state["factor_0"].fill_(i)
    return states, Stacks(states, [DENSE_4_3] * count, "factor_momentum_{}", interval)


def buckets_of(stacks, states, updates):
    """By bucket the parameters, and whose factors it has, which `stacked_states` numbers."""
    plan = stacks.plan(states, updates)
    assert not plan.vectors
    return [(b.params, b.factors[0][:, 0, 0].tolist()) for b in plan.buckets]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bucket_is_what_lies_together_and_steps_alike(dtype):
    states, stacks = stacked_states(dtype=dtype)
    every, all_of_them = [True] * 5, list(range(5))
    assert buckets_of(stacks, states, every) == [(all_of_them, all_of_them)]
    backwards = buckets_of(stacks, states[::-1], every)  # in the order of the stack
    assert backwards == [(all_of_them[::-1], all_of_them)]
    # Where the third has no gradient, the others are two buckets, each of its own factors.
    gap = [states[i] for i in (0, 1, 3, 4)]
    assert buckets_of(stacks, gap, every[:4]) == [([0, 1], [0, 1]), ([2, 3], [3, 4])]
    mixed = buckets_of(stacks, states, [True, False, False, True, True])
    assert sorted(mixed) == [([0], [0]), ([1, 2], [1, 2]), ([3, 4], [3, 4])]
    part = stacks.plan(gap, every[:4]).buckets[1]
    assert [r.shape[0] for r in part.residuals] == [2 * (dtype == torch.bfloat16)] * 2
    assert part.products_are_stale()  # nobody has made K K^T of it


@pytest.mark.parametrize("key", ["factor_0", "factor_1", "factor_momentum_1"])
def test_states_of_which_one_tensor_is_elsewhere_are_no_stack(key):
    """Whoever replaced it; every tensor of a state must lie in the stacks, not the first alone."""
    states, stacks = stacked_states()
    states[2][key] = states[2][key].clone()
    assert not stacks.hold(states)
    anew = Stacks(states, [DENSE_4_3] * 5, "factor_momentum_{}", 1)
    found = buckets_of(anew, states, [True] * 5)
    assert found == [([0, 1], [0, 1]), ([2], [2]), ([3, 4], [3, 4])]
    last = anew.plan(states, [True] * 5).buckets[-1]
    assert all(
        torch.equal(whole[i], states[3 + i][name])
        for name, whole in zip(("factor_0", "factor_1"), last.factors, strict=True)
        for i in (0, 1)
    )


def test_room_for_products_is_where_they_are_kept():
    """Axis 0 of (4, 3) is worth it at every step; of (60, 3) at long intervals alone."""
    for size, interval, kept in ((4, 1, True), (60, 1, False), (60, 20, True)):
        layout = Layout((size, 3), (DENSE, DENSE))
        spec = factor_state(layout, torch.float32, 1.0)
        states = allocate([spec], [dict.fromkeys(spec, CPU)])
        stacks = Stacks(states, [layout], "factor_momentum_{}", interval)
        (bucket,) = stacks.plan(states, [True]).buckets
        assert (bucket.products[0].numel() > 0) is kept
        assert bucket.products[0].shape in (bucket.factors[0].shape, (0,))
