"""Every structure against the matrices that it represents: a new one is tested by being listed."""

from __future__ import annotations

import math

import pytest
import torch

from rootfree_fused.reference import matrix
from rootfree_fused.reference.compact_structures import Hierarchical, Toeplitz
from rootfree_fused.reference.structures import (
    DENSE,
    DIAGONAL,
    Blocks,
    structure_of,
    structure_of_stack,
)

OTHERS = 5
STRUCTURES = {
    "dense": lambda d: DENSE,
    "diagonal": lambda d: DIAGONAL,
    "blocks of 16": lambda d: Blocks(16),
    "blocks of 15, bounded as one": lambda d: Blocks(15, joint_norm=True),
    "hierarchical 15, 15": lambda d: Hierarchical(d, 15, 15),
    "hierarchical 3, 0": lambda d: Hierarchical(d, 3, 0),
    "hierarchical 0, 2": lambda d: Hierarchical(d, 0, 2),
    "lower toeplitz": lambda d: Toeplitz(lower=True),
    "upper toeplitz": lambda d: Toeplitz(lower=False),
}
SIZES = (1, 2, 15, 16, 29, 30, 31, 45, 61)


@pytest.fixture(params=SIZES)
def size(request):
    return request.param


@pytest.fixture(params=STRUCTURES)
def structure(request, size):
    return STRUCTURES[request.param](size)


@pytest.fixture(params=[(), (3,)], ids=["one", "stack"])
def stack(request):
    return request.param


def random(structure, size, stack=()):
    """A factor; what is padding is zero."""
    factor = torch.randn(*stack, *structure.shape(size), dtype=torch.float64)
    if isinstance(structure, Blocks):
        factor = factor * structure.gram(torch.ones(size, 1, dtype=torch.float64))
    return factor


def dense(structure, factor, size):
    """The matrix, or stack of matrices, that a factor represents."""
    eye = torch.eye(size, dtype=factor.dtype).expand(*factor.shape[: -structure.axes], size, size)
    return structure.left(factor, eye)


def projected(structure, matrices):
    """What a structure holds of symmetric matrices, as matrices: the definition."""
    d = matrices.shape[-1]
    rows, columns = torch.arange(d)[:, None], torch.arange(d)[None, :]
    if structure is DENSE:
        weights = torch.ones(d, d)
    elif structure is DIAGONAL:
        weights = torch.eye(d)
    elif isinstance(structure, Blocks):
        weights = rows // structure.block == columns // structure.block
    elif isinstance(structure, Hierarchical):
        a = min(structure.first, d)
        e = d - min(structure.last, d - a)
        weights = torch.eye(d)
        weights[:a], weights[e:, a:] = 2, 2
        weights[:a, :a], weights[e:, e:] = 1, 1
    else:
        means = torch.stack([matrices.diagonal(j, -2, -1).mean(-1) for j in range(d)], -1)
        means[..., 1:] *= 2
        lag = rows - columns if structure.lower else columns - rows
        return torch.where(lag >= 0, means[..., lag.clamp_min(0)], 0)
    return matrices * weights


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-12)


def test_a_factor_applies_from_either_side(structure, size, stack):
    factor = random(structure, size, stack)
    held = dense(structure, factor, size)
    x = torch.randn(*stack, size, OTHERS, dtype=torch.float64)
    assert_close(structure.left(factor, x), held @ x)
    assert_close(structure.left(factor, x, transposed=True), held.mT @ x)
    assert_close(structure.right(x.mT, factor), x.mT @ held)
    assert_close(structure.right(x.mT, factor, transposed=True), x.mT @ held.mT)


def test_a_factor_represents_what_its_structure_can_hold(structure, size):
    """Pi(I) = I, and no entry of a factor is anywhere that Pi has none."""
    eye = torch.eye(size, dtype=torch.float64)
    assert_close(projected(structure, eye), eye)
    held = dense(structure, random(structure, size), size)
    places = projected(structure, torch.ones(size, size, dtype=torch.float64)) != 0
    assert_close(held[~places], torch.zeros_like(held[~places]))


