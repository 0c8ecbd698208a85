"""What each of four ranks does where one of them does otherwise, and how the others hear of it."""

from __future__ import annotations

import gc
import os
import weakref

import torch
import torch.distributed as dist
from helpers.rank_cases import (
    F64,
    LAYOUTS,
    backward,
    far,
    full,
    laid_out,
    mesh,
    optimizer_of,
    whole,
)
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor

from rootfree_fused.optimizer import sharing
from rootfree_fused.optimizer.shards import local


def disagrees(name, case):
    """What a rank raises where another steps on other things; nothing moves on any."""
    model = LAYOUTS["FSDP2 of 4"](whole())
    changes = {"factor_dtype": F64}
    optimizer = optimizer_of(name, model, **changes)
    rank = dist.get_rank()
    if case == "another order" and rank == 2:
        optimizer.param_groups[0]["params"].reverse()
    elif case != "another order":
        backward(model, 0)
        optimizer.step()
        optimizer.zero_grad()
    backward(model, 1)
    first = next(model.parameters())
    if (case == "no gradient on one" and rank == 2) or case == "no gradient on all":
        first.grad = None
    elif case == "another lr" and rank == 1:
        optimizer.param_groups[0]["lr"] = 0.125
    elif case == "a setting out of range" and rank == 1:
        optimizer.param_groups[0]["damping"] = -1.0
    elif case == "a plain gradient" and rank == 3:
        # As wrappers do it that know nothing of DTensors.
        grad = torch.zeros(first.shape, dtype=F64)
        first.grad = None
        torch.Tensor.grad.__set__(first, grad)
    elif case == "a tensor lr" and rank == 1:
        optimizer.param_groups[0]["lr"] = torch.tensor(0.25)
    elif case == "another type" and rank == 1:
        optimizer.param_groups[0]["update_interval"] = "often"
    elif case == "state anew on one" and rank == 0:
        optimizer.state.clear()
    elif case == "a matrix anew on one" and rank == 3:
        optimizer.state.pop(first)
    elif case == "state anew on all":
        optimizer.state.clear()
    elif case == "no such structure" and rank == 1:
        optimizer.param_groups[0]["structures"] = "foo"
    elif case == "one trains no more" and rank == 1:
        first.requires_grad_(False)
        first.grad = None
    elif case == "a group more" and rank == 3:
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2, dtype=F64))]})
    elif case == "sums of parts":
        for p in model.parameters():
            parts = [Partial()] * len(p.placements)
            p.grad = DTensor.from_local(torch.ones_like(full(p)), p.device_mesh, parts)
        if rank == 2:
            optimizer.param_groups[0]["lr"] = -1.0
    elif case == "a lost state" and rank == 3:
        key = next(k for k in optimizer.state[first] if k != "step")
        del optimizer.state[first][key]
    before = [p.detach().to_local().clone() for p in model.parameters()]
    kept = [v.clone() for s in dict.values(optimizer.state) for v in s.values()]
    try:
        optimizer.step()
    except (RuntimeError, TypeError, ValueError) as error:
        after = [p.detach().to_local() for p in model.parameters()]
        states = [v for s in optimizer.state.values() for v in s.values()]
        assert all(map(torch.equal, after, before))
        assert "anew" in case or all(map(torch.equal, map(local, states), map(local, kept)))
        return f"{type(error).__name__}: {error}"
    after = [p.detach().to_local() for p in model.parameters()]
    return [torch.equal(a, b) for a, b in zip(after, before, strict=True)]


def saves_on_one_rank(stepped):
    """What it raises there, and whether all of them save afterwards."""
    model = LAYOUTS["FSDP2 of 4"](whole())
    optimizer = optimizer_of("shampoo", model)
    if stepped:
        backward(model, 0)
        optimizer.step()
    kept, sharing.PATIENCE = sharing.PATIENCE, 0.5
    said = ""
    dist.barrier()
    try:
        if dist.get_rank() == 0:
            optimizer.state_dict()
    except RuntimeError as error:
        said = str(error)
    finally:
        sharing.PATIENCE = kept
    dist.barrier()
    assert len(optimizer.state_dict()["state"]) == 6
    return said


