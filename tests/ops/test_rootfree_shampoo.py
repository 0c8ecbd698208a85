"""ops.rootfree_shampoo_: the specification's steps on stacks, and its operator."""

from __future__ import annotations

import pytest
import torch
from helpers.comparison import assert_bits_equal
from helpers.rootfree_lists import (
    BF16,
    BUCKETS,
    F32,
    F64,
    SETTINGS,
    WRITTEN,
    assert_near,
    assert_untouched,
    call,
    copied,
    lists,
    operator_call,
)

from rootfree_fused import RootFreeShampoo, ops, reference
from rootfree_fused.ops import by_reference

NAN, INF = float("nan"), float("inf")


def specified_step(tensors, step, **changes):
    """The same step one parameter at a time, by the specification, on copies in float64."""
    betas = dict(zip(("beta1", "beta2"), SETTINGS["betas"], strict=True))
    settings = {**SETTINGS, **betas, **changes}
    del settings["betas"]
    members = [
        (i, pair)
        for pair in range(len(tensors["factors"]) // 2)
        for i in range(len(tensors["factors"][2 * pair]))
    ]
    for n, (i, pair) in enumerate(members):
        own = slice(2 * pair, 2 * pair + 2)
        grams, factors = ([t[i] for t in tensors[key][own]] for key in ("grams", "factors"))
        sizes = [len(factor) for factor in factors]
        reference.rootfree_shampoo_(
            tensors["params"][n],
            tensors["grads"][n].reshape(sizes),
            tensors["momentum_buffers"][n].view(sizes),
            grams,
            factors,
            tensors["row_square_avgs"][n] if settings["row_beta"] is not None else None,
            step,
            **settings,
        )


# What it computes


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"maximize": True},
        {"row_beta": None},
        {"betas": (0.0, 0.0)},
        {"update_factors": False},
    ],
)
def test_it_follows_the_specification(changes, device):
    tensors = lists(device=device)
    if changes.get("row_beta", True) is None:
        tensors["row_square_avgs"] = []
    expected = copied(tensors)
    betas = changes.get("betas", SETTINGS["betas"])
    by_name = {key: value for key, value in changes.items() if key != "betas"}
    for step in (1, 2, 3):
        call(tensors, step, **changes)
        specified_step(expected, step, beta1=betas[0], beta2=betas[1], **by_name)
    assert_near(tensors, expected)


def test_steps_are_a_count_for_each_parameter(device):
    """A parameter that begins late has rows that begin late, beside one that does not."""
    tensors = lists(device=device, buckets=BUCKETS[:1])
    expected = copied(tensors)
    call(tensors, steps=torch.tensor([1.0, 40.0]))
    alone = [copied(expected) for _ in range(2)]
    specified_step(alone[0], 1)
    specified_step(alone[1], 40)
    for i, truth in enumerate(alone):
        for name in ("params", "row_square_avgs"):
            torch.testing.assert_close(tensors[name][i], truth[name][i], rtol=1e-12, atol=1e-12)
    assert not torch.equal(alone[0]["row_square_avgs"][1], alone[1]["row_square_avgs"][1])


@pytest.mark.parametrize("dtype", [F64, F32, BF16])
def test_a_kept_product_changes_nothing(dtype, device):
    """It is K K^T in the dtype of K, made where K moves and read where it does not."""
    kept = lists(dtype, device, BUCKETS[:1])
    fresh = copied(kept)
    kept["products"] = [torch.full_like(factor, NAN) for factor in kept["factors"]]
    for step in (1, 2, 3):
        for tensors in (kept, fresh):
            call(tensors, step, update_factors=step != 2)
        for factor, product in zip(kept["factors"], kept["products"], strict=True):
            if dtype == F64 and factor.is_cuda:  # no kernel serves it, and none reads a product
                assert product.isnan().all()
                continue
            made = (factor.double() @ factor.double().mT).to(dtype)
            torch.testing.assert_close(product, made, rtol=2e-2 if dtype == BF16 else 1e-5, atol=0)
    scale = 0.05 * 3 * SETTINGS["update_rms"]  # of what three steps moved
    rounding = torch.finfo(dtype).eps
    for a, b in zip(kept["params"], fresh["params"], strict=True):
        assert (a - b).abs().max() <= 16 * rounding * scale * a.numel() ** 0.5


