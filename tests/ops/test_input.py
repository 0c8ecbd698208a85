"""What the functions of ops are told of bad input, before anything moves."""

from __future__ import annotations

import pytest
import torch
from helpers.operators import RMSPROP, for_operators
from helpers.optimizers import assert_identical

from rootfree_fused import ops


def lists():
    generator = torch.Generator().manual_seed(0)
    return [[torch.rand(shape, generator=generator) for shape in ((5,), (2, 3))] for _ in range(4)]


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"lr": torch.tensor(0.1, device="meta")}, "lr is .* on meta; pass"),
        ({"grad_scale": torch.ones((), device="meta")}, "grad_scale is .* on meta; pass"),
        ({"found_inf": torch.zeros((), device="meta")}, "found_inf is .* on meta; pass"),
        ({"lr": 10**400}, "lr is 10.*; pass"),
        ({"damping": 1e39}, r"damping is 1e\+39; pass"),
        ({"batch_size": 2**200}, "batch_size is 16.*; pass"),
    ],
)
@pytest.mark.parametrize("function", [ops.rmsprop_, ops.adamw_])
def test_values_that_no_kernel_can_read(function, bad, words):
    args = lists()
    before = [t.clone() for group in args for t in group]
    with pytest.raises(ValueError, match=words):
        function(*args, **{"lr": 0.1, "batch_size": 8, **bad})
    assert_identical([t for group in args for t in group], before)


def test_lists_of_what_is_no_tensor():
    params, grads, states, _ = lists()
    for bad, words in (
        (
            (params, [None, *grads[1:]], states),
            r"grads\[0\] is a NoneType; leave",
        ),
        ((params, grads, [*states[:-1], 1.0]), r"square_avgs\[\d\] is a float; pass"),
        ((params, [g.numpy() for g in grads], states), r"grads\[0\] is a ndarray; pass"),
    ):
        with pytest.raises(TypeError, match=words):
            ops.rmsprop_(*bad, lr=0.1, batch_size=8)


def test_iterators_are_lists_and_an_empty_call_does_nothing():
    args, twins = lists(), lists()
    ops.rmsprop_(*map(iter, args), lr=0.1, batch_size=8, momentum=0.9)
    ops.rmsprop_(*twins, lr=0.1, batch_size=8, momentum=0.9)
    assert_identical([t for group in args for t in group], [t for group in twins for t in group])
    ops.rmsprop_([], [], [], [], lr=0.1, batch_size=8, momentum=0.9)
    ops.adamw_([], [], [], [], lr=0.1, batch_size=8)


@pytest.mark.parametrize("count", [0.0, -1.0, float("nan")])
def test_steps_count_the_present_one(count):
    args = lists()
    steps = torch.ones(len(args[0]))
    steps[-1] = count
    with pytest.raises(ValueError, match=r"steps is .*; count the present step too"):
        ops.adamw_(*args, steps, lr=0.1, batch_size=8)
    with pytest.raises(TypeError, match=r"steps is .* a list; pass"):
        ops.adamw_(*args, steps.tolist(), lr=0.1, batch_size=8)


def test_a_tensor_on_meta_in_a_call_of_others_is_an_error():
    """torch takes the body that is for meta, which must not stand for the others'."""
    lr = torch.tensor(0.1, dtype=torch.float64)
    args, kwargs = (*lists(), lr), for_operators(RMSPROP)
    operator = torch.ops.rootfree_fused.rmsprop_
    for place in range(4):
        bad = list(args)
        bad[place] = [*bad[place][:-1], bad[place][-1].to("meta")]
        before = [p.clone() for p in args[0]]
        with pytest.raises(ValueError, match=r"params\[\d\] is on cpu but .* on meta"):
            operator(*bad, **kwargs)
        assert_identical(list(args[0]), before)


@pytest.mark.parametrize("function", [ops.rmsprop_, ops.adamw_])
@pytest.mark.parametrize("place", range(4))
def test_tensors_of_inference_mode_are_written_inside_it_alone(function, place):
    """As torch's own functions on lists: outside they refuse to write one, and read it."""
    settings = {"lr": 0.1, "batch_size": 8}
    if function is ops.rmsprop_:
        settings["momentum"] = 0.9
    args, expected = lists(), lists()
    function(*expected, **settings)
    with torch.inference_mode():
        args[place][1] = args[place][1].clone()
    before = [t.clone() for group in args for t in group]
    if place != 1:  # gradients are only read
        with pytest.raises(RuntimeError, match="outside InferenceMode"):
            torch._foreach_mul_(args[place], 1.0)
        with pytest.raises(ValueError, match=r"s\[1\] was made in torch.inference_mode.*clone"):
            function(*args, **settings)
        assert_identical([t for group in args for t in group], before)
    with torch.inference_mode(place != 1):
        function(*args, **settings)
    for group, others in zip(args, expected, strict=True):
        assert_identical(group, others)
