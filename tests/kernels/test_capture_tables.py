"""What launchers send to a device, on a stand-in that refuses under capture what CUDA refuses."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from helpers.operators import ADAMW, RMSPROP
from helpers.optimizers import SETTINGS, build, parameters, set_grads

import rootfree_fused.optimizer.base
from bench.host import as_on_cuda
from bench.machine_code.launches import SHAMPOO, matrix_tensors
from bench.machine_code.offline import Recorder
from rootfree_fused.kernels import (
    diag,
    lowbit,
    matrix,
    matrix_launches,
    packing,
    rootfree_shampoo,
    tables,
)

CUDA = torch.device("cuda")


class StandIn:
    """A device whose copies are CPU tensors; under capture only pinned memory may be copied."""

    def __init__(self, monkeypatch):
        self.capturing, self.stream, self.pinned, self.copies = False, 1, [], []
        self.to, table = torch.Tensor.to, tables.DeviceTable.__init__
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)
        monkeypatch.setattr(
            torch.cuda, "current_stream", lambda _: SimpleNamespace(cuda_stream=self.stream)
        )
        monkeypatch.setattr(rootfree_fused.optimizer.base, "is_capturing", lambda _: self.capturing)
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: self.pin(tensor))
        monkeypatch.setattr(
            torch.Tensor, "to", lambda *args, **options: self.send(*args, **options)
        )
        monkeypatch.setattr(
            tables.DeviceTable, "__init__", lambda own, host, _: table(own, host, CUDA)
        )

    def pin(self, tensor):
        self.pinned.append(tensor.clone())
        return self.pinned[-1]

    def send(self, tensor, *args, **options):
        if args[:1] != (CUDA,):
            return self.to(tensor, *args, **options)
        if self.capturing:
            assert any(tensor is other for other in self.pinned), "pageable memory under capture"
        self.copies.append(tensor.clone())
        return self.copies[-1]


@pytest.fixture
def stand_in(monkeypatch):
    modules = diag, lowbit, packing, matrix, rootfree_shampoo
    recorders = {(module, name) for module in modules for name in vars(module)}
    for module, name in recorders:
        if name.endswith("_kernel"):
            monkeypatch.setattr(module, name, Recorder())
    caches = tables.scalar_table, tables._chunk_table, matrix_launches._table_of
    for module in (tables, matrix, rootfree_shampoo):
        monkeypatch.setattr(module, "_plans", {})
    for cache in caches:
        cache.cache_clear()
    yield StandIn(monkeypatch)
    for cache in caches:
        cache.cache_clear()


def launcher(case):
    """A step of this kind on tensors of its own, for given gradients."""
    params, state, other = (parameters((8, 16), (8, 16), seed=seed) for seed in range(3))
    lr = torch.tensor(0.1)
    if case == "ifshampoo":
        tensors, settings = matrix_tensors([((8, 16), (True, True), 2)], torch.bfloat16)
        *state, buffers = tensors
        axes = settings.pop("axes")

        def step(grads):
            buckets = matrix.buckets_of(params, grads, *state, axes=axes, sizes=[(8, 16)])
            matrix.ifshampoo_(buckets, params, grads, buffers, lr, **settings)

        return step
    if case == "rootfree_shampoo":
        (factors, residuals, _, products, _), _ = matrix_tensors(
            [((8, 16), (True, True), 2)], torch.bfloat16
        )
        stacks = [factor.float() for factor in factors], factors, residuals, products
        lists = state, [torch.zeros(8) for _ in params], torch.ones(2), lr

        def step(grads):
            buckets = rootfree_shampoo.buckets_of(params, grads, *stacks, sizes=[(8, 16)])
            rootfree_shampoo.rootfree_shampoo_(buckets, params, grads, *lists, **SHAMPOO)

        return step
    if case == "vector_adam":
        settings = {"beta1": 0.9, "vector_beta2": 0.9, "vector_rms": 1.0, "weight_decay": 0.1}
        settings |= {"batch_size": 1.0, "maximize": False}
        lists = params, state, other, torch.ones(2)
        return lambda grads: diag.update_(
            "vector_adam_", lists[0], grads, *lists[1:], lr, **settings
        )
    if case == "adamw":
        return lambda grads: diag.update_("adamw_", params, grads, state, other, None, lr, **ADAMW)
    buffers = other if "momentum" in case else []
    return lambda grads: diag.update_("rmsprop_", params, grads, state, buffers, lr, **RMSPROP)


def assert_a_capture_keeps_what_it_reads(stand_in, run):
    """Every table that `run` sends comes from pinned memory; the graph's owner keeps both."""
    sent = len(stand_in.copies)
    stand_in.capturing = True
    with tables.captured_tables() as kept:
        run()
    copies = stand_in.copies[sent:]
    assert copies
    assert all(any(copy is tensor for tensor in kept) for copy in copies)
    pinned = [p for p in stand_in.pinned if any(p is tensor for tensor in kept)]
    assert len(pinned) == len(copies)


