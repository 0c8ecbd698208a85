"""`ops.accumulate_`, and the functions that step on its sums: what they do, what they refuse."""

from __future__ import annotations

import pytest
import torch
from helpers.comparison import assert_bits_equal
from helpers.optimizers import assert_identical

from rootfree_fused import ops
from rootfree_fused.ops import by_reference
from rootfree_fused.reference import square_weights

NAN, INF = float("nan"), float("inf")
SHAPES = ((5,), (2, 3))
KINDS = ("micro", "variance", "mean")


def tensors(device="cpu", dtype=torch.float32):
    return [torch.rand(shape, device=device, dtype=dtype) for shape in SHAPES]


def call(part, device, dtypes=(torch.float32, torch.float32)):
    """Arguments of the operator."""
    sums, parts, grads = (tensors(device, dtype) for dtype in (dtypes[0], *dtypes))
    settings = {"weight": 3.0, "signs": part == "signs", "first": False}
    return (sums, [] if part is None else parts, grads), settings


@pytest.mark.parametrize("part", [None, "squares", "signs"])
def test_opcheck(part, device):
    args, settings = call(part, device)
    torch.library.opcheck(torch.ops.rootfree_fused.accumulate_.default, args, settings)


@pytest.mark.parametrize("part", [None, "squares"])
def test_meta_tensors_cost_nothing(part):
    args, settings = call(part, "meta")
    assert torch.ops.rootfree_fused.accumulate_(*args, **settings) is None


def test_a_compiled_call_is_the_call(device):
    (sums, parts, grads), settings = call("squares", device)
    twins = [[t.clone() for t in ts] for ts in (sums, parts)]

    def run(sums, parts):
        torch.ops.rootfree_fused.accumulate_(sums, parts, grads, **settings)
        return [s + 1 for s in sums]

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert_identical(compiled(sums, parts), run(*twins))
    assert_identical([*sums, *parts], [t for ts in twins for t in ts])


@pytest.mark.parametrize("signs", [False, True])
def test_the_function_is_the_operator(signs, device):
    (sums, parts, grads), settings = call("signs" if signs else "squares", device)
    twins = [[t.clone() for t in ts] for ts in (sums, parts)]
    for first in (True, False):
        ops.accumulate_(iter(sums), iter(grads), iter(parts), weight=3, signs=signs, first=first)
        by_reference.accumulate_(*twins, grads, **{**settings, "first": first})
    for found, expected in zip(sums + parts, [t for ts in twins for t in ts], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_defaults_are_a_plain_sum_and_an_empty_call_does_nothing():
    sums, grads = tensors(), tensors()
    expected = [s + g for s, g in zip(sums, grads, strict=True)]
    ops.accumulate_(sums, grads)
    assert_bits_equal(sums, expected)
    ops.accumulate_([], [])


@pytest.mark.parametrize(
    ("sum_dtype", "grad_dtype"),
    [
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float16),
        (torch.float64, torch.float64),
        (torch.float64, torch.float32),
    ],
)
def test_dtypes_that_are_taken(sum_dtype, grad_dtype, device):
    sums, parts, grads = (tensors(device, dtype) for dtype in (sum_dtype, sum_dtype, grad_dtype))
    ops.accumulate_(sums, grads, parts, first=True)
    assert_bits_equal(sums, [g.to(sum_dtype) for g in grads])
    assert_bits_equal(parts, [g.to(sum_dtype) ** 2 for g in grads])


@pytest.mark.parametrize("weight", [0, -1.0, NAN, INF, 1e39, True])
def test_a_weight_is_a_number_above_0(weight):
    args = tensors(), tensors(), tensors()
    before = [t.clone() for ts in args for t in ts]
    with pytest.raises(ValueError, match=r"^weight is .*; pass a number > 0"):
        ops.accumulate_(*args, weight=weight)
    assert_identical([t for ts in args for t in ts], before)


def bad_lists():
    """Words of the error, by which sums, gradients and parts are refused."""
    sums, grads, parts = tensors(), tensors(), tensors()
    double = tensors(dtype=torch.float64)
    flipped = [*sums[:1], sums[1].t()]
    shared = torch.rand(6)
    return {
        "grads has 1 tensors but sums has 2": (sums, grads[:1], parts),
        "parts has 1 tensors but sums has 2": (sums, grads, parts[:1]),
        r"grads\[0\] is a NoneType": (sums, [None, grads[1]], parts),
        r"grads\[1\] has shape \(3, 2\) but sums\[1\] has \(2, 3\); pass it untransposed": (
            sums,
            flipped,
            parts,
        ),
        r"parts\[1\] has shape \(3, 2\)": (sums, grads, flipped),
        r"sums\[0\] is torch.bfloat16; make it float32": ([s.bfloat16() for s in sums], grads, []),
        r"grads\[0\] is torch.float64 but sums\[0\] is torch.float32; add it to a sum in torch.f": (
            sums,
            double,
            [],
        ),
        r"grads\[0\] is torch.bfloat16 but sums\[0\] is torch.float64": (
            double,
            [g.bfloat16() for g in grads],
            [],
        ),
        r"parts\[0\] is torch.float64 but sums\[0\] is torch.float32": (sums, grads, double),
        r"grads\[0\] has dtype torch.int64": (sums, [g.long() for g in grads], parts),
        r"grads\[0\] has layout torch.sparse_coo": (sums, [g.to_sparse() for g in grads], parts),
        r"grads\[0\] is on meta but sums\[0\] is on cpu": (sums, tensors("meta"), parts),
        "shares memory with": ([shared[:5]], [shared[1:]], []),
        r"(sums|parts)\[\d\] shares memory with (parts|sums)\[\d\]": (sums, grads, sums),
        "some of its elements are one": ([torch.rand(1).expand(3)], [torch.rand(3)], []),
    }