def test_a_stale_product_is_read_where_factors_stay(device):
    """What is said of products: kept between calls, or None to be made anew."""
    tensors = lists(F32, device, BUCKETS[:1])
    twins = copied(tensors)
    tensors["products"] = [torch.full_like(factor, NAN) for factor in tensors["factors"]]
    for each in (tensors, twins):
        call(each, update_factors=False)
    assert all(p.isnan().all() for p in tensors["params"])
    assert all(p.isfinite().all() for p in twins["params"])


def test_a_class_and_the_function_are_one_update(device):
    tensors = lists(F32, device, BUCKETS[:1])
    params = [torch.nn.Parameter(p.clone()) for p in tensors["params"]]
    optimizer = RootFreeShampoo(params, factor_dtype=F32, **SETTINGS)
    tensors["products"] = [torch.empty_like(f) for f in tensors["factors"]]
    for step in (1, 2):
        for p, g in zip(params, tensors["grads"], strict=True):
            p.grad = g.clone()
        optimizer.step()
        call(tensors, step)
    for i, p in enumerate(params):
        torch.testing.assert_close(p.detach(), tensors["params"][i], rtol=1e-6, atol=1e-6)
        state = optimizer.state[p]
        torch.testing.assert_close(state["gram_1"], tensors["grams"][1][i], rtol=1e-5, atol=1e-6)


def test_bfloat16_factors_have_residuals_that_keep_what_they_round(device):
    """Both parts together follow float64 to the roundings of the products that E is made of."""
    tensors, truth = lists(BF16, device, BUCKETS[:1]), lists(F64, device, BUCKETS[:1])
    for step in (1, 2, 3):
        call(tensors, step)
        specified_step(truth, step)
    for factor, residual, exact in zip(
        tensors["factors"], tensors["residuals"], truth["factors"], strict=True
    ):
        joined = reference.join(factor, residual).double()
        assert residual.count_nonzero() > residual.numel() // 2
        assert (joined - exact).norm() <= 3 * 2**-8 * exact.norm()


@pytest.mark.parametrize("memory", ["transposed", "channels_last", "every second"])
def test_parameters_of_any_strides(memory, device):
    shape = (4, 2, 3, 2)
    bucket = [(1, shape, (4, 12), (True, True))]
    tensors, twins = (lists(device=device, buckets=bucket) for _ in range(2))

    def strided(t):
        if memory == "transposed":
            return t.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
        if memory == "channels_last":
            return t.contiguous(memory_format=torch.channels_last)
        return t.repeat_interleave(2, 0)[::2]

    for name in ("params", "grads", "momentum_buffers"):
        tensors[name] = [strided(t) for t in tensors[name]]
    for step in (1, 2):
        for each in (tensors, twins):
            call(each, step)
    assert_near(tensors, twins)


def test_the_scale_of_a_scaler_changes_nothing(device):
    """Nor are the gradients written, and a found_inf of 0 skips nothing."""
    scaled, plain = (lists(device=device) for _ in range(2))
    scaled["grads"] = [g * 2.0**12 for g in scaled["grads"]]
    grads = copied(scaled)["grads"]
    zero = torch.zeros((), device=device)
    call(scaled, grad_scale=torch.tensor(2.0**12, device=device), found_inf=zero)
    call(plain)
    assert_near(scaled, plain)
    assert_bits_equal(scaled["grads"], grads)


