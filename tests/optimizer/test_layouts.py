"""Which factors a shape owns, when K K^T is kept, and how state is stacked."""

from __future__ import annotations

import re

import pytest
import torch

from rootfree_fused.optimizer.layouts import (
    Layout,
    Stacks,
    caches_product,
    factor_state,
    layout_of,
)
from rootfree_fused.optimizer.stacks import allocate
from rootfree_fused.reference import join
from rootfree_fused.reference.structures import DENSE, DIAGONAL

GROUP = {
    "structures": "auto",
    "max_dense_dim": 100,
    "merge_axes": True,
    "vector_method": "rmsprop",
}
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("shape", "settings", "sizes", "structures"),
    [
        ((8, 4), {}, (8, 4), (DENSE, DENSE)),
        ((8, 400), {}, (8, 400), (DENSE, DIAGONAL)),
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
        ((8, 400), {"structures": ("dense", "auto")}, (8, 400), (DENSE, DIAGONAL)),
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


def test_an_axis_too_large_for_a_dense_factor_is_refused():
    with pytest.raises(
        ValueError, match=r"axis of 400, above max_dense_dim=100.* GiB; pass 'auto'"
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


def stacked_states(count=5, dtype=torch.float32, interval=1):
    spec = factor_state(Layout((4, 3), (DENSE, DENSE)), dtype, 1.0)
    states = allocate([spec] * count, [dict.fromkeys(spec, CPU)] * count)
    for i, state in enumerate(states):
        state["factor_0"].fill_(i)
    return states, Stacks(states, "factor_momentum_{}", interval)


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
    anew = Stacks(states, "factor_momentum_{}", 1)
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
        spec = factor_state(Layout((size, 3), (DENSE, DENSE)), torch.float32, 1.0)
        states = allocate([spec], [dict.fromkeys(spec, CPU)])
        (bucket,) = Stacks(states, "factor_momentum_{}", interval).plan(states, [True]).buckets
        assert (bucket.products[0].numel() > 0) is kept
        assert bucket.products[0].shape in (bucket.factors[0].shape, (0,))