@pytest.mark.parametrize("words", bad_lists())
def test_lists_that_do_not_fit(words):
    args = bad_lists()[words]
    kept = [t for ts in args for t in ts if isinstance(t, torch.Tensor) and not t.is_meta]
    before = [t.clone() for t in kept]
    with pytest.raises((ValueError, TypeError), match=words):
        ops.accumulate_(*args)
    for tensor, old in zip(kept, before, strict=True):
        assert torch.equal(tensor.to_dense(), old.to_dense())


# Steps on the sums


def stepped(function, device, **more):
    """Parameters and state after a step of the function on given sums of 4 micro-batches."""
    torch.manual_seed(0)
    params, *states = (tensors(device) for _ in range(3))
    all_grads = [tensors(device) for _ in range(4)]
    sums, squares = tensors(device), tensors(device)
    for j, grads in enumerate(all_grads):
        ops.accumulate_(sums, grads, squares, weight=2.0, first=j == 0)
    settings = {"lr": 0.1, "batch_size": 8, "grad_scale": torch.tensor(8.0, device=device)}
    if function is ops.rmsprop_:
        settings["momentum"] = 0.9
    given = {"squares": squares} if more.get("second_moment", "batch") != "batch" else {}
    function(params, sums, *states, **settings, **given, **more)
    mean = [sum(grads) / 4 for grads in zip(*all_grads, strict=True)]
    return params, states, mean, all_grads


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("function", [ops.rmsprop_, ops.adamw_])
def test_s_follows_the_kind(function, kind, device):
    """(1 - decay) of the way from where it starts, which the random state tells."""
    decay = {"alpha": 0.5} if function is ops.rmsprop_ else {"betas": (0.9, 0.5)}
    given = {"second_moment": kind, "micro_batches": 4, **decay}
    _, states, mean, all_grads = stepped(function, device, **given)
    torch.manual_seed(0)
    start = [tensors(device) for _ in range(3)][1 if function is ops.rmsprop_ else 2]
    found = states[0 if function is ops.rmsprop_ else 1]
    for i, g in enumerate(mean):
        q = sum(grads[i] ** 2 for grads in all_grads) / 4
        expected = {
            "micro": 2 * q,
            "variance": 2 * (q - g**2) * 4 / 3,
            "mean": torch.maximum(8 * (4 * g**2 - q) / 3, 2 * g**2),
        }[kind]
        torch.testing.assert_close(found[i], (start[i] + expected) / 2, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("function", [ops.rmsprop_, ops.adamw_])
def test_that_of_the_batch_is_a_step_on_the_mean(function, device):
    params, states, mean, _ = stepped(function, device)
    torch.manual_seed(0)
    twins, *others = (tensors(device) for _ in range(3))
    settings = {"momentum": 0.9} if function is ops.rmsprop_ else {}
    function(twins, mean, *others, lr=0.1, batch_size=8, **settings)
    for found, expected in zip([params, *states], [twins, *others], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


BAD_SQUARES = [
    ({"second_moment": "mode"}, ValueError, "second_moment is 'mode'; pass 'batch' or"),
    ({"second_moment": "variance"}, ValueError, "micro_batches is 1; second_moment='variance' nee"),
    ({"second_moment": "mean"}, ValueError, "micro_batches is 1; second_moment='mean' needs at le"),
    ({"second_moment": "micro", "micro_batches": 0}, ValueError, "micro_batches is 0"),
    ({"second_moment": "micro", "micro_batches": 2.0}, TypeError, "micro_batches is 2.0; pass a w"),
    ({"second_moment": "micro", "micro_batches": True}, TypeError, "micro_batches is True"),
    ({}, ValueError, "second_moment is 'batch' and squares has 2 tensors"),
    (
        {"second_moment": "micro", "squares": []},
        ValueError,
        "second_moment is 'micro' and squares has 0 tensors; pass one a parameter",
    ),
    (
        {"second_moment": "micro", "squares": [torch.rand(5)]},
        ValueError,
        "squares has 1 tensors but params has 2",
    ),
    (
        {"second_moment": "micro", "squares": [torch.rand(5), torch.rand(3, 2)]},
        ValueError,
        r"squares\[1\] has shape \(3, 2\) but params\[1\] has \(2, 3\)",
    ),
    (
        {"second_moment": "micro", "squares": [torch.rand(5), torch.rand(2, 3).bfloat16()]},
        TypeError,
        r"squares\[1\] is torch.bfloat16 .* allocate it with",
    ),
]


@pytest.mark.parametrize("function", [ops.rmsprop_, ops.adamw_])
@pytest.mark.parametrize(("given", "error", "words"), BAD_SQUARES)
def test_squares_that_do_not_fit(given, error, words, function):
    args = [tensors() for _ in range(4)]
    before = [t.clone() for ts in args for t in ts]
    with pytest.raises(error, match=words):
        function(*args, lr=0.1, batch_size=8, **{"squares": tensors(), **given})
    assert_identical([t for ts in args for t in ts], before)


@pytest.mark.parametrize("function", [ops.rmsprop_, ops.adamw_])
def test_squares_that_are_a_state(function):
    args = [tensors() for _ in range(4)]
    with pytest.raises(ValueError, match="shares memory with"):
        function(*args, lr=0.1, batch_size=8, squares=args[3], second_moment="micro")


def test_weights_of_a_kind_sum_to_what_it_says():
    """Of b q and B g^2, by hand for k = 4."""
    assert square_weights("micro", 4) == (1, 0, 0)
    assert square_weights("variance", 4) == (1, -1 / 3, 0)
    assert square_weights("mean", 4) == (0, 4 / 3, 1 / 4)
