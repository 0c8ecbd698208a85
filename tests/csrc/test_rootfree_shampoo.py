"""The CPU kernel of root-free Shampoo against the specification in float64."""

from __future__ import annotations

import pytest
import torch
from helpers.blocks import without_padding
from helpers.comparison import assert_bits_equal
from helpers.cpu_rootfree_shampoo import BF16, CACHED, F16, F32, F64, INF, NAN, Problem
from helpers.layouts import channels_last, gapped, transposed

from rootfree_fused import ops
from rootfree_fused.reference import shape_scale

pytestmark = [
    pytest.mark.usefixtures("two_threads", "isa"),
    pytest.mark.parametrize("isa", ["avx512", "amx"], indirect=True),
    pytest.mark.skipif(ops.backends()["cpu"].startswith("reference"), reason="no extension"),
]

SIZES = [(2, 3), (3, 5), (7, 63), (17, 33), (64, 64), (64, 147), (65, 7), (128, 33), (200, 70)]
MODES = {
    "as by default": {},
    "ascending": {"maximize": True},
    "rows as they are": {"row_beta": None},
    "no decay": {"weight_decay": 0.0},
    "the newest gradient alone": {"beta1": 0.0, "beta2": 0.0, "row_beta": 0.0},
}


@pytest.fixture(autouse=True)
def _kernel(isa):
    if not torch.ops.rootfree_fused._bf16_kernel_runs():
        pytest.skip("no AVX512_BF16")


def one(sizes, members=1, cached=CACHED):
    return [(sizes, members, cached)]


