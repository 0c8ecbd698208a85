"""What s follows of micro-batches: its equations, their identities and means, and numbers."""

from __future__ import annotations

import pytest
import torch

from rootfree_fused.reference import diag

KINDS = ("batch", "micro", "variance", "mean")
F32, F64 = torch.float32, torch.float64
NAN, INF = float("nan"), float("inf")
LARGEST = torch.finfo(F32).max
# Of each micro-batch its number of terms.
TERMS = [(5,), (3, 3), (7, 7, 7), (1,) * 8, (2, 6), (1, 2, 3, 10), (9, 1, 1)]


def accumulated(grads, weights):
    """The mean gradient and the squares that a step is given of micro-batches."""
    total, square = (torch.full_like(grads[0], NAN) for _ in range(2))
    for j, (grad, weight) in enumerate(zip(grads, weights, strict=True)):
        diag.accumulate_(total, square, grad, weight=weight, signs=False, first=j == 0)
    return total / sum(weights), square / sum(weights) ** 2


def target(kind, grads, terms, weights=None):
    """By `weights` of the micro-batches, which are their terms, or 1 where these are equal."""
    mean, square = accumulated(grads, weights or terms)
    return diag.second_moment(mean, square, diag.square_weights(kind, len(terms)), sum(terms))


def without_max(kind, grads, terms):
    mean, square = accumulated(grads, terms)
    weights = diag.square_weights(kind, len(terms))._replace(floor=-INF)
    return diag.second_moment(mean, square, weights, sum(terms))


def kinds_of(terms):
    return KINDS if len(terms) > 1 else KINDS[:2]


def assert_close(actual, expected, scale):
    """To 1e-14 of what the terms of either side are."""
    assert actual.dtype == expected.dtype == F64
    assert ((actual - expected).abs() <= 1e-14 * scale).all()


def drawn(terms, mean=0.3):
    return torch.randn(len(terms), 1000, dtype=F64) + mean


def scale_of(grads, terms):
    return sum(terms) * grads.square().amax(0)


@pytest.mark.parametrize("terms", TERMS, ids=str)
def test_every_kind_is_its_equation(terms):
    grads, k, B = drawn(terms), len(terms), sum(terms)
    b = B / k
    b_j = torch.tensor(terms, dtype=F64)[:, None]
    g = (b_j * grads).sum(0) / B
    q = (b_j**2 * grads**2).sum(0) / B / b
    expected = {"batch": B * g**2, "micro": b * q}
    if k > 1:
        expected["variance"] = b * (q - g**2) * k / (k - 1)
        expected["mean"] = torch.maximum(B * (k * g**2 - q) / (k - 1), B * g**2 / k)
    assert set(expected) == set(kinds_of(terms))
    for kind, value in expected.items():
        assert_close(target(kind, grads, terms), value, k * scale_of(grads, terms))


@pytest.mark.parametrize("terms", [t for t in TERMS if len(set(t)) == 1], ids=str)
def test_equal_micro_batches_count_as_one_or_as_their_terms(terms):
    grads = drawn(terms)
    for kind in kinds_of(terms):
        found, expected = target(kind, grads, terms, [1.0] * len(terms)), target(kind, grads, terms)
        assert_close(found, expected, scale_of(grads, terms))


@pytest.mark.parametrize("weight", [1.0, 12.0])
def test_one_micro_batch_is_the_batch(weight):
    grads = drawn((12,))
    micro, batch = (target(kind, grads, (12,), [weight]) for kind in ("micro", "batch"))
    assert_close(micro, batch, batch)


@pytest.mark.parametrize("terms", [t for t in TERMS if len(t) > 1], ids=str)
def test_identities(terms):
    grads, k = drawn(terms), len(terms)
    scale = k * scale_of(grads, terms)
    batch, micro, variance = (target(kind, grads, terms) for kind in KINDS[:3])
    assert_close(variance + without_max("mean", grads, terms), batch, scale)
    assert_close((k - 1) / k * variance + batch / k, micro, scale)


@pytest.mark.parametrize("terms", [t for t in TERMS if len(set(t)) == 1 < len(t)], ids=str)
def test_of_equal_gradients_there_is_no_variance(terms):
    grads = drawn(terms)[:1].expand(len(terms), -1)
    batch, variance, mean = (target(kind, grads, terms) for kind in ("batch", "variance", "mean"))
    scale = scale_of(grads, terms)
    assert_close(variance, torch.zeros_like(batch), scale)
    assert_close(mean, batch, scale)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mu", [0.0, 0.4])
def test_the_mean_over_draws_is_that_of_the_table(kind, mu):
    B, k, v, draws = 12, 4, 1.7, 10_000
    b = B // k
    terms = mu + v**0.5 * torch.randn(k, b, draws, dtype=F64)
    grads, counts = terms.mean(1), (b,) * k
    expected = {"batch": B * mu**2 + v, "micro": b * mu**2 + v, "variance": v, "mean": B * mu**2}
    found = without_max(kind, grads, counts)
    error = found.std() / draws**0.5
    assert (found.mean() - expected[kind]).abs() < 4 * error
    with_max = target(kind, grads, counts)
    assert torch.equal(with_max, found) == (kind != "mean")
    assert (with_max >= 0).all()


