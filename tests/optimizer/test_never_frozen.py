"""s moves however small its steps: bfloat16 parameters train with the s of float64.

The released code keeps its second moment in the dtype of the (bfloat16) gradients. With the
published CNN settings, 1 - alpha between 1.2e-4 and 1.5e-3, v (1 - c) rounds back to v, so s stays
exactly 1 and the method is momentum SGD: `released_second_moment` shows it beside ours.
"""

from __future__ import annotations

import pytest
import torch
from helpers.comparison import relative_error

from rootfree_fused import RootFreeAdamW, RootFreeRMSprop

ALPHA = 1 - 1.2e-3
STEPS = 4000
BATCH = 32


def released_second_moment(square_avg, grad, alpha):
    """The released code's two statements on v = s / B, in the dtype that it is given."""
    square_avg.mul_(alpha).add_(grad * grad, alpha=1 - alpha)


def gradients(size, steps):
    generator = torch.Generator().manual_seed(0)
    scale = torch.logspace(-4, -1, size)
    for _ in range(steps):
        yield (scale * torch.randn(size, generator=generator)).bfloat16()


def test_released_code_stays_at_one_in_bfloat16():
    v = torch.full((64,), 1 / BATCH, dtype=torch.bfloat16)
    exact = v.double()
    for g in gradients(64, STEPS):
        released_second_moment(v, g, ALPHA)
        released_second_moment(exact, g.double(), ALPHA)
    frozen = (BATCH * v[:32]).double()
    assert (frozen == 1).all()
    assert (BATCH * exact[:32] < 0.05).all()


@pytest.mark.parametrize("cls", [RootFreeRMSprop, RootFreeAdamW])
def test_s_moves_as_in_float64(cls, device):
    decay = {"betas": (0.9, ALPHA)} if cls is RootFreeAdamW else {"alpha": ALPHA, "momentum": 0.9}
    key = "exp_avg_sq" if cls is RootFreeAdamW else "square_avg"
    low = torch.nn.Parameter(torch.ones(64, device=device, dtype=torch.bfloat16))
    high = torch.nn.Parameter(torch.ones(64, device=device, dtype=torch.float64))
    optimizers = [cls([p], lr=1e-5, batch_size=BATCH, **decay) for p in (low, high)]
    for g in gradients(64, STEPS):
        low.grad, high.grad = g.to(device), g.to(device).double()
        for optimizer in optimizers:
            optimizer.step()
    s, truth = (o.state[p][key] for o, p in zip(optimizers, (low, high), strict=True))
    assert (truth[:32] < 0.05).all()
    # A float32 recurrence x <- x + c (y - x) contracts: its error stays below about 2 eps / c.
    bound = 2 * torch.finfo(torch.float32).eps / (1 - ALPHA)
    assert ((s.double() - truth).abs() <= bound * truth).all(), relative_error(s, truth)
