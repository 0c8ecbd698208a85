"""The Triton launchers against the specification: on a GPU where there is one, else interpreted."""

from __future__ import annotations

import pytest
import torch
from helpers.comparison import assert_no_worse_than

pytest.importorskip("triton")

from helpers.kernels_diag import CASES, Lists, in_guarded_memory
from helpers.offline import needs_cuda, on_its_device
from helpers.operators import ADAMW, RMSPROP

from rootfree_fused.kernels import diag, tables
from rootfree_fused.kernels.slots import ROW

BLOCK = diag.BLOCK
SHAPES = [(n,) for n in (0, 1, 31, 33, 1023, 1025, BLOCK, BLOCK + 1, 3 * BLOCK + 7)]
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
SIGNS = ["sign", "sign of gradients maximize"]
DTYPES = [(F32, F32), (BF16, BF16), (BF16, F32), (F16, F16), (F16, F32)]

# The interpreter is numpy, which reports the infinities that some of the tests put in.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")


@pytest.fixture(autouse=True)
def _interpreter(request):
    with on_its_device(request):
        yield


# The update ----------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["rmsprop momentum", "adamw bias correction"])
def test_finite_gradients_never_make_nan(case, device):
    lists = Lists(case, SHAPES, device, (F32, F32))
    for size in (1e18, 1e19, 1e37):
        for _ in range(3):
            lists.step(grads=[size * torch.randn(s, device=device) for s in SHAPES])
    for tensors in lists.actual:
        assert all(t.isfinite().all() for t in tensors)


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_steps_follow_the_specification(case, dtypes, device):
    lists = Lists(case, SHAPES, device, dtypes)
    for _ in range(3):
        lists.step()
    lists.check()


@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, F32)], ids=str)
@pytest.mark.parametrize(
    "case", ["rmsprop momentum", "adamw bias correction", "sign of micro-batches"]
)
@pytest.mark.parametrize(
    ("shape", "layouts"),
    [
        ((3, 701), ["misaligned"] * 4),
        ((3, 701), ["contiguous", "misaligned", "contiguous", "contiguous"]),
        ((3, 701), ["contiguous", "contiguous", "contiguous", "misaligned"]),
        ((37, 41), ["transposed"] * 4),
        ((2, 5, 13, 17), ["channels_last"] * 4),
        ((37, 41), ["contiguous", "transposed", "contiguous", "contiguous"]),
        ((37, 41), ["transposed", "transposed", "contiguous", "transposed"]),
        ((2, 5, 13, 17), ["channels_last", "contiguous", "channels_last", "channels_last"]),
        ((37, 41), ["gapped", "contiguous", "contiguous", "contiguous"]),
        ((37, 41), ["gapped"] * 4),
    ],
    ids=str,
)
def test_layouts(shape, layouts, case, dtypes, device):
    lists = Lists(case, [(5,) * len(shape), shape], device, dtypes, layouts)
    for _ in range(2):
        lists.step()
    lists.check()


@pytest.mark.parametrize("case", ["rmsprop momentum", "adamw bias correction"])
def test_layouts_that_go_straight_through(case, device):
    """A dense tensor whose gradient and state have its strides is updated where it lies."""
    for shape, layout in [((37, 41), "transposed"), ((2, 5, 13, 17), "channels_last")]:
        lists = Lists(case, [shape], device, (F32, F32), [layout] * 4)
        grads = [in_guarded_memory(grad, layout)[0] for grad in lists.fresh_grads()]
        params, square_avgs, others = lists.actual
        plan = tables.find_plan(
            [params, grads, square_avgs, others], block=BLOCK, vector=diag.VECTOR
        )
        assert plan.copied == []


def test_an_expanded_gradient(device):
    lists = Lists("rmsprop momentum", [(40, 50)], device, (F32, F32))
    grad = torch.randn(50, device=device).expand(40, 50)
    lists.launch([grad], torch.tensor(0.3))
    lists.specify(lists.eager, [grad], torch.tensor(0.3))
    lists.specify(lists.truth, [grad.double()], torch.tensor(0.3))
    lists.check()


