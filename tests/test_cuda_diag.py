"""The CUDA C++ operators against the specification: on a GPU, and their threads run on the CPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")  # for what these tests share with those of the Triton kernels

import _bench  # noqa: F401 (which finds bench)
import _cuda
from _kernels_diag import CASES, Lists, place
from _offline import needs_cuda
from _operators import ADAMW, RMSPROP

from bench import cuda, diag, providers

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = [(F32, F32), (BF16, BF16), (BF16, F32), (F16, F16), (F16, F32)]
CHUNK = 1024
SHAPES = [(n,) for n in (0, 1, 31, 33, 1023, 1025, CHUNK, 2 * CHUNK + 4, 3 * CHUNK + 7)]
CAPACITY = 680  # rows of a launch


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("emulated")


@pytest.fixture(autouse=True)
def _kernels(request, monkeypatch, folder):
    """The operators of the test's device; a test without one needs a GPU."""
    of_test = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    kernels = _cuda.emulated(folder) if of_test.get("device") == "cpu" else _cuda.real()
    monkeypatch.setattr(Lists, "kernels", kernels)


def device_lr(value, device, dtype=F32):
    return torch.tensor(value, device=device, dtype=dtype)


# The update ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_steps_follow_the_specification(case, dtypes, device):
    lists = Lists(case, SHAPES, device, dtypes)
    for _ in range(3):
        lists.step()
    lists.check()


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("case", ["rmsprop", "adamw bias correction"])
@pytest.mark.parametrize("late", range(4))
def test_a_row_with_one_tensor_that_is_misaligned(late, case, dtypes, device):
    layouts = ["misaligned" if i == late else "contiguous" for i in range(4)]
    lists = Lists(case, [(5,), (CHUNK + 9,), (2 * CHUNK,)], device, dtypes, layouts)
    for _ in range(2):
        lists.step()
    lists.check()


@pytest.mark.parametrize("case", ["rmsprop momentum", "adamw bias correction"])
@pytest.mark.parametrize(
    ("shape", "layout"), [((37, 41), "transposed"), ((2, 5, 13, 17), "channels_last")]
)
def test_tensors_that_share_a_memory_order_go_straight_through(shape, layout, case, device):
    lists = Lists(case, [(5,) * len(shape), shape], device, (BF16, F32), [layout] * 4)
    for _ in range(2):
        lists.step()
    lists.check()


