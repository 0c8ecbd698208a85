"""The specification of IF-Shampoo against the released codes' trajectories and by hand."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.golden import MATRIX, load
from helpers.golden import factor as golden_factor
from helpers.truth import times_identity

from rootfree_fused import reference
from rootfree_fused.optimizer.layouts import layout_of

SETTINGS = ("factor_lr", "factor_momentum", "damping", "batch_size")
FLOAT64 = torch.float64


def test_every_case_is_here():
    assert len(MATRIX) == 15


@pytest.mark.parametrize("case", MATRIX)
def test_golden(case):
    data, meta = load(case)
    logarithmic = isinstance(meta["update_interval"], str)
    interval = 3 if logarithmic else meta["update_interval"]
    for i, shape in enumerate(meta["shapes"]):
        sizes = [d for d in shape if d != 1] or [1]
        group = {"structures": meta["structure"], "max_dense_dim": 100, "merge_axes": False}
        structures = layout_of(shape, {**group, "vector_method": "factor"}).structures
        axes = list(zip(structures, sizes, strict=True))
        factors = [times_identity(1.0, *axis, FLOAT64) for axis in axes]
        momenta = [torch.zeros_like(factor) for factor in factors]
        param = data[f"param0.{i}"]
        buffer = torch.zeros_like(param)
        for t in range(meta["steps"]):
            grad = data[f"grad.{t}.{i}"].reshape(sizes)
            if reference.is_update_step(t, interval, "log4" if logarithmic else "constant"):
                settings = {key: meta[key] for key in SETTINGS}
                reference.update_factors_(grad, factors, momenta, structures=structures, **settings)
            update = reference.precondition(grad, factors, structures).reshape(shape)
            reference.apply_(
                param,
                update,
                buffer,
                lr=meta["lr"],
                momentum=meta["momentum"],
                weight_decay=meta["weight_decay"],
                decoupled=False,
            )
            expected = data[f"param.{t}.{i}"]
            assert (param - expected).abs().max() <= 1e-12 * expected.abs().max()
        for axis, (structure, factor) in enumerate(zip(structures, factors, strict=True)):
            expected = golden_factor(data, i, axis, len(sizes))
            if expected is not None:
                dense = structure.left(factor, torch.eye(sizes[axis], dtype=FLOAT64))
                assert (dense - expected).abs().max() <= 1e-12 * expected.abs().max()


def test_one_update_by_hand():
    """G = (2, 1; 0, 1), C = K = I, B = 2, damping 0: M = G, H_C = (G G^T - I) / 2."""
    grad = torch.tensor([[2.0, 1.0], [0.0, 1.0]], dtype=FLOAT64)
    factors = [torch.eye(2, dtype=FLOAT64) for _ in range(2)]
    momenta = [torch.zeros(2, 2, dtype=FLOAT64) for _ in range(2)]
    reference.update_factors_(
        grad, factors, momenta, factor_lr=0.1, factor_momentum=0.5, damping=0.0, batch_size=2
    )
    # m = H / 2; G G^T = (5, 1; 1, 1): m_C = (1, 1/4; 1/4, 0), its norm sqrt(9/8) > 1
    left = torch.tensor([[1.0, 0.25], [0.25, 0.0]], dtype=FLOAT64)
    torch.testing.assert_close(momenta[0], left, rtol=1e-15, atol=1e-15)
    expected = torch.eye(2, dtype=FLOAT64) - 0.1 / math.sqrt(9 / 8) * left
    torch.testing.assert_close(factors[0], expected, rtol=1e-15, atol=1e-15)
    # G^T G = (4, 2; 2, 2): m_K = (3/4, 1/2; 1/2, 1/4), its norm sqrt(18/16) > 1
    right = torch.tensor([[0.75, 0.5], [0.5, 0.25]], dtype=FLOAT64)
    torch.testing.assert_close(momenta[1], right, rtol=1e-15, atol=1e-15)


def test_small_gradients_grow_the_factors_at_most_by_factor_lr_over_root_d():
    """PAPER: where G is next to 0, H = -I/2 and K grows by b / sqrt(d) once m has settled."""
    d = 16
    factors = [torch.eye(d, dtype=FLOAT64) for _ in range(2)]
    momenta = [torch.zeros(d, d, dtype=FLOAT64) for _ in range(2)]
    before = factors[0][0, 0].item()
    for _ in range(40):
        before = factors[0][0, 0].item()
        reference.update_factors_(
            torch.full((d, d), 1e-30, dtype=FLOAT64),
            factors,
            momenta,
            factor_lr=0.1,
            factor_momentum=0.5,
            damping=0.0,
            batch_size=1,
        )
    assert factors[0][0, 0].item() / before == pytest.approx(1 + 0.1 / math.sqrt(d), rel=1e-9)


def test_summed_and_averaged_loss_have_the_same_factors():
    """B g g^T is that of the averaged loss; with B = 1 and sqrt(B) g it is the same number."""
    torch.manual_seed(0)
    grad = torch.randn(5, 3, dtype=FLOAT64)

    def factors(g, batch_size):
        kept = [torch.eye(d, dtype=FLOAT64) for d in (5, 3)]
        momenta = [torch.zeros(d, d, dtype=FLOAT64) for d in (5, 3)]
        for _ in range(5):
            reference.update_factors_(
                g,
                kept,
                momenta,
                factor_lr=0.1,
                factor_momentum=0.5,
                damping=1e-3,
                batch_size=batch_size,
            )
        return kept

    for a, b in zip(factors(grad, 16), factors(4 * grad, 1), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("interval", [1, 2, 3, 5, 10])
def test_log4_schedule_is_the_released_recursion(interval):
    due = 0
    for k in range(5000):
        assert reference.is_update_step(k, interval, "log4") == (k == due)
        if k == due:
            wait = next(w for w in range(20) if 4 ** (w + 1) > k + 1)
            due = k + min(max(wait, 1), interval)


def test_split_keeps_every_bit_and_rounds_to_nearest():
    bits = torch.randint(-(2**31), 2**31, (100_000,)).to(torch.int32)
    values = bits.view(torch.float32)
    values = values[torch.isfinite(values) & (values.abs() < 3e38)]
    values[:3] = torch.tensor([1 + 2.0**-8, 1 + 3 * 2.0**-8, 0.0])  # two ties
    high, residual = reference.split(values)
    assert high.dtype == torch.bfloat16
    assert residual.dtype == torch.int16
    assert torch.equal(reference.join(high, residual), values)
    nearest = values.bfloat16()
    apart = (high != nearest) & (values.abs() > 0)
    error = (high[apart].double() - values[apart].double()).abs()
    assert torch.equal(error, (nearest[apart].double() - values[apart].double()).abs())
