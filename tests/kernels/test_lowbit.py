"""The low-bit launcher in Triton against the specification, to the bit: on a GPU or interpreted.

Where a test asks for equal bits its settings leave the update one rounding at each place where the
specification rounds, fused or not: averages move half-way, divisors are powers of two.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

import triton.language as tl
from helpers.kernels_lowbit import (
    BF16,
    CASES,
    E5M3,
    F32,
    INT16,
    METHOD_SETTINGS,
    S8,
    Lowbit,
    same,
)
from helpers.offline import needs_cuda, on_its_device
from helpers.operators import for_operators

from bench.host import as_on_cuda
from rootfree_fused.kernels import lowbit
from rootfree_fused.kernels.slots import ROW
from rootfree_fused.ops import dispatch
from rootfree_fused.ops.methods import METHODS
from rootfree_fused.reference.formats import (
    BLOCK,
    WEIGHT_STREAM,
    encoded,
)

SHAPES = [(n,) for n in (1, 255, 256, 257, 0, 5000)]
HALF_WAY = {"beta1": 0.5, "beta2": 0.5, "vector_beta2": 0.5, "alpha": 0.5, "beta": 0.5}

# The interpreter is numpy, which reports the infinities that some of the tests put in.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")


@pytest.fixture(autouse=True)
def _interpreter(request):
    with on_its_device(request):
        yield


def half_way(method):
    """Settings by which averages move half-way."""
    defaults, _ = METHOD_SETTINGS[method]
    return {key: value for key, value in HALF_WAY.items() if key in defaults}


# The update ----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHOD_SETTINGS)
@pytest.mark.parametrize("case", CASES)
def test_states_are_equal_to_the_bit(case, method, device):
    lists = Lowbit(method, case, SHAPES, device, **half_way(method))
    for _ in range(2):
        lists.step()
    lists.check_bits()


@pytest.mark.parametrize("grad", [None, F32], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_weights_are_equal_to_the_bit(case, grad, device):
    """The second moment stays at 1, and 1 is added to divide by 2."""
    settings = {"alpha": 1.0, "damping": 1.0, "momentum": 0.5, "weight_decay": 0.0}
    lists = Lowbit("rmsprop_", case, SHAPES, device, grad=grad, **settings)
    for tensors in (lists.actual, lists.expected):
        for i in range(len(SHAPES)):
            code, scale = encoded(torch.ones(SHAPES[i], device=device), lists.formats[0])
            tensors[1][i].copy_(code)
            if scale is not None:
                tensors[4][i].copy_(scale)
    before = [w.clone() for w in lists.weights(lists.actual)]
    for _ in range(2):
        lists.step(lr=0.5)
    lists.check_bits()
    after = lists.weights(lists.actual)
    assert all((a != b).float().mean() > 0.9 for a, b in zip(after, before, strict=True) if len(a))


@pytest.mark.parametrize("case", ["bfloat16 + 8, 8bit", "float32, bfloat16"])
@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((3, 701), "misaligned"),
        ((37, 41), "transposed"),
        ((2, 5, 13, 17), "channels_last"),
        ((37, 41), "gapped"),
    ],
    ids=str,
)
def test_blocks_follow_the_order_of_the_axes(shape, layout, case, device):
    lists = Lowbit("adamw_", case, [shape, shape], device, layout=layout, **half_way("adamw_"))
    for _ in range(2):
        lists.step()
    lists.check_bits()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("method", ["adamw_", "rmsprop_", "sign_ of micro-batches"])
def test_steps_agree_within_a_level(method, case, device):
    """An update that rounds otherwise moves a code by one, and few of them."""
    lists = Lowbit(method, case, [(5000,)], device, grad=F32)
    lists.step([torch.randn(5000, device=device)], lr=0.01)
    lists.check_guards()
    for tensors, others in zip(lists.actual, lists.expected, strict=True):
        for a, b in zip(tensors, others, strict=True):
            if a.dtype in (S8, E5M3) or a.dtype == BF16:
                assert (a == b).float().mean() > 0.99
    for (dtype, (a,)), (_, (b,)) in zip(
        lists.states(lists.actual), lists.states(lists.expected), strict=True
    ):
        if dtype == S8:
            largest = torch.nn.functional.pad(b.abs(), (0, -len(b) % BLOCK)).view(-1, BLOCK).amax(1)
            largest = largest.repeat_interleave(BLOCK)[: len(b)]
            roots = [x.sign() * (x.abs() / largest).sqrt() for x in (a, b)]
            assert ((roots[0] - roots[1]).abs() <= 1.01 / 127).all()
        else:
            level = {E5M3: 2.0**-3, BF16: 2.0**-7, F32: 2.0**-20}[dtype]
            assert ((a - b).abs() <= 1.01 * level * b.abs().clamp_min(2.0**-20 / level)).all()
    level = {S8: 2.0**-15, INT16: 2.0**-20}.get(lists.case.residual)
    if level is None:
        level = 2.0**-20 if lists.case.param == F32 else 2.0**-7
    for a, b in zip(*map(lists.weights, (lists.actual, lists.expected)), strict=True):
        assert ((a - b).abs() <= 1.01 * level * b.abs().clamp_min(1.0)).all()


@pytest.mark.parametrize("case", ["bfloat16 + 8, 8bit", "bfloat16 stochastic, 8bit"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_hurts_its_block_alone(bad, case, device):
    lists = Lowbit("adamw_", case, [(700,), (300,)], device, **half_way("adamw_"))
    grads = lists.fresh_grads()
    grads[0][300] = bad
    lists.step(grads)
    lists.check_bits()
    values = [value for _, states in lists.states(lists.actual) for value in states]
    hurt = [~value.isfinite() for value in values]
    assert hurt[0].nonzero().flatten().tolist() == [*range(256, 512)]
    assert not hurt[1].any()
    assert not hurt[3].any()
    weight, other = lists.weights(lists.actual)
    assert (~weight.isfinite()).nonzero().flatten().tolist() == [300]
    assert other.isfinite().all()
    lists.step()
    lists.check_bits()


@pytest.mark.parametrize("case", ["bfloat16 + 8, 8bit", "bfloat16 + 8, bfloat16"])
@pytest.mark.parametrize("size", [0.0, 2.0**-149, 2.0**-133, 2.0**-100, 2.0**60, 2.0**120])
def test_gradients_of_every_size(size, case, device):
    """Zeros, denormal numbers, such whose squares are not there, or infinite."""
    settings = {"beta1": 0.0, "beta2": 0.0, "damping": 1.0, "batch_size": 1.0}
    lists = Lowbit("adamw_", case, [(700,)], device, grad=F32, **settings)
    for _ in range(2):
        grad = size * torch.randint(-7, 8, (700,), device=device) + 0.0  # no zero below zero
        lists.step([grad])
    lists.check_bits()


def test_where_there_were_infs_nothing_changes(device):
    lists = Lowbit("adamw_", "bfloat16 + 8, 8bit", SHAPES, device)
    before = [[t.clone() for t in tensors] for tensors in lists.actual]
    grads = [torch.full_like(g, torch.inf) for g in lists.fresh_grads()]
    lists.step(grads, lr=0.1, found_inf=torch.ones((), device=device))
    for tensors, olds in zip(lists.actual, before, strict=True):
        assert all(map(same, tensors, olds))
    lists.check_bits()
    lists.step(found_inf=torch.zeros((), device=device))
    assert not torch.equal(lists.actual[1][-1], before[1][-1])


@pytest.mark.parametrize("method", ["adamw_", "sign_", "sign_ of micro-batches"])
@pytest.mark.parametrize("case", ["bfloat16 + 8, 8bit", "float32, bfloat16"])
def test_a_scaler_is_divided_out(case, method, device):
    lists = Lowbit(method, case, SHAPES, device, grad=F32, **half_way(method))
    for scale in (4.0, 65536.0):
        lists.step([scale * g for g in lists.fresh_grads()], grad_scale=torch.tensor(scale))
    lists.check_bits()


@pytest.mark.parametrize("kind", [F32, torch.float64], ids=str)
def test_lr_and_steps_may_be_on_either_device(kind, device):
    lists = Lowbit("vector_adam_", "bfloat16 + 8, 8bit", SHAPES, device)
    start = [[t.clone() for t in tensors] for tensors in lists.actual]
    grads, results = lists.fresh_grads(), []
    for place in (device, "cpu"):
        for tensors, olds in zip(lists.actual, start, strict=True):
            for tensor, old in zip(tensors, olds, strict=True):
                tensor.copy_(old)
        lists.steps = lists.steps.to(place)
        lists.launch(grads, torch.tensor(0.1, dtype=kind, device=place))
        results.append([t.clone() for tensors in lists.actual for t in tensors])
    assert all(map(same, *results))
    assert not same(results[0][len(SHAPES) - 1], start[0][-1])


# Plans ---------------------------------------------------------------------------------------


def plan_of(lists, grads):
    params, *others = lists.actual
    seeds, firsts = lists.random["seeds"], lists.random["firsts"]
    return lowbit.prepare([params, grads, *others], seeds=seeds, firsts=firsts)


def test_hundreds_of_tensors_are_one_launch(device):
    shapes = [(n,) for n in torch.randint(1, 600, (300,)).tolist()]
    lists = Lowbit("adamw_", "bfloat16 + 8, 8bit", shapes, device, **half_way("adamw_"))
    (launch,) = plan_of(lists, lists.fresh_grads()).launches
    assert launch.programs == len(shapes)
    assert tuple(launch.dtypes) == (tl.bfloat16, tl.bfloat16, tl.int8, tl.uint8, None, tl.int8)


def test_a_plan_for_gradients_that_moved(device):
    """It has their addresses, promises what they allow, and steps as the operator does."""
    shapes = [(3000,), (500,)]
    lists = Lowbit("adamw_", "bfloat16 + 8, 8bit", shapes, device, **half_way("adamw_"))
    grads = lists.fresh_grads()
    late = [torch.cat([g[:1], g])[1:] for g in grads]
    plan = plan_of(lists, grads)
    assert plan.launches[0].rows.host[:, ROW.aligned].tolist() == [2048, 0]
    moved = lowbit.move_grads(plan, torch.tensor([g.data_ptr() for g in late]))
    (found,), (expected,) = moved.launches, plan_of(lists, late).launches
    assert torch.equal(found.rows.host, expected.rows.host)
    assert found.rows.host[:, ROW.aligned].tolist() == [0, 0]
    lr = torch.tensor(0.0)
    settings = {**lists.settings, "stochastic": False}
    lowbit.launch("adamw_", moved, lists.steps, lr, **settings)
    lists.specify(late, lr)
    lists.check_bits()


@pytest.mark.parametrize("late", ["param", "state", "residual"])
def test_only_aligned_full_chunks_promise_alignment(late, device):
    def tensor(dtype, name):
        return [torch.zeros(2060, dtype=dtype, device=device)[name == late :][:2050]]

    scales = [[torch.zeros(9, dtype=dtype, device=device)] for dtype in (F32, E5M3)]
    lists = [tensor(BF16, "param"), tensor(BF16, "grad"), tensor(S8, "state"), tensor(E5M3, "")]
    lists += [tensor(S8, "residual"), *scales]
    (launch,) = lowbit.prepare(lists, seeds=[0], firsts=[0]).launches
    assert launch.rows.host[0, ROW.aligned] == 0
    assert launch.programs == 3


def test_other_seeds_or_formats_are_other_plans(device):
    lists = Lowbit("adamw_", "bfloat16 + 8, 8bit", [(300,)], device)
    grads = lists.fresh_grads()
    first = plan_of(lists, grads)
    assert plan_of(lists, grads).launches[0] is first.launches[0]
    lists.random["seeds"] = [1]
    second = plan_of(lists, grads)
    lists.random["firsts"] = [1]
    third = plan_of(lists, grads)
    lists.actual[2] = [t.view(S8) for t in lists.actual[2]]
    lists.actual[5] = [torch.zeros(2, device=device)]
    fourth = plan_of(lists, grads)
    assert len({id(plan.launches[0]) for plan in (first, second, third, fourth)}) == 4


@pytest.mark.parametrize(
    "wrong",
    [
        {"moment": torch.float16},
        {"moment": INT16},
        {"param": F32},  # which needs no residual
        {"residual": torch.int32},
        {"scale": F32},
    ],
    ids=str,
)
def test_what_the_kernels_do_not_take(wrong, device):
    def tensor(name, dtype):
        return [torch.zeros(3, dtype=wrong.get(name, dtype), device=device)]

    params = tensor("param", BF16)
    lists = [params, [torch.zeros_like(params[0])], tensor("average", S8), tensor("moment", E5M3)]
    lists += [tensor("residual", S8), tensor("", F32), tensor("scale", E5M3)]
    with pytest.raises(TypeError, match=r"params\[0\].*int8 with float32 scales"):
        lowbit.prepare(lists, seeds=[0], firsts=[0])


# The operators -------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["adamw_", "rmsprop_", "sign_", "vector_adam_"])
def test_the_operator_on_cuda_is_the_launcher(method, device):
    lists = Lowbit(method, "bfloat16 + 8, 8bit", SHAPES, device, **half_way(method))
    grads, lr = lists.fresh_grads(), torch.tensor(0.0)
    params, *others = lists.actual
    operator = getattr(torch.ops.rootfree_fused, METHODS[method].lowbit_name)
    settings = {**for_operators(lists.settings), **lists.random}
    launched, run_plan = [], lowbit.run_plan

    def noted(*args):
        launched.append(args[2])
        run_plan(*args)

    with as_on_cuda(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(lowbit, "run_plan", noted)
        operator(params, grads, *others, lists.steps, lr, **settings)
    assert launched == [method]
    lists.specify(grads, lr)
    lists.check_bits()


def test_parameters_on_the_cpu_go_to_the_body_there():
    device = torch.device("cpu")
    lists = Lowbit("adamw_", "bfloat16 stochastic, 8bit", SHAPES, device)
    grads, lr = lists.fresh_grads(), torch.tensor(0.1)
    params, *others = lists.actual
    _, on_cuda = dispatch.diagonal_bodies(METHODS["adamw_"])["lowbit_adamw_"]
    settings = {**for_operators(lists.settings), **lists.random}
    on_cuda(params, grads, *others, lists.steps, lr, **settings)
    lists.specify(grads, lr)
    lists.check_bits()


def test_the_numbers_of_a_weight_are_of_the_stream_that_is_specified():
    assert lowbit.WEIGHT_STREAM == WEIGHT_STREAM
    assert lowbit.BLOCK == BLOCK


# Only on a GPU -------------------------------------------------------------------------------


@needs_cuda
def test_a_captured_step_counts_on_and_waits_for_nothing():
    device = torch.device("cuda")
    shapes = [(5,), (5000,)]
    lists = Lowbit("adamw_", "bfloat16 stochastic, 8bit", shapes, device, **half_way("adamw_"))
    lr = torch.tensor(0.0, device=device)
    grads = lists.fresh_grads()
    lists.step(grads)
    torch.cuda.set_sync_debug_mode("error")
    try:
        lists.launch(grads, lr)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    lists.specify(grads, lr)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        lists.launch(grads, lr)
        lists.steps += 1
    for _ in range(3):
        lists.specify(grads, lr)
        graph.replay()
    lists.check_bits()
