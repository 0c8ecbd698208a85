"""What ops.rootfree_shampoo_ is told of bad input, before anything moves."""

from __future__ import annotations

import re

import pytest
import torch
from helpers.rootfree_lists import BF16, F32, F64, assert_untouched, call, copied, lists

NAN = float("nan")


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"lr": -1e-3}, ValueError, "lr is -0.001; pass"),
        ({"lr": "0.1"}, TypeError, "lr is '0.1'"),
        ({"lr": torch.tensor(0.1, device="meta")}, ValueError, "lr is"),
        ({"betas": (0.9, 1.0)}, ValueError, "betas is (0.9, 1.0); pass"),
        ({"betas": 0.9}, ValueError, "betas is 0.9; pass"),
        ({"damping": 0.0}, ValueError, "damping is 0.0; pass a number > 0"),
        ({"damping": NAN}, ValueError, "damping is nan; pass a number > 0"),
        ({"weight_decay": -1}, ValueError, "weight_decay is -1; pass"),
        ({"update_rms": 0}, ValueError, "update_rms is 0; pass a number > 0"),
        ({"row_beta": 1.0}, ValueError, "row_beta is 1.0; pass"),
        ({"row_beta": None}, ValueError, "row_square_avgs has 5 tensors; pass an empty list"),
        ({"maximize": 1}, ValueError, "maximize is 1; pass"),
        ({"update_factors": None}, TypeError, "update_factors is None, a NoneType; pass True"),
        ({"steps": torch.ones(4)}, ValueError, "pass a float32 tensor of shape (5,)"),
        ({"steps": torch.ones(5, dtype=F64)}, ValueError, "pass a float32 tensor of shape (5,)"),
        ({"steps": torch.zeros(5)}, ValueError, "count the present step too"),
        ({"steps": [1] * 5}, TypeError, "steps is [1, 1, 1, 1, 1], a list; pass"),
        ({"grad_scale": 2.0}, TypeError, "grad_scale is 2.0, a float; pass"),
        ({"grad_scale": torch.ones(2)}, ValueError, "pass one float32 number"),
        ({"found_inf": torch.zeros((), device="meta")}, ValueError, "found_inf is"),
    ],
)
def test_bad_settings(changes, error, said):
    tensors = lists()
    before = copied(tensors)
    with pytest.raises(error, match=re.escape(said)):
        call(tensors, **changes)
    assert_untouched(tensors, before)


def replaced(name, index, value):
    def change(tensors):
        tensors[name] = list(tensors[name] or [None] * 6)
        tensors[name][index] = value(tensors[name][index], tensors) if callable(value) else value

    return change


