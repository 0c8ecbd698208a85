"""The CPU bodies of IF-Shampoo against the specification in float64."""

from __future__ import annotations

import pytest
import torch
from helpers.blocks import without_padding
from helpers.comparison import assert_bits_equal, assert_no_worse_than, relative_error
from helpers.cpu_matrix import (
    BF16,
    DENSE,
    DIAGONAL,
    F16,
    F32,
    F64,
    INF,
    MODES,
    NAN,
    RAGGED,
    SCALARS,
    Problem,
    wide_of,
)
from helpers.layouts import channels_last, gapped, transposed

from rootfree_fused import IFShampoo, ops, reference
from rootfree_fused.reference import matrix

pytestmark = [
    pytest.mark.usefixtures("two_threads"),
    pytest.mark.skipif(ops.backends()["cpu"].startswith("reference"), reason="no extension"),
]


def one(sizes, members=1, dense=DENSE, cached=DENSE):
    return [(sizes, dense, members, cached)]


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("cached", [DENSE, DIAGONAL, (True, False), (False, True)], ids=str)
@pytest.mark.parametrize("sizes", RAGGED, ids=str)
def test_sizes(sizes, cached):
    Problem(one(sizes, 2, cached=cached)).check()


@pytest.mark.usefixtures("isa")
def test_sizes_of_several_tiles():
    Problem(one((300, 130)) + one((130, 300), cached=(True, False))).check()


BLOCKS = {  # of one tile and of several, the last shorter
    "rows": ((100, 40), (32, True)),
    "columns": ((40, 200), (True, 96)),
    "both": ((130, 70), (64, 32)),
    "several tiles": ((300, 257), (160, 128)),
    "not the kernel's": ((70, 33), (16, 8)),
}


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("cached", [DENSE, DIAGONAL, (True, False)], ids=str)
@pytest.mark.parametrize("case", BLOCKS)
def test_blocks(case, cached):
    sizes, blocks = BLOCKS[case]
    problem = Problem(one(sizes, 3, blocks, cached))
    problem.check([True, False, True], factor=3)
    for name in ("factors", "residuals", "momenta"):  # zeros where blocks are padded
        for stack, size in zip(getattr(problem, name), sizes, strict=True):
            assert torch.equal(stack, without_padding(stack, size)), name


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dense", [DENSE, (True, False), (False, True), DIAGONAL], ids=str)
@pytest.mark.parametrize("dtype", [BF16, F32])
def test_structures_and_modes(dtype, dense, mode):
    Problem(one((70, 33), 3, dense), dtype, **MODES[mode]).check()


@pytest.mark.parametrize("dense", [DENSE, (True, False), (False, True), DIAGONAL], ids=str)
def test_float64(dense):
    # The truth has the same precision: what is allowed is a different order of its sums.
    Problem(one((70, 33), 3, dense), F64, F64).check(factor=32)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize(
    ("param", "grad"), [(BF16, BF16), (BF16, F32), (F16, F16), (F16, F32)], ids=str
)
def test_dtypes_of_parameters(param, grad):
    Problem(one((70, 33), 3), BF16, param, grad).check()
    Problem(one((70, 33), 3), F32, param, grad).check()


def test_bfloat16_factors_of_float64_parameters():
    Problem(one((70, 33), 2), BF16, F64).check()


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", [BF16, F32])
def test_several_steps_some_of_which_update_the_factors(dtype):
    Problem(one((66, 40), 3) + one((40, 66), 2, cached=DIAGONAL), dtype).check(
        [True, False, True, False, False, True], factor=3
    )


@pytest.mark.usefixtures("isa")
def test_dozens_of_mixed_buckets_in_one_call():
    buckets = []
    for k in range(36):
        sizes = (3 + 7 * k % 80, 5 + 11 * k % 90)
        dense = [DENSE, (True, False), (False, True), DIAGONAL][k % 4 if k % 3 == 0 else 0]
        buckets += one(sizes, 1 + k % 4, dense, (k % 2 == 0, k % 5 != 0))
    Problem(buckets).check()


