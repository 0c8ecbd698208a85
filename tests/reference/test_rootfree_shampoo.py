"""The specification of root-free Shampoo: trajectories in float64, and what is proved of it."""

from __future__ import annotations

import pytest
import torch
from helpers.golden import GOLDEN, as_matrix, load, rootfree_update_rms

from rootfree_fused.reference import rootfree_shampoo as spec

F64 = torch.float64
CASES = sorted(path.stem for path in (GOLDEN / "rootfree_shampoo").glob("*.npz"))


class Parameter:
    """One parameter with its state, by the specification."""

    def __init__(self, param, settings):
        self.param, self.settings, self.step = param, settings, 0
        self.size = as_matrix(param.shape)
        zeros = param.new_zeros
        if self.size is None:
            self.averages = zeros(param.shape), zeros(param.shape)
            return
        self.momentum, self.rows = zeros(self.size), zeros(self.size[0])
        starts = spec.start_values(settings["damping"])
        eyes = [torch.eye(d, dtype=param.dtype) for d in self.size]
        self.grams = [eye * gram for eye, (gram, _) in zip(eyes, starts, strict=True)]
        self.roots = [eye * root for eye, (_, root) in zip(eyes, starts, strict=True)]

    def update(self, grad):
        self.step += 1
        meta = self.settings
        common = {"lr": meta["lr"], "beta1": meta["betas"][0], "weight_decay": meta["weight_decay"]}
        if self.size is not None:
            spec.rootfree_shampoo_(
                *(self.param, grad, self.momentum, self.grams, self.roots, self.rows, self.step),
                **common,
                beta2=meta["betas"][1],
                **{key: meta[key] for key in ("damping", "update_rms", "row_beta")},
            )
        elif meta["vector_method"] == "adam":
            own = {key: meta[key] for key in ("vector_beta2", "vector_rms")}
            spec.vector_adam_(self.param, grad, *self.averages, self.step, **common, **own)
        else:
            assert meta["vector_damping"] == 1
            own = {key: meta[key] for key in ("vector_beta2", "update_rms")}
            spec.vector_rootfree_(self.param, grad, *self.averages, self.step, **common, **own)


def assert_close(actual, expected):
    scale = expected.abs().max().clamp_min(1e-300)
    assert (actual - expected).abs().max() <= 1e-12 * scale


def test_every_trajectory_is_here():
    assert len(CASES) == 9


@pytest.mark.parametrize("case", CASES)
def test_golden(case):
    data, meta = load(f"rootfree_shampoo/{case}")
    for i in range(len(meta["shapes"])):
        start = data[f"param0.{i}"]
        own = {"update_rms": rootfree_update_rms(start.shape, meta)}
        parameter = Parameter(start, meta | own)
        for t in range(meta["steps"]):
            parameter.update(data[f"grad.{t}.{i}"])
            assert_close(parameter.param, data[f"param.{t}.{i}"])
        for axis in range(0 if parameter.size is None else 2):
            assert_close(parameter.grams[axis], data[f"S.{axis}.{i}"])
            assert_close(parameter.roots[axis], data[f"K.{axis}.{i}"])


SETTINGS = {
    "lr": 0.02,
    "betas": (0.9, 0.95),
    "damping": 0.1,
    "weight_decay": 0.0,
    "update_rms": 0.4,
    "row_beta": 0.95,
}


def updates(grads, **changes):
    """The update of each step, a difference of parameters over lr."""
    parameter = Parameter(torch.zeros(grads[0].shape, dtype=grads[0].dtype), SETTINGS | changes)
    for grad in grads:
        before = parameter.param.clone()
        parameter.update(grad)
        yield (before - parameter.param) / SETTINGS["lr"], parameter


def rms(x):
    return x.square().mean().sqrt()


def test_no_scale_of_a_gradient_matters():
    """To the bit where the scales are powers of two."""
    grads = [torch.randn(7, 5, dtype=F64) for _ in range(12)]
    scales = [2.0 ** int(n) for n in torch.randint(-60, 60, (12,))]
    others = [g * scale for g, scale in zip(grads, scales, strict=True)]
    for (a, _), (b, _) in zip(updates(grads), updates(others), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("shape", "scale"), [((256, 256), 1), ((64, 64), 2), ((64, 256), 2 / 3), ((256, 64), 8 / 3)]
)
def test_the_rms_of_an_update_follows_the_shape(shape, scale):
    """So that its spectral norm, by that of independent entries, goes with sqrt(m / n)."""
    ((update, _),) = updates([torch.randn(shape, dtype=F64)])
    assert rms(update).item() == pytest.approx(SETTINGS["update_rms"] * scale, rel=1e-12)
    m, n = shape
    norm = rms(update).item() * (m**0.5 + n**0.5)
    assert norm == pytest.approx(SETTINGS["update_rms"] * 32 * (m / n) ** 0.5, rel=1e-12)


def test_a_change_of_basis_changes_the_basis_of_the_update():
    """Of either axis, with rows as they are: balanced rows are those of one basis."""
    grads = [torch.randn(7, 5, dtype=F64) for _ in range(12)]
    u, v = (torch.linalg.qr(torch.randn(d, d, dtype=F64)).Q for d in (7, 5))
    turned = [u @ g @ v for g in grads]
    plain = updates(grads, row_beta=None)
    for (a, _), (b, _) in zip(plain, updates(turned, row_beta=None), strict=True):
        torch.testing.assert_close(u @ a @ v, b, rtol=1e-9, atol=1e-9)


