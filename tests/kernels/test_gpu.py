"""What only a GPU can show of the optimizers: captures, launches, memory, offsets beyond 2^31."""

from __future__ import annotations

import io

import pytest
import torch
from helpers.comparison import assert_no_worse_than
from helpers.offline import needs_cuda
from helpers.optimizers import (
    SETTINGS,
    assert_identical,
    build,
    parameters,
    run,
    set_grads,
    snapshot,
)

from rootfree_fused import IFShampoo, RootFreeRMSprop, ops, reference

pytestmark = needs_cuda
CUDA = torch.device("cuda")
SHAPES = [(64, 48), (5,), (), (8, 3, 3, 3), (130, 65)]
MATRICES = [(256, 128)] * 3 + [(64, 64)] * 5 + [(7, 63)]


def optimizers_on_the_gpu():
    """Each setting, but those that the reference serves, an axis or a dtype at a time."""
    return [name for name in SETTINGS if name != "ifshampoo-axes"]


def test_kernels_serve_the_gpu():
    assert ops.backends()["cuda"].startswith("Triton")


@pytest.mark.parametrize("name", optimizers_on_the_gpu())
def test_two_runs_agree_to_the_bit(name):
    results = []
    for _ in range(2):
        params = parameters(*SHAPES, device=CUDA)
        optimizer = build(name, params)
        for t in range(5):
            set_grads(params, t)
            optimizer.step()
        results.append(snapshot(optimizer, params))
    assert_identical(*results)


@pytest.mark.parametrize("name", optimizers_on_the_gpu())
def test_steps_do_not_synchronize(name):
    params = parameters(*SHAPES, device=CUDA)
    optimizer = build(name, params)
    for t in range(4):  # update_interval 3: both kinds of step have been compiled
        set_grads(params, t)
        optimizer.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for t in range(4):
            optimizer.param_groups[0]["lr"] = 0.01 / (t + 1)
            for p in params:
                p.grad = p.grad.clone()
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ["rmsprop-momentum", "adamw-corrected", "ifshampoo"])
def test_scaled_steps_do_not_synchronize(name):
    """As torch.amp.GradScaler calls them; an update_interval has the host read the counts."""
    params = parameters(*SHAPES, device=CUDA)
    optimizer = build(name, params, amp_scaling=True)
    optimizer.grad_scale = torch.tensor([1024.0], device=CUDA)
    optimizer.found_inf = torch.zeros((), device=CUDA)
    for t in range(3):
        set_grads(params, t)
        optimizer.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for value in (1.0, 0.0):
            before = snapshot(optimizer, params)
            optimizer.found_inf.fill_(value)
            optimizer.step()
            after = snapshot(optimizer, params)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert optimizer.state[params[0]]["step"] == 4
    assert not any(map(torch.equal, before[: len(params)], after))


@pytest.mark.parametrize("name", optimizers_on_the_gpu())
def test_a_captured_step_replays_with_a_scheduled_lr(name):
    """The twin takes the same steps without a graph; IFShampoo is captured on an update step."""
    overrides = {"capturable": True}
    if name.endswith("-interval"):
        overrides["update_interval"] = 1
    twins = []
    for _ in range(2):
        params = parameters(*SHAPES, device=CUDA)
        lr = torch.tensor(0.05, device=CUDA)
        optimizer = build(name, params, lr=lr, **overrides)
        for p in params:
            p.grad = torch.zeros_like(p)
        twins.append((params, lr, optimizer))

    def new_gradients(params, t):
        generator = torch.Generator().manual_seed(t)
        for p in params:
            p.grad.copy_(0.1 * torch.randn(p.shape, generator=generator))

    graph = torch.cuda.CUDAGraph()
    for captured, (params, lr, optimizer) in zip((True, False), twins, strict=True):
        for t in range(3):
            new_gradients(params, t)
            optimizer.step()
        if captured:
            torch.cuda.synchronize()
            with torch.cuda.graph(graph):
                optimizer.step()
        for t in range(3, 6):
            lr.fill_(0.05 / t)
            new_gradients(params, t)
            graph.replay() if captured else optimizer.step()
    (params, _, optimizer), (others, _, twin) = twins
    assert_identical(snapshot(optimizer, params), snapshot(twin, others))


@pytest.mark.parametrize("name", SETTINGS)
def test_a_checkpoint_of_the_cpu_goes_on_here_and_back(name):
    """Every bit of it, and the step count stays on the host unless it is capturable."""
    params, twins = parameters(*SHAPES), parameters(*SHAPES, device=CUDA)
    optimizer, resumed = build(name, params), build(name, twins)
    run(optimizer, params, 2)
    resumed.load_state_dict(optimizer.state_dict())
    run(resumed, twins, 2, first=2)
    assert all(resumed.state[p]["step"].device.type == "cpu" for p in twins)

    file = io.BytesIO()
    torch.save(resumed.state_dict(), file)
    file.seek(0)
    optimizer.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    for p, q in zip(params, twins, strict=True):
        for key, value in resumed.state[q].items():
            assert optimizer.state[p][key].device.type == "cpu"
            assert torch.equal(optimizer.state[p][key], value.cpu())
    run(optimizer, params, 1, first=4)


