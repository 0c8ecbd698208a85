"""Every structure against the matrices that it represents: a new one is tested by being listed."""

from __future__ import annotations

import pytest
import torch

from rootfree_fused.reference.structures import STRUCTURES, structure_of, structure_of_stack

D, OTHERS = 6, 5


@pytest.fixture(params=STRUCTURES.values(), ids=STRUCTURES)
def structure(request):
    return request.param


@pytest.fixture(params=[(), (3,)], ids=["one", "stack"])
def stack(request):
    return request.param


def random(structure, stack):
    return torch.randn(*stack, *structure.shape(D), dtype=torch.float64)


def dense(structure, factor):
    """The matrix, or stack of matrices, that a factor represents."""
    return structure.left(factor, torch.eye(D, dtype=factor.dtype))


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-13)


def test_a_factor_applies_from_either_side(structure, stack):
    factor = random(structure, stack)
    x = torch.randn(*stack, D, OTHERS, dtype=torch.float64)
    assert_close(structure.left(factor, x), dense(structure, factor) @ x)
    assert_close(structure.right(x.mT, factor), x.mT @ dense(structure, factor))


def test_a_factor_applies_to_the_fibres_of_any_tensor(structure):
    factor = random(structure, ())
    for shape in ((D,), (4, D), (2, 3, D)):
        x = torch.randn(shape, dtype=torch.float64)
        assert_close(structure.right(x, factor), x @ dense(structure, factor))


def test_transposed_square_and_product(structure, stack):
    factor, momentum = random(structure, stack), random(structure, stack)
    matrix, m = dense(structure, factor), dense(structure, momentum)
    assert_close(dense(structure, structure.transposed(factor)), matrix.mT)
    assert_close(dense(structure, structure.square(factor)), matrix.mT @ matrix)
    assert_close(dense(structure, structure.product(factor, momentum)), matrix @ m)


def test_a_gram_is_what_the_structure_holds_of_it(structure, stack):
    unfolded = torch.randn(*stack, D, OTHERS, dtype=torch.float64)
    held = dense(structure, torch.ones(structure.shape(D), dtype=torch.float64)) != 0
    expected = torch.where(held, unfolded @ unfolded.mT, 0)
    assert_close(dense(structure, structure.gram(unfolded)), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_an_average_of_grams(structure, dtype):
    momenta = random(structure, (3,)).to(dtype)
    unfolded = torch.randn(3, D, OTHERS, dtype=torch.float32).to(dtype)
    expected = 0.3 * momenta + 0.2 * structure.gram(unfolded)
    structure.average_gram_(momenta, unfolded, decay=0.3, weight=0.2)
    torch.testing.assert_close(momenta, expected)


def test_the_identity_and_a_view_of_the_diagonal(structure):
    factor = random(structure, ())
    eye = torch.eye(D, dtype=factor.dtype)
    assert torch.equal(dense(structure, structure.identity_like(factor)), eye)
    structure.diagonal(factor).fill_(7.0)
    assert torch.equal(dense(structure, factor).diagonal(), torch.full((D,), 7.0, dtype=eye.dtype))


def test_the_shape_tells_the_structure(structure):
    assert structure_of(random(structure, ())) is structure
    assert structure_of_stack(random(structure, (3,))) is structure
