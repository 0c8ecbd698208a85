"""What each of four ranks does with micro-batches, beside one process that has them all."""

from __future__ import annotations

import copy

import torch
import torch.distributed as dist
from helpers.rank_cases import (
    F64,
    LAYOUTS,
    backward,
    everything,
    far,
    full,
    mesh,
    optimizer_of,
    take_gradients,
    takes_part,
    whole,
)
from torch.nn.parallel import DistributedDataParallel

MICRO_BATCHES = 3


def shards_follow_the_whole_model(name, layout, changes, dtype=F64):
    """A micro-batch is what one backward of all ranks averages; the largest error."""
    if not takes_part(layout):
        return 0.0
    plain, spread = whole(dtype), LAYOUTS[layout](whole(dtype))
    if layout == "FSDP2, one frozen":
        plain[0].weight.requires_grad_(False)
    plain_optimizer, optimizer = (optimizer_of(name, m, **changes) for m in (plain, spread))
    for step in range(3):
        for micro in range(MICRO_BATCHES):
            backward(spread, MICRO_BATCHES * step + micro, dtype)
            take_gradients(plain, spread)
            optimizer.accumulate()
            plain_optimizer.accumulate()
        assert all(p.grad is None for p in spread.parameters())
        optimizer.step()
        plain_optimizer.step()
    return far(everything(spread, optimizer), everything(plain, plain_optimizer))


def _input(step, micro, rank):
    torch.manual_seed(100 * step + 10 * micro + rank)
    return torch.randn(4, 6, dtype=F64)