LAUNCHERS = ["rmsprop", "rmsprop momentum", "adamw", "vector_adam", "ifshampoo", "rootfree_shampoo"]


@pytest.mark.parametrize("case", LAUNCHERS)
def test_tables_of_gradients_made_under_capture_come_from_pinned_memory(case, stand_in):
    """They lie where no eager step has seen them."""
    run = launcher(case)
    grads, others = (parameters((8, 16), (8, 16), seed=seed) for seed in (3, 4))
    run(grads)
    assert_a_capture_keeps_what_it_reads(stand_in, lambda: run(others))


@pytest.mark.parametrize("case", LAUNCHERS)
def test_a_launcher_that_never_ran_is_captured_too(case, stand_in):
    """All of its tables, then, and not those of gradients alone."""
    run, grads = launcher(case), parameters((8, 16), (8, 16), seed=3)
    assert_a_capture_keeps_what_it_reads(stand_in, lambda: run(grads))


def test_numbers_of_the_host_come_from_pinned_memory(stand_in):
    """As found_inf of a scaler on the CPU does; what a capture reads is what it was then."""
    number = torch.tensor(3.0)
    read = []
    assert_a_capture_keeps_what_it_reads(
        stand_in, lambda: read.append(tables.readable(number, CUDA))
    )
    number.fill_(5.0)
    assert read == [torch.tensor(3.0)]


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("residual", [None, 8])
@pytest.mark.parametrize("name", [name for name in SETTINGS if name != "ifshampoo-axes"])
def test_a_whole_step_is_captured(name, residual, offset, stand_in):
    """With gradients made under capture, vectors and matrices; also such that start unaligned."""
    dtype = torch.bfloat16 if residual else torch.float32
    params = parameters((8, 16), (8, 16), (5,), (7, 3), dtype=dtype)
    settings = {"update_interval": 1} if name.endswith("-interval") else {}
    settings["param_residual"] = residual
    optimizer = build(name, params, capturable=True, lr=torch.tensor(0.1), **settings)
    for p in params:
        p.data = torch.cat([p.data.new_zeros(offset), p.data.flatten()])[offset:].view(p.shape)
    with as_on_cuda():
        seen = []  # kept, so that the next gradients lie elsewhere
        for t in range(3):
            set_grads(params, t)
            seen += [p.grad for p in params]
            optimizer.step()
        assert stand_in.copies
        set_grads(params, 3)
        assert_a_capture_keeps_what_it_reads(stand_in, optimizer.step)


@pytest.mark.parametrize("case", LAUNCHERS)
def test_two_streams_in_turn_send_every_table_once_each(case, stand_in):
    run, grads = launcher(case), parameters((8, 16), (8, 16), seed=3)
    run(grads)
    first = len(stand_in.copies)
    assert first
    for stand_in.stream in (2, 1, 2, 1):
        run(grads)
    assert len(stand_in.copies) == 2 * first
