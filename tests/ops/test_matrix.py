"""ops.ifshampoo_: the specification's steps on stacks, and what bad input is told."""

from __future__ import annotations

import math
import re

import pytest
import torch
from helpers.comparison import assert_bits_equal

from rootfree_fused import ops, reference

F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16
SETTINGS = {
    "lr": 0.1,
    "factor_lr": 0.3,
    "factor_momentum": 0.4,
    "damping": 1e-2,
    "batch_size": 3,
    "momentum": 0.8,
    "weight_decay": 0.05,
    "max_update": 2.0,
}
# (members, shape of the parameters, axes of the bucket, whether each has a dense factor)
BUCKETS = [
    (2, (6, 4), (6, 4), (True, True)),
    (1, (4, 2, 3), (4, 6), (True, False)),
    (2, (5,), (5,), (True,)),
]


def lists(dtype=F64, device="cpu", buckets=BUCKETS):
    """The lists of a call, and `axes`."""
    params, factors, residuals, momenta = [], [], [], []
    param_dtype = F64 if dtype == F64 else F32
    for members, shape, sizes, structures in buckets:
        params += [torch.randn(shape, dtype=param_dtype, device=device) for _ in range(members)]
        for size, dense in zip(sizes, structures, strict=True):
            kept = dtype if dense else param_dtype
            eye = torch.eye(size) if dense else torch.ones(size)
            factors.append(0.7 * eye.repeat(members, *[1] * eye.dim()).to(kept).to(device))
            momenta.append(torch.zeros_like(factors[-1]))
            parts = dense and dtype == BF16
            residuals.append(torch.zeros_like(factors[-1], dtype=torch.int16) if parts else None)
    grads = [torch.randn_like(p) for p in params]
    buffers = [torch.zeros_like(p) for p in params]
    tensors = {
        "params": params,
        "grads": grads,
        "factors": factors,
        "residuals": residuals,
        "factor_momenta": momenta,
        "products": None,
        "momentum_buffers": buffers,
    }
    return tensors, [len(sizes) for *_, sizes, _ in buckets]


def call(tensors, axes, **changes):
    ops.ifshampoo_(*tensors.values(), axes=axes, **{**SETTINGS, **changes})


def copied(tensors):
    return {
        name: values and [None if t is None else t.clone() for t in values]
        for name, values in tensors.items()
    }


def specified_step(tensors, axes, *, update=True):
    """The same step one parameter at a time, by the specification, on copies in float64."""
    names = ("factor_lr", "factor_momentum", "damping", "batch_size")
    settings = {name: SETTINGS[name] for name in names}
    bound = SETTINGS["max_update"] / math.sqrt(SETTINGS["batch_size"] * SETTINGS["damping"])
    params = iter(zip(*(tensors[n] for n in ("params", "grads", "momentum_buffers")), strict=True))
    first = 0
    for count in axes:
        own = slice(first, first + count)
        for i in range(tensors["factors"][first].shape[0]):
            p, g, buffer = next(params)
            factors = [factor[i] for factor in tensors["factors"][own]]
            momenta = [m[i] for m in tensors["factor_momenta"][own]]
            g = g.reshape([len(factor) for factor in factors])
            if update:
                reference.update_factors_(g, factors, momenta, **settings)
            reference.apply_(
                p,
                reference.precondition(g, factors).reshape(p.shape),
                buffer,
                lr=SETTINGS["lr"],
                momentum=SETTINGS["momentum"],
                weight_decay=SETTINGS["weight_decay"],
                decoupled=True,
                bound=bound,
            )
        first += count


@pytest.mark.parametrize("update", [True, False])
def test_it_follows_the_specification(device, update):
    tensors, axes = lists(device=device)
    expected = copied(tensors)
    for step in range(3):
        call(tensors, axes, update_factors=update or step == 0)
        specified_step(expected, axes, update=update or step == 0)
    for name in ("params", "factors", "factor_momenta", "momentum_buffers"):
        for actual, truth in zip(tensors[name], expected[name], strict=True):
            torch.testing.assert_close(actual, truth, rtol=1e-12, atol=1e-12)


