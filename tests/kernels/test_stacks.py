"""Stacks of aligned matrices, on Hopper by descriptors and cuBLAS: on a GPU, or interpreted."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("triton")

from helpers import kernels_rootfree_shampoo as shampoo
from helpers.kernels_matrix import (
    BF16,
    DENSE,
    F16,
    F32,
    LEFT,
    Model,
    _interpreter,
    _poisoned_scratch,
)

from rootfree_fused.kernels import matrix, matrix_launches, rootfree_shampoo

__all__ = ["_interpreter", "_poisoned_scratch"]  # fixtures


@pytest.fixture
def stacks(device, monkeypatch):
    """Buckets that can be computed as stacks are, whatever their size."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (9, 0):
        pytest.skip("tensor descriptors need sm_90")
    for launcher in (matrix, rootfree_shampoo):
        monkeypatch.setattr(launcher, "tiling_of", lambda *_: matrix.LARGE_HOPPER)
    monkeypatch.setattr(matrix, "ENOUGH_LARGE_TILES", 0)


STACKS = [((136, 24), DENSE, 2), ((16, 264), DENSE, 1), ((9, 16), DENSE, 1), ((8, 40), LEFT, 1)]


@pytest.mark.parametrize("case", ["momentum", "plain coupled"])
def test_stacks_follow_the_specification(case, stacks, device):
    """In one step with buckets that are none: ragged, or with a diagonal factor."""
    model = Model(device, case, BF16, STACKS)
    for update in (True, False, True):
        model.step(update=update)
    model.check()


def test_products_of_stacks_are_refreshed(stacks, device):
    model = Model(device, "momentum", BF16, STACKS[:2])
    model.step(update=False, refresh=True)
    model.step(update=False)
    model.check()


@pytest.mark.parametrize("dtypes", [(BF16, BF16), (F16, F32)], ids=str)
def test_stacks_of_parameters_of_16_bits(dtypes, stacks, device):
    model = Model(device, "momentum", BF16, [((136, 24), DENSE, 2)], *dtypes)
    model.step()
    model.check()


def test_a_bucket_of_two_dtypes_is_one_stack(stacks, device):
    """The launch on one dtype finds its matrices among the others."""
    model = Model(device, "momentum", BF16, [((24, 16), DENSE, 3)])
    grads = model.fresh_grads()
    model.params[1] = model.params[1].bfloat16()
    grads[1] = grads[1].bfloat16()
    for kind in (model.eager, model.truth):
        kind["params"][1] = model.params[1].to(kind["params"][1], copy=True)
    model.eager["params"][1] = model.params[1].clone()
    model.step(grads=grads)
    model.check()


@pytest.mark.parametrize("case", [{}, {"row_beta": None, "maximize": True}], ids=str)
def test_stacks_of_root_free_shampoo_follow_the_specification(case, stacks, device):
    model = shampoo.Model(device, BF16, STACKS, **case)
    for update in (True, False, True):
        model.step(update=update)
    model.check()
    for product in filter(torch.Tensor.numel, model.products):
        assert torch.equal(product, product.mT)


def test_products_of_stacks_of_root_free_shampoo_are_refreshed(stacks, device):
    model = shampoo.Model(device, BF16, STACKS[:2])
    model.step(update=False, refresh=True)
    model.step(update=False)
    model.check()


@pytest.mark.parametrize("value", [0.0, math.nan])
def test_a_gradient_of_a_stack_of_root_free_shampoo_stays_in_its_matrix(value, stacks, device):
    """Zeros leave S and K alone; a NaN reaches no neighbour."""
    model = shampoo.Model(device, BF16, [((136, 24), DENSE, 3)])
    grads = model.fresh_grads()
    grads[1].fill_(value)
    state = [*model.grams, *model.factors, *model.residuals]
    before = [t.clone() for t in state]
    model.launch(grads)
    model.launch(model.fresh_grads(), update=False)
    pairs = zip(before, state, strict=True)
    kept = [[torch.equal(*each) for each in zip(*pair, strict=True)] for pair in pairs]
    assert all(each == [False, value == 0, False] for each in kept)
    for tensors in (model.params, *model.grams, *model.factors, *model.products):
        assert [t.isfinite().all().item() for t in tensors] == [True, value == 0, True]