def test_axes_other_than_two():
    """Vectors and tensors of three axes among matrices; they are computed in float32."""
    problem = Problem(one((9, 5), 2))
    factors, momenta = [torch.ones(2, 6), *[torch.ones(1, d) for d in (2, 3, 4)]], []
    momenta = [torch.zeros_like(f) for f in factors]
    params = [torch.randn(6), torch.randn(6), torch.randn(2, 3, 4)]
    twin_params, twin_factors = [p.clone() for p in params], [f.clone() for f in factors]
    grads = [torch.randn(p.shape) for p in params]
    problem.params += params
    problem.grads += grads
    problem.buffers += [torch.zeros_like(p) for p in params]
    problem.factors += factors
    problem.momenta += momenta
    problem.residuals += [torch.empty(0)] * 4
    problem.products += [torch.empty(0)] * 4
    problem.axes += [1, 3]
    problem.run()
    rules = {k: SCALARS[k] for k in ("factor_lr", "factor_momentum", "damping", "batch_size")}
    owned = [[twin_factors[0][0]], [twin_factors[0][1]], [f[0] for f in twin_factors[1:]]]
    for p, g, mine in zip(twin_params, grads, owned, strict=True):
        reference.update_factors_(g, mine, [torch.zeros_like(f) for f in mine], **rules)
        update = reference.precondition(g, mine)
        reference.apply_(
            p, update, torch.zeros_like(p), lr=0.05, momentum=0.9, weight_decay=0.1, decoupled=True
        )
    assert_bits_equal(factors + params, twin_factors + twin_params)


# Products kept between updates


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", [BF16, F32])
def test_products_are_refreshed_where_asked_and_used_as_they_are_where_not(dtype):
    problem = Problem(one((70, 33), 3), dtype)
    read = [f.to(wide_of(dtype)) for f in problem.factors]
    expected = [(f @ f.mT).to(dtype) for f in read]
    truth = [f.double() @ f.double().mT for f in read]
    factors = [f.clone() for f in problem.factors]
    problem.run(update=False, refresh=True)
    for product, eager, exact in zip(problem.products, expected, truth, strict=True):
        assert_no_worse_than(product, eager, exact)
    assert_bits_equal(problem.factors, factors)

    for product in problem.products:
        product.copy_(torch.eye(product.shape[1]))
    problem.scalars |= {"momentum": 0.0, "weight_decay": 0.0}
    before, problem.buffers = [p.clone() for p in problem.params], []
    problem.run(update=False, lr=0.5)
    for p, old, g in zip(problem.params, before, problem.grads, strict=True):
        assert torch.equal(p, old - 0.5 * g.to(dtype).float())


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dense", [DENSE, (True, False)])
def test_writing_the_factors_leaves_their_version_alone(dense):
    problem = Problem(one((9, 5), 2, dense))
    versions = [f._version for f in problem.factors]
    problem.run()
    assert [f._version for f in problem.factors] == versions


# Layouts


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("like", [gapped, transposed])
def test_layouts(like):
    problem = Problem(one((70, 33), 3), like=like)
    problem.check()
    if like is gapped:
        for tensor in problem.params + problem.buffers:
            assert (tensor._base[..., 1::2] == 7).all()


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("like", [torch.clone, channels_last])
def test_convolutions(like):
    problem = Problem(one((6, 18), 2))
    as_kernel = lambda t: like(t.view(6, 2, 3, 3))  # noqa: E731
    for name in ("params", "grads", "buffers"):
        setattr(problem, name, [as_kernel(t) for t in getattr(problem, name)])
    problem.check()


# Determinism


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dense", [DENSE, (False, True)])
def test_every_number_of_threads_gives_the_same_bits(dense):
    def result(threads):
        torch.manual_seed(1)
        torch.set_num_threads(threads)
        buckets = one((130, 70), 5, dense) + one((20, 30), 40, dense) + one((200, 65), 1, dense)
        if dense == DENSE:
            buckets += one((300, 257), 1, (160, 128)) + one((100, 70), 3, (32, True))
        problem = Problem(buckets + one((65, 140), 3, dense, DIAGONAL))
        for update in (True, True, False):
            problem.run(update)
        return problem.tensors()

    expected = result(1)
    for threads in (2, 2, 3, 5):
        assert_bits_equal(result(threads), expected)