def launched_kernels(run):
    """The names of the kernels that a call launches, by the profiler, of all that has started."""
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        run()
        torch.cuda.synchronize()
    kernels = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return [e.name for e in kernels if not e.name.startswith(("Memcpy", "Memset"))]


@pytest.mark.parametrize("count", [1, 40])
def test_a_diagonal_step_is_one_launch(count):
    params = parameters(*SHAPES * count, device=CUDA)
    optimizer = build("rmsprop-momentum", params)
    for t in range(2):
        set_grads(params, t)
        optimizer.step()
    assert launched_kernels(optimizer.step) == ["_diag_kernel"]


@pytest.mark.parametrize("count", [1, 4])
def test_a_step_of_matrices_and_vectors_is_at_most_nine_launches(count):
    params = parameters(*[*MATRICES, (9,), (17,)] * count, device=CUDA)
    optimizer = build("ifshampoo", params, update_interval=2)
    set_grads(params, 0)
    for _ in range(4):
        optimizer.step()
    numbers = [len(launched_kernels(optimizer.step)) for _ in range(2)]
    assert max(numbers) <= 9
    assert min(numbers) <= 4


def peak_bytes(run):
    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return torch.cuda.max_memory_allocated() - before


def test_a_diagonal_step_allocates_no_more_than_its_tables():
    params = parameters(*[(1 << 20,)] * 20, device=CUDA)
    optimizer = build("rmsprop-momentum", params)
    set_grads(params, 0)
    assert peak_bytes(optimizer.step) <= 1 << 20


def test_the_scratch_of_a_matrix_step_is_what_the_design_says():
    """10 bytes a parameter of a square bfloat16 weight at an update; see kernels/matrix.py."""
    params = parameters(*[(1024, 1024)] * 4, device=CUDA)
    optimizer = build("ifshampoo", params)
    set_grads(params, 0)
    assert peak_bytes(optimizer.step) <= 10.5 * sum(p.numel() for p in params)


# Offsets ---------------------------------------------------------------------------------------


def test_more_than_2_to_the_31_elements():
    """Windows at the start, around 2^31 and at the end; every element has its own gradient."""
    n = 2**31 + 2**20 + 3
    if torch.cuda.get_device_properties(CUDA).total_memory < 40e9:
        pytest.skip("needs 40 GB")
    param = torch.zeros(n, device=CUDA, dtype=torch.bfloat16)
    pattern = torch.randn(2**20 + 7, device=CUDA, dtype=torch.bfloat16)
    param.grad = pattern.repeat(-(-n // len(pattern)))[:n]
    settings = {"lr": 0.1, "alpha": 0.99, "damping": 0.1, "momentum": 0.0, "batch_size": 1}
    optimizer = RootFreeRMSprop([param], **settings, initial_square_avg=1.0)
    optimizer.step()
    for start in (0, 2**31 - 1000, n - 1000):
        window = slice(start, start + 1000)
        grad = param.grad[window]
        expected = [
            (torch.zeros(1000, device=CUDA, dtype=p), torch.ones(1000, device=CUDA, dtype=s))
            for p, s in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64))
        ]
        for p, s in expected:
            g = grad.double() if p.dtype == torch.float64 else grad
            reference.rmsprop_(
                p,
                g,
                s,
                None,
                lr=0.1,
                alpha=0.99,
                damping=0.1,
                weight_decay=0.0,
                momentum=0.0,
                batch_size=1.0,
                decoupled=True,
                maximize=False,
            )
        (eager, _), (truth, _) = expected
        assert_no_worse_than(param.detach()[window], eager, truth)


def test_a_matrix_whose_last_row_lies_beyond_2_to_the_31():
    """70,000 rows of 32,768: the parameter is read and written by 64-bit offsets."""
    rows, columns = 70_000, 32_768
    if torch.cuda.get_device_properties(CUDA).total_memory < 60e9:
        pytest.skip("needs 60 GB")
    param = torch.zeros(rows, columns, device=CUDA, dtype=torch.bfloat16)
    param.grad = torch.zeros_like(param)
    param.grad[-1] = 1
    optimizer = IFShampoo(
        [param],
        lr=1.0,
        momentum=0.0,
        batch_size=1,
        damping=0.1,
        structures="diagonal",
        initial_square_avg=1.0,
        factor_dtype=torch.bfloat16,
    )
    optimizer.step()
    moved = param.detach().abs()
    assert (moved[-1] > 0).all()
    assert moved[:-1].max() == 0