ADVERSARIES = {
    "mixed scales": lambda t: torch.randn(9, 6) * 10.0 ** float(torch.randint(-30, 19, ())),
    "rank one": lambda t: torch.randn(9, 1) @ torch.randn(1, 6),
    "one row": lambda t: torch.eye(9)[t % 9, :, None] * torch.randn(6),
    "zero for long": lambda t: torch.randn(9, 6) if t % 40 == 39 else torch.zeros(9, 6),
    "ill-conditioned": lambda t: torch.logspace(0, -12, 9)[:, None] * torch.randn(9, 6),
    "one entry": lambda t: torch.eye(9, 6) * (torch.arange(9) == t % 6)[:, None],
}


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("adversary", ADVERSARIES)
def test_every_update_is_finite_and_of_one_rms(adversary, dtype):
    grads = [ADVERSARIES[adversary](t).to(dtype) for t in range(200)]
    started = False
    for grad, (update, _) in zip(grads, updates(grads), strict=True):
        started = started or bool(grad.any())
        assert update.isfinite().all()
        # A momentum of zero gradients dies out in the end; a zero update stays zero.
        rms_of_shape = SETTINGS["update_rms"] * spec.shape_scale(9, 6)
        expected = rms_of_shape if started and update.any() else 0.0
        assert abs(rms(update).item() - expected) <= 1e-4


def residuals(root, gram, lam):
    return root.mT @ (gram + lam * torch.eye(len(gram), dtype=F64)) @ root - torch.eye(
        len(gram), dtype=F64
    )


def test_the_residual_falls_on_a_fixed_gram(monkeypatch):
    """From a condition number of 1e8, and quadratically once it is below 1."""
    vectors = torch.linalg.qr(torch.randn(6, 6, dtype=F64)).Q
    gram = vectors @ torch.diag(torch.logspace(0, -8, 6, dtype=F64)) @ vectors.T
    gram /= gram.diagonal().mean()
    root = torch.eye(6, dtype=F64)
    lam = 1e-6 * gram.diagonal().mean()
    norms = []
    for _ in range(60):
        fixed, other = [gram.clone(), torch.ones(1, 1, dtype=F64)], torch.ones(1, 1, dtype=F64)
        norms.append(torch.linalg.matrix_norm(residuals(root, gram, lam), 2).item())
        # beta2 = 1 keeps S; any gradient that is not zero will do.
        grad = torch.ones(6, 1, dtype=F64)
        spec.update_roots_(grad, fixed, [root, other], beta2=1.0, damping=1e-6)
    assert norms[-1] <= 1e-9
    small = [i for i, norm in enumerate(norms[:-1]) if 1e-6 < norm < 0.5]
    assert small
    assert all(norms[i + 1] <= norms[i] ** 2 for i in small)


def test_an_exactly_zero_gradient_teaches_nothing():
    grads = [torch.randn(7, 5, dtype=F64), torch.zeros(7, 5, dtype=F64)]
    (_, first), (second, parameter) = updates(grads)
    assert first is parameter
    kept = [t.clone() for t in (*parameter.grams, *parameter.roots)]
    parameter.update(torch.zeros(7, 5, dtype=F64))
    assert all(map(torch.equal, kept, (*parameter.grams, *parameter.roots)))
    assert second.any()


def test_nothing_moves_before_the_first_gradient():
    parameter = Parameter(torch.randn(4, 3, dtype=F64), SETTINGS)
    before = parameter.param.clone()
    parameter.update(torch.zeros(4, 3, dtype=F64))
    assert torch.equal(parameter.param, before)


def test_a_diagonal_axis_keeps_the_diagonal_of_the_gram_and_its_exact_root():
    scales = torch.rand(5, dtype=F64) + 0.5
    dense = torch.randn(7, 7, dtype=F64)
    roots = [[dense.clone(), scales.diag()], [dense.clone(), scales.clone()]]
    grams = [[torch.eye(7, dtype=F64), torch.eye(5, dtype=F64)] for _ in roots]
    grams[1][1] = torch.ones(5, dtype=F64)
    grad = torch.randn(7, 5, dtype=F64)
    for gram, root in zip(grams, roots, strict=True):
        spec.update_roots_(grad, gram, root, beta2=0.7, damping=0.2)
    s = grams[1][1]
    torch.testing.assert_close(s, grams[0][1].diagonal(), rtol=1e-14, atol=0)
    torch.testing.assert_close(grams[1][0], grams[0][0], rtol=1e-14, atol=0)
    torch.testing.assert_close(roots[1][1], (s + 0.2 * s.mean()).rsqrt(), rtol=1e-14, atol=0)
    ahead = torch.randn(7, 5, dtype=F64)
    expected = roots[1][0] @ roots[1][0].T @ ahead * roots[1][1].square()
    torch.testing.assert_close(spec.direction(ahead, roots[1]), expected, rtol=1e-12, atol=1e-12)
