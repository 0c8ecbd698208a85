"""Which factors a shape owns, when K K^T is kept, and how state is stacked."""

from __future__ import annotations

import pytest
import torch

from rootfree_fused.optimizer.layouts import Layout, caches_product, factor_state, layout_of
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