@pytest.mark.parametrize("cached", [CACHED, (True, False), (False, True), (False, False)], ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_sizes(sizes, cached):
    Problem(one(sizes, 2, cached)).check()


def test_sizes_of_several_tiles():
    Problem(one((300, 130)) + one((130, 300), 1, (True, False))).check()


BLOCKS = {  # of one tile and of several, the last shorter
    "rows": ((100, 40), (32, True)),
    "columns": ((40, 200), (True, 96)),
    "both": ((130, 70), (64, 32)),
    "several tiles": ((300, 257), (160, 128)),
}


@pytest.mark.parametrize("cached", [CACHED, (False, False), (True, False)], ids=str)
@pytest.mark.parametrize("case", BLOCKS)
def test_blocks(case, cached):
    sizes, blocks = BLOCKS[case]
    problem = Problem([(sizes, 3, cached, blocks)])
    problem.check([True, False, True], factor=3)
    for name in ("factors", "residuals", "grams"):  # zeros where blocks are padded
        for stack, size in zip(getattr(problem, name), sizes, strict=True):
            assert torch.equal(stack, without_padding(stack, size)), name


@pytest.mark.parametrize("mode", MODES)
def test_modes(mode):
    Problem(one((70, 33), 3), **MODES[mode]).check()


@pytest.mark.parametrize(
    ("param", "grad"), [(BF16, BF16), (BF16, F32), (F16, F16), (F16, F32)], ids=str
)
def test_dtypes_of_parameters(param, grad):
    Problem(one((70, 33), 3), param, grad).check()


def test_several_steps_some_of_which_update_the_factors():
    buckets = one((66, 40), 3) + one((40, 66), 2, (False, False))
    Problem(buckets).check([True, False, True, False, False, True], factor=3)


@pytest.mark.parametrize("scale", [0.25, 1.2, 4.0, 100.0])
@pytest.mark.parametrize("sizes", [(17, 33), (130, 70)], ids=str)
def test_factors_far_from_where_they_belong_take_a_bounded_step(sizes, scale):
    Problem(one(sizes), factor_scale=scale).check()


def test_factors_come_to_rest_where_they_are_the_inverse():
    """With one gradient E falls to what bfloat16 operands leave of it."""
    problem = Problem(one((96, 96)), factor_scale=3)
    for _ in range(60):
        problem.run()
    for gram, factor in zip(problem.grams, problem.joined(), strict=True):
        lam = problem.scalars["damping"] * gram[0].diagonal().mean()
        k = factor[0].double()
        error = k.T @ (gram[0].double() + lam * torch.eye(len(k))) @ k - torch.eye(len(k))
        assert torch.linalg.matrix_norm(error, 2) < 2**-5


# Products kept between updates


def test_products_are_refreshed_where_asked_and_used_as_they_are_where_not():
    problem = Problem(one((70, 33), 3), weight_decay=0.0, row_beta=None, beta1=0.0)
    state = [t.clone() for t in problem.grams + problem.factors + problem.residuals]
    problem.run(update=False, refresh=True)
    for product, factor in zip(problem.products, problem.factors, strict=True):
        exact = (factor.double() @ factor.double().mT).float()
        assert (product.float() - exact).abs().max() <= 2**-8 * exact.abs().max()
        assert torch.equal(product, product.mT)
    assert_bits_equal(problem.grams + problem.factors + problem.residuals, state)

    for product in problem.products:
        product.copy_(torch.eye(product.shape[1]))
    before = [p.clone() for p in problem.params]
    problem.run(update=False)
    for p, old, g in zip(problem.params, before, problem.grads, strict=True):
        step = (old - p) / g
        assert (step - step.mean()).abs().max() < 2**-7 * step.mean()


def test_writing_the_factors_leaves_their_version_alone():
    problem = Problem(one((9, 5), 2))
    versions = [f._version for f in problem.factors]
    problem.run()
    assert [f._version for f in problem.factors] == versions


# Gradients of every size


@pytest.mark.parametrize("exponent", [-149, -126, -100, -64, -63, 64, 65, 100, 120])
def test_the_scale_of_a_gradient_changes_nothing(exponent):
    """To the bit, where nothing is lost when the gradient is multiplied."""
    first, second = (Problem(one((70, 33), 2)) for _ in range(2))
    grads = [torch.randint(-8, 9, g.shape).float() for g in first.grads]
    first.grads = grads
    half = 2.0 ** (exponent // 2)
    second.grads = [g * half * 2.0 ** (exponent - exponent // 2) for g in grads]
    for a, b in zip(first.tensors(), second.tensors(), strict=True):
        b.copy_(a)
    for problem in (first, second):
        problem.run()
        problem.run()
    assert_bits_equal(second.tensors(), first.tensors())


@pytest.mark.parametrize("size", [1e-30, 1e18])
def test_tiny_and_huge_gradients(size):
    problem = Problem(one((64, 40), 2))
    problem.grads = [g * size for g in problem.grads]
    problem.check((True, True))


def test_momentum_alone_gives_updates_of_the_same_size():
    """However small: the gradient is zero, the momentum nearly so."""
    problem = Problem(one((33, 20), 2), weight_decay=0.0)
    problem.grads = [torch.zeros_like(g) for g in problem.grads]
    problem.buffers = [b * 1e-25 for b in problem.buffers]
    before = [p.clone() for p in problem.params]
    state = [t.clone() for t in problem.grams + problem.factors + problem.residuals]
    problem.run()
    assert_bits_equal(problem.grams + problem.factors + problem.residuals, state)
    for p, old in zip(problem.params, before, strict=True):
        rms = ((p - old).double() / 0.05).square().mean().sqrt()
        assert rms.item() == pytest.approx(0.4 * shape_scale(33, 20), rel=1e-5)


@pytest.mark.parametrize("momentum", [True, False])
def test_a_zero_gradient_leaves_grams_and_factors_alone(momentum):
    problem = Problem(one((70, 33), 3))
    problem.grads[1].zero_()
    if not momentum:
        problem.buffers[1].zero_()
    kept = [t[1].clone() for t in problem.grams + problem.factors + problem.residuals]
    problem.check()
    assert_bits_equal([t[1] for t in problem.grams + problem.factors + problem.residuals], kept)


@pytest.mark.parametrize("bad", [NAN, INF])
def test_a_non_finite_gradient_reaches_its_own_matrix_alone(bad):
    problem, without = (Problem(one((70, 33), 3)) for _ in range(2))
    copied = (problem.tensors() + problem.grads, without.tensors() + without.grads)
    for source, copy in zip(*copied, strict=True):
        copy.copy_(source)
    problem.grads[1][69, 32] = bad
    problem.run()
    without.run()
    assert not problem.params[1].isfinite().any()
    for name in ("params", "buffers", "rows", "grams", "factors", "residuals", "products"):
        ours, theirs = getattr(problem, name), getattr(without, name)
        if len(ours) == 2:  # stacks
            ours, theirs = ([t[i] for t in ts for i in (0, 2)] for ts in (ours, theirs))
        else:
            ours, theirs = ([ts[i] for i in (0, 2)] for ts in (ours, theirs))
        assert_bits_equal(ours, theirs)


# Layouts


@pytest.mark.parametrize("like", [gapped, transposed])
def test_layouts(like):
    problem = Problem(one((70, 33), 3), like=like)
    problem.check()
    if like is gapped:
        for tensor in problem.params + problem.buffers:
            assert (tensor._base[..., 1::2] == 7).all()


@pytest.mark.parametrize("like", [torch.clone, channels_last])
def test_convolutions(like):
    problem = Problem(one((6, 18), 2))
    for name in ("params", "grads", "buffers"):
        tensors = getattr(problem, name)
        setattr(problem, name, [like(t.view(6, 2, 3, 3)) for t in tensors])
    problem.check()


# Determinism


@pytest.mark.parametrize("cached", [CACHED, (False, False)], ids=str)
def test_every_number_of_threads_gives_the_same_bits(cached):
    def result(threads):
        torch.manual_seed(1)
        torch.set_num_threads(threads)
        buckets = one((130, 70), 5, cached) + one((20, 30), 40, cached) + one((200, 65), 1, cached)
        buckets += [((300, 257), 1, cached, (160, 128)), ((100, 70), 3, cached, (32, True))]
        problem = Problem(buckets + one((65, 140), 3, cached))
        for update in (True, True, False):
            problem.run(update)
        return problem.tensors()

    expected = result(1)
    for threads in (2, 2, 3, 5):
        assert_bits_equal(result(threads), expected)


# Misuse: memory must stay safe


MISUSE = {
    "a gradient less": lambda p: p.grads.pop(),
    "a buffer less": lambda p: p.buffers.pop(),
    "no buffers": lambda p: p.buffers.clear(),
    "a row less": lambda p: p.rows.pop(),
    "a shorter row": lambda p: p.rows.__setitem__(1, torch.ones(8)),
    "a larger gradient": lambda p: p.grads.__setitem__(1, torch.rand(9, 6)),
    "an integer parameter": lambda p: p.params.__setitem__(1, torch.ones(9, 5, dtype=torch.int32)),
    "a double gradient": lambda p: p.grads.__setitem__(1, torch.rand(9, 5, dtype=F64)),
    "a residual of another dtype": lambda p: p.residuals.__setitem__(0, p.residuals[0].int()),
    "a transposed factor": lambda p: p.factors.__setitem__(0, p.factors[0].mT),
    "a smaller gram": lambda p: p.grams.__setitem__(1, p.grams[1][:, 1:]),
    "a bfloat16 gram": lambda p: p.grams.__setitem__(1, p.grams[1].bfloat16()),
    "a smaller product": lambda p: p.products.__setitem__(1, p.products[1][:, 1:]),
    "a step less": lambda p: setattr(p, "steps", p.steps[1:]),
    "whole steps": lambda p: setattr(p, "steps", p.steps.long()),
}


@pytest.mark.parametrize("case", MISUSE)
def test_misuse_changes_nothing(case):
    problem = Problem(one((9, 5), 2))
    MISUSE[case](problem)
    before = [t.clone() for t in problem.tensors()]
    with pytest.raises(RuntimeError):
        torch.ops.rootfree_fused._rootfree_shampoo_bf16_(
            *(problem.params, problem.grads, problem.buffers, problem.rows),
            *(problem.grams, problem.factors, problem.residuals, problem.products),
            problem.steps,
            torch.tensor(0.1),
            sizes=[9, 5],
            update_factors=True,
            refresh_products=False,
            **problem.scalars,
        )
    count = len(problem.tensors()) - 2  # products are poisoned
    assert_bits_equal(problem.tensors()[:count], before[:count])