def test_hundreds_of_tensors_are_one_launch(device):
    sizes = torch.randint(1, 2 * BLOCK, (300,)).tolist()
    lists = Lists("adamw bias correction", [(n,) for n in sizes], device, (BF16, BF16))
    lists.step()
    lists.check()
    args = [*lists.actual[:1], lists.fresh_grads(), *lists.actual[1:]]
    assert len(tables.find_plan(args, block=BLOCK, vector=diag.VECTOR).launches) == 1


def test_dtypes_may_mix(device):
    """A launch a dtype pair; every tensor keeps its own step count."""
    several = [
        Lists("adamw bias correction", [(n,)], device, dtypes)
        for n, dtypes in zip((7, 1500, 64, 1, 300), DTYPES, strict=True)
    ]
    counts = torch.tensor([3.0, 1.0, 40.0, 2.0, 500.0], device=device)
    lr = torch.tensor(0.3)
    merged = [[lists.actual[j][0] for lists in several] for j in range(3)]
    grads = [lists.fresh_grads()[0] for lists in several]
    diag.update_("adamw_", merged[0], grads, merged[2], merged[1], counts, lr, **ADAMW)
    for lists, grad, count in zip(several, grads, counts, strict=True):
        lists.steps = count[None]
        lists.specify(lists.eager, [grad], lr)
        lists.specify(lists.truth, [grad.double()], lr)
        lists.check()


@pytest.mark.parametrize("decay", [1 - 1e-4, 0.0])
def test_many_small_steps_do_not_drift(decay, device):
    """s moves by 1e-4 of its distance a step; alpha itself rounded to float32 would bias it."""
    lists = Lists("rmsprop", [(1000,)], device, (F32, F32))
    lists.scalars = {**RMSPROP, "alpha": decay, "weight_decay": 0.0}
    for _ in range(500 if decay else 1):
        lists.step()
    lists.check()


@pytest.mark.parametrize("betas", [(0.0, 0.5), (0.9, 0.99), (0.999, 0.9999), (0.9999, 0.0)])
def test_bias_correction_does_not_cancel(betas, device):
    """Twice the usual factor: each of the two corrections is right to 2 ulp, the eager one to 1/2.

    1 - beta^t as it stands would be wrong by up to 1 ulp of 1, thousands of ulp of the result.
    """
    counts = [1, 2, 3, 5, 10, 100, 690, 700, 1000, 6930, 7000, 10**5, 10**7]
    lists = Lists("adamw bias correction", [(64,)] * len(counts), device, (F32, F32))
    lists.scalars = {**ADAMW, "beta1": betas[0], "beta2": betas[1], "weight_decay": 0.0}
    lists.steps = torch.tensor(counts, device=device, dtype=F32)
    for params in (lists.actual[0], lists.eager[0], lists.truth[0]):
        for param in params:
            param.zero_()  # so that the parameter is the update
    lists.step()
    lists.check(one_by_one=True, factor=4.0)


