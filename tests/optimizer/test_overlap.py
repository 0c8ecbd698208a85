"""Tensors that share memory are refused, and those that only lie among each other are not."""

from __future__ import annotations

import itertools

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from rootfree_fused import ops
from rootfree_fused.ops.overlap import check_written


def shares(tensors, written):
    try:
        check_written(("t", t, w) for t, w in zip(tensors, written, strict=True))
    except ValueError:
        return True
    return False


def bytes_of(tensor):
    """The address of every byte of every element."""
    offsets = [0]
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        offsets = [offset + k * stride for offset in offsets for k in range(size)]
    size = tensor.element_size()
    return [tensor.data_ptr() + offset * size + k for offset in offsets for k in range(size)]


def share_by_counting(tensors, written):
    owned = [bytes_of(t) for t in tensors]
    if any(w and len(set(own)) < len(own) for own, w in zip(owned, written, strict=True)):
        return True
    return any(
        (written[i] or written[j]) and set(owned[i]) & set(owned[j])
        for i, j in itertools.combinations(range(len(tensors)), 2)
    )


VIEW = st.tuples(
    st.lists(st.integers(0, 4), max_size=3),
    st.lists(st.integers(0, 9), min_size=3, max_size=3),
    st.integers(0, 20),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    st.booleans(),
)


@hypothesis.settings(derandomize=True, database=None, deadline=None, max_examples=500)
@hypothesis.given(st.lists(VIEW, min_size=1, max_size=4))
def test_as_counting_every_byte(views):
    storage = torch.zeros(1024, dtype=torch.uint8)
    tensors, written = [], []
    for shape, strides, offset, dtype, writes in views:
        base = storage[: 1024 // 8 * 8].view(dtype)
        tensors.append(base.as_strided(shape, strides[: len(shape)], offset))
        written.append(writes)
    assert shares(tensors, written) == share_by_counting(tensors, written)


def test_neighbours_in_a_buffer_and_columns_of_a_matrix_are_apart():
    flat, matrix = torch.zeros(100), torch.zeros(6, 8)
    parts = [*flat.split(7), matrix[:, :3], matrix[:, 3:], matrix[:0]]
    assert not shares(parts, [True] * len(parts))
    assert shares([*parts, matrix[2]], [True] * (len(parts) + 1))


def test_what_is_only_read_may_be_one():
    p, q, grad = torch.zeros(3), torch.zeros(3), torch.ones(1)
    assert not shares([p, q, grad.expand(3), grad.expand(3)], [True, True, False, False])


def lists():
    return [[torch.ones(4, 3), torch.ones(5)] for _ in range(4)]


def aliased():
    """Lists of parameters, gradients, s and buffers, by what the error must say."""
    params, grads, squares, buffers = lists()
    base = torch.ones(40)
    return {
        r"params\[1\] shares memory with params\[0\]": (params[:1] * 2, grads[:1] * 2, [], []),
        r"params\[1\] shares memory with params\[0\]|params\[0\] .* params\[1\]": (
            [base[:12].view(4, 3), base[7:12]],
            grads,
            squares,
            buffers,
        ),
        r"params\[0\] has shape \(4, 3\) and strides \(1, 1\)": (
            [base.as_strided((4, 3), (1, 1)), params[1]],
            grads,
            squares,
            buffers,
        ),
        r"square_avgs\[0\].* params\[0\]|params\[0\].* square_avgs\[0\]": (
            params,
            grads,
            [params[0], squares[1]],
            buffers,
        ),
        r"momentum_buffers\[0\].*square_avgs\[0\]|square_avgs\[0\].*momentum_buffers\[0\]": (
            params,
            grads,
            squares,
            [squares[0], buffers[1]],
        ),
        r"grads\[0\].*square_avgs\[0\]|square_avgs\[0\].*grads\[0\]": (
            params,
            grads,
            [grads[0], squares[1]],
            buffers,
        ),
        r"grads\[1\].*params\[1\]|params\[1\].*grads\[1\]": (
            [params[0], base[:5]],
            [grads[0], base[1:6]],
            squares,
            buffers,
        ),
    }


@pytest.mark.parametrize("words", aliased())
def test_functions_refuse_lists_that_alias(words):
    params, grads, squares, buffers = aliased()[words]
    squares = squares or [torch.ones_like(p) for p in params]
    buffers = buffers or [torch.zeros_like(p) for p in params]
    args = params, grads, squares, buffers
    before = [t.clone() for tensors in args for t in tensors]
    with pytest.raises(ValueError, match=words):
        ops.rmsprop_(*args, lr=0.1, batch_size=4, momentum=0.9)
    after = [t for tensors in args for t in tensors]
    assert all(map(torch.equal, after, before))