def replicas_follow_one_process(name, changes, no_sync, terms):
    """DistributedDataParallel, where each backward is reduced or, with no_sync, none is.

    Sums of four ranks are rounded otherwise than those of one process.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    model, plain = whole(), whole()
    parallel = DistributedDataParallel(model)
    optimizer, plain_optimizer = (optimizer_of(name, m, **changes) for m in (model, plain))
    for step in range(3):
        for micro in range(2):
            if no_sync:
                with parallel.no_sync():
                    parallel(_input(step, micro, rank)).square().mean().backward()
                optimizer.accumulate(1 + rank + micro if terms else None)
                for other in range(world):
                    plain(_input(step, micro, other)).square().mean().backward()
                    plain_optimizer.accumulate(1 + other + micro if terms else None)
            else:
                parallel(_input(step, micro, rank)).square().mean().backward()
                optimizer.accumulate()
                for other in range(world):
                    (plain(_input(step, micro, other)).square().mean() / world).backward()
                plain_optimizer.accumulate()
        if no_sync:
            optimizer.reduce_accumulated()
        optimizer.step()
        plain_optimizer.step()
    return far(everything(model, optimizer), everything(plain, plain_optimizer))


def hooks_of_replicas():
    """What a step says after a backward that was reduced; without, how far from one process."""
    rank, world = dist.get_rank(), dist.get_world_size()
    model, plain = whole(), whole()
    parallel = DistributedDataParallel(model)
    optimizer, plain_optimizer = (optimizer_of("adamw", m) for m in (model, plain))
    optimizer.accumulate_in_backward()
    parallel(_input(0, 0, rank)).square().mean().backward()
    try:
        optimizer.step()
    except RuntimeError as error:
        said = str(error)
    optimizer.zero_grad()
    for micro in range(2):
        with parallel.no_sync():
            parallel(_input(0, micro, rank)).square().mean().backward()
        for other in range(world):
            plain(_input(0, micro, other)).square().mean().backward()
            plain_optimizer.accumulate()
    optimizer.reduce_accumulated()
    optimizer.step()
    plain_optimizer.step()
    return said, far(everything(model, optimizer), everything(plain, plain_optimizer))


def two_ranks_are_two_micro_batches(name, changes):
    """Sums of two numbers, which no order rounds otherwise; the largest error."""
    group, rank = mesh(2).get_group() if dist.get_rank() < 2 else None, dist.get_rank()
    if group is None:
        return 0.0
    model, plain = whole(), whole()
    optimizer, plain_optimizer = (optimizer_of(name, m, **changes) for m in (model, plain))
    for step in range(3):
        model(_input(step, 0, rank)).square().mean().backward()
        optimizer.accumulate()
        optimizer.reduce_accumulated(group)
        optimizer.step()
        for other in range(2):
            plain(_input(step, 0, other)).square().mean().backward()
            plain_optimizer.accumulate()
        plain_optimizer.step()
    return far(everything(model, optimizer), everything(plain, plain_optimizer))


def ranks_without_some_gradients(changes):
    """Experts that a rank did not choose, and a rank without any micro-batch."""
    rank, world = dist.get_rank(), dist.get_world_size()
    model, plain = whole(), whole()
    optimizer, plain_optimizer = (optimizer_of("adamw", m, **changes) for m in (model, plain))
    names = [name for name, _ in model.named_parameters()]

    def left_out(m, of):
        for name, p in m.named_parameters():
            if name == names[of]:
                p.grad = None

    for step in range(2):
        if rank:
            model(_input(step, 0, rank)).square().mean().backward()
            left_out(model, rank)
            optimizer.accumulate()
        for other in range(1, world):
            plain(_input(step, 0, other)).square().mean().backward()
            left_out(plain, other)
            plain_optimizer.accumulate()
        optimizer.reduce_accumulated()
        optimizer.step()
        plain_optimizer.step()
    return far(everything(model, optimizer), everything(plain, plain_optimizer))


def different_things_are_told(case):
    """What each rank is told, and whether all its gradients are still there."""
    rank = dist.get_rank()
    model = whole()
    optimizer = optimizer_of("rmsprop", model, second_moment="batch")
    if case == "a parameter more" and rank == 1:
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2, dtype=F64))]})
    if case == "squares on one" and rank == 2:
        optimizer.param_groups[0]["second_moment"] = "micro"
    backward(model, rank)
    optimizer.accumulate(4 if case == "terms on one" and rank == 3 else None)
    if case == "another kind on one" and rank == 1:
        optimizer.param_groups[0]["second_moment"] = "micro"
    before = [p.detach().clone() for p in model.parameters()]
    try:
        optimizer.reduce_accumulated()
    except (RuntimeError, ValueError) as error:
        moved = [not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True)]
        own = copy.deepcopy(before)  # what this rank would have stepped alone
        assert optimizer._accumulated.count == 1
        assert len(own) == len(moved)
        return str(error), any(moved)
    return "nothing", False


def what_follows_a_sum_over_ranks():
    """What is said of a micro-batch, of another sum, and of one whose gradients hooks take."""
    model, said = whole(), []
    optimizer = optimizer_of("adamw", model)

    def note(call):
        try:
            call()
            said.append("nothing")
        except RuntimeError as error:
            said.append(str(error))

    backward(model, 0)
    optimizer.accumulate()
    optimizer.reduce_accumulated()
    note(optimizer.reduce_accumulated)
    backward(model, 1)
    note(optimizer.accumulate)
    optimizer.zero_grad()
    optimizer.accumulate_in_backward()
    backward(model, 0)
    optimizer.reduce_accumulated()
    note(lambda: backward(model, 1))
    optimizer.zero_grad()
    backward(model, 0)
    note(optimizer.reduce_accumulated)
    return said


def shards_are_not_reduced():
    spread = LAYOUTS["FSDP2 of 4"](whole())
    optimizer = optimizer_of("adamw", spread)
    backward(spread, 0)
    optimizer.accumulate()
    try:
        optimizer.reduce_accumulated()
    except TypeError as error:
        optimizer.step()
        return str(error), [bool(full(p.detach()).isfinite().all()) for p in spread.parameters()]
    return "nothing", []