def test_found_inf_leaves_stacks_of_root_free_shampoo_alone(stacks, device):
    model = shampoo.Model(device, BF16, [((136, 24), DENSE, 2)])
    before = [t.clone() for t in model.written()]
    model.launch(model.fresh_grads(), found_inf=torch.ones(1, device=device))
    for old, new in zip(before, model.written(), strict=True):
        assert torch.equal(old.nan_to_num(), new.nan_to_num())


@pytest.mark.parametrize("plain", [0, 1])
def test_stacks_and_the_table_agree_bit_for_bit(plain, stacks, device, monkeypatch):
    """Where cuBLAS's products have one term each, which it cannot add up in another order."""
    models = []
    for enough in (0, math.inf):
        torch.manual_seed(1)
        monkeypatch.setattr(matrix, "ENOUGH_LARGE_TILES", enough)
        model = Model(device, "momentum", BF16, [((136, 200), DENSE, 2)])
        identity = torch.eye(model.factors[plain].shape[-1])
        model.factors[plain].copy_(identity)
        model.residuals[plain].zero_()
        grads = [torch.eye(*shape).to(device) for shape in model.shapes]
        model.launch(grads, torch.tensor(0.1), update=True)
        models.append(model)
    for name in ("params", "buffers", "factors", "residuals", "momenta", "products"):
        for a, b in zip(getattr(models[0], name), getattr(models[1], name), strict=True):
            assert torch.equal(a, b), name


def test_stacked_products_and_momenta_are_symmetric(stacks, device):
    model = Model(device, "momentum", BF16, [((136, 24), DENSE, 1)])
    model.step()
    for tensor in (*model.products, *model.momenta):
        assert torch.equal(tensor, tensor.mT)


def test_a_nonfinite_gradient_stays_in_its_matrix_of_a_stack(stacks, device):
    """Sizes that no tile divides: a tile reaches beyond the matrix, into the next."""
    model = Model(device, "momentum", BF16, [((136, 24), DENSE, 3)])
    grads = model.fresh_grads()
    grads[1][135, 23] = math.nan
    model.launch(grads, torch.tensor(0.1), update=True)
    model.launch(model.fresh_grads(), torch.tensor(0.1), update=False)
    for tensors in (model.params, *model.factors, *model.momenta, *model.products):
        assert [t.isfinite().all().item() for t in tensors] == [True, False, True]


def test_a_zero_gradient_leaves_its_factors_of_a_stack_alone(stacks, device):
    model = Model(device, "momentum", BF16, [((136, 24), DENSE, 3)])
    grads = model.fresh_grads()
    grads[1].zero_()
    names = ("factors", "residuals", "momenta")
    before = [t.clone() for name in names for t in getattr(model, name)]
    model.step(grads=grads)
    model.check()
    after = [t for name in names for t in getattr(model, name)]
    for old, new in zip(before, after, strict=True):
        assert [torch.equal(a, b) for a, b in zip(old, new, strict=True)] == [False, True, False]


def test_found_inf_leaves_stacks_alone(stacks, device):
    model = Model(device, "momentum", BF16, [((136, 24), DENSE, 2)])
    names = ("params", "buffers", "factors", "residuals", "momenta", "products")
    for product in model.products:
        product.fill_(3)
    before = {name: [t.clone() for t in getattr(model, name)] for name in names}
    found = torch.ones(1, device=device)
    model.launch(model.fresh_grads(), torch.tensor(0.1), update=True, found_inf=found)
    for name, tensors in before.items():
        assert all(map(torch.equal, tensors, getattr(model, name))), name


def test_the_users_setting_of_reductions_changes_nothing_and_stays(device, monkeypatch):
    settings = torch.backends.cuda.matmul
    name = "allow_bf16_reduced_precision_reduction"
    a, b = (torch.randn(2, 8, 8, device=device, dtype=BF16) for _ in range(2))
    seen, real = [], torch.bmm

    def watched(*args, **kwargs):
        seen.append(getattr(settings, name))
        return real(*args, **kwargs)

    monkeypatch.setattr(torch, "bmm", watched)
    before = getattr(settings, name)
    try:
        for allowed in (True, False):
            setattr(settings, name, allowed)
            matrix_launches.bmm(a, b, torch.empty_like(a))
            assert getattr(settings, name) == allowed
    finally:
        setattr(settings, name, before)
    assert seen == [False, False]