@pytest.mark.parametrize("place_of_lr", ["cpu", "device"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", ["rmsprop", "adamw bias correction"])
def test_lr_is_a_tensor_that_changes(case, dtype, place_of_lr, device):
    lists = Lists(case, [(5,), (BLOCK + 1,)], device, (F32, F32))
    lr = torch.tensor(0.3, dtype=dtype, device="cpu" if place_of_lr == "cpu" else device)
    for factor in (1.0, 0.5, 0.0, 3.0):
        lr *= factor
        lists.step(lr=lr)
    lists.check()


def test_step_counts_on_the_cpu(device):
    lists = Lists("adamw bias correction", [(5,), (50,)], device, (F32, F32))
    lists.steps = lists.steps.cpu()
    for _ in range(3):
        lists.step()
    lists.check()


@pytest.mark.parametrize("case", ["rmsprop momentum", "adamw bias correction", *SIGNS])
def test_a_nonfinite_gradient_stays_where_it_is(case, device):
    lists = Lists(case, [(BLOCK + 9,)], device, (F32, F32))
    (grad,) = lists.fresh_grads()
    bad = {0: float("nan"), 3: float("inf"), BLOCK: -float("inf"), BLOCK + 8: float("nan")}
    for i, value in bad.items():
        grad[i] = value
    lists.step([grad])
    good = torch.ones(BLOCK + 9, dtype=torch.bool, device=device)
    good[list(bad)] = False
    together = zip(lists.actual, lists.eager, lists.truth, strict=True)
    for actual, eager, truth in (group for lists in together for group in zip(*lists, strict=True)):
        assert torch.equal(actual[~good].isnan(), eager[~good].isnan())
        assert torch.equal(actual[~good].isinf(), eager[~good].isinf())
        assert_no_worse_than(actual[good], eager[good], truth[good])


def test_nothing_to_do(device):
    lr = torch.tensor(0.3)
    diag.update_("rmsprop_", [], [], [], [], lr, **RMSPROP)
    diag.update_("adamw_", [], [], [], [], None, lr, **ADAMW)
    empty = [torch.empty(0, 3, device=device)]
    diag.update_("rmsprop_", empty, empty, empty, empty, lr, **RMSPROP)


# Tables --------------------------------------------------------------------------------------


def test_tables_are_never_stale(device):
    """The same addresses with another length, dtype or stride are other tensors."""
    memory = [torch.empty(4096, device=device) for _ in range(4)]
    views = [
        lambda t, dtype: t[:1500].view(dtype)[:1500],
        lambda t, dtype: t[:400].view(dtype)[:400],
        lambda t, dtype: t.view(dtype)[:1600].view(40, 40),
        lambda t, dtype: t.view(dtype)[:1600].view(40, 40).t(),
        lambda t, dtype: t.view(dtype)[:3200:2].view(40, 40),
    ]
    for param_dtype, grad_dtype in [*DTYPES, (F32, F32)]:
        for view in views:
            for other in views:
                if other(memory[0], F32).shape != view(memory[0], F32).shape:
                    continue
                lists = Lists("rmsprop momentum", [(1,)], device, (param_dtype, grad_dtype))
                p, s, m = (
                    view(t, dtype)
                    for t, dtype in zip(memory[:3], (param_dtype, F32, F32), strict=True)
                )
                g = other(memory[3], grad_dtype)
                for t in (p, s, m, g):
                    t.copy_(torch.rand(t.shape))
                lists.actual = [[p], [s], [m]]
                lists.eager = [[t.clone()] for t in (p, s, m)]
                lists.truth = [[t.double()] for t in (p, s, m)]
                lr = torch.tensor(0.3)
                lists.specify(lists.eager, [g.clone()], lr)
                lists.specify(lists.truth, [g.double()], lr)
                lists.launch([g], lr)
                lists.check(factor=4.0)  # a stale table is wrong everywhere


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("which", range(4))
def test_only_aligned_full_chunks_promise_alignment(which, dtypes, device):
    """One tensor of four that starts an element late makes the whole row ragged."""
    for late, expected in [(0, 3 * BLOCK), (1, 0), (2, 0), (diag.VECTOR, 3 * BLOCK)]:
        row = [
            torch.zeros(4 * BLOCK, dtype=dtype, device=device)[late * (i == which) :]
            for i, dtype in enumerate((*dtypes, F32, F32))
        ]
        row = [[tensor[: 3 * BLOCK + 7]] for tensor in row]
        (launch,) = tables.find_plan(row, block=BLOCK, vector=diag.VECTOR).launches
        assert launch.programs == 4
        assert launch.rows.host[0, ROW.aligned] == expected


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_a_plan_for_gradients_that_moved_is_the_plan_for_those_gradients(dtypes, device):
    def gradient(late):
        return torch.ones(3 * BLOCK + late, dtype=dtypes[1], device=device)[late:]

    params, states = ([torch.ones(3 * BLOCK, dtype=t, device=device)] * 2 for t in (dtypes[0], F32))
    plan = diag.prepare([params, [gradient(0), gradient(1)], states])
    moved = [gradient(1), gradient(0)]
    addresses = torch.tensor([g.data_ptr() for g in moved])
    (found,), (expected,) = (
        p.launches
        for p in (diag.move_grads(plan, addresses), diag.prepare([params, moved, states]))
    )
    assert torch.equal(found.rows.host, expected.rows.host)
    assert found._replace(rows=None) == expected._replace(rows=None)


def test_few_plans_are_kept(device):
    lr = torch.tensor(0.3)
    kept = []
    for _ in range(tables._MAX_PLANS + 3):
        kept.append([torch.ones(3, device=device)])
        diag.update_("rmsprop_", kept[-1], kept[0], kept[-1], [], lr, **RMSPROP)
    assert len(tables._plans) == tables._MAX_PLANS


def test_what_the_kernels_do_not_take(device):
    def tensors(*dtypes):
        return [[torch.ones(3, device=device, dtype=dtype)] for dtype in dtypes]

    lr = torch.tensor(0.3)
    for dtypes in [(torch.float64, torch.float64, F32), (BF16, F16, F32), (F32, F32, BF16)]:
        with pytest.raises(TypeError, match=r"params\[0\].*float32"):
            diag.update_("rmsprop_", *tensors(*dtypes), [], lr, **RMSPROP)


# Only on a GPU -------------------------------------------------------------------------------


@needs_cuda
def test_no_synchronization():
    device = torch.device("cuda")
    lists = Lists("adamw bias correction", [(5,), (BLOCK,)], device, (F32, F32))
    lists.step()
    grads = lists.fresh_grads()
    lrs = [torch.tensor(0.3 / n) for n in range(1, 4)]
    cpu_steps = lists.steps.cpu()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for lr in lrs:
            lists.launch(grads, lr)
            lists.launch([grad.clone() for grad in grads], lr)
        lists.steps = cpu_steps
        lists.launch(grads, lrs[0])
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_cuda
def test_a_scheduled_lr_compiles_nothing():
    device = torch.device("cuda")
    lists = Lists("rmsprop", [(5,), (BLOCK,)], device, (F32, F32))
    lists.step()
    compiled = [len(caches[0]) for caches in diag._diag_kernel.device_caches.values()]
    for n in range(1, 5):
        lists.step(lr=torch.tensor(0.3 / n))
    assert compiled == [len(caches[0]) for caches in diag._diag_kernel.device_caches.values()]


@needs_cuda
@pytest.mark.parametrize("case", ["rmsprop momentum", "adamw bias correction"])
@pytest.mark.parametrize("layout", ["contiguous", "gapped"])
def test_graph_replays_read_lr_steps_and_gradients(case, layout):
    """Gradients are born in the capture, as the standard recipe has it, so tables are too."""
    device = torch.device("cuda")
    lists = Lists(case, [(5,), (BLOCK + 3,)], device, (F32, F32), [layout] * 4)
    lr = torch.tensor(0.3, device=device)
    sources = lists.fresh_grads()
    lists.step(sources, lr)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        lists.launch([source * 1.0 for source in sources], lr)
        if lists.steps is not None:
            lists.steps += 1
    tables._plans.clear()
    for n in range(3):
        lr.fill_(0.3 / (n + 1))
        grads = lists.fresh_grads()
        for source, grad in zip(sources, grads, strict=True):
            source.copy_(grad)
        lists.specify(lists.eager, grads, lr)
        lists.specify(lists.truth, [grad.double() for grad in grads], lr)
        graph.replay()
    lists.check()


@needs_cuda
def test_streams_do_not_share_unfinished_tables():
    device = torch.device("cuda")
    lists = Lists("rmsprop momentum", [(100_000,)] * 50, device, (F32, F32))
    grads = lists.fresh_grads()
    lr = torch.tensor(0.3)
    tables._plans.clear()
    for stream in (torch.cuda.Stream(), torch.cuda.Stream(), torch.cuda.current_stream()):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(10_000_000)
            lists.launch(grads, lr)
        torch.cuda.current_stream().wait_stream(stream)
        lists.specify(lists.eager, grads, lr)
        lists.specify(lists.truth, [grad.double() for grad in grads], lr)
    lists.check()