def is_killed(rank):
    """A rank ends in the midst of a step; the others raise in time."""
    model = LAYOUTS["FSDP2 of 4"](whole())
    optimizer = optimizer_of("ifshampoo", model, factor_dtype=F64)
    for seed in range(3):
        optimizer.zero_grad()
        backward(model, seed)
        if seed == 2 and dist.get_rank() == rank:
            os._exit(1)
        try:
            optimizer.step()
        except RuntimeError as error:
            return str(error)
    return "no error"


def a_fault_is_told_over_two_meshes(name):
    """Ranks in rows share one matrix and those in columns another; the first has a bad lr."""
    torch.manual_seed(0)
    start = torch.randn(4, 3, dtype=F64)
    params = [
        torch.nn.Parameter(distribute_tensor(start, mesh(2, 2)[axis], [Shard(0)]))
        for axis in ("outer", "inner")
    ]
    optimizer = optimizer_of(name, torch.nn.ParameterList(params), factor_dtype=F64)
    said = []
    for step in range(3):
        for p in params:
            p.grad = laid_out(torch.ones(4, 3, dtype=F64), p)
        before = [p.detach().to_local().clone() for p in params]
        lr = optimizer.param_groups[0]["lr"]
        if step == 1 and dist.get_rank() == 0:
            optimizer.param_groups[0]["lr"] = -1.0
        try:
            optimizer.step()
        except (RuntimeError, ValueError) as error:
            said.append(str(error))
            after = [p.detach().to_local() for p in params]
            assert all(map(torch.equal, after, before))
        optimizer.param_groups[0]["lr"] = lr
    return said


def moves_to_another_group(name):
    """The largest error where a matrix goes to a group of its own, and one more comes."""
    torch.manual_seed(0)
    starts = [torch.randn(4, 3, dtype=F64) for _ in range(4)]
    models = [
        [torch.nn.Parameter(value.clone()) for value in starts],
        [
            torch.nn.Parameter(distribute_tensor(value, mesh(4), [Shard(0)], src_data_rank=None))
            for value in starts
        ],
    ]
    optimizers = [
        optimizer_of(name, torch.nn.ParameterList(m[:3]), factor_dtype=F64) for m in models
    ]
    for step in range(6):
        for m, optimizer in zip(models, optimizers, strict=True):
            if step == 2:
                moved = optimizer.param_groups[0]["params"].pop()
                optimizer.add_param_group({"params": [moved], "lr": 0.5, "weight_decay": 0.0})
            if step == 4:
                # Whoever reads the state decides nothing of what comes later.
                assert dist.get_rank() or len(optimizer.state) == 3
                optimizer.add_param_group({"params": [m[3]]})
        torch.manual_seed(step)
        for plain, spread in zip(*models, strict=True):
            plain.grad = torch.randn(4, 3, dtype=F64)
            spread.grad = laid_out(plain.grad, spread)
        for optimizer in optimizers:
            optimizer.step()
    return far([full(p.detach()) for p in models[1]], [p.detach() for p in models[0]])


def gradients_go(name):
    """Which gradients somebody keeps when the parameter has let them go."""
    torch.manual_seed(0)
    shapes = {"matrix": ((4, 3), 0), "vector": ((5,), 0), "experts": ((4, 3, 2), 1)}
    kept = []
    for what, (shape, batch_axes) in shapes.items():
        start = torch.randn(shape, dtype=F64)
        p = torch.nn.Parameter(distribute_tensor(start, mesh(4), [Shard(0)], src_data_rank=None))
        module = torch.nn.ParameterList([p])
        optimizer = optimizer_of(name, module, factor_dtype=F64, batch_axes=batch_axes)
        for _ in range(3):
            p.grad = laid_out(torch.randn(shape, dtype=F64), p)
            optimizer.step()
        grad = weakref.ref(p.grad.to_local().untyped_storage())
        p.grad = None
        gc.collect()
        kept += [what] if grad() is not None else []
    return kept
