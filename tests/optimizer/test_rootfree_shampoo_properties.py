"""RootFreeShampoo, with the device's kernels, on the sequences that its specification survives."""

from __future__ import annotations

import pytest
import torch
from conftest import DEVICES
from helpers.gradients import BF16, F32, SEQUENCES, certainly, deterministic, gradients_of
from helpers.kept_sums import told_of_sums, watched_launches

from rootfree_fused import RootFreeShampoo
from rootfree_fused.reference import shape_scale

hypothesis = pytest.importorskip("hypothesis")

RMS = 0.4
# What an update may be off by: its bfloat16 parameter is rounded, its products are before that.
ROUNDING = {F32: 1e-4, BF16: 2.0**-8}


def trials(shape, device, dtype, factor_dtype, **settings):
    """A parameter at zero, whose value after a step of lr 1 and full decay is minus the update."""
    param = torch.nn.Parameter(torch.zeros(shape, device=device, dtype=dtype))
    settings = {"factor_dtype": factor_dtype, "update_rms": RMS, **settings}
    return param, RootFreeShampoo([param], lr=1.0, weight_decay=1.0, **settings)


def step(param, optimizer, grad):
    param.grad = grad.to(param.device, param.dtype)
    optimizer.step()
    return -param.detach().clone()


def rms(x):
    return x.double().square().mean().sqrt().item()


@certainly(structures="dense", damping=1e-4)
@hypothesis.given(
    sequence=SEQUENCES,
    structures=hypothesis.strategies.sampled_from(["dense", "diagonal", ("dense", "diagonal")]),
    damping=hypothesis.strategies.sampled_from([0.1, 1e-4]),
)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("dtype", "factor_dtype"), [(F32, F32), (F32, BF16), (BF16, BF16)], ids=str
)
@deterministic(4)
def test_every_update_is_finite_and_of_one_rms(
    sequence, structures, damping, dtype, factor_dtype, device
):
    settings = {"structures": structures, "damping": damping}
    param, optimizer = trials(sequence["shape"], device, dtype, factor_dtype, **settings)
    for t, grad in enumerate(gradients_of(sequence, dtype)):
        with watched_launches() as launches:
            update = step(param, optimizer, grad)
        state = optimizer.state[param]
        assert all(value.isfinite().all() for value in state.values())
        moved = state["momentum_buffer"].any().item()
        expected = RMS * shape_scale(*sequence["shape"]) if moved else 0
        as_expected = rms(update) == pytest.approx(expected, rel=ROUNDING[dtype])
        assert as_expected, f"step {t}: {rms(update)}, not {expected}; {told_of_sums(launches)}"


@hypothesis.given(sequence=SEQUENCES)
@pytest.mark.parametrize("factor_dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("device", DEVICES)
@deterministic(4)
def test_powers_of_two_change_no_bit(sequence, factor_dtype, device):
    one, other = (trials(sequence["shape"], device, F32, factor_dtype) for _ in range(2))
    for t, grad in enumerate(gradients_of(sequence, torch.float64)):
        # Within float32's normal numbers, so that a power of two is exact.
        grad = (grad / grad.abs().amax().clamp_min(1e-300)).float()
        scaled = grad * 2.0 ** (-40, 3, 40)[t % 3]
        assert torch.equal(step(*one, grad), step(*other, scaled))