def test_a_kept_product_changes_nothing(device):
    """To the bit in bfloat16 would ask for one order of sums: float64 to its rounding."""
    kept, axes = lists(device=device, buckets=BUCKETS[:1])
    fresh = copied(kept)
    kept["products"] = [torch.empty_like(factor) for factor in kept["factors"]]
    for step in range(3):
        for tensors in (kept, fresh):
            call(tensors, axes, update_factors=step == 0)
    for a, b in zip(kept["params"], fresh["params"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_bfloat16_factors_have_residuals_that_move_below_a_rounding(device):
    tensors, axes = lists(BF16, device, BUCKETS[:1])
    call(tensors, axes, factor_lr=1e-5)
    for factor, residual in zip(tensors["factors"], tensors["residuals"], strict=True):
        diagonals = [t.diagonal(dim1=1, dim2=2) for t in (factor, residual)]
        assert (diagonals[0] == torch.tensor(0.7, dtype=BF16)).all()
        assert diagonals[1].count_nonzero()


def test_a_class_and_the_function_are_one_update(device):
    """A step of IFShampoo is this function on its own state."""
    from rootfree_fused import IFShampoo

    tensors, axes = lists(F32, device, BUCKETS[:1])
    params = [torch.nn.Parameter(p.clone()) for p in tensors["params"]]
    optimizer = IFShampoo(
        params,
        factor_dtype=F32,
        initial_square_avg=1 / 0.7**4,
        **SETTINGS,
    )
    for p, g in zip(params, tensors["grads"], strict=True):
        p.grad = g.clone()
    optimizer.step()
    tensors["factors"] = [  # as the class starts them
        torch.eye(d, device=device).mul(0.7).repeat(2, 1, 1) for d in (6, 4)
    ]
    tensors["products"] = [torch.empty_like(f) for f in tensors["factors"]]
    call(tensors, axes)
    for p, expected in zip(params, tensors["params"], strict=True):
        torch.testing.assert_close(p.detach(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"damping": 0.0}, ValueError, "damping is 0.0; pass a number > 0"),
        ({"factor_momentum": 1.0}, ValueError, "factor_momentum is 1.0"),
        ({"batch_size": 0}, ValueError, "batch_size is 0"),
        ({"axes": [2, 2]}, ValueError, "factors has 5 entries but the buckets have 4 axes"),
        ({"axes": [2, 2, 0]}, ValueError, "axes is [2, 2, 0]"),
        ({"axes": [1, 2, 2]}, ValueError, "params[0] has shape (6, 4) but its bucket has axes"),
        ({"lr": torch.tensor(0.1, device="meta")}, ValueError, "lr is"),
    ],
)
def test_bad_settings(changes, error, said):
    tensors, axes = lists()
    before = copied(tensors)
    with pytest.raises(error, match=re.escape(said)):
        call(tensors, changes.pop("axes", axes), **changes)
    for name in ("params", "factors", "factor_momenta", "momentum_buffers"):
        assert_bits_equal(tensors[name], before[name])


def replaced(name, index, value):
    def change(tensors):
        tensors[name] = list(tensors[name] or [None] * 5)
        tensors[name][index] = value(tensors[name][index], tensors) if callable(value) else value

    return change