def test_projections_and_products(structure, size, stack):
    factor, momentum = random(structure, size, stack), random(structure, size, stack)
    held, m = dense(structure, factor, size), dense(structure, momentum, size)
    unfolded = torch.randn(*stack, size, OTHERS, dtype=torch.float64)
    gram = structure.gram(unfolded)
    assert gram.shape == factor.shape
    assert_close(dense(structure, gram, size), projected(structure, unfolded @ unfolded.mT))
    square = dense(structure, structure.square(factor), size)
    assert_close(square, projected(structure, held.mT @ held))
    assert_close(dense(structure, structure.product(factor, momentum), size), held @ m)


def test_norms(structure, size, stack):
    factor = random(structure, size, stack)
    squares = dense(structure, factor, size).square()
    assert_close(structure.square_sum(factor), squares.sum((-2, -1)))
    norms = structure.norms(factor)
    assert (norms * factor).shape == factor.shape
    if isinstance(structure, Blocks) and not structure.joint_norm:
        assert_close(norms[..., 0, 0], factor.square().sum((-2, -1)).sqrt())
    else:
        assert norms.numel() == math.prod(stack)
        assert_close(norms.flatten().squeeze(), squares.sum((-2, -1)).sqrt())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_an_average_of_grams(structure, size, dtype):
    momenta = random(structure, size, (3,)).to(dtype)
    unfolded = torch.randn(3, size, OTHERS, dtype=torch.float32).to(dtype)
    expected = 0.3 * momenta + 0.2 * structure.gram(unfolded)
    structure.average_gram_(momenta, unfolded, decay=0.3, weight=0.2)
    torch.testing.assert_close(momenta, expected)


def test_the_identity_is_added_where_no_padding_is(structure, size, stack):
    factor = random(structure, size, stack)
    eye = torch.eye(size, dtype=factor.dtype)
    expected = dense(structure, factor, size) + 3 * eye
    structure.add_identity_(factor, 3, size)
    assert_close(dense(structure, factor, size), expected)
    if isinstance(structure, Blocks):
        expected = structure.gram(torch.ones(size, 1, dtype=torch.float64)) == 0
        assert not factor[expected.expand(factor.shape)].any()


def test_the_shape_tells_the_structure():
    for structure in (DENSE, DIAGONAL, Blocks(16)):
        assert structure_of(random(structure, 40)) == structure
        assert structure_of_stack(random(structure, 40, (3,))) == structure


def updated(structures, grad, steps=4):
    """The factors and their momenta after some updates with multiples of this gradient."""
    factors = []
    for structure, size in zip(structures, grad.shape, strict=True):
        factors.append(torch.zeros(structure.shape(size), dtype=grad.dtype))
        structure.add_identity_(factors[-1], 1.0, size)
    momenta = [torch.zeros_like(factor) for factor in factors]
    settings = {"factor_lr": 0.4, "factor_momentum": 0.5, "damping": 0.1, "batch_size": 2.0}
    for i in range(steps):
        own = {**settings, "structures": structures}
        matrix.update_factors_(grad * 0.9**i, factors, momenta, **own)
    return factors, momenta


