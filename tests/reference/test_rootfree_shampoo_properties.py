"""What is proved of root-free Shampoo, on the sequences of gradients that would break it."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.gradients import BF16, F32, F64, SEQUENCES, certainly, deterministic, gradients_of

from rootfree_fused.reference import rootfree_shampoo as spec
from rootfree_fused.reference.structures import structure_of

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

RMS = 0.4
SETTINGS = {
    "lr": 1.0,
    "beta1": 0.9,
    "beta2": 0.95,
    "damping": 0.1,
    "weight_decay": 0.0,
    "update_rms": RMS,
    "row_beta": 0.95,
}
AXES = st.tuples(st.booleans(), st.booleans())


class Trial:
    """A matrix by the specification, its axes dense or diagonal; `step` returns its update."""

    def __init__(self, shape, dense=(True, True), dtype=F32, **changes):
        self.settings, self.steps = SETTINGS | changes, 0
        self.shape, self.dtype = shape, dtype
        self.momentum, self.rows = (
            torch.zeros(shape, dtype=dtype),
            torch.zeros(shape[0], dtype=dtype),
        )
        self.grams, self.roots = [], []
        starts = spec.start_values(self.settings["damping"])
        for size, is_dense, (gram, root) in zip(shape, dense, starts, strict=True):
            for tensors, start in ((self.grams, gram), (self.roots, root)):
                diagonal = torch.full((size,), start, dtype=dtype)
                tensors.append(diagonal.diag() if is_dense else diagonal)

    def step(self, grad):
        self.steps += 1
        param = torch.zeros(self.shape, dtype=self.dtype)
        state = self.momentum, self.grams, self.roots, self.rows, self.steps
        spec.rootfree_shampoo_(param, grad, *state, **self.settings)
        return -param


def rms(x):
    return x.double().square().mean().sqrt().item()


def residual_of(root, gram, damping):
    identity = torch.eye(len(gram), dtype=F64)
    shifted = gram.double() + damping * gram.double().diagonal().mean() * identity
    return root.double().mT @ shifted @ root.double() - identity


@certainly(dense=(True, True), damping=1e-4)
@hypothesis.given(sequence=SEQUENCES, dense=AXES, damping=st.sampled_from([0.1, 1e-4]))
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@deterministic(6)
def test_every_update_is_finite_and_of_one_rms(sequence, dense, damping, dtype):
    """Of float32 state, from float32 and bfloat16 gradients; a zero momentum makes it zero."""
    trial = Trial(sequence["shape"], dense, damping=damping)
    for grad in gradients_of(sequence, dtype):
        update = trial.step(grad)
        assert all(t.isfinite().all() for t in (*trial.grams, *trial.roots, trial.rows))
        expected = RMS * spec.shape_scale(*trial.shape) if trial.momentum.any() else 0
        assert rms(update) == pytest.approx(expected, rel=1e-4)


@certainly()
@hypothesis.given(sequence=SEQUENCES)
@deterministic(4)
def test_no_step_of_a_factor_overshoots(sequence):
    """K^-1 K' = I - b E / 2 has its eigenvalues in [1/2, 3/2], whatever was seen."""
    trial = Trial(sequence["shape"], dtype=F64)
    for grad in gradients_of(sequence):
        before = [root.clone() for root in trial.roots]
        trial.step(grad)
        for old, new in zip(before, trial.roots, strict=True):
            ratio = torch.linalg.solve(old, new)
            eigenvalues = torch.linalg.eigvalsh((ratio + ratio.mT) / 2)
            assert eigenvalues[0] >= 0.5 - 1e-6
            assert eigenvalues[-1] <= 1.5 + 1e-6