@pytest.mark.parametrize(
    ("dtype", "change", "error", "said"),
    [
        (F64, replaced("params", 0, lambda p, _: p.int()), TypeError, "params[0] has dtype"),
        (F64, replaced("params", 1, lambda _, t: t["params"][0]), ValueError, "shares memory"),
        (F64, replaced("params", 0, lambda p, _: p.mT), ValueError, "params[0] has (4, 6)"),
        (F64, replaced("grads", 1, None), TypeError, "grads[1] is a NoneType; leave"),
        (F64, replaced("grads", 1, lambda g, _: g.mT), ValueError, "grads[1] has shape (4, 6)"),
        (F64, replaced("grads", 1, lambda g, _: g.half()), TypeError, "grads[1] is torch.float16"),
        (F64, replaced("grads", 1, lambda g, _: g.to_sparse()), TypeError, "layout torch.sparse"),
        (F64, replaced("grads", 0, lambda _, t: t["params"][0]), ValueError, "shares memory"),
        (F64, replaced("momentum_buffers", 0, lambda b, _: b.float()), TypeError, "momentum_buff"),
        (F64, replaced("momentum_buffers", 0, lambda b, _: b.to("meta")), ValueError, "on meta"),
        (F64, replaced("row_square_avgs", 0, None), ValueError, "row_square_avgs[0] is None but"),
        (F64, replaced("row_square_avgs", 0, lambda v, _: v[:4]), ValueError, "needs torch.float6"),
        (F64, replaced("row_square_avgs", 0, lambda v, _: v.float()), ValueError, "needs torch.fl"),
        (
            F64,
            replaced("row_square_avgs", 0, lambda v, _: v.repeat_interleave(2)[::2]),
            ValueError,
            "row_square_avgs[0] is not contiguous",
        ),
        (
            F64,
            replaced("row_square_avgs", 1, lambda _, t: t["row_square_avgs"][0]),
            ValueError,
            "shares memory",
        ),
        (F64, replaced("grams", 0, None), TypeError, "grams[0] is a NoneType"),
        (F64, replaced("grams", 0, lambda s, _: s.float()), ValueError, "grams[0] is a torch.fl"),
        (F64, replaced("grams", 0, lambda s, _: s[:, 0]), ValueError, "grams[0] is a torch.fl"),
        (F64, replaced("grams", 1, lambda s, _: s.mT), ValueError, "grams[1] is not contiguous"),
        (F64, replaced("grams", 0, lambda _, t: t["factors"][0]), ValueError, "shares memory"),
        (BF16, replaced("grams", 0, lambda s, _: s.bfloat16()), ValueError, "needs torch.float32"),
        (F64, replaced("factors", 0, None), TypeError, "factors[0] is a NoneType"),
        (F64, replaced("factors", 0, lambda f, _: f[0, 0]), ValueError, "factors[0] has shape (6,"),
        (F64, replaced("factors", 0, lambda f, _: f.mT), ValueError, "factors[0] is not contig"),
        (F64, replaced("factors", 1, lambda f, _: f[:1]), ValueError, "factors[1] stacks 1 where"),
        (F64, replaced("factors", 1, lambda f, _: f.float()), TypeError, "factors[0] is torch.fl"),
        (F64, replaced("factors", 0, lambda f, _: f.half()), TypeError, "factors[0] is torch.fl"),
        (F64, replaced("factors", 3, lambda f, _: f.float()), TypeError, "factors[3] is torch.fl"),
        (F64, replaced("factors", 0, lambda f, _: f.to("meta")), ValueError, "factors[0] is on m"),
        (F64, replaced("residuals", 0, lambda _, t: t["factors"][0]), ValueError, "pass None"),
        (BF16, replaced("residuals", 0, None), TypeError, "residuals[0] is a NoneType"),
        (BF16, replaced("residuals", 0, lambda r, _: r.int()), ValueError, "needs torch.int16"),
        (F64, replaced("products", 3, lambda _, t: t["factors"][3]), ValueError, "pass None"),
        (F64, replaced("products", 0, lambda _, t: t["factors"][0]), ValueError, "shares memory"),
        (
            BF16,
            replaced("products", 0, lambda _, t: t["grams"][0].clone()),
            ValueError,
            "products[0] is a torch.float32",
        ),
    ],
)
def test_bad_tensors(dtype, change, error, said):
    tensors = lists(dtype)
    change(tensors)
    before = copied(tensors)
    with pytest.raises(error, match=re.escape(said)):
        call(tensors)
    assert_untouched(tensors, before)


@pytest.mark.parametrize("name", [name for name in lists() if name != "products"])
@pytest.mark.parametrize("change", ["shorter", "longer", "empty"])
def test_lists_of_other_lengths(name, change):
    tensors = lists()
    values = tensors[name]
    changed = {"shorter": values[:-1], "longer": [*values, values[0]], "empty": []}[change]
    tensors[name] = changed
    before = copied(tensors)
    with pytest.raises(ValueError, match=r"pass|stack"):
        call(tensors)
    assert_untouched(tensors, before)


@pytest.mark.parametrize("dtype", [F64, F32, BF16])
@pytest.mark.parametrize("name", ["params", "momentum_buffers", "row_square_avgs", "grams"])
def test_a_tensor_of_inference_mode_is_written_or_nothing_is(dtype, name):
    """Outside that mode torch lets nobody write to one: told before anything moved."""
    tensors = lists(dtype)
    with torch.inference_mode():
        tensors[name][-1] = tensors[name][-1].clone()
    before = copied(tensors)
    with pytest.raises(ValueError, match=rf"{name}\[\d\] was made in torch.inference_mode.*clone"):
        call(tensors)
    assert_untouched(tensors, before)
