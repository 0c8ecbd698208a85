"""Root-free Shampoo's launcher against the specification: on a GPU, or interpreted."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from helpers.kernels_matrix import _interpreter, _poisoned_scratch
from helpers.kernels_rootfree_shampoo import (
    BF16,
    DENSE,
    F16,
    F32,
    LEFT,
    NEITHER,
    RIGHT,
    Model,
)

from rootfree_fused.kernels import matrix, rootfree_shampoo

__all__ = ["_interpreter", "_poisoned_scratch"]  # fixtures

# Parameter shape, the structures of its axes (helpers.blocks), how many. Rows of 8 n are aligned,
# others are ragged; 66 is more than a tile. Blocks of 72 are more than one, and the last of each
# axis is padded.
BUCKETS = [
    ((3, 5), DENSE, 1),
    ((17, 33), DENSE, 2),
    ((34, 147), DENSE, 1),
    ((66, 8), DENSE, 1),
    ((16, 72), LEFT, 1),
    ((9, 10), LEFT, 1),
    ((66, 8), RIGHT, 1),
    ((11, 7), RIGHT, 1),
    ((8, 70), NEITHER, 1),
    ((40, 24), (16, 8), 2),
    ((100, 9), (72, True), 1),
    ((9, 83), (True, 72), 1),
    ((40, 11), (16, False), 1),
    ((7, 40), (False, 16), 1),
]
FEW = [((7, 9), DENSE, 1), ((24, 16), DENSE, 2), ((9, 16), LEFT, 1), ((8, 7), NEITHER, 1)]
CASES = {
    "all": {},
    "ascending": {"maximize": True},
    "rows as they are": {"row_beta": None},
    "newest alone": {"beta1": 0.0, "beta2": 0.0, "row_beta": 0.0},
}


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_steps_follow_the_specification(case, dtype, device):
    model = Model(device, dtype, BUCKETS if case == "all" else FEW, **CASES[case])
    for update in (True, False) if case == "all" else (True, False, True):
        model.step(update=update)
    model.check()


def test_large_tiles(device, monkeypatch):
    """The tiling of large models, on matrices of one tile and of several."""
    monkeypatch.setattr(rootfree_shampoo, "tiling_of", lambda *_: matrix.LARGE)
    buckets = [((136, 8), DENSE, 1), ((7, 130), RIGHT, 1), ((8, 200), LEFT, 1)]
    buckets.append(((150, 264), (80, 136), 1))
    model = Model(device, BF16, buckets)
    for update in (True, False):
        model.step(update=update)
    model.check()


def test_products_are_refreshed_where_factors_were_loaded(device):
    model = Model(device, BF16, [((24, 9), DENSE, 1), ((16, 8), RIGHT, 1)])
    model.step(update=False, refresh=True)
    model.step(update=False)
    model.check()


@pytest.mark.parametrize("dtypes", [(BF16, BF16), (BF16, F32), (F16, F16), (F16, F32)], ids=str)
def test_parameters_of_16_bits(dtypes, device):
    model = Model(device, BF16, FEW, *dtypes)
    for update in (True, False):
        model.step(update=update)
    model.check()


@pytest.mark.parametrize("layout", ["transposed", "gapped", "misaligned"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_layouts(layout, dtype, device):
    model = Model(device, dtype, [((10, 24), DENSE, 1), ((7, 9), LEFT, 1)], layout=layout)
    for update in (True, False):
        model.step(update=update)
    model.check()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_convolutions_are_matrices(layout, device):
    model = Model(device, F32, [((6, 3, 3, 3), DENSE, 2), ((8, 4, 2, 1), RIGHT, 1)], layout=layout)
    for update in (True, False):
        model.step(update=update)
    model.check()


@pytest.mark.parametrize("place", ["cpu", "device"])
def test_lr_is_a_tensor_that_changes(place, device):
    model = Model(device, BF16, [((7, 16), DENSE, 1)])
    lr = torch.tensor(0.3, device="cpu" if place == "cpu" else device)
    for factor in (1.0, 0.5):
        model.step(lr=lr * factor)
    model.check()


# Gradients of every size, none, and broken ones ---------------------------------------------------


@pytest.mark.parametrize("exponent", [-120, -64, 60, 124])
def test_no_scale_of_a_gradient_matters(exponent, device):
    """To the bit, where nothing is lost when the gradient is multiplied."""
    first, second = Model(device, BF16, FEW), Model(device, BF16, FEW)
    for one, other in zip(first.written(), second.written(), strict=True):
        other.copy_(one)
    grads = [torch.randint(-8, 9, shape).float().to(device) for shape in first.shapes]
    first.launch(grads)
    second.launch([g * 2.0 ** (exponent - 3) * 8 for g in grads])
    for one, other in zip(first.written(), second.written(), strict=True):
        assert torch.equal(one, other)


def test_a_zero_gradient_leaves_grams_and_factors_alone(device):
    model = Model(device, BF16, FEW)
    grads = model.fresh_grads()
    for i in (0, 2, 4):
        grads[i].zero_()
    before = [t.clone() for t in (*model.grams, *model.factors, *model.residuals)]
    model.launch(grads)
    after = [*model.grams, *model.factors, *model.residuals]
    members = [(0,), (1, 2), (3,), (4,)]
    still = {0, 2, 4}
    for i, (old, new) in enumerate(zip(before, after, strict=True)):
        for row, member in enumerate(members[i % 8 // 2] if old.numel() else ()):
            assert torch.equal(old[row], new[row]) == (member in still)
    assert all(p.isfinite().all() for p in model.params)


def test_a_broken_gradient_stays_in_its_matrix(device):
    model, whole = Model(device, BF16, FEW), Model(device, BF16, FEW)
    for one, other in zip(model.written(), whole.written(), strict=True):
        other.copy_(one)
    grads = model.fresh_grads()
    whole.launch(grads)
    broken = [g.clone() for g in grads]
    broken[1][0, 0] = float("nan")
    broken[3][2, 2] = float("inf")
    model.launch(broken)
    for i, (one, other) in enumerate(zip(model.params, whole.params, strict=True)):
        assert torch.equal(one, other) == (i not in (1, 3))
        assert one.isnan().all() if i in (1, 3) else one.isfinite().all()
    assert torch.equal(model.factors[2][1], whole.factors[2][1])


@pytest.mark.parametrize("update", [True, False])
def test_a_skipped_step_changes_nothing(update, device):
    model = Model(device, BF16, FEW)
    model.step(update=False, refresh=True)
    before = [t.clone() for t in model.written()]
    scaling = {"grad_scale": torch.full((1,), 4.0), "found_inf": torch.ones(1)}
    scaling = {key: value.to(device) for key, value in scaling.items()}
    grads = [torch.full_like(g, float("inf")) for g in model.fresh_grads()]
    model.launch(grads, update=update, **scaling)
    for old, new in zip(before, model.written(), strict=True):
        assert torch.equal(old, new)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_runs_agree_to_the_bit(dtype, device):
    models = []
    for _ in range(2):
        torch.manual_seed(1)
        model = Model(device, dtype, FEW)
        for update in (True, False):
            model.launch(model.fresh_grads(), update=update)
        models.append(model)
    for one, other in zip(*(model.written() for model in models), strict=True):
        assert torch.equal(one, other)
    for symmetric in (*models[0].products, *models[0].grams):
        if symmetric.dim() == 3:
            assert torch.equal(symmetric, symmetric.mT)


@pytest.mark.parametrize(("update", "expected"), [(True, 13), (False, 6)])
def test_the_number_of_launches_is_that_of_one_matrix(update, expected, device, monkeypatch):
    """Thirteen of an update, and six between, of any number of matrices."""
    model = Model(device, BF16, [*FEW, ((11, 7), RIGHT, 1), ((40, 24), (16, 8), 1)])
    model.launch(model.fresh_grads())
    count = 0

    for name in [name for name in vars(rootfree_shampoo) if name.endswith("_kernel")]:
        kernel = getattr(rootfree_shampoo, name)

        class Counted:
            def __init__(self, kernel):
                self.kernel = kernel

            def __getattr__(self, attribute):
                return getattr(self.kernel, attribute)

            def __getitem__(self, grid):
                nonlocal count
                count += 1
                return self.kernel[grid]

        monkeypatch.setattr(rootfree_shampoo, name, Counted(kernel))
    model.launch(model.fresh_grads(), update=update)
    assert count == expected