@pytest.mark.parametrize("dtype", [F64, F32, BF16])
@pytest.mark.parametrize("update_factors", [True, False])
def test_found_inf_leaves_every_bit(dtype, update_factors, device):
    tensors = lists(dtype, device)
    call(tensors)
    before = copied(tensors)
    tensors["grads"][0].fill_(INF)
    found = torch.ones((), device=device)
    call(tensors, 2.0, found_inf=found, update_factors=update_factors)
    assert_untouched(tensors, before)


@pytest.mark.parametrize("dtype", [F64, F32, BF16])
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_gradient_that_is_not_finite_spoils_its_own_parameter_alone(dtype, bad, device):
    """Not those of its bucket, whose stacks it shares: to the bit."""
    tensors, twins = (lists(dtype, device) for _ in range(2))
    tensors["grads"][0][1, 2] = bad
    for each in (tensors, twins):
        call(each)
    assert tensors["params"][0].isnan().all()
    for name in ("params", "momentum_buffers", "row_square_avgs"):
        assert_bits_equal(tensors[name][1:], twins[name][1:])
    for name in ("grams", "factors"):
        assert_bits_equal([t[1] for t in tensors[name][:2]], [t[1] for t in twins[name][:2]])
        assert_bits_equal(tensors[name][2:], twins[name][2:])


def test_lr_is_read_where_it_is(device):
    by_tensor, by_number = (lists(device=device) for _ in range(2))
    lr = torch.tensor(0.02, dtype=F64, device=device)
    call(by_tensor, lr=lr)
    call(by_number, lr=0.02)
    assert_near(by_tensor, by_number)
    assert lr.item() == 0.02


def test_no_parameters_are_no_work():
    ops.rootfree_shampoo_([], [], [], [], [], [], [], steps=torch.zeros(0), **SETTINGS)


def test_iterators_are_lists():
    tensors, twins = lists(), lists()
    steps = torch.ones(5)
    iterators = [values and iter(values) for values in tensors.values()]
    ops.rootfree_shampoo_(*iterators, steps=steps, **SETTINGS)
    call(twins)
    assert_near(tensors, twins)


# The operator


CALLS = [
    {},
    {"dtype": BF16},
    {"dtype": F64, "row_beta": None},
    {"update_factors": False, "refresh_products": True},
]


@pytest.mark.parametrize("changes", CALLS)
def test_opcheck(changes, device):
    args, kwargs = operator_call(device, **changes)
    torch.library.opcheck(torch.ops.rootfree_fused.rootfree_shampoo_.default, args, kwargs)


@pytest.mark.parametrize("changes", CALLS)
def test_meta_tensors_cost_nothing(changes):
    args, kwargs = operator_call("meta", **changes)
    assert torch.ops.rootfree_fused.rootfree_shampoo_(*args, **kwargs) is None


@pytest.mark.parametrize("name", WRITTEN[:6])
def test_a_tensor_on_meta_in_a_call_of_others_is_an_error(name):
    """torch takes the body that is for meta, which must not stand for the others'."""
    args, kwargs = operator_call("cpu", BF16)
    place = list(lists()).index(name)
    bad = list(args)
    bad[place] = [*bad[place][:-1], bad[place][-1].to("meta")]
    before = [p.clone() for p in args[0]]
    with pytest.raises(ValueError, match=r"is on cpu but .* on meta|on meta but"):
        torch.ops.rootfree_fused.rootfree_shampoo_(*bad, **kwargs)
    assert_bits_equal(args[0], before)


def test_the_bodies_agree_to_their_roundings():
    """The specification, one matrix at a time, and the CPU's stacks."""
    (args, kwargs), (twins, _) = (operator_call("cpu", F64) for _ in range(2))
    torch.ops.rootfree_fused.rootfree_shampoo_(*args, **kwargs)
    by_reference.rootfree_shampoo_(*twins, **kwargs)
    for actual, expected in zip(args[:6], twins[:6], strict=True):
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)
