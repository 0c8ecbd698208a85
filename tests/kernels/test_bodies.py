"""A diagonal method in Triton is its update, its row of scalars and one entry of `diag.BODIES`."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
from helpers.comparison import assert_no_worse_than
from helpers.offline import on_its_device
from helpers.operators import ADAMW, RMSPROP

from rootfree_fused.kernels import diag
from rootfree_fused.kernels.slots import columns


class AdagradScalars(NamedTuple):
    """Of root-free Adagrad, a method that is only here."""

    lr: float
    batch_size: float
    damping: float


ADAGRAD = columns(AdagradScalars)


@triton.jit
def _adagrad_update(p, g, s, other, lr, scalars_ptr, step_ptr):
    s += tl.load(scalars_ptr + ADAGRAD.batch_size) * g * g
    return p - lr * g / (s + tl.load(scalars_ptr + ADAGRAD.damping)), s, other


def adagrad(p, g, s, *, lr, batch_size, damping):
    s += batch_size * g * g
    p -= lr * g / (s + damping)


def test_a_method_is_its_update_and_its_scalars(device, request, monkeypatch):
    def scalars(lr, *, batch_size, damping):
        return AdagradScalars(lr=lr, batch_size=batch_size, damping=damping)

    body = diag.Body(_adagrad_update, scalars, counts=False)
    monkeypatch.setitem(diag.BODIES, "adagrad_", body)
    sizes, settings = (7, diag.BLOCK + 3), {"batch_size": 4.0, "damping": 0.1}
    params, grads = ([torch.randn(n, device=device) for n in sizes] for _ in range(2))
    sums = [torch.ones(n, device=device) for n in sizes]
    eager = [[t.clone() for t in tensors] for tensors in (params, grads, sums)]
    truth = [[t.double() for t in tensors] for tensors in (params, grads, sums)]
    with on_its_device(request):
        for _ in range(3):
            diag.update_("adagrad_", params, grads, sums, torch.tensor(0.25), **settings)
    for lists in (eager, truth):
        for _ in range(3):
            for tensors in zip(*lists, strict=True):
                adagrad(*tensors, lr=0.25, **settings)
    for actual, *others in zip((params, sums), eager[::2], truth[::2], strict=True):
        for tensors in zip(actual, *others, strict=True):
            assert_no_worse_than(*tensors)


@pytest.mark.parametrize(("name", "settings"), [("rmsprop_", RMSPROP), ("adamw_", ADAMW)])
def test_a_setting_that_is_missing_or_unknown_is_refused_by_its_name(name, settings):
    plan = diag.prepare([[torch.ones(3)] for _ in range(4)])
    incomplete = {key: value for key, value in settings.items() if key != "damping"}
    with pytest.raises(TypeError, match="damping"):
        diag.launch(name, plan, None, 0.1, **incomplete)
    with pytest.raises(TypeError, match="eps"):
        diag.launch(name, plan, None, 0.1, **settings, eps=1e-8)