# Numbers


def test_momenta_and_products_are_symmetric():
    problem = Problem(one((130, 70), 2))
    problem.run()
    for t in problem.momenta + problem.products:
        assert torch.equal(t, t.mT)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("bad", [NAN, INF])
def test_a_non_finite_gradient_reaches_its_own_matrix_alone(bad):
    problem = Problem(one((70, 33), 3))
    problem.grads[1][69, 32] = bad
    problem.run()
    assert not problem.params[1].isfinite().any()
    for i in (0, 2):
        assert problem.params[i].isfinite().all()
        assert all(f[i].isfinite().all() for f in problem.joined())


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("d", [64, 256])
def test_factors_never_freeze(d):
    """In bfloat16 alone, K - c K m rounds back to K for a factor_lr below sqrt(d) / 256."""
    steps = 200 if d == 64 else 60
    generator = torch.Generator().manual_seed(0)
    params = [torch.zeros(d, d, dtype=dtype, requires_grad=True) for dtype in (F32, F64)]
    rules = {"factor_lr": 0.01, "factor_momentum": 0.5, "damping": 1e-4, "batch_size": 1}
    low, high = (
        IFShampoo([p], factor_dtype=dtype, **rules)
        for p, dtype in zip(params, (BF16, F64), strict=True)
    )
    frozen, still = [torch.eye(d, dtype=BF16)] * 2, [torch.zeros(d, d)] * 2
    for _ in range(steps):
        grad = 1e-3 * torch.randn(d, d, generator=generator).bfloat16()
        params[0].grad, params[1].grad = grad.float(), grad.double()
        low.step()
        high.step()
        if d == 64:
            kept = [f.float() for f in frozen]
            reference.update_factors_(grad.float(), kept, still, **rules)
            frozen = [k.bfloat16() for k in kept]
    if d == 64:
        assert all((f.diagonal() == 1).all() for f in frozen)
    for axis in (0, 1):
        state = low.state[params[0]]
        stored = matrix.join(state[f"factor_{axis}"], state[f"factor_{axis}_residual"]).diagonal()
        truth = high.state[params[1]][f"factor_{axis}"].diagonal()
        moved = truth - 1
        assert moved.min() > 0.02
        # A step reads K rounded to bfloat16, so what moves is within 2^-8 of what should.
        assert relative_error(stored - 1, moved) < 2**-7


# Misuse: memory must stay safe


MISUSE = {
    "a gradient less": lambda p: p.grads.pop(),
    "a buffer less": lambda p: p.buffers.pop(),
    "a larger gradient": lambda p: p.grads.__setitem__(1, torch.rand(9, 6)),
    "an integer parameter": lambda p: p.params.__setitem__(1, torch.ones(9, 5, dtype=torch.int32)),
    "a double gradient": lambda p: p.grads.__setitem__(1, torch.rand(9, 5, dtype=F64)),
    "a residual of another dtype": lambda p: p.residuals.__setitem__(0, p.residuals[0].int()),
    "a transposed factor": lambda p: p.factors.__setitem__(0, p.factors[0].mT),
    "a smaller momentum": lambda p: p.momenta.__setitem__(1, p.momenta[1][:, 1:]),
    "a smaller product": lambda p: p.products.__setitem__(1, p.products[1][:, 1:]),
}


@pytest.mark.parametrize("case", MISUSE)
def test_misuse_changes_nothing(case):
    if not torch.ops.rootfree_fused._bf16_kernel_runs():
        pytest.skip("no AVX512_BF16")
    problem = Problem(one((9, 5), 2))
    MISUSE[case](problem)
    before = [t.clone() for t in problem.tensors()]
    with pytest.raises(RuntimeError):
        problem.run()
    assert_bits_equal(problem.tensors()[:-2], before[:-2])