@pytest.mark.parametrize(
    ("dtype", "change", "error", "said"),
    [
        (F64, replaced("factors", 0, None), TypeError, "factors[0] is a NoneType"),
        (F64, replaced("factors", 0, lambda f, _: f[0, 0]), ValueError, "factors[0] has shape (6,"),
        (F64, replaced("factors", 0, lambda f, _: f.mT), ValueError, "factors[0] is not contig"),
        (F64, replaced("factors", 1, lambda f, _: f[:1]), ValueError, "factors[1] stacks 1 where"),
        (F64, replaced("factors", 1, lambda f, _: f.float()), TypeError, "factors[0] is torch.fl"),
        (F64, replaced("factors", 3, lambda f, _: f.float()), TypeError, "factors[3] is torch.fl"),
        (
            F64,
            replaced("factors", 0, lambda f, _: f.to("meta")),
            ValueError,
            "factors[0] is on meta",
        ),
        (F64, replaced("factor_momenta", 2, None), TypeError, "factor_momenta[2] is a NoneType"),
        (F64, replaced("factor_momenta", 0, lambda m, _: m[:, 0]), ValueError, "factor_momenta[0]"),
        (F64, replaced("residuals", 0, lambda _, t: t["factors"][0]), ValueError, "pass None"),
        (BF16, replaced("residuals", 0, None), TypeError, "residuals[0] is a NoneType"),
        (BF16, replaced("residuals", 0, lambda r, _: r.int()), ValueError, "needs torch.int16"),
        (F64, replaced("products", 3, lambda _, t: t["factors"][3]), ValueError, "pass None"),
        (F64, replaced("products", 0, lambda _, t: t["factors"][0]), ValueError, "shares memory"),
        (F64, replaced("momentum_buffers", 0, lambda b, _: b.float()), TypeError, "momentum_buff"),
        (F64, replaced("grads", 1, lambda g, _: g.mT), ValueError, "grads[1] has shape (4, 6)"),
        (F64, replaced("params", 1, lambda _, t: t["params"][0]), ValueError, "shares memory"),
    ],
)
def test_bad_tensors(dtype, change, error, said):
    tensors, axes = lists(dtype)
    change(tensors)
    before = copied(tensors)
    with pytest.raises(error, match=re.escape(said)):
        call(tensors, axes)
    for name in ("params", "factors", "factor_momenta", "momentum_buffers"):
        for actual, expected in zip(tensors[name], before[name], strict=True):
            if isinstance(actual, torch.Tensor) and not actual.is_meta:
                assert_bits_equal([actual], [expected])


def test_a_tensor_of_inference_mode_is_told_before_anything_moved():
    tensors, axes = lists()
    with torch.inference_mode():
        tensors["factor_momenta"][-1] = tensors["factor_momenta"][-1].clone()
    before = copied(tensors)
    with pytest.raises(ValueError, match=r"factor_momenta\[4\] was made in torch.inference_mode"):
        call(tensors, axes)
    assert_bits_equal(tensors["params"], before["params"])


@pytest.mark.parametrize("missing", ["params", "factors", "momentum_buffers"])
def test_lists_of_other_lengths(missing):
    tensors, axes = lists()
    tensors[missing] = tensors[missing][:-1]
    with pytest.raises(ValueError, match=r"pass|stack"):
        call(tensors, axes)


def test_axes_in_another_order_are_refused():
    """They have as many elements, and would precondition other ones together."""
    tensors, axes = lists(buckets=[(2, (4, 6), (6, 4), (True, True))])
    before = copied(tensors)
    with pytest.raises(ValueError, match=r"params\[0\] has shape \(4, 6\) but its bucket has axes"):
        call(tensors, axes)
    assert_bits_equal(tensors["params"], before["params"])


@pytest.mark.parametrize(
    ("shape", "sizes"), [((4, 1, 6), (4, 6)), ((2, 3, 4), (6, 4)), ((2, 3, 4), (2, 3, 4))]
)
def test_axes_of_one_and_merged_neighbours_are_taken(shape, sizes):
    tensors, axes = lists(buckets=[(2, shape, sizes, (True,) * len(sizes))])
    expected = copied(tensors)
    call(tensors, axes)
    specified_step(expected, axes)
    for actual, truth in zip(tensors["params"], expected["params"], strict=True):
        torch.testing.assert_close(actual, truth, rtol=1e-12, atol=1e-12)


def test_momentum_needs_buffers():
    tensors, axes = lists()
    tensors["momentum_buffers"] = []
    with pytest.raises(ValueError, match=r"momentum is 0\.8 but momentum_buffers is empty"):
        call(tensors, axes)


def test_no_parameters_are_no_work():
    ops.ifshampoo_([], [], [], [], [], **SETTINGS)