@pytest.mark.parametrize("name", STRUCTURES)
@pytest.mark.parametrize("shape", [(31,), (31, 45), (16, 4, 29)])
def test_an_update_is_the_dense_one_with_projected_matrices(name, shape):
    """The definition: IF-Shampoo with every H replaced by what the structure holds of it."""
    grad = torch.randn(shape, dtype=torch.float64)
    structures = [STRUCTURES[name](size) for size in shape]
    factors, momenta = updated(structures, grad)

    held = [torch.eye(size, dtype=grad.dtype) for size in shape]
    averages = [torch.zeros_like(k) for k in held]
    for i in range(4):
        g = grad * 0.9**i
        transformed = g
        for axis, k in enumerate(held):
            transformed = torch.tensordot(k, transformed, ([0], [axis])).movedim(0, axis)
        means = [k.square().sum() / len(k) for k in held]
        targets = []
        for axis, (structure, k) in enumerate(zip(structures, held, strict=True)):
            unfolded = transformed.movedim(axis, 0).reshape(len(k), -1)
            others = math.prod(mean for j, mean in enumerate(means) if j != axis)
            h = 2.0 * len(k) / g.numel() * projected(structure, unfolded @ unfolded.mT)
            h += 0.1 * others * projected(structure, k.mT @ k) - torch.eye(len(k))
            targets.append(h / 2)
        for structure, k, m, h in zip(structures, held, averages, targets, strict=True):
            m.lerp_(h, 0.5)
            norms = m.norm().clamp_min(1)
            if isinstance(structure, Blocks) and not structure.joint_norm:
                block = torch.arange(len(k)) // structure.block
                same = (block[:, None] == torch.arange(int(block.max()) + 1)).double()
                norms = (same @ (same.T @ m.square().sum(1))).sqrt().clamp_min(1)
            k -= 0.4 * k @ m / norms
    for structure, factor, m, k, average in zip(
        structures, factors, momenta, held, averages, strict=True
    ):
        torch.testing.assert_close(dense(structure, factor, len(k)), k, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(dense(structure, m, len(k)), average, rtol=1e-12, atol=1e-12)


def test_blocks_of_one_are_diagonal_and_of_the_whole_dense():
    grad = torch.randn(12, 20, dtype=torch.float64)
    (ones, _), _ = updated([Blocks(1, joint_norm=True), DENSE], grad)
    (diagonal, _), _ = updated([DIAGONAL, DENSE], grad)
    torch.testing.assert_close(ones.flatten(), diagonal, rtol=1e-15, atol=1e-15)
    (whole, _), _ = updated([Blocks(12), DENSE], grad)
    (matrices, _), _ = updated([DENSE, DENSE], grad)
    assert torch.equal(whole[0], matrices)


def test_permuted_blocks_give_permuted_factors():
    grad = torch.randn(3, 16, 20, dtype=torch.float64)
    order = torch.tensor([2, 0, 1])
    (factor, other), _ = updated([Blocks(16), DENSE], grad.flatten(0, 1))
    (permuted, same), _ = updated([Blocks(16), DENSE], grad[order].flatten(0, 1))
    torch.testing.assert_close(permuted, factor[order], rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(same, other, rtol=1e-12, atol=1e-13)


def test_padding_never_moves():
    factors, momenta = updated([Blocks(16), Blocks(16)], torch.randn(33, 47).double(), steps=1000)
    for rows, columns in (factors, momenta):
        padding = rows[2, 1:], rows[2, :, 1:], columns[2, 15], columns[2, :, 15]
        assert not any(part.any() for part in padding)
        assert rows.isfinite().all()
        assert columns.isfinite().all()


@pytest.mark.parametrize("stack", [False, True])
def test_an_infinite_gradient_leaves_the_padding(stack):
    x = torch.randn((2, 5, 6) if stack else (5, 6))
    x[..., -1, 0] = torch.inf
    blocks = Blocks(4)
    gram = blocks.gram(x)
    averaged = torch.zeros_like(gram)
    if stack:
        blocks.average_gram_(averaged, x, decay=0.5, weight=1.0)
    for padded in (gram, averaged):
        assert not padded[..., 1, 1:, :].any()
        assert not padded[..., 1, :, 1:].any()
    assert gram[..., 1, 0, 0].isinf().all()


def test_of_nothing_the_gram_is_zero(structure, size):
    """As a rank finds it that has no row."""
    factor, nothing = random(structure, size), torch.empty(size, 0, dtype=torch.float64)
    assert not structure.gram(nothing).any()
    for transposed in (False, True):
        assert structure.left(factor, nothing, transposed=transposed).shape == (size, 0)