@pytest.mark.parametrize("count", [300, CAPACITY, CAPACITY + 1, 2500])
def test_many_tensors_take_several_launches(count, device):
    """Also a table that is full, and one with a single row."""
    sizes = torch.randint(0, 60, (count,))
    sizes[:: count // 7] += CHUNK
    lists = Lists("adamw bias correction", [(n,) for n in sizes.tolist()], device, (BF16, BF16))
    lists.step()
    lists.check()


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
    Lists.kernels.adamw_(merged[0], grads, merged[2], merged[1], counts, lr, **ADAMW)
    for lists, grad, count in zip(several, grads, counts, strict=True):
        lists.steps = count[None]
        lists.specify(lists.eager, [grad], lr)
        lists.specify(lists.truth, [grad.double()], lr)
        lists.check()


@pytest.mark.parametrize("betas", [(0.0, 0.5), (0.9, 0.99), (0.999, 0.9999), (0.9999, 0.0)])
def test_bias_correction_does_not_cancel(betas, device):
    """Twice the usual factor: each of the two corrections is rounded on its own."""
    counts = [1, 2, 3, 5, 10, 100, 690, 700, 1000, 6930, 7000, 10**5, 10**7]
    lists = Lists("adamw bias correction", [(64,)] * len(counts), device, (F32, F32))
    lists.scalars = {**ADAMW, "beta1": betas[0], "beta2": betas[1], "weight_decay": 0.0}
    lists.steps = torch.tensor(counts, device=device, dtype=F32)
    for params in (lists.actual[0], lists.eager[0], lists.truth[0]):
        for param in params:
            param.zero_()  # so that the parameter is the update
    lists.step()
    lists.check(one_by_one=True, factor=4.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", ["rmsprop", "adamw", "adamw bias correction"])
def test_lr_lives_on_the_device(case, dtype, device):
    lists = Lists(case, [(5,), (CHUNK + 1,)], device, (F32, F32))
    lr = device_lr(0.3, device, dtype)
    for factor in (1.0, 0.5, 0.0, 3.0):
        lr *= factor
        lists.step(lr=lr)
    lists.check()


def test_the_benchmarks_step_with_them_and_put_the_public_ones_back(device, monkeypatch):
    called = []

    def recorded(name):
        def run(*tensors, **scalars):
            called.append(name)
            getattr(Lists.kernels, name)(*tensors, **scalars)

        return run

    namespace = torch.ops.rootfree_fused
    public = namespace.rmsprop_, namespace.adamw_
    monkeypatch.setattr(namespace, "_rmsprop_cuda_", recorded("rmsprop_"), raising=False)
    monkeypatch.setattr(namespace, "_adamw_cuda_", recorded("adamw_"), raising=False)
    params = [torch.randn(n, device=device) / 10 for n in (300, 2)]
    for name in cuda.COMPARED:
        provider = providers.PROVIDERS[name]
        optimizer = diag.built(
            replace(provider, build=cuda.in_cuda_cpp(provider.build)), params, params
        )
        assert diag.check(provider, optimizer, params, params) <= diag.ALLOWED_ERROR
    assert called == ["rmsprop_"] * 2 + ["adamw_"] * 2
    assert public == (namespace.rmsprop_, namespace.adamw_)


# What the operators refuse -------------------------------------------------------------------


def assert_refused(lists, grads, match, lr=None):
    before = [t.clone() for tensors in lists.actual for t in tensors]
    with pytest.raises(RuntimeError, match=match):
        lists.launch(grads, torch.tensor(0.3) if lr is None else lr)
    after = [t for tensors in lists.actual for t in tensors]
    assert all(map(torch.equal, before, after))


@pytest.mark.parametrize(
    "layouts",
    [
        ["gapped"] * 4,
        ["contiguous", "transposed", "contiguous", "contiguous"],
        ["transposed", "transposed", "contiguous", "transposed"],
    ],
    ids=str,
)
def test_other_layouts_are_refused_before_anything_changes(layouts, device):
    lists = Lists("rmsprop momentum", [(7, 5), (6, 4)], device, (F32, F32), layouts)
    lists.actual[0][0], lists.actual[1][0] = (torch.ones(7, 5, device=device) for _ in range(2))
    lists.actual[2][0] = torch.ones(7, 5, device=device)
    grads = [torch.ones(7, 5, device=device), place(torch.ones(6, 4, device=device), layouts[1])[0]]
    assert_refused(lists, grads, r"params\[1\].*one memory order; copy them")


def test_what_does_not_fit_is_refused_before_anything_changes(device):
    def tensors(*shapes, dtype=F32):
        return [torch.ones(shape, device=device, dtype=dtype) for shape in shapes]

    lists = Lists("rmsprop", [(3,), (4,)], device, (F32, F32))
    assert_refused(lists, tensors((3,)), "differ in length")
    assert_refused(lists, tensors((3,), (5,)), r"params\[1\].*one shape")
    assert_refused(
        lists, tensors((3,), (4,), dtype=F16), r"no kernel for the dtypes of params\[0\]"
    )
    lists.actual[1][1] = lists.actual[1][1].double()
    assert_refused(lists, tensors((3,), (4,)), r"state of params\[1\] must be float32")
    lists = Lists("adamw bias correction", [(3,), (4,)], device, (F32, F32))
    lists.steps = lists.steps[:1]
    assert_refused(lists, tensors((3,), (4,)), "steps must be.*capturable=True")
    lists = Lists("rmsprop", [(3,)], device, (F32, F32))
    assert_refused(lists, tensors((3,)), "lr must be one", lr=device_lr(0.3, device, F16))


# Only on a GPU -------------------------------------------------------------------------------


@needs_cuda
def test_lr_on_the_cpu_goes_by_value():
    lists = Lists("rmsprop momentum", [(5,), (CHUNK + 1,)], torch.device("cuda"), (F32, F32))
    for value in (0.3, 0.1, 0.0):
        lists.step(lr=torch.tensor(value, dtype=torch.float64))
    lists.check()


@needs_cuda
def test_tensors_and_steps_on_another_device_are_refused():
    lists = Lists("adamw bias correction", [(3,), (4,)], torch.device("cuda"), (F32, F32))
    grads = lists.fresh_grads()
    assert_refused(lists, [grads[0], grads[1].cpu()], r"params\[1\].*CUDA device of params\[0\]")
    lists.steps = lists.steps.cpu()
    assert_refused(lists, grads, "steps must be.*capturable=True")


@needs_cuda
def test_no_synchronization():
    device = torch.device("cuda")
    lists = Lists("adamw bias correction", [(5,), (CHUNK,)], device, (F32, F32))
    grads = lists.fresh_grads()
    lrs = [torch.tensor(0.3), device_lr(0.3, device)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for lr in lrs:
            lists.launch(grads, lr)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_cuda
@pytest.mark.parametrize("case", ["rmsprop momentum", "adamw bias correction"])
@pytest.mark.parametrize("count", [2, 2 * CAPACITY + 1])
def test_graph_replays_read_lr_steps_and_gradients(count, case):
    device = torch.device("cuda")
    lists = Lists(case, [(5,), (CHUNK + 3,), *[(3,)] * (count - 2)], device, (F32, F32))
    lr = device_lr(0.3, device)
    grads = lists.fresh_grads()
    lists.step(grads, lr)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        lists.launch(grads, lr)
        if lists.steps is not None:
            lists.steps += 1
    for n in range(3):
        lr.fill_(0.3 / (n + 1))
        for grad, fresh in zip(grads, lists.fresh_grads(), strict=True):
            grad.copy_(fresh)
        lists.specify(lists.eager, grads, lr)
        lists.specify(lists.truth, [grad.double() for grad in grads], lr)
        graph.replay()
    lists.check()


@needs_cuda
def test_every_provider_of_the_benchmarks_is_right():
    params = [torch.randn(n, device="cuda") / 10 for n in (300, 2, CHUNK)]
    for provider in cuda.cuda_providers().values():
        optimizer = diag.built(provider, params, params)
        assert diag.check(provider, optimizer, params, params) <= diag.ALLOWED_ERROR


@needs_cuda
def test_work_goes_to_the_current_stream():
    device = torch.device("cuda")
    lists = Lists("rmsprop momentum", [(100_000,)] * 50, device, (F32, F32))
    grads, lr = lists.fresh_grads(), torch.tensor(0.3)
    late = [torch.zeros_like(grad) for grad in grads]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        torch._foreach_copy_(late, grads)
        lists.launch(late, lr)
    torch.cuda.current_stream().wait_stream(stream)
    lists.specify(lists.eager, grads, lr)
    lists.specify(lists.truth, [grad.double() for grad in grads], lr)
    lists.check()


@needs_cuda
def test_offsets_are_64_bits():
    """RMSProp on ones: s stays 1, so p moves by lr, at the last element too."""
    count = 2**31 + CHUNK + 3
    if torch.cuda.mem_get_info()[0] < 11 * count:
        pytest.skip("needs 24 GB of free GPU memory")
    param, grad = (torch.ones(count, device="cuda", dtype=BF16) for _ in range(2))
    square_avg = torch.ones(count, device="cuda")
    scalars = {**RMSPROP, "damping": 0.0, "weight_decay": 0.0, "batch_size": 1.0}
    Lists.kernels.rmsprop_([param], [grad], [square_avg], [], torch.tensor(0.5), **scalars)
    assert param.min() == param.max() == 0.5
