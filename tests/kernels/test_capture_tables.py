"""What launchers send to a device under capture, on a stand-in that refuses what CUDA refuses."""

from __future__ import annotations

import pytest
import torch
from helpers.operators import ADAMW, RMSPROP
from helpers.optimizers import parameters

from bench.machine_code.launches import SHAMPOO, matrix_tensors
from bench.machine_code.offline import Recorder
from rootfree_fused.kernels import diag, matrix, matrix_launches, rootfree_shampoo, tables

CUDA = torch.device("cuda")


class StandIn:
    """A device whose copies are CPU tensors; under capture only pinned memory may be copied."""

    def __init__(self, monkeypatch):
        self.capturing, self.pinned, self.copies = False, [], []
        self.to, table = torch.Tensor.to, tables.DeviceTable.__init__
        stream = type("Stream", (), {"cuda_stream": 1})
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _: stream)
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
    recorders = {
        (module, name) for module in (diag, matrix, rootfree_shampoo) for name in vars(module)
    }
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
            buckets = matrix.buckets_of(params, grads, *state, axes=axes)
            matrix.ifshampoo_(buckets, params, grads, buffers, lr, **settings)

        return step
    if case == "rootfree_shampoo":
        (factors, residuals, _, products, _), _ = matrix_tensors(
            [((8, 16), (True, True), 2)], torch.bfloat16
        )
        stacks = [factor.float() for factor in factors], factors, residuals, products
        lists = state, [torch.zeros(8) for _ in params], torch.ones(2), lr

        def step(grads):
            buckets = rootfree_shampoo.buckets_of(params, grads, *stacks)
            rootfree_shampoo.rootfree_shampoo_(buckets, params, grads, *lists, **SHAMPOO)

        return step
    if case == "adamw":
        return lambda grads: diag.update_("adamw_", params, grads, state, other, None, lr, **ADAMW)
    buffers = other if "momentum" in case else []
    return lambda grads: diag.update_("rmsprop_", params, grads, state, buffers, lr, **RMSPROP)


@pytest.mark.parametrize(
    "case", ["rmsprop", "rmsprop momentum", "adamw", "ifshampoo", "rootfree_shampoo"]
)
def test_tables_of_gradients_made_under_capture_come_from_pinned_memory(case, stand_in):
    """They lie where no eager step has seen them; the graph's owner keeps all that it reads."""
    run = launcher(case)
    grads, others = (parameters((8, 16), (8, 16), seed=seed) for seed in (3, 4))
    run(grads)
    sent = len(stand_in.copies)
    stand_in.capturing = True
    with tables.captured_tables() as kept:
        run(others)
    assert len(stand_in.copies) > sent
    assert all(any(copy is tensor for tensor in kept) for copy in stand_in.copies[sent:])
    pinned = [p for p in stand_in.pinned if any(p is tensor for tensor in kept)]
    assert len(pinned) == len(stand_in.copies) - sent