def test_the_mean_over_draws_of_unequal_micro_batches():
    """A term of the loss weighs as much in each: b_j mu^2 + v by b_j / B."""
    counts, mu, v, draws = (1, 2, 3, 6), 0.4, 1.7, 10_000
    grads = [(mu + v**0.5 * torch.randn(b, draws, dtype=F64)).mean(0) for b in counts]
    found = target("micro", torch.stack(grads), counts)
    expected = sum(b * (b * mu**2 + v) for b in counts) / sum(counts)
    assert (found.mean() - expected).abs() < 4 * found.std() / draws**0.5


def test_noise_alone_leaves_the_mean_its_floor():
    """Where the means of two halves cancel, "mean" is B g^2 / k and not below."""
    grads = torch.tensor([[1.0], [-0.9]], dtype=F64)
    assert_close(target("mean", grads, (4, 4)), torch.tensor([0.01], dtype=F64), 1.0)


# Numbers


SIZES = [0.0, 1e-45, 1e-30, 1.0, 1e10, 1e19, 2e19, 1e38, LARGEST]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("parts", [2, 3, 1000])
@pytest.mark.parametrize("batch_size", [1e-3, 1.0, 512.0, 1e9, LARGEST])
def test_finite_numbers_never_make_nan(kind, parts, batch_size):
    mean, square = (t.flatten() for t in torch.meshgrid(*[torch.tensor(SIZES)] * 2, indexing="ij"))
    for g in (mean, -mean):
        found = diag.second_moment(g, square, diag.square_weights(kind, parts), batch_size)
        assert found.dtype == F32
        assert found.isfinite().all()
        assert (found >= 0).all()


@pytest.mark.parametrize("kind", KINDS[1:])
def test_what_is_infinite_counts_as_the_largest_number_and_nan_stays(kind):
    weights = diag.square_weights(kind, 4)
    mean = torch.tensor([INF, -INF, 1.0, INF, NAN, 1.0, NAN, INF])
    square = torch.tensor([1.0, 1.0, INF, INF, 1.0, NAN, INF, NAN])
    found = diag.second_moment(mean, square, weights, 8.0)
    assert found[:4].isfinite().all()
    assert found[4:].isnan().all()


def test_without_squares_it_is_that_of_the_batch():
    mean = torch.randn(100)
    weights = diag.square_weights("batch", 1)
    assert torch.equal(diag.second_moment(mean, None, weights, 8.0), 8.0 * mean * mean)


# The updates that read it


@pytest.mark.parametrize("kind", KINDS)
def test_s_follows_it(kind):
    """Where the decay is 0 it is the new s."""
    terms = (3, 3, 3, 3)
    mean, square = accumulated(drawn(terms), terms)
    weights = diag.square_weights(kind, 4)
    expected = diag.second_moment(mean, square, weights, 12.0)
    given = {"parts": square, **{f"{key}_weight": w for key, w in weights._asdict().items()}}
    given |= {"lr": 0.1, "damping": 0.1, "weight_decay": 0.0, "batch_size": 12.0, "maximize": True}
    s, m, param = (torch.ones_like(mean) for _ in range(3))
    decays = {"alpha": 0.0, "momentum": 0.0, "decoupled": True}
    diag.rmsprop_(param, mean, s, None, **decays, **given)
    assert torch.equal(s, expected)
    s = torch.ones_like(mean)
    diag.adamw_(param, mean, m, s, None, beta1=0.9, beta2=0.0, **given)
    assert torch.equal(s, expected)


@pytest.mark.parametrize("maximize", [False, True])
def test_sign_descent_follows_the_mean_of_signs(maximize):
    grads, weights = torch.tensor([[2.0, -1.0, 0.0, NAN], [3.0, 4.0, -5.0, 1.0]]), (1.0, 3.0)
    total, signs = torch.full((2, 4), NAN)
    for j, grad in enumerate(grads):
        diag.accumulate_(total, signs, grad, weight=weights[j], signs=True, first=j == 0)
    assert torch.equal(signs[:3], torch.tensor([4.0, 2.0, -3.0]))
    assert signs[3].isnan()
    param, m = torch.zeros(2, 4)
    settings = {"beta": 0.0, "weight_decay": 0.0, "sign_last": False, "maximize": maximize}
    given = {"parts": signs, "part_weight": 0.25}
    diag.sign_(param, total, m, lr=2.0, **settings, **given)
    expected = (-1 if maximize else 1) * torch.tensor([1.0, 0.5, -0.75])
    assert torch.equal(m[:3], expected)
    assert torch.equal(param[:3], -2 * expected)
    assert m[3].isnan()


@pytest.mark.parametrize("part", [None, "squares", "signs"])
def test_sums_start_with_the_first(part):
    grads = torch.randn(3, 50).bfloat16()
    total, own = torch.full((2, 50), NAN)
    for j, grad in enumerate(grads):
        given = None if part is None else own
        diag.accumulate_(total, given, grad, weight=2.0, signs=part == "signs", first=j == 0)
    exact = grads.double()
    assert (total - 2 * exact.sum(0)).abs().max() < 1e-6
    if part == "squares":
        assert (own - 4 * exact.square().sum(0)).abs().max() < 1e-5
    elif part == "signs":
        assert torch.equal(own, 2 * exact.sign().sum(0).float())
    else:
        assert own.isnan().all()