@hypothesis.given(
    size=st.integers(2, 12),
    condition=st.integers(0, 10),
    damping=st.integers(1, 6),
    start=st.integers(-3, 3),
    seed=st.integers(0, 99),
)
@hypothesis.example(size=12, condition=10, damping=6, start=-3, seed=0)
@hypothesis.example(size=12, condition=10, damping=6, start=3, seed=0)
@deterministic(20)
def test_the_residual_falls_on_a_fixed_gram(size, condition, damping, start, seed):
    """From any multiple of the identity; quadratically where b is 1, and never up above 1.

    From far below every eigenvalue of E is in (-1, 0], ||E^2||_F^(1/2) at most size^(1/4), and an
    eigenvalue of K K^T (S + lam I) grows by (1 + b / 2)^2 a step.
    """
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=F64)).Q
    gram = vectors * torch.logspace(0, -condition, size, dtype=F64) @ vectors.mT
    root = 10.0**start * torch.eye(size, dtype=F64)
    damping = 10.0**-damping
    largest, norms = [], []
    one = torch.ones(1, 1, dtype=F64)
    while not norms or norms[-1] > 1e-6:
        residual = residual_of(root, gram, damping)
        largest.append(torch.linalg.matrix_norm(residual, 2).item())
        norms.append(residual.norm().item())
        assert len(norms) < 100
        fixed, roots = [gram.clone(), one.clone()], [root, one.clone()]
        # beta2 = 1 keeps S, whatever the gradient.
        spec.update_roots_(one.expand(size, 1), fixed, roots, beta2=1.0, damping=damping)
    rounding = size / damping * torch.finfo(F64).eps  # of a residual at this condition number
    for old, new, norm in zip(largest, largest[1:], norms, strict=False):
        assert new <= max(old, 1) + 1e-9
        if norm <= 1:  # E' = -(3 E^2 - E^3) / 4
            assert new <= old**2 + rounding
    shifted = torch.linalg.eigvalsh(gram) + damping * gram.diagonal().mean()
    far = [math.log2(10.0 ** (2 * start) * value) for value in (shifted[0], shifted[-1])]
    doublings = max(far[1], 0) + max(-far[0], far[1] - far[0])
    assert len(norms) <= doublings / (2 * math.log2(1 + size**-0.25 / 2)) + 8


@hypothesis.given(sequence=SEQUENCES, dense=AXES, powers=st.lists(st.integers(-40, 40), min_size=1))
@deterministic(4)
def test_powers_of_two_change_no_bit(sequence, dense, powers):
    one, other = (Trial(sequence["shape"], dense) for _ in range(2))
    for t, grad in enumerate(gradients_of(sequence, F64)):
        # Within float32's normal numbers, so that a power of two is exact.
        grad = (grad / grad.abs().amax().clamp_min(1e-300)).float()
        scaled = grad * 2.0 ** powers[t % len(powers)]
        assert torch.equal(one.step(grad), other.step(scaled))


@hypothesis.given(sequence=SEQUENCES, dense=AXES)
@deterministic(5)
def test_the_order_of_rows_and_columns_does_not_matter(sequence, dense):
    one, other = (Trial(sequence["shape"], dense, F64) for _ in range(2))
    generator = torch.Generator().manual_seed(sequence["seed"])
    rows, columns = (torch.randperm(d, generator=generator) for d in sequence["shape"])
    for grad in gradients_of(sequence):
        permuted = grad[rows][:, columns]
        expected = one.step(grad)[rows][:, columns]
        torch.testing.assert_close(other.step(permuted), expected, rtol=1e-7, atol=1e-7)


@hypothesis.given(sequence=SEQUENCES)
@deterministic(6)
def test_a_change_of_basis_changes_the_basis_of_the_update(sequence):
    """Of either axis, dense, with rows as they are."""
    one, other = (Trial(sequence["shape"], dtype=F64, row_beta=None) for _ in range(2))
    generator = torch.Generator().manual_seed(sequence["seed"])
    normal = [torch.randn(d, d, generator=generator, dtype=F64) for d in sequence["shape"]]
    u, v = (torch.linalg.qr(matrix).Q for matrix in normal)
    for grad in gradients_of(sequence):
        expected = u @ one.step(grad) @ v
        torch.testing.assert_close(
            other.step(u @ grad.double() @ v), expected, rtol=1e-6, atol=1e-6
        )


@hypothesis.given(sequence=SEQUENCES)
@deterministic(8)
def test_a_diagonal_root_is_exact(sequence):
    trial = Trial(sequence["shape"], (False, False))
    for grad in gradients_of(sequence):
        trial.step(grad)
    for gram, root in zip(trial.grams, trial.roots, strict=True):
        shifted = gram.double() + trial.settings["damping"] * gram.double().mean()
        if any(kind != "zero" for kind, *_ in sequence["spells"]):
            assert (root.double().square() * shifted - 1).abs().max() < 1e-5
        assert structure_of(root).diagonal(root).min() > 0
