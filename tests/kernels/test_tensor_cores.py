"""The tests' model of float32 products on tensor cores: what it keeps, and what is its own."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.tensor_cores import DEPTH, TERMS, ThreeTF32Products, product, split_tf32


def test_two_parts_keep_23_of_24_bits():
    value = torch.randn(10_000) * 2.0 ** torch.randint(-60, 60, (10_000,))
    high, low = split_tf32(value)
    for part, rest, bits in ((high, value - high, 11), (low, value - high - low, 23)):
        assert not (part.view(torch.int32) & 0x1FFF).any()
        assert (rest.abs() <= 2.0**-bits * value.abs()).all()
    assert (value - high - low).any()


@pytest.mark.parametrize("depth", [1, 8, 33, 100])
def test_an_error_is_that_of_three_products_and_of_sums_cut_off(depth):
    """2^-22 for the products of low parts, and at most as much for their last bits."""
    a, b = torch.randn(40, depth), torch.randn(depth, 24)
    error = product(a, b).double() - a.double() @ b.double()
    sums = math.ceil(depth / TERMS) * 2.0**-23 + math.ceil(depth / DEPTH) * 2.0**-24
    largest = a.abs().double() @ b.abs().double()
    assert (error.abs() <= (1.01 * sums + 2 * 2.0**-22) * largest).all()


def test_sums_of_positive_terms_are_never_too_large():
    a, b = (split_tf32(torch.rand(shape))[0] for shape in ((40, 32), (32, 24)))
    error = product(a, b).double() - a.double() @ b.double()
    assert (error <= 0).all()
    assert error.mean() < -(2.0**-24)


def test_few_bits_are_exact_and_infinities_stay():
    a, b = (torch.randint(-9, 10, shape).float() for shape in ((3, 5, 40), (3, 40, 6)))
    assert torch.equal(product(a, b), a @ b)
    a[:, 0, 0], b[:, 0] = math.inf, 2.0
    assert torch.equal(product(a, b), a @ b)


def test_every_float32_product_within_is_such_a_product():
    a, b = torch.randn(3, 7, 20), torch.randn(20, 9)
    plain = a @ b, a[0] @ b, a.double() @ b.double()
    with ThreeTF32Products():
        batched, one, double = a @ b, a[0] @ b, a.double() @ b.double()
    assert torch.equal(batched, product(a, b))
    assert torch.equal(one, product(a[0], b))
    assert torch.equal(double, plain[2])
    assert not torch.equal(batched, plain[0])
    assert not torch.equal(one, plain[1])


def test_sums_have_the_kernels_blocks():
    matrix = pytest.importorskip("rootfree_fused.kernels.matrix", exc_type=ImportError)
    assert matrix.FLOAT32.block_k == DEPTH
    assert matrix.FLOAT32.precision == "tf32x3"
