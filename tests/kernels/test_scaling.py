"""A gradient scaler's scale and infs in the Triton kernels: on a GPU where there is one, or not."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("triton")

from helpers.kernels_diag import Lists
from helpers.kernels_matrix import BF16, F16, F32, FEW, Model
from helpers.offline import on_its_device

from rootfree_fused.kernels import diag

LR = torch.tensor(0.3)
DIAGONAL = [
    "rmsprop",
    "rmsprop momentum",
    "adamw",
    "adamw bias correction",
    "sign",
    "sign of micro-batches",
]

# The interpreter is numpy, which reports the infinities that are put in here.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")


@pytest.fixture(autouse=True)
def _interpreter(request):
    with on_its_device(request):
        yield


def diagonal(case, device, dtypes):
    """A launch of gradients, the gradients, and all that the launch writes."""
    lists = Lists(case, [(31,), (diag.BLOCK + 5,)], device, dtypes)
    written = [t for tensors in lists.actual for t in tensors]
    return lists.launch, lists.fresh_grads(), written


def matrices(device, dtype, grad_dtype):
    model = Model(device, "momentum", dtype, FEW, grad_dtype=grad_dtype)
    for product in model.products:
        product.fill_(3)
    written = [*model.params, *model.factors, *model.residuals, *model.momenta, *model.buffers]
    written += model.products

    def launch(grads, lr, **scaling):
        model.launch(grads, lr, update=True, **scaling)

    return launch, model.fresh_grads(), written


def problem(case, device, grad_dtype=F32):
    """The same values for every call, whatever was drawn before."""
    torch.manual_seed(0)
    if case in DIAGONAL:
        return diagonal(case, device, (F16 if grad_dtype == F16 else BF16, grad_dtype))
    return matrices(device, {"bfloat16": BF16, "float32": F32}[case], grad_dtype)


CASES = [*DIAGONAL, "bfloat16", "float32"]


@pytest.mark.parametrize("case", CASES)
def test_a_power_of_two_that_scales_gradients_changes_no_bit(case, device):
    launch, grads, expected = problem(case, device)
    launch(grads, LR)
    launch, grads, written = problem(case, device)
    scale, found_inf = torch.tensor([1024.0], device=device), torch.zeros((), device=device)
    launch([1024 * g for g in grads], LR, grad_scale=scale, found_inf=found_inf)
    assert all(map(torch.equal, written, expected))


@pytest.mark.parametrize("case", CASES)
def test_found_infs_leave_every_bit(case, device):
    launch, grads, written = problem(case, device, F16)
    before = [t.clone() for t in written]
    found_inf = torch.tensor([2.0], device=device)
    launch([torch.full_like(g, math.inf) for g in grads], LR, found_inf=found_inf)
    assert all(map(torch.equal, written, before))
    launch(grads, LR, found_inf=torch.zeros_like(found_inf))
    assert not any(torch.equal(t, b) for t, b in zip(written, before, strict=True) if t.numel())
